"""Packed attention in plain PyTorch, one sequence at a time, in memory linear in its length.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j    over the keys j of i's sequence that i sees

Query i of a sequence sits at position p = i + len_k - len_q and sees the keys p - left <= j <=
p + right (FlashAttention's ``window_size``, aligned bottom-right as since its version 2.1); causal
means right = 0. So the rows that see no key are the first ones of their sequence.

Shapes: T packed rows, H query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slap_fast.reference.rope import rotate

BLOCK = 64
"""Rows that share one strip of keys: the fastest of 32 to 128 on a CPU for a window of +-48.
Gathering the blocks of all sequences into one call was no faster."""
CHUNK = 1024
"""Strips are sliced from chunks of this many keys: the backward of a slice fills all that it was
sliced from, so slices of a long sequence would cost the square of its length."""


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

    The lengths come from ``cu_seqlens`` (a sync on a GPU); ``max_seqlen`` and ``max_seqlen_k`` are
    for the kernels. With fp64 inputs ``lse`` is fp64 too.
    """
    lengths = _lengths(cu_seqlens)
    lengths_k = lengths if cu_seqlens_k is None else _lengths(cu_seqlens_k)
    num_rows, total = len(q), sum(lengths)
    q, k, v = _rows(q, 0, total), _rows(k, 0, sum(lengths_k)), _rows(v, 0, sum(lengths_k))
    if rope is not None:
        rope = (rope[0][:total], rope[1][:total])
        q, k = rotate(q, rope), rotate(k, rope)
    window = _window(window_size, causal)
    return _attend(q, k, v, lengths, lengths_k, num_rows, window, softmax_scale, return_lse)


