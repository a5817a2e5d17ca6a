"""The gradient cache: a step in several packs is the step of one, on one rank and on two."""

import weakref

import pytest
import torch
from torch import nn

from slap_fast.config import override
from slap_fast.data.loader import TrainSteps
from slap_fast.training import grad_cache, step
from slap_fast.training.state import begin
from slap_fast.training.step import autocast, train_step
from tests.helpers import runs
from tests.helpers.gradients import NO_LOSS, gradients_of

CASES = {
    "softmax": {**NO_LOSS, "loss.contrastive": 1.0},
    "sigmoid": {**NO_LOSS, "loss.contrastive": 1.0, "loss.contrastive_kind": "sigmoid"},
    "sinkhorn": {**NO_LOSS, "loss.ssl": 1.0},
    "centering": {**NO_LOSS, "loss.ssl": 1.0, "model.ssl.targets": "centering"},
    "sum": {},
    "sum, separate pass": {"model.ssl.student_pass": "separate"},
}
SPLIT = {"max_tokens": 60, "grad_cache": True}


def config_of(changes):
    return override(runs.TINY, {"batch_size": 9, "clip_grad_norm": 1e9, **changes})


def all_gradients(split):
    runs.in_fp64()
    return {case: gradients_of(config_of(changes | split)) for case, changes in CASES.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_split_step_equals_the_unsplit_one(world_size):
    (expected,) = runs.ranks(1, all_gradients, {})
    for gradients in runs.ranks(world_size, all_gradients, SPLIT):
        for case, values in expected.items():
            assert gradients[case].keys() == values.keys()
            for name, value in values.items():
                worst = abs(gradients[case][name] - value).max()
                assert worst <= 1e-12, (case, name, worst)


def split_run(changes):
    """A run, and a step's packs: more than two."""
    config = config_of(changes)
    state, tokenizer = begin(config, None, None, runs.CPU)
    batches = TrainSteps(runs.clips(), tokenizer, config)[0].batches
    assert len(batches) > 2
    return state, batches


def test_without_grad_cache_each_pack_has_its_own_negatives():
    changes = {**NO_LOSS, "loss.contrastive": 1.0}
    cached = train_step(*split_run(SPLIT | changes))
    parts = train_step(*split_run(SPLIT | changes | {"grad_cache": False}))
    assert parts["loss"] < 0.8 * cached["loss"]


def test_the_second_pass_drops_out_what_the_first_did():
    state, batches = split_run({**SPLIT, **NO_LOSS, "loss.contrastive": 1.0})
    state.model.audio_head.mlp.fc2 = nn.Sequential(state.model.audio_head.mlp.fc2, nn.Dropout(0.5))
    seen = []
    state.model.register_forward_hook(lambda *args: seen.append(args[2].audio_features.detach()))
    train_step(state, batches)
    first, second = seen[: len(batches)], seen[len(batches) :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*(state.model(batches[0]).audio_features for _ in range(2)))


def test_the_first_pass_keeps_features_of_clips_and_targets_alone(monkeypatch):
    state, batches = split_run(SPLIT | {"precision": "bf16"})
    made, alive, gradients = [], [], grad_cache._contrastive_gradients
    state.model.register_forward_hook(lambda *args: made.append(weakref.ref(args[2][-2])))

    def spy(*arguments):
        alive.extend(ref() is not None for ref in made)
        return gradients(*arguments)

    monkeypatch.setattr(grad_cache, "_contrastive_gradients", spy)
    with autocast(state.config, runs.CPU):
        cached = grad_cache.first_pass(state, batches, [9], 0.07)
    assert len(alive) == len(batches) and not any(alive)
    assert {cache.targets.features.dtype for cache in cached} == {torch.bfloat16}
    memory = {cache.targets.features.untyped_storage().data_ptr() for cache in cached}
    assert len(memory) == 1 and sum(map(len, (cache.targets.features for cache in cached))) > 9


def test_one_pack_needs_no_first_pass(monkeypatch):
    monkeypatch.setattr(step, "first_pass", None)
    config = config_of({"grad_cache": True})
    state, tokenizer = begin(config, None, None, runs.CPU)
    train_step(state, TrainSteps(runs.clips(), tokenizer, config)[0].batches)


def test_packs_may_differ_in_how_many_groups_a_clip_is_in():
    changes = {**SPLIT, **NO_LOSS, "loss.contrastive": 1.0}
    state, batches = split_run(changes)
    groups = batches[0].groups
    batches[0] = batches[0]._replace(groups=torch.cat([groups, groups[:, :1]], 1))
    metrics = train_step(state, batches)
    assert torch.equal(metrics["loss"], train_step(*split_run(changes))["loss"])
