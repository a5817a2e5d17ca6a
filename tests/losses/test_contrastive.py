"""Contrastive losses against formulas in numpy, gradients against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slap_fast import losses
from tests.helpers.losses import BIAS, F64, SCALE, log_softmax, unit

GROUPS = [None, [0, 1, 2, 3, 4], [3, 1, 3, 0, 3], [2, 2, 2, 2, 2]]
GROUP_IDS = ["no_groups", "distinct", "three_equal", "all_equal"]


@pytest.mark.parametrize("groups", GROUPS, ids=GROUP_IDS)
class TestFormulas:
    def pairs(self, groups):
        audio, text = unit(5, 8, seed=1), unit(5, 8, seed=2)
        numbers = range(5) if groups is None else groups
        positives = [[i for i in range(5) if numbers[i] == n] for n in numbers]
        return audio, text, positives, None if groups is None else torch.tensor(groups)

    def test_contrastive(self, groups):
        audio, text, positives, groups = self.pairs(groups)
        logits = 7.0 * audio.numpy() @ text.numpy().T
        rows, columns = log_softmax(logits, 1), log_softmax(logits, 0)
        to_text = [-np.mean([rows[i, j] for j in js]) for i, js in enumerate(positives)]
        to_audio = [-np.mean([columns[j, i] for j in js]) for i, js in enumerate(positives)]
        loss = losses.contrastive_loss(audio, text, SCALE, groups=groups)
        assert loss.item() == pytest.approx((np.mean(to_text) + np.mean(to_audio)) / 2, abs=1e-12)

    def test_sigmoid(self, groups):
        audio, text, positives, groups = self.pairs(groups)
        total = 0.0
        for i in range(5):
            for j in range(5):
                logit = 7.0 * float(audio[i] @ text[j]) - 3.0
                total += math.log1p(math.exp(-logit if j in positives[i] else logit))
        loss = losses.sigmoid_contrastive_loss(audio, text, SCALE, BIAS, groups=groups)
        assert loss.item() == pytest.approx(total / 5, abs=1e-12)

    def test_gradients(self, groups):
        audio, text, _, groups = self.pairs(groups)
        inputs = [x.clone().requires_grad_() for x in (audio, text, SCALE, BIAS)]

        def both(audio, text, scale, bias):
            return losses.contrastive_loss(
                audio, text, scale, groups=groups
            ), losses.sigmoid_contrastive_loss(audio, text, scale, bias, groups=groups)

        assert torch.autograd.gradcheck(both, inputs)


class TestContrastive:
    def test_equals_clip(self):
        audio, text = unit(6, 8, seed=1), unit(6, 8, seed=2)
        logits, diagonal = SCALE * audio @ text.T, torch.arange(6)
        expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
        torch.testing.assert_close(
            losses.contrastive_loss(audio, text, SCALE), expected, rtol=0, atol=1e-12
        )

    def test_identical_captions_do_not_push_apart(self):
        """Two clips of one caption, aligned with it, have no gradient."""
        base = torch.eye(4, dtype=F64)
        text = base[[0, 0, 1, 2]]
        groups = torch.tensor([5, 5, 1, 2])
        scale = torch.tensor(100.0, dtype=F64)

        def gradient(loss, *arguments, **keywords):
            audio = text.clone().requires_grad_()
            loss(audio, text, scale, *arguments, **keywords).backward()
            return audio.grad.abs().max().item()

        bias = torch.tensor(-50.0, dtype=F64)
        assert gradient(losses.contrastive_loss, groups=groups) < 1e-12
        assert gradient(losses.sigmoid_contrastive_loss, bias, groups=groups) < 1e-12
        assert gradient(losses.sigmoid_contrastive_loss, bias) > 1
        # With groups the softmax loss of aligned pairs is the entropy of its targets, no less.
        assert losses.contrastive_loss(text, text, scale, groups=groups).item() == pytest.approx(
            math.log(2) / 2
        )
        one_apart = text.clone()
        one_apart[0], one_apart[1] = base[0], base[3]
        with_groups = losses.contrastive_loss(text, one_apart, scale, groups=groups)
        assert with_groups > losses.contrastive_loss(text, text, scale, groups=groups) + 1

    @pytest.mark.parametrize("batch", [0, 1])
    def test_a_batch_of_0_or_1_has_no_contrastive_loss(self, batch):
        audio = unit(batch, 8).requires_grad_()
        loss = losses.contrastive_loss(audio, unit(batch, 8, seed=1), SCALE)
        loss.backward()
        assert loss.item() == 0 and audio.grad.shape == (batch, 8) and not audio.grad.any()
        sigmoid = losses.sigmoid_contrastive_loss(audio, unit(batch, 8, seed=1), SCALE, BIAS)
        assert math.isfinite(sigmoid.item()) and (sigmoid.item() == 0) == (batch == 0)

    @pytest.mark.parametrize("scale", [1e4, -1e4])
    def test_extreme_logits_are_finite(self, scale):
        audio = unit(6, 8, seed=1, dtype=torch.float32).requires_grad_()
        text, scale = unit(6, 8, seed=2, dtype=torch.float32), torch.tensor(scale)
        both = losses.contrastive_loss(audio, text, scale)
        both = both + losses.sigmoid_contrastive_loss(audio, text, scale, torch.tensor(-10.0))
        both.backward()
        assert both.isfinite() and audio.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast_computes_in_fp32(self, dtype):
        audio, text = unit(16, 64, seed=1, dtype=dtype), unit(16, 64, seed=2, dtype=dtype)
        scale = torch.tensor(100.0)
        expected = losses.contrastive_loss(audio.to(F64), text.to(F64), scale.to(F64))
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses.contrastive_loss(audio, text, scale)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=2e-6)

    def test_a_caption_that_fits_several_clips_is_a_positive_of_each(self):
        """Text 1 also fits audio 0; text 0 does not fit audio 1."""
        audio, text = unit(3, 8), unit(3, 8, seed=1)
        groups = torch.tensor([[0, 1], [1, 1], [2, 2]])
        positives = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=float)
        logits = SCALE.item() * audio.numpy() @ text.numpy().T
        rows = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        columns = logits - np.log(np.exp(logits).sum(0, keepdims=True))
        expected = -(rows * positives / positives.sum(1, keepdims=True)).sum() / 6
        expected -= (columns * positives / positives.sum(0, keepdims=True)).sum() / 6
        loss = losses.contrastive_loss(audio, text, SCALE, groups=groups)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        signs = 2 * positives - 1
        expected = np.log1p(np.exp(-signs * (logits + BIAS.item()))).sum() / 3
        loss = losses.sigmoid_contrastive_loss(audio, text, SCALE, BIAS, groups=groups)
        assert loss.item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(
        ("text_shape", "groups", "name"),
        [((4, 8), None, "text_features"), ((5, 7), None, "text_features"), ((5, 8), 4, "groups")],
        ids=["rows", "width", "groups"],
    )
    def test_rejects_shapes(self, text_shape, groups, name):
        groups = None if groups is None else torch.arange(groups)
        with pytest.raises(ValueError, match=f"{name}: found shape"):
            losses.contrastive_loss(unit(5, 8), unit(*text_shape), SCALE, groups=groups)
