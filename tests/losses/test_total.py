"""The weighted sum of the losses, and all of them in one compiled step."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from slap_fast import losses
from tests.helpers.losses import BIAS, SCALE, normal, unit


class TestTotal:
    weights = SimpleNamespace(contrastive=1.0, ssl=2.0, caption=0.5)

    def test_weighted_sum(self):
        parts = {"contrastive": torch.tensor(3.0), "ssl": torch.tensor(5.0)}
        assert losses.total_loss(parts, self.weights).item() == 13.0
        parts["caption"] = torch.tensor(8.0)
        assert losses.total_loss(parts, self.weights).item() == 17.0

    def test_weight_0_leaves_out_even_nan(self):
        weights = SimpleNamespace(contrastive=1.0, ssl=0.0, caption=0.0)
        parts = {"contrastive": torch.tensor(3.0), "ssl": torch.tensor(math.nan)}
        assert losses.total_loss(parts, weights).item() == 3.0
        with pytest.raises(ValueError, match="expected one with a weight above 0"):
            losses.total_loss({"ssl": parts["ssl"]}, weights)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="losses: found 'clap'"):
            losses.total_loss({"clap": torch.tensor(1.0)}, self.weights)


def test_everything_compiles_without_a_graph_break():
    def step(audio, text, groups, features, prototypes, teacher, hidden, labels):
        targets = losses.sinkhorn(teacher, prototypes.flip(0), 0.05, 3, chunk_size=4)
        student, health = losses.self_distillation_loss(
            features, prototypes, targets, 0.1, chunk_size=4
        )
        parts = {
            "contrastive": losses.contrastive_loss(audio, text, SCALE, groups=groups)
            + losses.sigmoid_contrastive_loss(audio, text, SCALE, BIAS, groups=groups),
            "ssl": student,
            "caption": losses.caption_loss(hidden, prototypes, labels, chunk_size=4),
        }
        return losses.total_loss(parts, TestTotal.weights), losses.collapsed(health)

    arguments = [unit(5, 8, seed=1), unit(5, 8, seed=2), torch.tensor([0, 1, 1, 2, 3])]
    arguments += [unit(10, 6, seed=3), unit(7, 6, seed=4), unit(10, 6, seed=5)]
    arguments += [normal(9, 6, seed=6), torch.arange(9) % 7]
    for index in (0, 1, 3, 4, 6):
        arguments[index].requires_grad_()
    inputs = [x for x in arguments if x.requires_grad]
    eager, _ = step(*arguments)
    compiled, alarm = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-12)
    assert not alarm
    for ours, theirs in zip(
        torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
