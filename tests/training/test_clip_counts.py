"""Clip counts: added up over ranks, kept in a checkpoint, warnings counted at every draw."""

import json

import pytest
import soundfile

from slap_fast.config import override
from slap_fast.data.manifest import read_manifest
from slap_fast.data.sources.files import ManifestClips
from slap_fast.training.clip_counts import ClipCounts
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
    stored = json.loads(json.dumps(second.to_dict()))
    assert ClipCounts.from_dict(stored) == second and second.trained == 13
    of_version_2 = {**stored, "recent": [[15, 2], [0, 0]], "lost_shards": ["a.tar"]}
    assert ClipCounts.from_dict(of_version_2) == second


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
