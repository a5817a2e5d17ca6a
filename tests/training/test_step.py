"""A step: schedules, optimiser, accumulation over packs, ablations, learning one batch."""

import dataclasses
import math

import pytest
import torch

from slap_fast.config import LossConfig, override, slap_base
from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.data.loader import TrainSteps
from slap_fast.data.sources.builtin import BuiltinClips
from slap_fast.losses import self_distillation
from slap_fast.training.schedules import ema_momentum, learning_rate, teacher_temperature
from slap_fast.training.state import begin
from slap_fast.training.step import LOSSES, LossCounts, train_step
from tests.helpers import runs
from tests.helpers.memory import Peak
from tests.helpers.runs import SMALL


@pytest.fixture(scope="module")
def source():
    return BuiltinClips(SoundSet("train", 10, max_seconds=2.0))


def start(config=SMALL):
    return begin(config, None, None, runs.CPU)


def test_schedules():
    config = slap_base()
    assert learning_rate(config, 0) == pytest.approx(1e-4 / 2000)
    assert learning_rate(config, 1999) == pytest.approx(1e-4)
    middle = 2000 + (config.steps - 2000) // 2
    assert learning_rate(config, middle) == pytest.approx(0.5e-4, rel=1e-3)
    assert learning_rate(config, config.steps) == pytest.approx(0.0, abs=1e-12)
    assert ema_momentum(config, 0) == pytest.approx(0.994)
    assert ema_momentum(config, config.steps // 2) == pytest.approx(0.997)
    assert ema_momentum(config, config.steps) == pytest.approx(1.0)
    assert teacher_temperature(config, 0) == pytest.approx(0.04)
    assert teacher_temperature(config, config.steps) == pytest.approx(0.07)


def test_weight_decay_is_on_matrices_only():
    state, _ = start()
    decayed, free = state.optimizer.param_groups
    assert all(p.ndim >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.ndim < 2 for p in free["params"]) and free["weight_decay"] == 0.0
    assert decayed["fused"] and free["fused"]
    trained = sum(p.requires_grad for p in state.model.parameters())
    assert len(decayed["params"]) + len(free["params"]) == trained


def first_batches(source, state, tokenizer):
    return TrainSteps(source, tokenizer, state.config)[0].batches


def gradients(state, batches):
    """A step's metrics, and the gradients that its optimiser is given, in place of its step."""
    named, kept = dict(state.model.named_parameters()), {}

    def keep():
        kept.update({name: p.grad for name, p in named.items() if p.grad is not None})

    state.optimizer.step = keep
    return train_step(state, batches), kept


def test_a_gradient_is_clipped_to_the_largest_norm(source):
    by_largest = []
    for largest in (1e9, 0.01):
        state, tokenizer = start(override(SMALL, {"clip_grad_norm": largest}))
        by_largest.append(gradients(state, first_batches(source, state, tokenizer)))
    (_, unclipped), (_, short) = by_largest
    norm = float(torch.stack([grad.norm() for grad in unclipped.values()]).norm())
    assert norm > 1.0
    for metrics, _ in by_largest:
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    for name, grad in unclipped.items():
        torch.testing.assert_close(short[name], grad * (0.01 / norm), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("step, rate", [(0, 0.5e-2), (1, 1e-2), (4, 0.55e-2), (6, 1e-3)])
def test_a_step_uses_the_scheduled_learning_rate(source, step, rate):
    """AdamW's first step is the rate in the gradient's direction, whatever its size."""
    config = override(SMALL, {"lr": 1e-2, "lr_final": 1e-3, "weight_decay": 0.5})
    state, tokenizer = start(config)
    named, grads = dict(state.model.named_parameters()), {}
    before = {name: p.detach().clone() for name, p in named.items()}

    def keep(*_):
        grads.update({name: p.grad.clone() for name, p in named.items() if p.grad is not None})

    state.optimizer.register_step_pre_hook(keep)
    state.step = step
    train_step(state, first_batches(source, state, tokenizer))
    for name, grad in grads.items():
        decay = 0.5 if grad.ndim >= 2 else 0.0
        expected = before[name] * (1 - rate * decay) - rate * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(named[name].detach(), expected, rtol=0.0, atol=2e-6)


def test_no_activations_are_alive_beside_the_teachers(source, monkeypatch):
    state, tokenizer = start()
    (batch,) = TrainSteps(source, tokenizer, SMALL)[0].batches
    teacher, alive = state.teacher.forward, []

    def forward(*arguments):
        alive.append(seen.live)
        return teacher(*arguments)

    monkeypatch.setattr(state.teacher, "forward", forward)
    with Peak() as seen:
        train_step(state, [batch])
    assert alive == [0]


@pytest.mark.parametrize(
    "step, temperature, momentum", [(0, 0.04, 0.9), (2, 0.06, 0.925), (3, 0.07, 0.95)]
)
@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_a_step_uses_the_scheduled_temperatures_and_teacher_momentum(
    source, targets, step, temperature, momentum
):
    changes = {
        "loss.contrastive": 0.0,
        "loss.caption": 0.0,
        "model.ssl.targets": targets,
        "model.ssl.student_temperature": 0.2,
        "model.ssl.teacher_temperature_warmup": 0.5,
        "ema_momentum": 0.9,
        "lr": 1e-2,
    }
    state, tokenizer = start(override(SMALL, changes))
    (batch,) = first_batches(source, state, tokenizer)
    teacher, student = (
        [*part.audio_encoder.parameters(), *part.prototype_head.parameters()]
        for part in (state.teacher, state.model)
    )
    with torch.no_grad():
        state.teacher.center.normal_()
        for parameter in teacher:
            parameter += 0.1 * torch.randn_like(parameter)
        out, teacher_out = state.model(batch, state.config.loss), state.teacher(batch)
        scores = teacher_out[0] @ teacher_out[1].T
        center, before = state.teacher.center.clone(), [p.clone() for p in teacher]
        teacher_probs = ((scores - center) / temperature).softmax(1)
        if targets == "sinkhorn":
            teacher_probs = self_distillation.sinkhorn(*teacher_out, temperature, 3).probabilities()
        log_p = (out.student_features @ out.prototypes.T / 0.2).log_softmax(1)
    state.step = step
    loss = train_step(state, [batch])["ssl"]
    torch.testing.assert_close(loss, -(teacher_probs * log_p).sum(1).mean(), rtol=1e-5, atol=0.0)
    for old, new, other in zip(before, teacher, student, strict=True):
        expected = momentum * old + (1 - momentum) * other.detach()
        torch.testing.assert_close(new.detach(), expected, rtol=0.0, atol=1e-6)
    moved = 0.9 * center + 0.1 * scores.mean(0) if targets == "centering" else center
    torch.testing.assert_close(state.teacher.center, moved)


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
@pytest.mark.parametrize("student_pass", ["shared", "separate"])
def test_one_batch_can_be_overfitted(source, targets, student_pass):
    changes = {
        "model.ssl.targets": targets,
        "model.ssl.student_pass": student_pass,
        "steps": 60,
        "lr": 5e-3,
        "data.time_masks": 0,
        "data.freq_masks": 0,
    }
    config = override(SMALL, changes)
    state, tokenizer = start(config)
    batches = TrainSteps(source, tokenizer, config)[0].batches
    first = train_step(state, batches)
    for state.step in range(1, 60):
        last = train_step(state, batches)
    assert last["contrastive"] < 0.1 < first["contrastive"]
    assert last["caption"] < 0.5 < first["caption"]
    # The targets sharpen during training, so the divergence from them must fall.
    divergence = [float(m["ssl"] - m["target_entropy"] * math.log(32)) for m in (first, last)]
    assert divergence[1] < 0.8 * divergence[0]
    assert last["prototype_use"] > 0.2


def test_accumulating_a_batch_twice_equals_taking_it_once(source):
    state, tokenizer = start()
    batch = TrainSteps(source, tokenizer, SMALL)[0].batches[0]
    once = train_step(state, [batch])
    state, _ = start()
    twice = train_step(state, [batch, batch])
    for name, value in once.items():
        assert torch.allclose(value, twice[name], rtol=1e-4, atol=1e-6), name


def test_a_batch_split_by_the_token_budget_gives_the_same_step(source):
    """Of the caption loss: contrastive and Sinkhorn depend on which clips meet in a forward."""
    config = override(SMALL, {"loss.contrastive": 0.0, "loss.ssl": 0.0, "batch_size": 8})
    stepped = []
    for max_tokens in (65_536, 110):
        state, tokenizer = start(config)
        data = TrainSteps(source, tokenizer, dataclasses.replace(config, max_tokens=max_tokens))
        batches = data[0].batches
        stepped.append((len(batches), train_step(state, batches)))
    (one, unsplit), (several, split) = stepped
    assert one == 1 and several > 1
    for name in ("caption", "grad_norm"):
        assert torch.allclose(unsplit[name], split[name], rtol=1e-5), name


IN_PACKS = {
    "ssl": {
        "loss.contrastive": 0.0,
        "loss.caption": 0.0,
        "model.ssl.mask_clips": 0.5,
        "model.ssl.targets": "centering",
    },
    "caption": {"loss.contrastive": 0.0, "loss.ssl": 0.0},
    "weights": {
        "loss.contrastive": 0.25,
        "loss.ssl": 2.0,
        "loss.caption": 3.0,
        "grad_cache": True,
    },
}


@pytest.mark.parametrize("changes", IN_PACKS.values(), ids=IN_PACKS)
def test_the_gradient_of_uneven_packs_is_that_of_one(source, changes):
    """In fp64, but for what ModernBERT rounds to fp32."""
    results = []
    for max_tokens in (65_536, 60):
        sizes = {"batch_size": 9, "max_tokens": max_tokens, "clip_grad_norm": 1e9}
        state, tokenizer = start(override(SMALL, sizes | changes))
        state.model.double()
        if state.teacher is not None:
            state.teacher.double()
            torch.manual_seed(1)
            torch.nn.init.normal_(state.teacher.center)
        batches = [
            batch._replace(audio=batch.audio._replace(patches=batch.audio.patches.double()))
            for batch in first_batches(source, state, tokenizer)
        ]
        counts = [LossCounts.of(batch) for batch in batches]
        results.append(gradients(state, batches))
        if state.teacher is not None:
            results[-1][1]["centre"] = state.teacher.center
    assert len(set(counts)) == len(counts) > 2
    (one, unsplit), (several, split) = results
    for name in (*LOSSES, "grad_norm"):
        assert (name in one) == (name in several)
        if name in one:
            torch.testing.assert_close(several[name], one[name], rtol=1e-8, atol=0.0)
    assert unsplit.keys() == split.keys()
    for name, grad in unsplit.items():
        assert (split[name] - grad).norm() <= 1e-8 * one["grad_norm"], name


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
    state, tokenizer = start(config)
    before = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    metrics = train_step(state, TrainSteps(source, tokenizer, config)[0].batches)
    weights: LossConfig = config.loss
    for name in ("contrastive", "ssl", "caption"):
        assert (name in metrics) == (getattr(weights, name) > 0)
    moved = {n for n, p in state.model.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("caption_decoder") for n in moved) == (weights.caption > 0)
    assert any(n.startswith("prototype_head") for n in moved) == (weights.ssl > 0)
    assert ("logit_bias" in moved) == (weights.contrastive_kind == "sigmoid")
    assert (state.teacher is None) == (weights.ssl == 0)
