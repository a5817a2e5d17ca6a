"""``impl="torch"``: a fast engine made of torch's own operations, the default on a CPU.

:mod:`slap_fast.reference.attention` has the formula. Memory is linear in the length of a sequence,
and so is time within a window. Sequences go one at a time, save that neighbours of the same length
are one batch. Fully masked rows are the first ones of their sequence.

Shapes: T packed rows, H query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slap_fast.ops.attention_options import AttentionOptions
from slap_fast.precision import accumulation_dtype
from slap_fast.reference.rope import rotate

BLOCK = 64
"""Rows that share one strip of keys: the fastest of 32 to 128 on a CPU for a window of +-48."""
BATCH_ROWS = 8192
"""Most rows of a batch of several sequences: what exists of its scores at a time stays small."""
Block = tuple[slice, slice, Tensor | None]
"""Rows of a sequence, the keys that they see, and the additive mask of both."""


class Batch(NamedTuple):
    """Sequences beside each other that have the same lengths, and the blocks of each."""

    size: int
    rows: slice
    """Of all of them, in the packed run."""
    keys: slice
    blocks: list[Block]

    def queries(self, x: Tensor, dim: int = 0) -> Tensor:
        """x [..., T, ...] -> [..., size, rows of one, ...], in place."""
        return _split(x, dim, self.rows, self.size)

    def context(self, x: Tensor, dim: int = 0) -> Tensor:
        """x [..., Tk, ...] -> [..., size, keys of one, ...], in place."""
        return _split(x, dim, self.keys, self.size)


def _split(x: Tensor, dim: int, span: slice, size: int) -> Tensor:
    length = span.stop - span.start
    return x.narrow(dim, span.start, length).unflatten(dim, (size, length // size))


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, options: AttentionOptions
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`slap_fast.ops.attention`, with the lengths from ``cu_seqlens``: a GPU syncs."""
    starts_k, rope, num_rows = options.cu_seqlens_k, options.rope, len(q)
    lengths = cu_seqlens.diff().tolist()
    lengths_k = lengths if starts_k is None else starts_k.diff().tolist()
    q, k, v = _rows(q, sum(lengths)), _rows(k, sum(lengths_k)), _rows(v, sum(lengths_k))
    if rope is not None:
        q, k = (rotate(x, (rope[0][: len(q)], rope[1][: len(q)])) for x in (q, k))
    return _attend(q, k, v, lengths, lengths_k, num_rows, options)


