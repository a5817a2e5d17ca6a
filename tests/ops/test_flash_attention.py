"""impl="flash": its calls of the varlen functions, which need a GPU; stubs take their place."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from slap_fast import ops
from slap_fast.ops import dispatch, flash_attention
from slap_fast.ops.attention_options import AttentionOptions
from slap_fast.reference import attention as reference_attention

LENGTHS, LENGTHS_K = [5, 0, 9], [3, 4, 11]
TAIL = 2


def starts(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def computed(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, causal):
    """What those functions compute: NaN past the last sequence, lse +inf for fully masked rows."""
    out, lse = reference_attention.attention(
        q, k, v, cu_q, max_q, cu_seqlens_k=cu_k, max_seqlen_k=max_k, softmax_scale=scale,
        window_size=window, causal=causal, return_lse=True,
    )  # fmt: skip
    past = torch.arange(len(q)) >= cu_q[-1]
    out = torch.where(past[:, None, None], math.nan, out)
    return out, lse.masked_fill(lse.isneginf(), math.inf).masked_fill(past, math.nan)


def flash_attn(monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert return_attn_probs and dropout_p == 0.0
        tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *computed(*tensors, softmax_scale, window_size, causal), None

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def torch_varlen(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises
    from torch.nn.attention import varlen

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False,
    ):  # fmt: skip
        assert return_aux.lse and enable_gqa == (query.shape[1] != key.shape[1])
        tensors = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        return computed(*tensors, scale, window_size, False)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


def torch_2_11_varlen(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    from torch.nn.attention import varlen

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1),
    ):  # fmt: skip
        assert return_aux.lse and query.shape[1] == key.shape[1]
        tensors = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        return computed(*tensors, scale, window_size, False)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


STUBS = [flash_attn, torch_varlen, torch_2_11_varlen]


@pytest.fixture(params=STUBS, ids=lambda stub: stub.__name__, autouse=True)
def stub(request, monkeypatch):
    request.param(monkeypatch)
    varlen = flash_attention.varlen
    varlen.cache_clear()
    yield
    varlen.cache_clear()


OPTIONS = {
    "plain": {},
    "window": {"window_size": (3, 1)},
    "causal": {"causal": True, "window_size": (4, -1)},
    "scale": {"softmax_scale": 0.7},
}


@pytest.mark.parametrize("kind", ["self", "rope", "cross", "packed"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_is_the_reference(kind, options):
    rows, rows_k = sum(LENGTHS) + TAIL, sum(LENGTHS_K if kind == "cross" else LENGTHS) + TAIL
    shapes = ((rows, 4, 8), (rows_k, 2, 8), (rows_k, 2, 8))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    options = options | {"return_lse": True}
    if kind in ("rope", "packed"):
        options["rope"] = ops.rope_tables(torch.arange(rows, dtype=torch.int32)[:, None], 8)
    if kind == "cross":
        options |= {"cu_seqlens_k": starts(LENGTHS_K), "max_seqlen_k": 11}
    if kind == "packed":
        inputs = [torch.cat([x.detach() for x in inputs], 1).requires_grad_()]

    function = "attention_qkvpacked" if kind == "packed" else "attention"
    arguments = *inputs, *([2] if kind == "packed" else []), starts(LENGTHS), 9
    actual = getattr(flash_attention, function)(*arguments, AttentionOptions(**options))
    expected = getattr(reference_attention, function)(*arguments, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    weight = torch.randn_like(expected[0])
    for a, b in zip(
        *(torch.autograd.grad(x[0], inputs, weight) for x in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_obstacles(monkeypatch):
    cuda, half = torch.device("cuda"), torch.float16
    assert dispatch.choose("attention", "flash", cuda, half) == "flash"
    with pytest.raises(NotImplementedError, match="which has no kernels for torch.float32"):
        dispatch.choose("attention", "flash", cuda, torch.float32)
    with pytest.raises(NotImplementedError, match="which runs on a GPU, not on cpu"):
        dispatch.choose("attention", "flash", torch.device("cpu"), half)
    monkeypatch.setattr(flash_attention, "varlen", lambda: None)
    with pytest.raises(NotImplementedError, match="which is not installed"):
        dispatch.choose("attention", "flash", cuda, half)
