"""The loop: exact resume, stops, losses that are not finite."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from slap_fast.config import override
from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.data.sources.builtin import BuiltinClips
from slap_fast.training import loop
from slap_fast.training.loop import train
from slap_fast.training.state import begin, restore
from slap_fast.training.stop_rules import RunStopped
from tests.helpers import runs
from tests.helpers.runs import SMALL


@pytest.fixture(scope="module")
def source():
    return BuiltinClips(SoundSet("train", 10, max_seconds=2.0))


def start(config=SMALL):
    return begin(config, None, None, runs.CPU)


def losses_of(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def run(state, tokenizer, source, out, **kwargs):
    return train(state, source, tokenizer, out, progress=False, **kwargs)


def test_a_resumed_run_has_the_losses_and_weights_of_one_that_never_stopped(source, tmp_path):
    state, tokenizer = start()
    assert run(state, tokenizer, source, tmp_path / "whole")

    half, tokenizer = start()
    part = tmp_path / "part"

    class Stop(Exception):
        pass

    def interrupted(item, *args):
        if half.step == 4:
            raise Stop
        return original(item, *args)

    original = loop.train_step
    loop.train_step = interrupted
    try:
        with pytest.raises(Stop):
            run(half, tokenizer, source, part)
    finally:
        loop.train_step = original
    again, tokenizer = begin(SMALL, None, part / "last", runs.CPU)
    restore(again, part / "last")
    assert again.step == 3
    assert run(again, tokenizer, source, part)
    resumed = dict(losses_of(part))
    assert resumed == dict(losses_of(tmp_path / "whole"))
    for a, b in ((again.model, state.model), (again.teacher, state.teacher)):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name
    assert again.clip_counts == state.clip_counts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_saves_and_stops(source, tmp_path, number):
    state, tokenizer = start()

    def evaluate(_):
        os.kill(os.getpid(), number)
        return {"score": 0.0}

    config = dataclasses.replace(SMALL, eval_every=2)
    state = dataclasses.replace(state, config=config)
    assert run(state, tokenizer, source, tmp_path, evaluate=evaluate) is False
    assert state.step == 2
    again, _ = begin(SMALL, None, tmp_path / "last", runs.CPU)
    restore(again, tmp_path / "last")
    assert again.step == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(source, tmp_path):
    changes = {"lr": 1e30, "warmup_steps": 0, "save_every": 1, "max_skipped_steps": 2}
    state, tokenizer = start(override(SMALL, changes))
    with pytest.raises(RunStopped, match="step 4: .* is not finite, as in 3 steps in a row"):
        run(state, tokenizer, source, tmp_path)
    saved = json.loads((tmp_path / "last" / "training.json").read_text())
    assert (saved["step"], saved["skipped"]) == (3, 2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 1, 2, 3]