def attention_qkvpacked(
    qkv: Tensor, num_heads_kv: int, cu_seqlens: Tensor, max_seqlen: int, options: AttentionOptions
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` of the queries, keys and values in qkv [T, H + 2 Hkv, D]."""
    lengths, rope = cu_seqlens.diff().tolist(), options.rope
    num_heads = qkv.shape[1] - 2 * num_heads_kv
    qk, v = _rows(qkv, sum(lengths)).split((num_heads + num_heads_kv, num_heads_kv), dim=1)
    if rope is not None:
        qk = rotate(qk, (rope[0][: len(qk)], rope[1][: len(qk)]))
    q, k = qk.split((num_heads, num_heads_kv), dim=1)
    return _attend(q, k, v, lengths, lengths, len(qkv), options)


def _rows(x: Tensor, count: int) -> Tensor:
    # The backward of x[: len(x)] would still copy.
    return x if count == len(x) else x[:count]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    lengths_k: list[int],
    num_rows: int,
    options: AttentionOptions,
) -> Tensor | tuple[Tensor, Tensor]:
    """q [sum(lengths), H, D], k and v [sum(lengths_k), Hkv, D] -> out [num_rows, H, D] (, lse)."""
    num_heads, head_dim = q.shape[1:]
    scale = head_dim**-0.5 if options.softmax_scale is None else options.softmax_scale
    left, right = (math.inf if size == -1 else size for size in options.window_size)
    if k.shape[1] != num_heads:
        k, v = (x.repeat_interleave(num_heads // k.shape[1], dim=1) for x in (k, v))
    band = _Band((left, 0 if options.causal else right), max([0, *lengths, *lengths_k]), q)
    fused = not options.return_lse and q.device.type == "cpu"
    # The fused operation goes through the keys of an open window in blocks of its own.
    batches = list(_batches(lengths, lengths_k, band, split=not (fused and band.is_open)))
    if fused:
        return _FusedAttention.apply(q, k, v, batches, num_rows, scale)
    out, lse = _PlainAttention.apply(q, k, v, batches, num_rows, scale)
    return (out, lse) if options.return_lse else out


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

    def blocks(self, first_row: int, num_rows: int, num_keys: int, step: int) -> Iterator[Block]:
        """Runs of at most ``step`` rows, without those before ``first_row``; the last row is at the
        last key."""
        for begin in range(first_row, num_rows, step):
            end = min(begin + step, num_rows)
            position = begin + num_keys - num_rows
            first = max(0, position - self.left)
            last = min(num_keys, position + end - begin + self.right)
            bias = None
            if not self.is_open:
                column = self.origin + first - position
                bias = self.bias[: end - begin, column : column + last - first]
            yield slice(begin, end), slice(first, last), bias


def _batches(lengths: list[int], lengths_k: list[int], band: _Band, split: bool) -> Iterator[Batch]:
    """All sequences with a row that sees a key, each in blocks unless ``split`` is false."""
    row = key = 0
    for (len_q, len_k), same in groupby(zip(lengths, lengths_k, strict=True)):
        masked = len_q if len_k == 0 else min(len_q, max(0, len_q - len_k - band.right))
        count, remaining = len_q - masked, len(list(same))
        step = (BLOCK if count > 2 * BLOCK else 2 * BLOCK) if split else count
        blocks = list(band.blocks(masked, len_q, len_k, max(1, step)))
        while remaining:
            size = min(remaining, max(1, BATCH_ROWS // max(1, len_q)))
            rows, keys = slice(row, row + size * len_q), slice(key, key + size * len_k)
            if blocks:
                yield Batch(size, rows, keys, blocks)
            row, key, remaining = rows.stop, keys.stop, remaining - size


class _FusedAttention(torch.autograd.Function):
    """out [num_rows, H, D] by a CPU's flash attention: memory linear in the length, exact in fp64.

    Its own backward is called block by block, and the gradients are added in place: autograd would
    fill a gradient of all keys for each block's slice of them, at three times the cost.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, batches: list[Batch], num_rows: int, scale: float
    ) -> Tensor:
        out = q.new_zeros(num_rows, *q.shape[1:])
        lses = []
        for batch in batches:
            q_b, out_b = batch.queries(q), batch.queries(out)
            k_b, v_b = batch.context(k), batch.context(v)
            for rows, keys, bias in batch.blocks:
                inputs = (x.transpose(1, 2) for x in (q_b[:, rows], k_b[:, keys], v_b[:, keys]))
                block, lse = _FLASH(*inputs, attn_mask=bias, scale=scale)
                out_b[:, rows] = block.transpose(1, 2)
                lses.append(lse)
        ctx.save_for_backward(q, k, v, out, *lses)
        ctx.batches, ctx.scale = batches, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *lses = ctx.saved_tensors
        grads = tuple(x.new_zeros(x.shape) for x in (q, k, v))
        remaining = iter(lses)
        for batch in ctx.batches:
            dout_b, q_b, out_b, dq_b = map(batch.queries, (dout, q, out, grads[0]))
            k_b, v_b, dk_b, dv_b = map(batch.context, (k, v, *grads[1:]))
            for rows, keys, bias in batch.blocks:
                parts = dout_b[:, rows], q_b[:, rows], k_b[:, keys], v_b[:, keys], out_b[:, rows]
                gradients = _FLASH_BACKWARD(
                    *(x.transpose(1, 2) for x in parts),
                    next(remaining), 0.0, False, attn_mask=bias, scale=ctx.scale,
                )  # fmt: skip
                sums = dq_b[:, rows], dk_b[:, keys], dv_b[:, keys]
                for total, grad in zip(sums, gradients, strict=True):
                    total += grad.transpose(1, 2)
        return *grads, None, None, None


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _PlainAttention(torch.autograd.Function):
    """out [num_rows, H, D] and lse [H, num_rows] in plain products, fp32 or wider.

    With P = exp(S - lse), dP = dout v^T and dS = P (dP - sum(P dP) + dlse):
    dq = scale dS k, dk = scale dS^T q, dv = P^T dout. The backward makes S again, so that no more
    than one block of it ever exists.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, batches: list[Batch], num_rows: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        lse_dtype = accumulation_dtype(q)
        out = q.new_zeros(q.shape[1], num_rows, q.shape[2])
        lse = q.new_full((q.shape[1], num_rows), -math.inf, dtype=lse_dtype)
        q_h, k_h, v_h = (x.transpose(0, 1).to(lse_dtype) for x in (q, k, v))
        for batch in batches:
            q_b, out_b, lse_b = (batch.queries(x, 1) for x in (q_h, out, lse))
            k_b, v_b = batch.context(k_h, 1), batch.context(v_h, 1)
            for rows, keys, bias in batch.blocks:
                scores = _scores(q_b[:, :, rows], k_b[:, :, keys], bias, scale)
                lse_b[:, :, rows] = scores.logsumexp(-1)
                p = (scores - lse_b[:, :, rows, None]).exp()
                out_b[:, :, rows] = (p @ v_b[:, :, keys]).to(out.dtype)
        ctx.save_for_backward(q, k, v, lse)
        ctx.batches, ctx.scale = batches, scale
        return out.transpose(0, 1), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse = ctx.saved_tensors
        heads_first = [x.transpose(0, 1).to(lse.dtype) for x in (*inputs, dout)]
        grads = tuple(torch.zeros_like(x) for x in heads_first[:3])
        for batch in ctx.batches:
            q, dout, lse_b, dlse_b, dq = (
                batch.queries(x, 1) for x in (heads_first[0], heads_first[3], lse, dlse, grads[0])
            )
            k, v, dk, dv = (batch.context(x, 1) for x in (*heads_first[1:3], *grads[1:]))
            for rows, keys, bias in batch.blocks:
                scores = _scores(q[:, :, rows], k[:, :, keys], bias, ctx.scale)
                p = (scores - lse_b[:, :, rows, None]).exp()
                dp = dout[:, :, rows] @ v[:, :, keys].mT
                delta = (p * dp).sum(-1, keepdim=True) - dlse_b[:, :, rows, None]
                ds = p * (dp - delta) * ctx.scale
                dq[:, :, rows] = ds @ k[:, :, keys]
                dk[:, :, keys] += ds.mT @ q[:, :, rows]
                dv[:, :, keys] += p.mT @ dout[:, :, rows]
        return *(x.transpose(0, 1).to(inputs[0].dtype) for x in grads), None, None, None


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q * scale) @ k.mT
    return scores if bias is None else scores + bias