def attention_qkvpacked(
    qkv: Tensor,
    num_heads_kv: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    window_size: tuple[int, int] = (-1, -1),
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` of the queries, keys and values in qkv [T, H + 2 Hkv, D]."""
    lengths = _lengths(cu_seqlens)
    total = sum(lengths)
    num_heads = qkv.shape[1] - 2 * num_heads_kv
    qk, v = _rows(qkv, 0, total).split((num_heads + num_heads_kv, num_heads_kv), dim=1)
    if rope is not None:
        qk = rotate(qk, (rope[0][:total], rope[1][:total]))
    q, k = qk.split((num_heads, num_heads_kv), dim=1)
    window = _window(window_size, causal)
    return _attend(q, k, v, lengths, lengths, len(qkv), window, softmax_scale, return_lse)


def _lengths(cu_seqlens: Tensor) -> list[int]:
    return cu_seqlens.diff().tolist()


def _rows(x: Tensor, begin: int, end: int) -> Tensor:
    # The backward of x[0 : len(x)] would still copy.
    return x if (begin, end) == (0, len(x)) else x[begin:end]


def _window(window_size: tuple[int, int], causal: bool) -> tuple[float, float]:
    left, right = (math.inf if size == -1 else size for size in window_size)
    return left, 0 if causal else right


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    lengths_k: list[int],
    num_rows: int,
    window: tuple[float, float],
    softmax_scale: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """q [sum(lengths), H, D], k and v [sum(lengths_k), Hkv, D] -> out [num_rows, H, D] (, lse)."""
    num_heads, head_dim = q.shape[1:]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if k.shape[1] != num_heads:
        group = num_heads // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    band = _Band(window, max([0, *lengths, *lengths_k]), q)

    pieces = []
    # Without any sequence, an empty one keeps the gradients defined.
    for q_seq, k_seq, v_seq in zip(
        q.split(lengths or [0]),
        k.split(lengths_k or [0]),
        v.split(lengths_k or [0]),
        strict=True,
    ):
        pieces += _attend_sequence(q_seq, k_seq, v_seq, band, scale, return_lse)
    if num_rows > len(q):
        pieces.append(_blind_rows(q, num_rows - len(q)))
    out = torch.cat([out for out, _ in pieces])
    return (out, torch.cat([lse for _, lse in pieces], dim=1)) if return_lse else out


def _blind_rows(q: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What ``count`` rows give that see no key: out 0, lse -inf, gradients exactly 0."""
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full((q.shape[1], count), -math.inf, dtype=lse_dtype)
    return q.new_zeros(count, *q.shape[1:]), lse


class _Band:
    """A window's additive mask: it depends on distances alone, so one serves all blocks, sliced."""

    def __init__(self, window: tuple[float, float], longest: int, like: Tensor) -> None:
        self.left, self.right = window
        self.is_open = self.left == self.right == math.inf
        if self.is_open:
            return
        rows = 2 * BLOCK
        self.origin = min(self.left, longest)
        width = rows + min(self.right, longest)
        row = torch.arange(rows, device=like.device)[:, None]
        distance = torch.arange(-self.origin, width, device=like.device) - row
        hidden = (distance < -self.left) | (distance > self.right)
        self.bias = like.new_zeros(rows, self.origin + width).masked_fill_(hidden, -math.inf)

    def blocks(self, num_rows: int, num_keys: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """Runs of rows, the keys they see and the mask of both; the last row is at the last key."""
        step = BLOCK if num_rows > 2 * BLOCK else 2 * BLOCK
        for begin in range(0, num_rows, step):
            end = min(begin + step, num_rows)
            position = begin + num_keys - num_rows
            first = max(0, position - self.left)
            last = min(num_keys, position + end - begin + self.right)
            bias = None
            if not self.is_open:
                column = self.origin + first - position
                bias = self.bias[: end - begin, column : column + last - first]
            yield slice(begin, end), slice(first, last), bias


def _attend_sequence(
    q: Tensor, k: Tensor, v: Tensor, band: _Band, scale: float, return_lse: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields (out [n, H, D], lse [H, n] or None) for one run of n rows after the other."""
    len_q, len_k = len(q), len(k)
    blind = len_q if len_k == 0 else max(0, len_q - len_k - band.right)
    if blind:
        yield _blind_rows(q, blind)
        q = q[blind:]
    if return_lse or blind == len_q or q.device.type != "cpu":
        yield _BlockwiseAttention.apply(q, k, v, band, scale)
    else:
        for out in _fused_attention(q, k, v, band, scale):
            yield out, None


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, band: _Band, scale: float
) -> Iterator[Tensor]:
    """A CPU's fused operation is flash attention: memory linear in the length, exact in fp64."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)[0].transpose(0, 1)

    if band.is_open:
        yield attend(q, k, v, None)
        return
    k_chunks, v_chunks = k.split(CHUNK), v.split(CHUNK)
    blocks = list(band.blocks(len(q), len(k)))
    q_blocks = q.split([rows.stop - rows.start for rows, _, _ in blocks])
    for q_block, (_, keys, bias) in zip(q_blocks, blocks, strict=True):
        yield attend(q_block, _strip(k, k_chunks, keys), _strip(v, v_chunks, keys), bias)


def _strip(x: Tensor, chunks: tuple[Tensor, ...], rows: slice) -> Tensor:
    """x[rows], from the chunks of x where one or two of them hold it."""
    first, last = rows.start // CHUNK, (rows.stop - 1) // CHUNK
    begin, end = rows.start - first * CHUNK, rows.stop - last * CHUNK
    if first == last:
        return _rows(chunks[first], begin, end)
    if last == first + 1:
        return torch.cat((chunks[first][begin:], chunks[last][:end]))
    return x[rows]


class _BlockwiseAttention(torch.autograd.Function):
    """out [n, H, D] and lse [H, n] of one sequence, in plain products, fp32 or wider.

    With P = exp(S - lse), dP = dout v^T and dS = P (dP - sum(P dP) + dlse):
    dq = scale dS k, dk = scale dS^T q, dv = P^T dout. The backward makes S again, so that no more
    than one block of it ever exists.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: _Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _blind_rows(q, len(q))
        q_h, k_h, v_h = (x.transpose(0, 1).to(lse.dtype) for x in (q, k, v))
        for rows, keys, bias in band.blocks(len(q), len(k)):
            scores = _scores(q_h[:, rows], k_h[:, keys], bias, scale)
            lse[:, rows] = scores.logsumexp(-1)
            p = (scores - lse[:, rows, None]).exp()
            out[rows] = (p @ v_h[:, keys]).transpose(0, 1).to(out.dtype)
        ctx.save_for_backward(q, k, v, lse)
        ctx.band, ctx.scale = band, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse = ctx.saved_tensors
        q, k, v, dout = (x.transpose(0, 1).to(lse.dtype) for x in (*inputs, dout))
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for rows, keys, bias in ctx.band.blocks(q.shape[1], k.shape[1]):
            scores = _scores(q[:, rows], k[:, keys], bias, ctx.scale)
            p = (scores - lse[:, rows, None]).exp()
            dp = dout[:, rows] @ v[:, keys].mT
            delta = (p * dp).sum(-1, keepdim=True) - dlse[:, rows, None]
            ds = p * (dp - delta) * ctx.scale
            dq[:, rows] = ds @ k[:, keys]
            dk[:, keys] += ds.mT @ q[:, rows]
            dv[:, keys] += p.mT @ dout[:, rows]
        dtype = inputs[0].dtype
        return *(x.transpose(0, 1).to(dtype) for x in (dq, dk, dv)), None, None


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q * scale) @ k.mT
    return scores if bias is None else scores + bias
