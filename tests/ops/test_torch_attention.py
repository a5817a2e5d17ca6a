"""impl="torch" against SDPA with a dense mask, gradcheck and the reference; leaks, memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slap_fast.ops import torch_attention
from slap_fast.ops.attention_options import AttentionOptions
from slap_fast.ops.torch_attention import attention, attention_qkvpacked
from slap_fast.reference import attention as reference
from slap_fast.reference.rope import rope_tables
from tests.helpers.sdpa import (
    CROSS,
    LENGTHS,
    WINDOWS,
    assert_same,
    random_inputs,
    sdpa,
    starts,
    visible,
)
from tests.helpers.tolerance import assert_accurate


def call(q, k, v, lengths, lengths_k=None, **options):
    if lengths_k is not None:
        options |= {"cu_seqlens_k": starts(lengths_k), "max_seqlen_k": max(lengths_k)}
    return attention(q, k, v, starts(lengths), max(lengths), AttentionOptions(**options))


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
@pytest.mark.parametrize("lengths_k", [None, CROSS], ids=["self", "cross"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"window{w[0]}_{w[1]}")
def test_is_the_reference(window, causal, lengths_k, return_lse):
    inputs = random_inputs(LENGTHS, lengths_k or LENGTHS, 4, 2)
    options = {"window_size": window, "causal": causal, "return_lse": return_lse}
    arguments = *inputs, starts(LENGTHS), max(LENGTHS)
    if lengths_k is None:
        coords = torch.randint(0, 700, (sum(LENGTHS), 2), dtype=torch.int32)
        options["rope"] = rope_tables(coords, 8)
    else:
        options |= {"cu_seqlens_k": starts(lengths_k), "max_seqlen_k": max(lengths_k)}
    actual = attention(*arguments, AttentionOptions(**options))
    expected = reference.attention(*arguments, **options)
    if return_lse:
        assert_same(actual[1], expected[1])
        actual, expected = (out + lse.T[..., None].exp() for out, lse in (actual, expected))
    assert_same(actual, expected)
    weight = torch.randn_like(expected)
    for a, b in zip(
        *(torch.autograd.grad(x, inputs, weight) for x in (actual, expected)), strict=True
    ):
        assert_same(a, b)


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("lengths_k", [None, CROSS], ids=["self", "cross"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"window{w[0]}_{w[1]}")
def test_forward_and_gradients(window, causal, lengths_k, heads, return_lse):
    inputs = random_inputs(LENGTHS, lengths_k or LENGTHS, *heads)
    options = {"window_size": window, "causal": causal, "return_lse": return_lse}
    actual = call(*inputs, LENGTHS, lengths_k, **options)
    out, lse = actual if return_lse else (actual, None)
    expected, expected_lse = sdpa(*inputs, LENGTHS, lengths_k or LENGTHS, window, causal)
    assert_same(out, expected)
    weight, weight_lse = torch.randn_like(expected), torch.randn_like(expected_lse)
    loss, expected_loss = (out * weight).sum(), (expected * weight).sum()
    if return_lse:
        assert_same(lse, expected_lse)
        seen = expected_lse.isfinite()
        loss = loss + (lse * weight_lse)[seen].sum()
        expected_loss = expected_loss + (expected_lse * weight_lse)[seen].sum()
    for grad, expected_grad in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected_loss, inputs), strict=True
    ):
        assert_same(grad, expected_grad)


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
@pytest.mark.parametrize("window", [(48, 48), (700, 0), (1500, -1)], ids=str)
def test_sequences_longer_than_a_chunk(window, return_lse):
    lengths = [2500]
    inputs = random_inputs(lengths, lengths, num_heads=1, num_heads_kv=1, head_dim=4)
    i = torch.arange(2500)
    distance = i - i[:, None]
    mask = distance >= -window[0]
    if window[1] != -1:
        mask &= distance <= window[1]
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in inputs), mask)
    actual = call(*inputs, lengths, window_size=window, return_lse=return_lse)
    out = actual[0] if return_lse else actual
    assert_same(out, expected.transpose(0, 1))
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, weight)
    expected_grads = torch.autograd.grad(expected, inputs, weight.transpose(0, 1))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_same(grad, expected_grad)


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
@pytest.mark.parametrize("window", [(-1, -1), (1, 2)], ids=["global", "local"])
def test_gradcheck(figure, window, return_lse):
    lengths = [3, 0, 5]
    rope = rope_tables(torch.arange(8, dtype=torch.int32)[:, None], 4)

    def run(q, k, v):
        return call(q, k, v, lengths, rope=rope, window_size=window, return_lse=return_lse)

    for seed in figure("K6", ci=1, soak=10):
        torch.manual_seed(seed)
        assert torch.autograd.gradcheck(run, random_inputs(lengths, lengths, 2, 1, 4))


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
@pytest.mark.parametrize("window", [(0, 0), (1, 0), (63, 0), (64, 65), (129, 3)], ids=str)
def test_exact_mask_by_one_hot_values(window, return_lse):
    # With equal scores and v the identity, row i of out shows exactly which keys row i sees.
    length = 150
    q = torch.zeros(length, 1, length)
    v = torch.eye(length)[:, None]
    actual = call(q, q, v, [length], window_size=window, return_lse=return_lse)
    out = actual[0] if return_lse else actual
    mask = visible(length, length, window, False)
    assert torch.equal(out[:, 0] > 0, mask)
    assert_same(out[:, 0], mask / mask.sum(1, keepdim=True), 1e-6)


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (48, 48)], ids=["global", "local"])
def test_as_accurate_as_dense_sdpa(dtype, window, return_lse):
    inputs = random_inputs(LENGTHS, LENGTHS, head_dim=32, dtype=dtype)
    q, k, v = exact = [x.detach().double().requires_grad_() for x in inputs]
    dout = torch.randn_like(inputs[0])
    actual = call(*inputs, LENGTHS, window_size=window, return_lse=return_lse)
    out = actual[0] if return_lse else actual
    eager, eager_lse = sdpa(*inputs, LENGTHS, LENGTHS, window, False)
    truth, truth_lse = sdpa(*exact, LENGTHS, LENGTHS, window, False)
    assert_accurate(out, eager, truth, operands=(v,))
    if return_lse:
        assert actual[1].dtype == torch.float32
        assert_accurate(actual[1], eager_lse.float(), truth_lse, operands=(q, k))
    triples = (
        torch.autograd.grad(x, y, dout.to(x.dtype))
        for x, y in ((out, inputs), (eager, inputs), (truth, exact))
    )
    operands = ((dout, v, k), (dout, v, q), (dout,))
    for grads, factors in zip(zip(*triples, strict=True), operands, strict=True):
        assert_accurate(*grads, operands=factors, gradient=True)


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
def test_large_scores_do_not_overflow(return_lse):
    # fp16, scores to 1e4: their exponentials need the row maximum taken off in fp32.
    q, k, v = (x.detach().half() for x in random_inputs([130], [130], head_dim=16))
    actual = call(q * 30, k * 30, v, [130], softmax_scale=1.0, return_lse=return_lse)
    out = actual[0] if return_lse else actual
    exact = sdpa(
        *((x * s).double() for x, s in ((q, 30), (k, 30), (v, 1))), [130], [130], (-1, -1), False, 1
    )
    assert exact[1].abs().max() > 5e3
    torch.testing.assert_close(out.double(), exact[0], rtol=0, atol=0.02)


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
@pytest.mark.parametrize("window", [(-1, -1), (48, 48)], ids=["global", "local"])
@pytest.mark.parametrize("packed", [False, True], ids=["q_k_v", "qkv"])
def test_rows_past_the_end_are_not_read(packed, window, return_lse):
    lengths, tail = [5, 0, 70], 9
    rows = sum(lengths)
    qkv = torch.randn(rows + tail, 6, 8)
    rope = rope_tables(torch.arange(rows + tail, dtype=torch.int32)[:, None], 8)
    short_rope = [x[:rows].clone() for x in rope]
    options = {"window_size": window, "return_lse": return_lse}

    def run(qkv, rope):
        if packed:
            actual = attention_qkvpacked(
                qkv, 2, starts(lengths), 70, AttentionOptions(rope=rope, **options)
            )
        else:
            actual = call(*qkv.split(2, dim=1), lengths, rope=rope, **options)
        return actual if return_lse else (actual, qkv.new_zeros(2, len(qkv)))

    short = qkv[:rows].clone().requires_grad_()
    expected, expected_lse = run(short, short_rope)
    poisoned = qkv.clone()
    for x in (poisoned, *rope):
        x[rows:] = math.nan
    poisoned.requires_grad_()
    out, lse = run(poisoned, rope)
    assert torch.equal(out[:rows], expected) and torch.equal(lse[:, :rows], expected_lse)
    assert torch.equal(out[rows:], torch.zeros(tail, 2, 8))
    if return_lse:
        assert torch.equal(lse[:, rows:], torch.full((2, tail), -math.inf))
    weight = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, poisoned, weight)
    (expected_grad,) = torch.autograd.grad(expected, short, weight[:rows])
    assert torch.equal(grad[:rows], expected_grad)
    assert torch.equal(grad[rows:], torch.zeros(tail, 6, 8))


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
@pytest.mark.parametrize("window", [(-1, -1), (48, 48)], ids=["global", "local"])
def test_a_sequence_ignores_its_neighbours(window, return_lse):
    inputs = [x.detach().float() for x in random_inputs(LENGTHS, LENGTHS)]
    weight = torch.randn_like(inputs[0])

    def run(inputs, lengths, weight):
        inputs = [x.clone().requires_grad_() for x in inputs]
        actual = call(*inputs, lengths, window_size=window, return_lse=return_lse)
        out = actual[0] if return_lse else actual
        return out, *torch.autograd.grad(out, inputs, weight)

    others = slice(0, 64)
    halves = [run([x[a:b] for x in inputs], [130], weight[a:b]) for a, b in ((64, 194), (194, 324))]
    for x in inputs:
        x[others] = math.nan
    for together, *alone in zip(run(inputs, LENGTHS, weight), *halves, strict=True):
        # Nearly: a library's product may depend on how many it makes at once.
        torch.testing.assert_close(together[64:], torch.cat(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
@pytest.mark.parametrize("lengths_k", [[3] * 7, [90] * 7], ids=["fewer_keys", "more_keys"])
def test_batches_are_no_larger_than_their_limit(monkeypatch, lengths_k, return_lse):
    # Of 7 sequences with 40 rows each, 2 at a time.
    inputs = random_inputs([40] * 7, lengths_k)
    options = {"window_size": (5, 9), "return_lse": return_lse}

    def run():
        actual = call(*inputs, [40] * 7, lengths_k, **options)
        out = actual[0] if return_lse else actual
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    unbatched = run()
    sizes = []
    make_batch = torch_attention.Batch
    monkeypatch.setattr(torch_attention, "BATCH_ROWS", 100)
    monkeypatch.setattr(torch_attention, "Batch", lambda *x: sizes.append(x[0]) or make_batch(*x))
    for actual, expected in zip(run(), unbatched, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert sizes == [2, 2, 2, 1]


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
@pytest.mark.parametrize(
    "lengths, lengths_k",
    [([6, 3], [2, 0]), ([4], [0]), ([0, 0], [3, 0]), ([], [])],
    ids=["some", "no_keys", "no_rows", "no_sequences"],
)
def test_fully_masked_rows(lengths, lengths_k, return_lse):
    inputs = [
        torch.randn(sum(n) + 2, 2, 4, requires_grad=True) for n in (lengths, lengths_k, lengths_k)
    ]
    options = AttentionOptions(starts(lengths_k), 3, causal=True, return_lse=return_lse)
    actual = attention(*inputs, starts(lengths), 6, options)
    out = actual[0] if return_lse else actual
    masked = [0, 1, 2, 3, *range(6, 11)] if lengths == [6, 3] else range(sum(lengths) + 2)
    masked = torch.tensor(list(masked))
    assert torch.equal(out[masked], torch.zeros(len(masked), 2, 4))
    assert (out == 0).all(-1).all(-1).sum() == len(masked)
    if return_lse:
        assert actual[1][:, masked].eq(-math.inf).all()
    loss = out.sum() + (actual[1].exp().sum() if return_lse else 0)
    for grad in torch.autograd.grad(loss, inputs):
        assert grad.isfinite().all()


def test_lse_alone_has_a_gradient():
    q, k, v = random_inputs(LENGTHS, LENGTHS)
    _, lse = call(q, k, v, LENGTHS, window_size=(5, 5), return_lse=True)
    _, expected = sdpa(q, k, v, LENGTHS, LENGTHS, (5, 5), False)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad(lse, (q, k, v), weight)
    assert_same(grads[0], torch.autograd.grad(expected, q, weight, retain_graph=True)[0])
    assert_same(grads[1], torch.autograd.grad(expected, k, weight)[0])
    assert torch.equal(grads[2], torch.zeros_like(v))


def layouts(x: Tensor) -> dict[str, Tensor]:
    head_dim = x.shape[-1]
    step = x.new_zeros(2 * len(x), *x.shape[1:])
    step[::2] = x
    offset = x.new_zeros(x.numel() + 3)
    offset[3:] = x.flatten()
    padded = x.new_zeros(*x.shape[:-1], head_dim + 5)
    padded[..., :head_dim] = x
    return {
        "heads_first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "step_2": step[::2],
        "offset": offset[3:].view(x.shape),
        "padded_heads": padded[..., :head_dim],
        "expanded": x[:, :1].expand(x.shape),
    }


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "lse"])
@pytest.mark.parametrize("layout", list(layouts(torch.zeros(2, 2, 2))))
def test_strides(layout, return_lse):
    inputs = [layouts(x.detach())[layout].requires_grad_() for x in random_inputs(LENGTHS, LENGTHS)]
    plain = [x.detach().contiguous().requires_grad_() for x in inputs]
    kept = [x.detach().clone() for x in inputs]
    rope = rope_tables(torch.arange(sum(LENGTHS), dtype=torch.int32)[:, None], 8)
    weight = torch.randn(8, 2, sum(LENGTHS), dtype=torch.float64).transpose(0, 2)
    results = []
    for x in (inputs, plain):
        result = call(*x, LENGTHS, rope=rope, window_size=(48, 48), return_lse=return_lse)
        out = result[0] if return_lse else result
        results.append([out, *torch.autograd.grad(out, x, weight)])
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)
    for x, before in zip(inputs, kept, strict=True):
        assert torch.equal(x, before)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rope"])
def test_qkvpacked_is_attention(rope, heads):
    num_heads, num_heads_kv = heads
    total = sum(LENGTHS)
    qkv = torch.randn(total, num_heads + 2 * num_heads_kv, 8).double().requires_grad_()
    tables = rope_tables(torch.arange(total, dtype=torch.int32)[:, None], 8) if rope else None
    options = {"rope": tables, "window_size": (5, 9), "causal": True, "softmax_scale": 0.3}
    options["return_lse"] = True
    parts = qkv.split((num_heads, num_heads_kv, num_heads_kv), dim=1)
    expected = torch.cat([x.flatten() for x in call(*parts, LENGTHS, **options)])
    actual = attention_qkvpacked(
        qkv, num_heads_kv, starts(LENGTHS), 130, AttentionOptions(**options)
    )
    actual = torch.cat([x.flatten() for x in actual])
    assert_same(actual, expected)
    weight = torch.randn_like(expected)
    assert_same(*(torch.autograd.grad(x, qkv, weight)[0] for x in (actual, expected)))


def test_rope_is_applied_to_queries_and_keys():
    # Written out for each pair: no code shared with rotate().
    q, k, v = random_inputs(LENGTHS, LENGTHS)
    cos, sin = rope_tables(torch.randint(0, 700, (sum(LENGTHS), 2), dtype=torch.int32), 8)

    def turned(x):
        pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)[:, None]
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    expected, _ = sdpa(turned(q), turned(k), v, LENGTHS, LENGTHS, (-1, -1), False)
    assert_same(call(q, k, v, LENGTHS, rope=(cos, sin)), expected)


MEMORY = """
import resource, sys, torch
from slap_fast.ops.attention_options import AttentionOptions
from slap_fast.ops.torch_attention import attention

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

for length, side, return_lse in (
    (15_000, 48, False), (15_000, 48, True), (15_000, -1, False), (6_000, -1, True)
):
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    q, k, v = (torch.randn(length, 1, 32, requires_grad=True) for _ in range(3))
    before = peak()
    options = AttentionOptions(window_size=(side, side), return_lse=return_lse)
    found = attention(q, k, v, cu_seqlens, length, options)
    (found[0].sum() + found[1].sum() if return_lse else found.sum()).backward()
    print(peak() - before)
"""


def test_memory_is_linear_in_the_length():
    # One fp32 [length, length] matrix of one head: 900 MB at 15,000 tokens (10 minutes of audio),
    # 144 MB at 6,000.
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = [int(line) for line in done.stdout.split()]
    assert len(grown) == 4 and max(grown) < 100e6, grown
