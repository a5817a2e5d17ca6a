"""The caption loss against formulas in numpy, gradients against finite differences."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slap_fast import losses
from tests.helpers.losses import CHUNKS, F64, log_softmax, normal


class TestCaption:
    def inputs(self, dtype=F64):
        labels = torch.tensor([3, -100, 0, 10, -100, 5, 5, -100, 1, 2, 9])
        hidden, weight = normal(11, 6, seed=1).to(dtype), normal(11, 6, seed=2).to(dtype)
        return hidden.requires_grad_(), weight.requires_grad_(), labels

    @CHUNKS
    def test_formula_and_gradients(self, chunk_size):
        hidden, weight, labels = self.inputs()
        log_probs = log_softmax(hidden.detach().numpy() @ weight.detach().numpy().T, 1)
        expected = -np.mean([log_probs[i, y] for i, y in enumerate(labels.tolist()) if y >= 0])
        loss = losses.caption_loss(hidden, weight, labels, chunk_size=chunk_size)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert torch.autograd.gradcheck(
            lambda h, w: losses.caption_loss(h, w, labels, chunk_size=chunk_size), (hidden, weight)
        )

    def test_equals_cross_entropy_with_another_ignore_index(self):
        hidden, weight, labels = self.inputs()
        labels = labels.clamp(min=0)
        loss = losses.caption_loss(hidden, weight, labels, ignore_index=5, chunk_size=3)
        expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=5)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
        for ours, theirs in zip(
            torch.autograd.grad(loss, (hidden, weight)),
            torch.autograd.grad(expected, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("rows", [0, 11], ids=["no_rows", "all_ignored"])
    @pytest.mark.parametrize("chunk_size", [3, 100], ids=["chunks", "one_chunk"])
    def test_no_label_gives_zero(self, rows, chunk_size):
        hidden, weight, labels = self.inputs()
        labels = torch.full_like(labels, -100)[:rows]
        loss = losses.caption_loss(hidden[:rows], weight, labels, chunk_size=chunk_size)
        loss.backward()
        assert loss.item() == 0 and not weight.grad.any() and not hidden.grad.any()

    def test_extreme_logits_are_finite(self):
        hidden, weight, labels = self.inputs(torch.float32)
        loss = losses.caption_loss(1e4 * hidden, weight, labels, chunk_size=4)
        loss.backward()
        assert loss.isfinite() and weight.grad.isfinite().all()

    def test_bf16_logits_have_an_fp32_softmax(self):
        hidden, weight, labels = self.inputs(torch.bfloat16)
        expected = F.cross_entropy((hidden @ weight.T).to(F64), labels)
        loss = losses.caption_loss(hidden, weight, labels)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_chunks_agree_under_autocast(self):
        hidden, weight, labels = self.inputs(torch.float32)

        def run(chunk_size):
            with torch.autocast("cpu", torch.bfloat16):
                loss = losses.caption_loss(hidden, weight, labels, chunk_size=chunk_size)
            return loss, *torch.autograd.grad(loss, (hidden, weight))

        one_chunk, chunks = run(100), run(4)
        exact = losses.caption_loss(hidden, weight, labels)
        assert one_chunk[0].dtype == torch.float32 and chunks[0].item() == pytest.approx(
            one_chunk[0].item(), rel=1e-6
        )
        assert one_chunk[0].item() == pytest.approx(exact.item(), rel=2**-8)
        for ours, theirs in zip(chunks[1:], one_chunk[1:], strict=True):
            assert (ours - theirs).norm() < 2**-8 * theirs.norm()

    @pytest.mark.parametrize("rows", [0, 3, 11], ids=lambda n: f"{n}_rows")
    def test_liger_equals_cross_entropy(self, rows, monkeypatch):
        pytest.importorskip("liger_kernel")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        hidden, weight, labels = self.inputs(torch.float32)
        expected = F.cross_entropy(hidden[:rows] @ weight.T, labels[:rows], reduction="sum")
        expected = expected / (labels[:rows] != -100).sum().clamp(min=1)
        loss = losses.caption_loss(hidden[:rows], weight, labels[:rows], impl="liger")
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for ours, theirs in zip(
            torch.autograd.grad(loss, (hidden, weight)),
            torch.autograd.grad(expected, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("installed", [False, True], ids=["not_installed", "no_gpu"])
    def test_liger_is_refused_where_it_cannot_run(self, installed, monkeypatch):
        if installed:
            pytest.importorskip("liger_kernel")
        else:
            monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        problem = "on cpu, expected .* a GPU" if installed else ", expected .* installed"
        with pytest.raises(ValueError, match=f"impl: found liger ?{problem}"):
            losses.caption_loss(*self.inputs(torch.float32), impl="liger")
        with pytest.raises(ValueError, match="impl: found 'cut', expected blockwise or liger"):
            losses.caption_loss(*self.inputs(), impl="cut")

    def test_rejects_shapes(self):
        hidden, weight, labels = self.inputs()
        with pytest.raises(ValueError, match=r"labels: found shape \[10\], expected \[11\]"):
            losses.caption_loss(hidden, weight, labels[1:])
