"""The model on Triton's attention, interpreted where there is no GPU: fp32, 2 heads, 80 tokens."""

from __future__ import annotations

import copy

import pytest
import torch

from slap_fast.models.layers import Segments
from slap_fast.models.slap import Teacher
from slap_fast.ops import dispatch, validation
from tests.helpers.small_model import (
    ALL,
    PER_CLIP,
    assert_packed_equals_one_clip_at_a_time,
    losses_and_gradients,
    make_batch,
    relative,
    small_model,
    three_losses,
)

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton(monkeypatch):
    """Makes attention resolve to Triton; counts the calls, and the schedules that are built."""
    from slap_fast.kernels import attention

    calls = {"attention": 0, "schedule": 0}
    choose, schedule_tiles = dispatch.choose, attention.schedule_tiles

    def counted_choice(op, *others):
        impl = choose(op, *others)
        calls["attention"] += (op, impl) == ("attention", "triton")
        return impl

    def count_schedule(*arguments):
        calls["schedule"] += 1
        return schedule_tiles(*arguments)

    monkeypatch.setattr(dispatch, "choose", counted_choice)
    monkeypatch.setattr(attention, "schedule_tiles", count_schedule)
    # It builds one to compare with.
    monkeypatch.setattr(validation, "check_schedule", lambda *_: None)
    with dispatch.using({"attention": "triton"}):
        yield calls


REFERENCES = {"attention": "reference", "map_pool": "reference"}
"""The implementations to compare with, also on a GPU."""


def test_forward_and_gradients_equal_the_references(triton):
    model = small_model(torch.float32).to(DEVICE)
    batch = make_batch(torch.float32).to(DEVICE)
    actual = losses_and_gradients(model, Teacher(model), [batch])
    # Self-attention of 3 audio, 3 text and 2 caption layers, 2 cross-attentions; the teacher's 3.
    assert triton["attention"] >= 13
    double = copy.deepcopy(model).double()
    with dispatch.using(REFERENCES):
        truth = losses_and_gradients(double, Teacher(double), [batch_to(batch, torch.float64)])
        eager = losses_and_gradients(model, Teacher(model), [batch])
    for name, expected in truth[0].items():
        bound = max(1e-6, 2 * relative(eager[0][name], expected))
        assert relative(actual[0][name], expected) <= bound, name
    for name, expected in truth[2].items():
        norm = torch.stack([g.norm() for g in expected.values()]).norm()
        for parameter, gradient in expected.items():
            error, eager_error = (
                (run[2][name][parameter] - gradient).norm() / norm for run in (actual, eager)
            )
            assert error <= max(1e-5, 2 * eager_error), (name, parameter)


def batch_to(batch, dtype):
    return batch._replace(audio=batch.audio._replace(patches=batch.audio.patches.to(dtype)))


def test_the_schedule_is_shared_by_all_layers(triton):
    model = small_model(torch.float32).to(DEVICE)
    batch = make_batch(torch.float32).to(DEVICE)
    model.audio_encoder(batch.audio)
    assert triton["schedule"] == 1
    features = torch.zeros(len(batch.audio.patches), 32, device=DEVICE)
    context = Segments.scheduled(batch.audio.cu_seqlens, batch.audio.max_seqlen, len(features))
    model.caption_decoder(batch.text, features, context).sum().backward()
    assert triton["schedule"] == 3


@pytest.mark.parametrize("student_pass", ["shared", "separate"])
def test_packed_equals_one_clip_at_a_time(triton, student_pass):
    assert_packed_equals_one_clip_at_a_time(torch.float32, 1e-5, student_pass, DEVICE)


def test_one_training_step(triton):
    results = []
    for impls in ({}, REFERENCES):
        model = small_model(torch.float32).to(DEVICE)
        batch = make_batch(torch.float32).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with dispatch.using(impls):
            outputs = model(batch, ALL)
            teacher_output = Teacher(model)(batch)
            per_clip = {name: getattr(outputs, name) for name in PER_CLIP}
            total = sum(three_losses(model, per_clip, teacher_output, batch.labels).values())
            total.backward()
        optimizer.step()
        results.append((total.detach(), model.state_dict()))
    (loss, state), (expected_loss, expected_state) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    for name, x in state.items():
        torch.testing.assert_close(x, expected_state[name], rtol=1e-4, atol=1e-5)
