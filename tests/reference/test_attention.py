"""The reference attention against SDPA with a dense mask, and gradcheck: no code is shared."""

from __future__ import annotations

import math

import pytest
import torch

from slap_fast.reference.attention import attention, attention_qkvpacked
from slap_fast.reference.rope import rope_tables
from tests.helpers.sdpa import CROSS, LENGTHS, WINDOWS, assert_same, random_inputs, sdpa, starts


def call(q, k, v, lengths, lengths_k=None, **options):
    if lengths_k is not None:
        options |= {"cu_seqlens_k": starts(lengths_k), "max_seqlen_k": max(lengths_k)}
    return attention(q, k, v, starts(lengths), max(lengths), **options)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("lengths_k", [None, CROSS], ids=["self", "cross"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"window{w[0]}_{w[1]}")
def test_forward_and_gradients(window, causal, lengths_k, heads):
    inputs = random_inputs(LENGTHS, lengths_k or LENGTHS, *heads)
    options = {"window_size": window, "causal": causal, "softmax_scale": 0.3}
    out, lse = call(*inputs, LENGTHS, lengths_k, **options, return_lse=True)
    expected, expected_lse = sdpa(*inputs, LENGTHS, lengths_k or LENGTHS, window, causal, 0.3)
    assert_same(out, expected)
    assert_same(lse, expected_lse)
    assert torch.equal(call(*inputs, LENGTHS, lengths_k, **options), out)
    weight, weight_lse = torch.randn_like(expected), torch.randn_like(expected_lse)
    seen = expected_lse.isfinite()
    losses = (
        (x * weight).sum() + (y * weight_lse)[seen].sum()
        for x, y in ((out, lse), (expected, expected_lse))
    )
    for grad, expected_grad in zip(*(torch.autograd.grad(x, inputs) for x in losses), strict=True):
        assert_same(grad, expected_grad)


@pytest.mark.parametrize("window", [(-1, -1), (1, 2)], ids=["global", "local"])
def test_gradcheck(window):
    lengths = [2, 0, 3]
    rope = rope_tables(torch.arange(5, dtype=torch.int32)[:, None], 4)

    def run(q, k, v):
        return call(q, k, v, lengths, rope=rope, window_size=window, return_lse=True)

    inputs = random_inputs(lengths, lengths, 2, 1, 4)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_rope_is_applied_to_queries_and_keys():
    # Written out for each pair: no code shared with rotate().
    q, k, v = random_inputs(LENGTHS, LENGTHS)
    cos, sin = rope_tables(torch.randint(0, 700, (sum(LENGTHS), 2), dtype=torch.int32), 8)

    def rotated(x):
        pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)[:, None]
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    expected, _ = sdpa(rotated(q), rotated(k), v, LENGTHS, LENGTHS, (-1, -1), False)
    assert_same(call(q, k, v, LENGTHS, rope=(cos, sin)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype):
    inputs = [x.detach().to(dtype) for x in random_inputs(LENGTHS, LENGTHS)]
    out, lse = call(*inputs, LENGTHS, return_lse=True)
    expected, expected_lse = call(*(x.float() for x in inputs), LENGTHS, return_lse=True)
    assert torch.equal(out, expected.to(dtype)) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize(
    "lengths, lengths_k",
    [([6, 3], [2, 0]), ([4], [0]), ([0, 0], [3, 0]), ([], [])],
    ids=["some", "no_keys", "no_rows", "no_sequences"],
)
def test_fully_masked_rows(lengths, lengths_k):
    inputs = [
        torch.randn(sum(n) + 2, 2, 4, requires_grad=True) for n in (lengths, lengths_k, lengths_k)
    ]
    options = {"cu_seqlens_k": starts(lengths_k), "max_seqlen_k": 3}
    out, lse = attention(*inputs, starts(lengths), 6, causal=True, return_lse=True, **options)
    masked = [0, 1, 2, 3, *range(6, 11)] if lengths == [6, 3] else range(sum(lengths) + 2)
    masked = torch.tensor(list(masked))
    assert torch.equal(out[masked], torch.zeros(len(masked), 2, 4))
    assert (out == 0).all(-1).all(-1).sum() == len(masked)
    assert lse[:, masked].eq(-math.inf).all()
    for grad in torch.autograd.grad(out.sum() + lse.exp().sum(), inputs):
        assert grad.isfinite().all()


def test_rows_past_the_end_are_not_read():
    lengths, tail = [5, 0, 70], 9
    rows = sum(lengths)
    qkv = torch.randn(rows + tail, 8, 8)
    rope = rope_tables(torch.arange(rows + tail, dtype=torch.int32)[:, None], 8)
    for x in (qkv, *rope):
        x[rows:] = math.nan
    qkv.requires_grad_()
    options = {"window_size": (48, 48), "return_lse": True}
    out, lse = attention_qkvpacked(qkv, 2, starts(lengths), 70, rope=rope, **options)
    parts = qkv[:rows].split((4, 2, 2), dim=1)
    short_rope = [x[:rows] for x in rope]
    expected, expected_lse = call(*parts, lengths, rope=short_rope, **options)
    assert torch.equal(out[:rows], expected) and torch.equal(lse[:, :rows], expected_lse)
    assert torch.equal(out[rows:], torch.zeros(tail, 4, 8))
    assert lse[:, rows:].eq(-math.inf).all()
    (grad,) = torch.autograd.grad(out.sum() + lse[:, :rows].sum(), qkv)
    assert grad[:rows].isfinite().all()
    assert torch.equal(grad[rows:], torch.zeros(tail, 8, 8))
