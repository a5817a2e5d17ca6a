"""Runs that stop themselves: by which rule, what they say, and that they go on afterwards."""

import json

import pytest

from slap_fast.config import override
from slap_fast.data.manifest import read_manifest
from slap_fast.data.open import open_source
from slap_fast.data.shards.writer import write_shards
from slap_fast.training.stop_rules import WINDOW, BadClipRule, RunStopped
from tests.helpers import runs
from tests.helpers.train_command import start, train, write_sounds

SIZE = 1_000_000


def message(seen, bad=()):
    """A rank's: ``bad`` as (index, shard, code)."""
    records = [{"shard": s, "code": code, "message": f"{s}: bad"} for _, s, code in bad]
    return {"seen": seen, "bad": records, "bad_indices": [index for index, _, _ in bad]}


def missing(indices):
    return [(index, "/x", "E_MISSING") for index in indices]


def rule_after(*messages, size=SIZE, max_bad_share=0.01):
    rule = BadClipRule(size, max_bad_share)
    for one in messages:
        rule.add([one])
    return rule


def test_a_bad_clip_counts_once_however_often_it_is_drawn():
    epochs = [message(35, missing([3, 8]))] * 100
    assert not rule_after(*epochs, size=35).problem()
    assert rule_after(*epochs, size=4).problem()
    assert not rule_after(*[message(500, missing([3]))] * 60, size=SIZE).problem()


@pytest.mark.parametrize(
    "size, bad, stops",
    [(35, 17, False), (35, 18, True), (36, 18, True), (1_000, 19, False), (1_000, 20, True),
     (3_000, 29, False), (3_000, 31, True), (1, 1, True), (2, 1, True), (3, 1, False)],
)  # fmt: skip
def test_a_share_is_judged_after_20_bad_clips_or_half_of_a_small_set(size, bad, stops):
    assert bool(rule_after(message(size, missing(range(bad))), size=size).problem()) == stops


@pytest.mark.parametrize("size", [1, 4, 30, 200])
def test_a_set_without_a_good_clip_stops_the_run_whatever_share_is_allowed(size):
    rule = rule_after(message(size, missing(range(size))), size=size, max_bad_share=1.0)
    assert f"{size} of {size} clips are bad ({size} E_MISSING), such as /x" in rule.problem()
    all_but_one = message(size, missing(range(size - 1)))
    assert not rule_after(all_but_one, size=size, max_bad_share=1.0).problem()


def test_the_share_is_that_of_the_last_clips():
    """A disk that fails after a long run is noticed at once, and an old failure forgotten."""
    good = [message(WINDOW)] * 4
    assert not rule_after(*good, message(500, missing(range(500)))).problem()
    failing = rule_after(*good, message(1_100, missing(range(1_100))))
    assert failing.problem().startswith("1100 of 51100 clips are bad (1100 E_MISSING)")
    for _ in range(3):
        failing.add([message(WINDOW)])
    assert not failing.problem()


def lost(*names, code="E_SHARD_MISSING"):
    return [(int(name), f"{name}.tar", code) for name in names]


def test_consecutive_failing_shards_mean_a_lost_disk():
    five = [message(2, lost(i, i)) for i in range(5)]

    def problem(*more):
        return rule_after(*five, *more, max_bad_share=1.0).problem()

    assert not problem()
    assert problem(message(1, lost(5))).startswith("6 shards in a row cannot be read, 0.tar to")
    assert not problem(message(1, lost(4)))
    assert not problem(message(1, lost(7, code="E_DECODE")))
    assert not problem(message(2, lost(5)))
    assert not problem(message(2, lost(5)), message(1, lost(6)))


@pytest.fixture
def sounds(tmp_path):
    """35 sounds and their manifest."""
    write_sounds(tmp_path, 35)
    return tmp_path


def hide(folder, numbers):
    for i in numbers:
        (folder / f"{i}.wav").rename(folder / f"{i}.hidden")


def bring_back(folder):
    for path in folder.glob("*.hidden"):
        path.rename(path.with_suffix(".wav"))


def test_two_missing_of_35_clips_train_to_the_end_and_are_named(sounds, capsys):
    hide(sounds, [4, 20])
    assert start(sounds, 20) == 0
    output = capsys.readouterr().out.replace("\n", " ")
    assert "2 clips were left out" in output and "4.wav" in output and "20.wav" in output


@pytest.mark.parametrize(
    "mend",
    [bring_back, lambda folder: (folder / "m.csv").write_text("path,caption\n34.wav,sound\n")],
    ids=["files", "manifest"],
)
def test_too_many_bad_clips_stop_the_run_which_goes_on_once_they_are_mended(sounds, capsys, mend):
    hide(sounds, range(30))
    assert start(sounds, 8) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("slap-fast: stopped: ") and "30 E_MISSING" not in error
    assert "E_MISSING" in error and "--resume" in error and "max_bad_share" in error
    assert train(sounds, "--resume") == 1
    mend(sounds)
    assert train(sounds, "--resume") == 0
    assert json.loads((sounds / "run" / "last" / "training.json").read_text())["step"] == 8


def test_all_files_missing_is_no_model_and_goes_on_once_they_are_back(sounds, capsys):
    hide(sounds, range(35))
    assert start(sounds, 2) == 1
    assert "of 35 clips could be trained on" not in capsys.readouterr().out
    assert not (sounds / "run" / "best").exists()
    bring_back(sounds)
    assert train(sounds, "--resume") == 0
    assert len(runs.loss_rows(sounds / "run")) == 2


def test_a_run_too_short_to_judge_by_trains_on_nothing_and_starts_again(sounds, capsys):
    hide(sounds, range(35))
    assert start(sounds, 1, "--set", "data.max_bad_share=1") == 1
    assert "none of 7 clips could be trained on" in capsys.readouterr().err
    bring_back(sounds)
    assert train(sounds, "--resume") == 0
    assert len(runs.loss_rows(sounds / "run")) == 1


def test_steps_that_are_not_finite_stop_the_run_which_goes_on_with_a_lower_lr(sounds, capsys):
    words = ["--set", "max_skipped_steps=2", "--set", "warmup_steps=0", "--set", "save_every=100"]
    assert start(sounds, 8, *words, "--set", "lr=1e30") == 1
    error = capsys.readouterr().err
    assert "is not finite, as in 3 steps in a row" in error and "--resume --set lr=" in error
    assert train(sounds, "--resume", "--set", "lr=1e-3") == 0
    assert len(runs.loss_rows(sounds / "run")) == 8


def test_validation_clips_that_are_gone_stop_the_run_which_goes_on_with_them(sounds, capsys):
    rows = [f"{i}.wav,sound {i},{'train' if i < 30 else 'val'}" for i in range(35)]
    (sounds / "m.csv").write_text("\n".join(["path,caption,split", *rows]) + "\n")
    hide(sounds, range(30, 35))
    assert start(sounds, 2) == 1
    assert "none of 5 validation clips could be read: 5 E_MISSING" in capsys.readouterr().err
    bring_back(sounds)
    assert train(sounds, "--resume") == 0
    assert (sounds / "run" / "best").exists()


def test_a_lost_disk_ends_the_run_which_resumes_when_it_is_back(tmp_path):
    """All but the trained clips are lost; the resumed run equals an uninterrupted one."""
    shards, gone = tmp_path / "set", tmp_path / "gone"
    write_sounds(tmp_path, 8)
    write_shards(read_manifest(tmp_path / "m.csv"), shards, shard_mb=0)
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

    with pytest.raises(RunStopped, match=r"8 shards in a row cannot be read, .*is the disk there"):
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
