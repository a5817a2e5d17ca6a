"""The model on Triton's attention, interpreted where there is no GPU: fp32, 2 heads, 80 tokens."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

from slap_fast.models.layers import Segments
from slap_fast.models.slap import Teacher
from slap_fast.ops import dispatch
from tests.models import test_slap

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton(monkeypatch):
    """Attention resolves to Triton; returns how often, and how often a schedule was built."""
    from slap_fast.kernels import attention

    count = {"attention": 0, "schedule": 0}
    choose, build = dispatch.choose, attention.schedule_tiles

    def counted(op, *rest):
        impl = choose(op, *rest)
        count["attention"] += (op, impl) == ("attention", "triton")
        return impl

    def built(*arguments):
        count["schedule"] += 1
        return build(*arguments)

    monkeypatch.setattr(dispatch, "choose", counted)
    monkeypatch.setattr(attention, "schedule_tiles", built)
    # It builds one to compare with. `ops.attention` is the function, not the module.
    module = importlib.import_module("slap_fast.ops.attention")
    monkeypatch.setattr(module, "check_schedule", lambda *_: None)
    with dispatch.using({"attention": "triton"}):
        yield count


REFERENCES = {"attention": "reference", "map_pool": "reference"}
"""The implementations to compare with, also on a GPU."""


def losses_and_gradients(model, batch):
    return test_slap.run(model, Teacher(model), [batch])


def test_forward_and_gradients_are_the_references(triton):
    model = test_slap.small_model(torch.float32).to(DEVICE)
    batch = test_slap.make_batch(torch.float32).to(DEVICE)
    found = losses_and_gradients(model, batch)
    # Self-attention of 3 audio, 3 text and 2 caption layers, 2 cross-attentions; the teacher's 3.
    assert triton["attention"] >= 13
    with dispatch.using(REFERENCES):
        truth = losses_and_gradients(copy.deepcopy(model).double(), batch_to(batch, torch.float64))
        eager = losses_and_gradients(model, batch)
    for name, want in truth[0].items():
        bound = max(1e-6, 2 * test_slap.relative(eager[0][name], want))
        assert test_slap.relative(found[0][name], want) <= bound, name
    for name, want in truth[2].items():
        whole = torch.stack([g.norm() for g in want.values()]).norm()
        for parameter, gradient in want.items():
            error, usual = (
                (run[2][name][parameter] - gradient).norm() / whole for run in (found, eager)
            )
            assert error <= max(1e-5, 2 * usual), (name, parameter)


def batch_to(batch, dtype):
    return batch._replace(audio=batch.audio._replace(patches=batch.audio.patches.to(dtype)))


def test_the_schedule_is_shared_by_all_layers(triton):
    model = test_slap.small_model(torch.float32).to(DEVICE)
    batch = test_slap.make_batch(torch.float32).to(DEVICE)
    model.audio_encoder(batch.audio)
    assert triton["schedule"] == 1
    features = torch.zeros(len(batch.audio.patches), 32, device=DEVICE)
    context = Segments.scheduled(batch.audio.cu_seqlens, batch.audio.max_seqlen, len(features))
    model.caption_decoder(batch.text, features, context).sum().backward()
    assert triton["schedule"] == 3


@pytest.mark.parametrize("student_pass", ["shared", "separate"])
def test_packed_equals_one_clip_at_a_time(triton, student_pass):
    test_slap.test_packed_equals_one_clip_at_a_time(torch.float32, 1e-5, student_pass, DEVICE)


def test_one_training_step(triton):
    results = []
    for impls in ({}, REFERENCES):
        model = test_slap.small_model(torch.float32).to(DEVICE)
        batch = test_slap.make_batch(torch.float32).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with dispatch.using(impls):
            outputs = model(batch, test_slap.ALL)
            scores = Teacher(model)(batch)
            per_clip = {name: getattr(outputs, name) for name in test_slap.PER_CLIP}
            total = sum(test_slap.three_losses(model, per_clip, scores, batch.labels).values())
            total.backward()
        optimizer.step()
        results.append((total.detach(), model.state_dict()))
    (loss, state), (want_loss, want_state) = results
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-6)
    for name, x in state.items():
        torch.testing.assert_close(x, want_state[name], rtol=1e-4, atol=1e-5)
