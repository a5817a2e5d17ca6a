"""The trainer: schedules, exact resume, overfitting one batch, ablations, stops."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch

from slap_fast import runstate
from slap_fast import train as training
from slap_fast.config import LossConfig, override, slap_base, slap_tiny
from slap_fast.data.clips import BuiltinClips, ManifestClips
from slap_fast.data.loader import TrainSteps
from slap_fast.data.manifest import read_manifest
from slap_fast.data.sounds import SoundSet

SMALL = override(
    slap_tiny(),
    {
        "model.audio.hidden_size": 32,
        "model.audio.num_heads": 2,
        "model.audio.intermediate_size": 48,
        "model.text.hidden_size": 32,
        "model.text.num_heads": 2,
        "model.text.num_layers": 2,
        "model.text.intermediate_size": 48,
        "model.caption.hidden_size": 32,
        "model.caption.num_heads": 2,
        "model.ssl.prototypes": 32,
        "model.ssl.mask_clips": 1.0,
        "steps": 6,
        "batch_size": 4,
        "warmup_steps": 2,
        "log_every": 1,
        "save_every": 3,
    },
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source():
    return BuiltinClips(SoundSet("train", 10, max_seconds=2.0))


def start(config=SMALL):
    return runstate.begin(config, None, None, CPU)


def losses_of(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def run(state, words, source, out, **kwargs):
    return training.train(state, source, words, out, progress=False, **kwargs)


def test_schedules():
    config = slap_base()
    assert training.learning_rate(config, 0) == pytest.approx(1e-4 / 2000)
    assert training.learning_rate(config, 1999) == pytest.approx(1e-4)
    middle = 2000 + (config.steps - 2000) // 2
    assert training.learning_rate(config, middle) == pytest.approx(0.5e-4, rel=1e-3)
    assert training.learning_rate(config, config.steps) == pytest.approx(0.0, abs=1e-12)
    assert training.ema_momentum(config, 0) == pytest.approx(0.994)
    assert training.ema_momentum(config, config.steps // 2) == pytest.approx(0.997)
    assert training.ema_momentum(config, config.steps) == pytest.approx(1.0)
    assert training.teacher_temperature(config, 0) == pytest.approx(0.04)
    assert training.teacher_temperature(config, config.steps) == pytest.approx(0.07)


def test_weight_decay_is_on_matrices_only():
    state, _ = start()
    decayed, free = state.optimizer.param_groups
    assert all(p.ndim >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.ndim < 2 for p in free["params"]) and free["weight_decay"] == 0.0
    trained = sum(p.requires_grad for p in state.model.parameters())
    assert len(decayed["params"]) + len(free["params"]) == trained


def test_a_resumed_run_has_the_losses_and_weights_of_one_that_never_stopped(source, tmp_path):
    state, words = start()
    assert run(state, words, source, tmp_path / "whole")

    half, words = start()
    part = tmp_path / "part"

    class Stop(Exception):
        pass

    def interrupted(item, *args):
        if half.step == 4:
            raise Stop
        return original(item, *args)

    original = training.train_step
    training.train_step = interrupted
    try:
        with pytest.raises(Stop):
            run(half, words, source, part)
    finally:
        training.train_step = original
    again, words = runstate.begin(SMALL, None, part / "last", CPU)
    runstate.restore(again, part / "last")
    assert again.step == 3
    assert run(again, words, source, part)
    resumed = dict(losses_of(part))
    assert resumed == dict(losses_of(tmp_path / "whole"))
    for a, b in ((again.model, state.model), (again.teacher, state.teacher)):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name
    assert again.tally == state.tally


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_saves_and_stops(source, tmp_path, number):
    state, words = start()

    def evaluate(_):
        os.kill(os.getpid(), number)
        return {"score": 0.0}

    config = dataclasses.replace(SMALL, eval_every=2)
    state = dataclasses.replace(state, config=config)
    assert run(state, words, source, tmp_path, evaluate=evaluate) is False
    assert state.step == 2
    again, _ = runstate.begin(SMALL, None, tmp_path / "last", CPU)
    runstate.restore(again, tmp_path / "last")
    assert again.step == 2


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
@pytest.mark.parametrize("student_pass", ["shared", "separate"])
def test_one_batch_can_be_learned_by_heart(source, targets, student_pass):
    changes = {
        "model.ssl.targets": targets,
        "model.ssl.student_pass": student_pass,
        "steps": 60,
        "lr": 5e-3,
        "data.time_masks": 0,
        "data.freq_masks": 0,
    }
    config = override(SMALL, changes)
    state, words = start(config)
    batches = TrainSteps(source, words, config)[0].batches
    first = training.train_step(state, batches)
    for state.step in range(1, 60):
        last = training.train_step(state, batches)
    assert last["contrastive"] < 0.1 < first["contrastive"]
    assert last["caption"] < 0.5 < first["caption"]
    # The targets sharpen as they go, so what must fall is the divergence from them.
    divergence = [float(m["ssl"] - m["target_entropy"] * math.log(32)) for m in (first, last)]
    assert divergence[1] < 0.8 * divergence[0]
    assert last["prototype_use"] > 0.2


def test_accumulating_a_batch_twice_equals_taking_it_once(source):
    state, words = start()
    batch = TrainSteps(source, words, SMALL)[0].batches[0]
    once = training.train_step(state, [batch])
    state, _ = start()
    twice = training.train_step(state, [batch, batch])
    for name, value in once.items():
        assert torch.allclose(value, twice[name], rtol=1e-4, atol=1e-6), name


def test_a_batch_split_by_the_token_budget_gives_the_same_step(source):
    """Of the caption loss: the others depend on which clips meet in a forward."""
    config = override(SMALL, {"loss.contrastive": 0.0, "loss.ssl": 0.0, "batch_size": 8})
    stepped = []
    for max_tokens in (65_536, 110):
        state, words = start(config)
        data = TrainSteps(source, words, dataclasses.replace(config, max_tokens=max_tokens))
        batches = data[0].batches
        stepped.append((len(batches), training.train_step(state, batches)))
    (one, whole), (several, split) = stepped
    assert one == 1 and several > 1
    for name in ("caption", "grad_norm"):
        assert torch.allclose(whole[name], split[name], rtol=1e-5), name


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.ssl": 0.0, "loss.caption": 0.0},
        {"loss.caption": 0.0},
        {"loss.ssl": 0.0},
        {"model.audio.global_every": 1},
        {"loss.contrastive_kind": "sigmoid"},
    ],
    ids=["contrastive", "+ssl", "+caption", "no local attention", "sigmoid"],
)
def test_ablations_train_only_what_they_name(source, changes):
    config = override(SMALL, changes)
    state, words = start(config)
    before = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    metrics = training.train_step(state, TrainSteps(source, words, config)[0].batches)
    weights: LossConfig = config.loss
    for name in ("contrastive", "ssl", "caption"):
        assert (name in metrics) == (getattr(weights, name) > 0)
    moved = {n for n, p in state.model.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("caption_decoder") for n in moved) == (weights.caption > 0)
    assert any(n.startswith("prototype_head") for n in moved) == (weights.ssl > 0)
    assert ("logit_bias" in moved) == (weights.contrastive_kind == "sigmoid")
    assert (state.teacher is None) == (weights.ssl == 0)


def test_too_many_bad_clips_stop_the_run_and_are_listed(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.wav").write_bytes(b"no audio")
    rows = "".join(f"{i}.wav,a sound\n" for i in range(4))
    (tmp_path / "m.csv").write_text(f"path,caption\n{rows}")
    bad = ManifestClips(read_manifest(tmp_path / "m.csv"))
    config = override(SMALL, {"steps": 100})
    state, words = start(config)
    with pytest.raises(RuntimeError, match="104 of the last 104 clips are bad, more than"):
        run(state, words, bad, tmp_path / "out")
    lines = (tmp_path / "out" / "bad_clips.jsonl").read_text().splitlines()
    assert len(lines) == 104 and json.loads(lines[0])["code"] == "E_FORMAT"
    saved = json.loads((tmp_path / "out" / "last" / "training.json").read_text())
    assert (saved["step"], saved["clips"]["bad"]) == (25, {"E_FORMAT": 100})


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(source, tmp_path):
    changes = {"lr": 1e30, "warmup_steps": 0, "save_every": 1, "max_skipped_steps": 2}
    state, words = start(override(SMALL, changes))
    with pytest.raises(RuntimeError, match="step 4: .* is not finite, as in 3 steps in a row"):
        run(state, words, source, tmp_path)
    saved = json.loads((tmp_path / "last" / "training.json").read_text())
    assert (saved["step"], saved["skipped"]) == (3, 2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 1, 2, 3]
