"""Clip counts: added up over ranks; a run stops where too many clips are lost."""

import json

import pytest
import soundfile

from slap_fast.config import override
from slap_fast.data.manifest import read_manifest
from slap_fast.data.open import open_source
from slap_fast.data.shards.writer import write_shards
from slap_fast.data.sources.files import ManifestClips
from slap_fast.training.clip_counts import WINDOW, ClipCounts
from tests.helpers import runs


def message(seen, bad=(), warned=None):
    return {"seen": seen, "bad": list(bad), "warned": warned or {}}


def lost(shard, code="E_SHARD_MISSING"):
    return {"shard": shard, "code": code}


def test_ranks_add_up_and_a_stored_count_is_the_same():
    first = ClipCounts().after(
        [message(4, [lost("a.tar")], {"W_SILENT": 1}), message(3, [lost("/x", "E_DECODE")])]
    )
    assert (first.seen, first.bad) == (7, {"E_SHARD_MISSING": 1, "E_DECODE": 1})
    second = first.after([message(4, warned={"W_SILENT": 2, "W_CROPPED": 1}), message(4)])
    assert (second.seen, second.bad.total(), first.seen) == (15, 2, 7)
    assert second.warned == {"W_SILENT": 3, "W_CROPPED": 1}
    assert ClipCounts.from_dict(json.loads(json.dumps(second.to_dict()))) == second


def test_the_share_is_that_of_the_last_clips():
    """A disk that fails after a long run is noticed at once, and an old failure forgotten."""
    bad = [lost("/x", "E_MISSING")]
    counts = ClipCounts()
    for _ in range(4):
        counts = counts.after([message(WINDOW)])
    assert counts.recent == [[0, 0], [WINDOW, 0]] and counts.seen == 4 * WINDOW
    assert not counts.after([message(500, 500 * bad)]).problem(0.01)
    failing = counts.after([message(600, 600 * bad)])
    assert failing.problem(0.01).startswith(
        "600 of the last 50600 clips are bad, more than data.max"
    )
    for _ in range(2):
        failing = failing.after([message(WINDOW)])
    assert not failing.problem(0.01) and failing.bad == {"E_MISSING": 600}


def test_consecutive_failing_shards_mean_a_lost_disk():
    counts = ClipCounts()
    for i in range(5):
        counts = counts.after([message(2, [lost(f"{i}.tar"), lost(f"{i}.tar")])])
        assert not counts.problem(1.0)
    sixth = counts.after([message(1, [lost("5.tar")])])
    assert sixth.problem(1.0).startswith("6 shards in a row cannot")
    assert not counts.after([message(1, [lost("4.tar")])]).problem(1.0)
    assert not counts.after([message(1, [lost("/x", "E_DECODE")])]).problem(1.0)
    one_was_read = counts.after([message(2, [lost("5.tar")])])
    assert one_was_read.lost_shards == [] and not one_was_read.problem(1.0)


@pytest.fixture
def manifest(tmp_path):
    """Eight sounds: one silent, one that is cropped."""
    rows = ["path,caption,end"]
    for i in range(8):
        wave = runs.clips().audio(i).waveform * (i != 3)
        soundfile.write(tmp_path / f"{i}.wav", wave, 16_000)
        rows.append(f"{i}.wav,sound {i},{0.4 if i == 5 else ''}")
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "m.csv"


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
@pytest.mark.parametrize("workers", [0, 2])
def test_warnings_are_counted_whenever_their_clip_is_drawn(manifest, tmp_path, cache_gb, workers):
    changes = {"steps": 6, "save_every": 4, "data.cache_gb": cache_gb}
    config = override(runs.TINY, changes)
    state = runs.start_or_resume(
        tmp_path / "run", config, ManifestClips(read_manifest(manifest)), workers=workers
    )
    assert (state.clip_counts.seen, state.clip_counts.bad) == (24, {})
    assert state.clip_counts.warned == {"W_SILENT": 3, "W_CROPPED": 3}
    saved = json.loads((tmp_path / "run" / "last" / "training.json").read_text())
    assert saved["clips"]["warned"] == {"W_SILENT": 3, "W_CROPPED": 3}
    assert (
        json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["warned"] == 6
    )


def test_a_lost_disk_ends_the_run_which_resumes_when_it_is_back(manifest, tmp_path):
    """All but the trained clips are lost; the resumed run equals an uninterrupted one."""
    shards, gone = tmp_path / "set", tmp_path / "gone"
    write_shards(read_manifest(manifest), shards, shard_mb=0)
    config = override(
        runs.TINY, {"steps": 4, "batch_size": 8, "save_every": 9, "data.cache_gb": 0.0}
    )
    source = open_source(shards, None, fallback="train")
    uninterrupted = runs.start_or_resume(tmp_path / "whole", config, source)

    class Leaving:
        """The folder of shards is moved away when the 17th clip is read."""

        read = 0

        def __len__(self):
            return len(source)

        def __getattr__(self, name):
            return getattr(source, name)

        def captions(self, index):
            Leaving.read += 1
            if Leaving.read == 17:
                source._last_clip = None
                gone.mkdir()
                for tar in shards.glob("*.tar"):
                    tar.rename(gone / tar.name)
            return source.captions(index)

    with pytest.raises(
        RuntimeError, match=r"8 shards in a row cannot be read, .*is the disk there"
    ):
        runs.start_or_resume(tmp_path / "run", config, Leaving())
    saved = json.loads((tmp_path / "run" / "last" / "training.json").read_text())
    assert (saved["step"], saved["clips"]["seen"]) == (2, 16)
    for tar in gone.iterdir():
        tar.rename(shards / tar.name)
    state = runs.start_or_resume(tmp_path / "run", source=source)
    assert runs.loss_rows(tmp_path / "run") == runs.loss_rows(tmp_path / "whole")
    assert (
        runs.same_weights(state, uninterrupted) and state.clip_counts == uninterrupted.clip_counts
    )
    assert (tmp_path / "run" / "bad_clips.jsonl").read_text() == ""
