"""Packed attention by SDPA with a dense mask: maths that shares no code with the package."""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTHS = [1, 63, 0, 130, 130]
CROSS = [9, 0, 7, 200, 200]
WINDOWS = [(-1, -1), (48, 48), (0, 0), (5, -1), (-1, 3), (63, 64), (500, 500)]


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@functools.cache
def visible(len_q: int, len_k: int, window: tuple[int, int], causal: bool) -> Tensor:
    """bool [len_q, len_k], entry by entry as FlashAttention documents it."""
    mask = torch.zeros(len_q, len_k, dtype=torch.bool)
    for i, j in itertools.product(range(len_q), range(len_k)):
        position = i + len_k - len_q
        mask[i, j] = (
            (window[0] == -1 or j >= position - window[0])
            and (window[1] == -1 or j <= position + window[1])
            and not (causal and j > position)
        )
    return mask


def sdpa(q, k, v, lengths, lengths_k, window, causal, scale=None):
    """out and lse of every sequence by SDPA with a dense mask, fully masked rows left out."""
    num_heads, head_dim = q.shape[1:]
    group = num_heads // k.shape[1]
    outs, lses = [], []
    for q_seq, k_seq, v_seq in zip(
        q.split(lengths), k.split(lengths_k), v.split(lengths_k), strict=True
    ):
        mask = visible(len(q_seq), len(k_seq), window, causal)
        sees = mask.any(1)
        q_h = q_seq[sees].transpose(0, 1)
        k_h, v_h = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k_seq, v_seq))
        out = q_seq.new_zeros(len(q_seq), num_heads, head_dim)
        lse = q_seq.new_full((len(q_seq), num_heads), -math.inf)
        if sees.any():
            rows = sees.nonzero()[:, 0]
            out_h = F.scaled_dot_product_attention(q_h, k_h, v_h, mask[sees], scale=scale)
            out = out.index_put((rows,), out_h.transpose(0, 1))
            scores = q_h @ k_h.mT * (head_dim**-0.5 if scale is None else scale)
            lse_h = scores.masked_fill(~mask[sees], -math.inf).logsumexp(-1)
            lse = lse.index_put((rows,), lse_h.T)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses).T


def random_inputs(lengths, lengths_k, num_heads=2, num_heads_kv=2, head_dim=8, dtype=torch.float64):
    """q, k and v that require gradients."""
    rows, rows_k = sum(lengths), sum(lengths_k)
    shapes = [(rows, num_heads), (rows_k, num_heads_kv), (rows_k, num_heads_kv)]
    return [torch.randn(*s, head_dim, dtype=dtype, requires_grad=True) for s in shapes]


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
