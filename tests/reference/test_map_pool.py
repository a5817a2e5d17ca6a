"""The folded pooling against a SigLIP-style head that builds keys and values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slap_fast.reference.map_pool import map_pool
from tests.helpers.tolerance import assert_accurate

LENGTHS = [1, 63, 0, 130]


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def naive(x: Tensor, score_weight: Tensor, lengths: list[int]) -> Tensor:
    pooled = []
    for tokens in x.split(lengths):
        terms = torch.einsum("hc,tc->ht", score_weight, tokens).exp()
        weights = terms / terms.sum(1, keepdim=True)
        pooled.append(torch.einsum("ht,tc->hc", weights, tokens))
    return torch.stack(pooled)


def test_forward_and_gradients():
    x = torch.randn(194, 12, dtype=torch.float64, requires_grad=True)
    score_weight = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    pooled = map_pool(x, score_weight, starts(LENGTHS))
    expected = naive(x, score_weight, LENGTHS)
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(pooled[2], torch.zeros(3, 12, dtype=torch.float64))
    weight = torch.randn_like(expected)
    grads, expected_grads = (
        torch.autograd.grad(y, (x, score_weight), weight) for y in (pooled, expected)
    )
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_gradcheck(figure):
    for seed in figure("K6", ci=10, soak=100):
        torch.manual_seed(seed)
        x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
        score_weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, w: map_pool(x, w, starts([3, 0, 5])), (x, score_weight)
        )


def test_equals_multi_head_attention_with_a_probe():
    # Biases included: the key bias drops out, the value bias passes through the softmax unchanged.
    hidden_size, num_heads, head_dim = 12, 3, 4
    x = torch.randn(63, hidden_size, dtype=torch.float64)
    head = torch.nn.MultiheadAttention(hidden_size, num_heads, batch_first=True).double()
    torch.nn.init.normal_(head.in_proj_bias)
    probe = torch.randn(1, 1, hidden_size, dtype=torch.float64)
    expected = head(probe, x[None], x[None])[0][0, 0]

    w_q, w_k, w_v = head.in_proj_weight.chunk(3)
    b_q, _, b_v = head.in_proj_bias.chunk(3)
    q = F.linear(probe[0, 0], w_q, b_q).view(num_heads, head_dim)
    w_k, w_v = w_k.view(num_heads, head_dim, -1), w_v.view(num_heads, head_dim, -1)
    score_weight = torch.einsum("hd,hdc->hc", q, w_k) / math.sqrt(head_dim)
    pooled = map_pool(x, score_weight, starts([63]))[0]
    values = torch.einsum("hdc,hc->hd", w_v, pooled).flatten() + b_v
    torch.testing.assert_close(head.out_proj(values), expected, rtol=1e-12, atol=1e-12)


def test_large_scores_do_not_overflow():
    x = torch.randn(50, 4)
    pooled = map_pool(x, torch.full((1, 4), 1e4), starts([50]))
    assert torch.equal(pooled[0, 0], x[x.sum(1).argmax()])


def test_rows_past_the_end_are_not_read():
    x = torch.randn(200, 8)
    x[194:] = math.nan
    x.requires_grad_()
    score_weight = torch.randn(2, 8, requires_grad=True)
    pooled = map_pool(x, score_weight, starts(LENGTHS))
    short = x.detach()[:194].clone().requires_grad_()
    expected = map_pool(short, score_weight, starts(LENGTHS))
    assert torch.equal(pooled, expected)
    dout = torch.randn_like(pooled)
    dx, dw = torch.autograd.grad(pooled, (x, score_weight), dout)
    expected_dx, expected_dw = torch.autograd.grad(expected, (short, score_weight), dout)
    assert torch.equal(dx[:194], expected_dx) and torch.equal(dw, expected_dw)
    assert torch.equal(dx[194:], torch.zeros(6, 8))


def test_a_sequence_ignores_its_neighbours_bitwise():
    x, score_weight = torch.randn(194, 8), torch.randn(2, 8)
    alone = map_pool(x[64:], score_weight, starts([130]))
    x[:64] = math.nan
    assert torch.equal(map_pool(x, score_weight, starts(LENGTHS))[3:], alone)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=["none", "empty", "two_empty"])
def test_no_tokens(lengths):
    x = torch.randn(3, 4, requires_grad=True)
    score_weight = torch.randn(2, 4, requires_grad=True)
    pooled = map_pool(x, score_weight, starts(lengths))
    assert torch.equal(pooled, torch.zeros(len(lengths), 2, 4))
    for grad in torch.autograd.grad(pooled.sum(), (x, score_weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_inputs(dtype):
    x, score_weight = torch.randn(194, 8).to(dtype), torch.randn(2, 8).to(dtype)
    pooled = map_pool(x, score_weight, starts(LENGTHS))
    truth = naive(x.double(), score_weight.double(), LENGTHS)
    assert pooled.dtype == dtype
    assert_accurate(pooled, naive(x, score_weight, LENGTHS), truth, operands=(x,))
