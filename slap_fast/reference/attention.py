"""Packed attention as the paper writes it: one sequence at a time, all its scores at once.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j    over the keys j of i's sequence that i sees

Query i of a sequence sits at position p = i + len_k - len_q and sees the keys p - left <= j <=
p + right (FlashAttention's ``window_size``, aligned bottom-right as since its version 2.1); causal
means right = 0.

Shapes: T packed rows, H query heads, Hkv key heads, D head size; Lq and Lk, those of one sequence.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from slap_fast.reference.rope import rotate


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    window_size: tuple[int, int] = (-1, -1),
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`slap_fast.ops.attention`, which documents and checks the arguments.

    The lengths come from ``cu_seqlens``; ``max_seqlen`` and ``max_seqlen_k`` are for the kernels.
    fp16 and bf16 are computed in fp32.
    """
    left, right = (math.inf if size == -1 else size for size in window_size)
    right = 0 if causal else right
    starts = cu_seqlens.tolist()
    starts_k = starts if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outs, lses = [], []
    # One more, empty, so that without any sequence the results still depend on the inputs.
    spans, spans_k = (pairwise([*begins, begins[-1]]) for begins in (starts, starts_k))
    for (begin, end), (begin_k, end_k) in zip(spans, spans_k, strict=True):
        q_s, k_s, v_s = q[begin:end], k[begin_k:end_k], v[begin_k:end_k]
        if rope is not None:
            tables = rope[0][begin:end], rope[1][begin:end]
            q_s, k_s = rotate(q_s, tables), rotate(k_s, tables)
        position = torch.arange(len(q_s), device=q.device)[:, None] + len(k_s) - len(q_s)
        distance = torch.arange(len(k_s), device=q.device) - position
        visible = (distance >= -left) & (distance <= right)
        out, lse = _dense(q_s, k_s, v_s, visible, softmax_scale)
        outs.append(out.to(q.dtype))
        lses.append(lse)
    num_past = len(q) - starts[-1]
    out = torch.cat([*outs, q.new_zeros(num_past, *q.shape[1:])])
    lse = torch.cat([*lses, lses[0].new_full((q.shape[1], num_past), -math.inf)], dim=1)
    return (out, lse) if return_lse else out


def _dense(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float | None
) -> tuple[Tensor, Tensor]:
    """q [Lq, H, D], k and v [Lk, Hkv, D], visible bool [Lq, Lk] -> out [Lq, H, D], lse [H, Lq]."""
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    fully_masked = ~visible.any(1)
    # A fully masked row keeps its scores until after the softmax: of -inf alone it is NaN.
    scores = (scale * q @ k.mT).masked_fill(~visible & ~fully_masked[:, None], -math.inf)
    p = scores.softmax(-1).masked_fill(~visible, 0)
    return (p @ v).transpose(0, 1), scores.logsumexp(-1).masked_fill(fully_masked, -math.inf)


def attention_qkvpacked(
    qkv: Tensor, num_heads_kv: int, cu_seqlens: Tensor, max_seqlen: int, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` of the queries, keys and values in qkv [T, H + 2 Hkv, D]."""
    num_heads = qkv.shape[1] - 2 * num_heads_kv
    q, k, v = qkv.split((num_heads, num_heads_kv, num_heads_kv), dim=1)
    return attention(q, k, v, cu_seqlens, max_seqlen, **options)
