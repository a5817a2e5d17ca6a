"""Packed attention with rotary embedding, forward and backward, local or global.

    out_i = sum_j p_ij v_j    p_ij = exp(s_ij - lse_i)    s_ij = scale R_i q_i . R_j k_j

over the keys j of i's sequence that query i sees; R_i rotates the pairs (c, c + D / 2) of a head by
the angles of row i. The backward recomputes s and p from q, k and lse, and has

    dv_j = sum_i p_ij dout_i        dp_ij = dout_i . v_j       delta_i = sum_j p_ij dp_ij - dlse_i
    dk_j = R_j^-1 scale sum_i ds_ij R_i q_i        ds_ij = p_ij (dp_ij - delta_i)
    dq_i = R_i^-1 scale sum_j ds_ij R_j k_j

The length of a sequence, that of its queries or its keys, whichever is longer, decides which of two
kernels computes it, so that its bits never depend on its neighbours:

- short-sequence, up to the limits in SETTINGS: one program per sequence and head. All keys stay,
  read and rotated once; blocks of queries pass by, each with a single-pass softmax. In the backward
  all queries stay and blocks of keys pass by. Short sequences are bound by L2, and tiles of 64
  queries would read the keys of a 10 s clip four times.
- tiled, above: one program per block and head walks over the blocks that the window can see.

Nothing is atomic: a program owns the rows it writes, and a program of keys sums over all the query
heads that share them.

Source: FlashAttention-2, arXiv 2307.08691; rotary embedding, arXiv 2104.09864.

Shapes: T packed rows, B sequences, H query heads, Hkv key heads, D head size (PADDED to a power of
two). q, out, dout, dq [T, H, D]; k, v, dk, dv [Tk, Hkv, D]; lse, delta fp32 [H, T]; cos, sin fp32
[T, D / 2]. i counts the queries of a sequence, j its keys; rows are those of the packed tensors.

No GPU has run this file yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slap_fast.kernels._attention_settings import SETTINGS, Setting, Settings, architecture
from slap_fast.kernels._compile import CompileCase, compile_case
from slap_fast.kernels._packed import (
    dot,
    load,
    load_rotated,
    padded,
    span,
    store,
    store_turned_back,
)
from slap_fast.registration import register

OPEN = 1 << 30
"""A window side without end."""
TILE = tl.constexpr(128)
"""Rows of a tile of the schedule; a kernel of smaller blocks has several programs per tile."""
CLEAR_BLOCK = {"ROWS": 8, "COLS": 256}
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NUMBERS = ["total_q", "total_k", "num_heads", "left", "right"]


@triton.jit
def _assignment(
    tiles_ptr, cu_q_ptr, cu_k_ptr, total_q, total_k, num_heads, SHORTER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's head (int64), first row in its sequence, first rows and lengths of the queries
    and keys of that, and whether this kernel runs it: more than SHORTER rows, and without tiles
    at most BLOCK."""
    block, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    if tiles_ptr is None:
        sequence, start = block, 0
    else:
        split: tl.constexpr = TILE // BLOCK
        tile_ptr = tiles_ptr + block // split * 2
        sequence, start = tl.load(tile_ptr), tl.load(tile_ptr + 1) * TILE + block % split * BLOCK
    begin_q, len_q = span(cu_q_ptr, sequence, total_q)
    begin_k, len_k = span(cu_k_ptr, sequence, total_k)
    length = tl.maximum(len_q, len_k)
    runs = length > SHORTER
    if tiles_ptr is None:
        runs = runs & (length <= BLOCK)
    return head.to(tl.int64), start, begin_q.to(tl.int64), len_q, begin_k.to(tl.int64), len_k, runs


@triton.jit
def _sees(i, j, len_q, len_k, left, right, LOCAL: tl.constexpr):
    """Whether query i sees key j; i and j broadcast."""
    seen = (i < len_q) & (j < len_k)
    if LOCAL:
        distance = j - i - (len_k - len_q)
        seen = seen & (distance >= -left) & (distance <= right)
    return seen


@triton.jit
def _seen_from(start, BLOCK: tl.constexpr, offset, before, after, length):
    """The rows of the other side, begin and end, that a block from start on can see."""
    position = start + offset
    return tl.maximum(position - before, 0), tl.minimum(position + BLOCK + after, length)


@triton.jit
def _softmax_step(scores, high):
    """Exponentials [Q, K] of scores (base 2) over the new row maximum; that maximum; and the factor
    for sums under the old one, high. The maximum of a row that has seen nothing yet is -inf, and
    -inf less -inf would be NaN."""
    new_high = tl.maximum(high, tl.max(scores, 1))
    shift = tl.where(new_high == float("-inf"), 0.0, new_high)
    return tl.exp2(scores - shift[:, None]), new_high, tl.exp2(high - shift)


@triton.jit
def _store_result(out_ptr, lse_ptr, stride, rows, valid, acc, high, total, HEAD_DIM: tl.constexpr):
    """out = acc / total, and lse from the row maximum (base 2) and total; 0, -inf for no key."""
    masked = total == 0.0
    total = tl.where(masked, 1.0, total)
    store(out_ptr, stride, rows, valid, acc / total[:, None], HEAD_DIM)
    lse = tl.where(masked, float("-inf"), (high + tl.log2(total)) * LN2)
    tl.store(lse_ptr + rows, lse, mask=valid)


@triton.jit(do_not_specialize=NUMBERS)
def _forward_short(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cos_ptr, sin_ptr, cu_q_ptr, cu_k_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    total_q, total_k, num_heads, left, right, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LOCAL: tl.constexpr,
    SHORTER: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One head of a short sequence: all its keys stay, BLOCK_Q queries at a time pass by."""
    head, zero, begin_q, len_q, begin_k, len_k, runs = _assignment(
        None, cu_q_ptr, cu_k_ptr, total_q, total_k, num_heads, SHORTER, BLOCK_K
    )
    if not runs:
        return
    j = tl.arange(0, BLOCK_K)
    rows_k, valid_k = begin_k + j, j < len_k
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    k = load_rotated(k_ptr, k_stride, rows_k, valid_k, cos_ptr, sin_ptr, HEAD_DIM)
    v = load(v_ptr, v_stride, rows_k, valid_k, HEAD_DIM)
    q_ptr += head * q_head_stride
    out_ptr += head * HEAD_DIM
    lse_ptr += head * total_q
    for start in range(0, len_q, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        rows, valid = begin_q + i, i < len_q
        q = load_rotated(q_ptr, q_stride, rows, valid, cos_ptr, sin_ptr, HEAD_DIM)
        seen = _sees(i[:, None], j[None, :], len_q, len_k, left, right, LOCAL)
        scores = tl.where(seen, dot(q, tl.trans(k)) * (scale * LOG2E), float("-inf"))
        p, high, no_past = _softmax_step(scores, tl.full((BLOCK_Q,), float("-inf"), tl.float32))
        acc, total, stride = dot(p.to(v.dtype), v), tl.sum(p, 1), num_heads * HEAD_DIM
        _store_result(out_ptr, lse_ptr, stride, rows, valid, acc, high, total, HEAD_DIM)


@triton.jit(do_not_specialize=NUMBERS)
def _forward_tiled(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cos_ptr, sin_ptr, cu_q_ptr, cu_k_ptr, tiles_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    total_q, total_k, num_heads, left, right, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LOCAL: tl.constexpr,
    SHORTER: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one head walk over the keys they can see."""
    head, start, begin_q, len_q, begin_k, len_k, runs = _assignment(
        tiles_ptr, cu_q_ptr, cu_k_ptr, total_q, total_k, num_heads, SHORTER, BLOCK_Q
    )
    if (not runs) | (start >= len_q):
        return
    i = start + tl.arange(0, BLOCK_Q)
    rows, valid = begin_q + i, i < len_q
    q_ptr += head * q_head_stride
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    q = load_rotated(q_ptr, q_stride, rows, valid, cos_ptr, sin_ptr, HEAD_DIM)
    acc = tl.zeros((BLOCK_Q, padded(HEAD_DIM)), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    high = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    first, last = _seen_from(start, BLOCK_Q, len_k - len_q, left, right, len_k)
    for start_k in range(first, last, BLOCK_K):
        j = start_k + tl.arange(0, BLOCK_K)
        rows_k, valid_k = begin_k + j, j < len_k
        k = load_rotated(k_ptr, k_stride, rows_k, valid_k, cos_ptr, sin_ptr, HEAD_DIM)
        v = load(v_ptr, v_stride, rows_k, valid_k, HEAD_DIM)
        seen = _sees(i[:, None], j[None, :], len_q, len_k, left, right, LOCAL)
        scores = tl.where(seen, dot(q, tl.trans(k)) * (scale * LOG2E), float("-inf"))
        p, high, rescale = _softmax_step(scores, high)
        acc = acc * rescale[:, None] + dot(p.to(v.dtype), v)
        total = total * rescale + tl.sum(p, 1)
    out_ptr += head * HEAD_DIM
    lse_ptr += head * total_q
    stride = num_heads * HEAD_DIM
    _store_result(out_ptr, lse_ptr, stride, rows, valid, acc, high, total, HEAD_DIM)


@triton.jit(do_not_specialize=NUMBERS)
def _backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    cos_ptr, sin_ptr, cu_q_ptr, cu_k_ptr, tiles_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    dout_stride, dout_head_stride, dq_stride, dk_stride, dv_stride,
    total_q, total_k, num_heads, left, right, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LOCAL: tl.constexpr,
    SHORTER: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_Q queries of one head, which walk over the keys they can see.

    Tiled, it leaves delta for _backward_keys. Without tiles the queries are a short sequence's: all
    of them meet every key, so dk and dv are done too (GROUP is 1).
    """
    SHORT: tl.constexpr = tiles_ptr is None
    head, start, begin_q, len_q, begin_k, len_k, runs = _assignment(
        tiles_ptr, cu_q_ptr, cu_k_ptr, total_q, total_k, num_heads, SHORTER, BLOCK_Q
    )
    if not runs:
        return
    first, last = 0, len_k
    if not SHORT:
        if start >= len_q:
            return
        first, last = _seen_from(start, BLOCK_Q, len_k - len_q, left, right, len_k)
    i = start + tl.arange(0, BLOCK_Q)
    rows, valid = begin_q + i, i < len_q
    head_kv = head // GROUP
    q_ptr += head * q_head_stride
    k_ptr += head_kv * k_head_stride
    v_ptr += head_kv * v_head_stride
    dout_ptr += head * dout_head_stride
    q = load_rotated(q_ptr, q_stride, rows, valid, cos_ptr, sin_ptr, HEAD_DIM)
    dout = load(dout_ptr, dout_stride, rows, valid, HEAD_DIM)
    out = load(out_ptr + head * HEAD_DIM, num_heads * HEAD_DIM, rows, valid, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    rows_of_head = head * total_q + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows_of_head, mask=valid, other=0.0)
    if not SHORT:
        tl.store(delta_ptr + rows_of_head, delta, mask=valid)
    lse = tl.load(lse_ptr + rows_of_head, mask=valid, other=0.0) * LOG2E
    dq = tl.zeros((BLOCK_Q, padded(HEAD_DIM)), tl.float32)
    for start_k in range(first, last, BLOCK_K):
        j = start_k + tl.arange(0, BLOCK_K)
        rows_k, valid_k = begin_k + j, j < len_k
        k = load_rotated(k_ptr, k_stride, rows_k, valid_k, cos_ptr, sin_ptr, HEAD_DIM)
        v = load(v_ptr, v_stride, rows_k, valid_k, HEAD_DIM)
        seen = _sees(i[:, None], j[None, :], len_q, len_k, left, right, LOCAL)
        # Unseen, p is anything up to inf, and the dlse of a row that sees nothing may be NaN.
        p = tl.exp2(dot(q, tl.trans(k)) * (scale * LOG2E) - lse[:, None])
        dp = dot(dout, tl.trans(v))
        ds = tl.where(seen, p * (dp - delta[:, None]), 0.0).to(k.dtype)
        dq += dot(ds, k)
        if SHORT:
            # Transposed: a product's tall side has to be at least 64 for wgmma, BLOCK_K is not.
            p = tl.where(seen, p, 0.0).to(dout.dtype)
            dv = tl.trans(dot(tl.trans(dout), p))
            store(dv_ptr + head * HEAD_DIM, dv_stride, rows_k, valid_k, dv, HEAD_DIM)
            dk = tl.trans(dot(tl.trans(q), ds)) * scale
            at = dk_ptr + head * HEAD_DIM
            store_turned_back(at, dk_stride, rows_k, valid_k, dk, cos_ptr, sin_ptr, HEAD_DIM)
    dq_ptr += head * HEAD_DIM
    store_turned_back(dq_ptr, dq_stride, rows, valid, dq * scale, cos_ptr, sin_ptr, HEAD_DIM)


@triton.jit(do_not_specialize=NUMBERS)
def _backward_keys(
    q_ptr, k_ptr, v_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    cos_ptr, sin_ptr, cu_q_ptr, cu_k_ptr, tiles_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    dout_stride, dout_head_stride, dk_stride, dv_stride,
    total_q, total_k, num_heads, left, right, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LOCAL: tl.constexpr,
    SHORTER: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_K keys of one head, which walk over the queries that can see them, head by
    head of those that share the keys. Tiled only, after _backward_queries."""
    head_kv, start_k, begin_q, len_q, begin_k, len_k, runs = _assignment(
        tiles_ptr, cu_q_ptr, cu_k_ptr, total_q, total_k, num_heads // GROUP, SHORTER, BLOCK_K
    )
    if (not runs) | (start_k >= len_k):
        return
    j = start_k + tl.arange(0, BLOCK_K)
    rows_k, valid_k = begin_k + j, j < len_k
    k_ptr += head_kv * k_head_stride
    v_ptr += head_kv * v_head_stride
    k = load_rotated(k_ptr, k_stride, rows_k, valid_k, cos_ptr, sin_ptr, HEAD_DIM)
    v = load(v_ptr, v_stride, rows_k, valid_k, HEAD_DIM)
    dk = tl.zeros((BLOCK_K, padded(HEAD_DIM)), tl.float32)
    dv = tl.zeros((BLOCK_K, padded(HEAD_DIM)), tl.float32)
    first, last = _seen_from(start_k, BLOCK_K, len_q - len_k, right, left, len_q)
    for member in range(GROUP):
        head = head_kv * GROUP + member
        for start in range(first, last, BLOCK_Q):
            i = start + tl.arange(0, BLOCK_Q)
            rows, valid = begin_q + i, i < len_q
            at = q_ptr + head * q_head_stride
            q = load_rotated(at, q_stride, rows, valid, cos_ptr, sin_ptr, HEAD_DIM)
            dout = load(dout_ptr + head * dout_head_stride, dout_stride, rows, valid, HEAD_DIM)
            rows_of_head = head * total_q + rows
            lse = tl.load(lse_ptr + rows_of_head, mask=valid, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + rows_of_head, mask=valid, other=0.0)
            seen = _sees(i[None, :], j[:, None], len_q, len_k, left, right, LOCAL)
            # Keys by queries: p and ds are then left operands as they come.
            p = tl.exp2(dot(k, tl.trans(q)) * (scale * LOG2E) - lse[None, :])
            p = tl.where(seen, p, 0.0)
            dv += dot(p.to(dout.dtype), dout)
            dp = dot(v, tl.trans(dout))
            ds = p * (dp - delta[None, :])
            dk += dot(ds.to(q.dtype), q)
    dk_ptr += head_kv * HEAD_DIM
    dv_ptr += head_kv * HEAD_DIM
    store_turned_back(dk_ptr, dk_stride, rows_k, valid_k, dk * scale, cos_ptr, sin_ptr, HEAD_DIM)
    store(dv_ptr, dv_stride, rows_k, valid_k, dv, HEAD_DIM)


@triton.jit(do_not_specialize=["total", "num_heads", "num_programs", "num_sequences"])
def _clear_tail(
    x_ptr, lse_ptr, cu_ptr, stride, total, num_heads, num_programs, num_sequences,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x [total, stride] becomes 0 and lse [H, total] -inf in the rows past the last sequence."""
    end = tl.maximum(tl.load(cu_ptr + num_sequences), 0)
    for start in range(end + tl.program_id(0) * ROWS, total, num_programs * ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        for start_col in range(0, stride, COLS):
            cols = start_col + tl.arange(0, COLS)[None, :]
            zeros = tl.zeros((ROWS, COLS), x_ptr.dtype.element_ty)
            mask = (rows < total)[:, None] & (cols < stride)
            tl.store(x_ptr + rows[:, None] * stride + cols, zeros, mask=mask)
        if lse_ptr is not None:
            for head in range(num_heads):
                at = total.to(tl.int64) * head + rows
                tl.store(lse_ptr + at, float("-inf"), mask=rows < total)


def _settings(q: Tensor, k: Tensor) -> Settings:
    settings = SETTINGS[architecture(q.device), 64 if q.shape[2] <= 64 else 128, q.element_size()]
    # The short-sequence backward writes keys from one query head, so none may share them.
    return settings if q.shape[1] == k.shape[1] else settings._replace(backward_short={})


def compile_cases() -> Iterator[CompileCase]:
    """Every kernel with every setting and dtype, for its GPU: rotary, with dlse, local, global."""
    clear = Setting(0, 0, num_warps=4, num_stages=1)
    kernels = (
        ("forward_short", _forward_short, ()),
        ("forward_tiled", _forward_tiled, ()),
        ("backward_short", _backward_queries, ("delta_ptr", "tiles_ptr")),
        ("backward_queries", _backward_queries, ("dk_ptr", "dv_ptr")),
        ("backward_keys", _backward_keys, ()),
        ("clear_tail", _clear_tail, ()),
    )
    for ((target, head_dim, size), settings), (kind, kernel, absent), local in itertools.product(
        SETTINGS.items(), kernels, (True, False)
    ):
        chosen = getattr(settings, kind, clear)
        for (block_q, block_k, num_warps, num_stages), dtype in itertools.product(
            chosen.values() if isinstance(chosen, dict) else (chosen,),
            ("fp16", "bf16") if size == 2 else ("fp32",),
        ):
            name = f"{kind} D={head_dim} {dtype} {block_q}x{block_k} " + ("global", "local")[local]
            constexprs = dict.fromkeys(absent) | {"GROUP": 1, "HEAD_DIM": head_dim, "LOCAL": local}
            constexprs |= {"SHORTER": 0, "BLOCK_Q": block_q, "BLOCK_K": block_k} | CLEAR_BLOCK
            yield compile_case(name, kernel, dtype, constexprs, num_warps, num_stages, target)


def num_tiles(cu_seqlens: Tensor, total_tokens: int) -> int:
    """How many tiles a schedule has: an upper bound, which needs no sync."""
    num_sequences = len(cu_seqlens) - 1
    return total_tokens // TILE.value + num_sequences if num_sequences else 0


def schedule_tiles(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """(sequence, tile in it) of every tile of packed rows, int32 [num_tiles, 2].

    cu_seqlens int32 [B + 1]. On its device and without a sync; tiles too many lie past the end of
    the last sequence.
    """
    if len(cu_seqlens) == 1:
        return cu_seqlens.new_empty(0, 2)
    tiles = (cu_seqlens.diff() + (TILE.value - 1)) // TILE.value
    ends = tiles.cumsum(0)
    tile = torch.arange(num_tiles(cu_seqlens, total_tokens), device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, tile, right=True).clamp(max=len(cu_seqlens) - 2)
    return torch.stack((sequence, tile - (ends - tiles)[sequence]), dim=1).int()


class _Call(NamedTuple):
    """The arguments of the operations besides q, k, v and their gradients."""

    cu_seqlens: Tensor
    cu_seqlens_k: Tensor
    schedule: Tensor | None
    schedule_k: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    max_seqlen: int
    max_seqlen_k: int
    left: int
    right: int
    softmax_scale: float

    SCHEMA = (
        "Tensor cu_seqlens, Tensor cu_seqlens_k, Tensor? schedule, Tensor? schedule_k, "
        "Tensor? cos, Tensor? sin, SymInt max_seqlen, SymInt max_seqlen_k, int left, int right, "
        "float softmax_scale"
    )
    NUM_TENSORS = 6

    def launches(self, short: dict[int, Setting]) -> Iterator[tuple[int, Setting | None]]:
        """(SHORTER, setting) of the short-sequence kernels, then of the tiled one, whose setting is
        None. Those that max_seqlen leaves without a sequence are not launched."""
        for shorter, setting in zip([0, *short], [*short.values(), None], strict=True):
            if max(self.max_seqlen, self.max_seqlen_k) > shorter:
                yield shorter, setting

    def launch(
        self, kernel: Any, programs: int, shorter: int, setting: Setting, q: Tensor, k: Tensor,
        *tensors_and_strides: Tensor | int | None,
    ) -> None:  # fmt: skip
        """Launches a kernel; the arguments that every kernel has in common come last."""
        block_q, block_k, num_warps, num_stages = setting
        kernel[(programs,)](
            *tensors_and_strides,
            len(q), len(k), q.shape[1], self.left, self.right, self.softmax_scale,
            GROUP=q.shape[1] // k.shape[1], HEAD_DIM=q.shape[2],
            LOCAL=min(self.left, self.right) < OPEN,
            SHORTER=shorter, BLOCK_Q=block_q, BLOCK_K=block_k,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip


def _tiles(
    schedule: Tensor | None, cu_seqlens: Tensor, x: Tensor, block: int
) -> tuple[Tensor, int]:
    """The schedule of the rows of x, made where there is none, and how many blocks it has."""
    tiles = schedule_tiles(cu_seqlens, len(x)) if schedule is None else schedule
    return tiles, len(tiles) * (TILE.value // block)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _parts(inputs: list[Tensor], num_heads_kv: int) -> list[Tensor]:
    """q, k and v of the inputs: these, or qkv [T, H + 2 Hkv, D] alone."""
    if len(inputs) == 3:
        return inputs
    num_heads = inputs[0].shape[1] - 2 * num_heads_kv
    return inputs[0].split((num_heads, num_heads_kv, num_heads_kv), dim=1)


def _clear(x: Tensor, cu_seqlens: Tensor, lse: Tensor | None = None) -> None:
    """Writes the rows of a dense x [T, H, D], and of lse, past the last sequence."""
    programs = min(len(x), 1024)
    numbers = x.stride(0), len(x), x.shape[1], programs, len(cu_seqlens) - 1
    _clear_tail[(programs,)](x, lse, cu_seqlens, *numbers, **CLEAR_BLOCK)


def _allocate_forward(inputs: list[Tensor], num_heads_kv: int, *_: Any) -> tuple[Tensor, Tensor]:
    q = _parts(inputs, num_heads_kv)[0]
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _forward(inputs: list[Tensor], num_heads_kv: int, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    out, lse = _allocate_forward(inputs, num_heads_kv)
    q, k, v = _parts(inputs, num_heads_kv)
    settings, num_heads, strides = _settings(q, k), q.shape[1], _strides(q, k, v)
    tensors = (q, k, v, out, lse, call.cos, call.sin, call.cu_seqlens, call.cu_seqlens_k)
    with torch.cuda.device_of(q):
        for shorter, setting in call.launches(settings.forward_short):
            if setting is not None:
                programs = (len(call.cu_seqlens) - 1) * num_heads
                call.launch(_forward_short, programs, shorter, setting, q, k, *tensors, *strides)
                continue
            setting = settings.forward_tiled
            tiles, blocks = _tiles(call.schedule, call.cu_seqlens, q, setting.block_q)
            call.launch(
                _forward_tiled, blocks * num_heads, shorter, setting, q, k,
                *tensors, tiles, *strides,
            )  # fmt: skip
        _clear(out, call.cu_seqlens, lse)
    return out, lse


def _allocate_backward(_dout: Tensor, _dlse: Any, inputs: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs]


def _backward(
    dout: Tensor, dlse: Tensor | None, inputs: list[Tensor], num_heads_kv: int, out: Tensor,
    lse: Tensor, *arguments: Any,
) -> list[Tensor]:  # fmt: skip
    call = _Call(*arguments)
    gradients = _allocate_backward(dout, dlse, inputs)
    q, k, v = _parts(inputs, num_heads_kv)
    dq, dk, dv = _parts(gradients, num_heads_kv)
    settings, num_heads = _settings(q, k), q.shape[1]
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    operands = (q, k, v, out, lse, dout, dlse)
    positions = (call.cos, call.sin, call.cu_seqlens, call.cu_seqlens_k)
    strides, rows_k = _strides(q, k, v, dout), (dk.stride(0), dv.stride(0))
    sequences = len(call.cu_seqlens) - 1
    with torch.cuda.device_of(q):
        for shorter, setting in call.launches(settings.backward_short):
            if setting is not None:
                call.launch(
                    _backward_queries, sequences * num_heads, shorter, setting, q, k,
                    *operands, None, dq, dk, dv, *positions, None, *strides, dq.stride(0), *rows_k,
                )  # fmt: skip
                continue
            delta, setting = torch.empty_like(lse), settings.backward_queries
            tiles, blocks = _tiles(call.schedule, call.cu_seqlens, q, setting.block_q)
            call.launch(
                _backward_queries, blocks * num_heads, shorter, setting, q, k,
                *operands, delta, dq, None, None, *positions, tiles, *strides, dq.stride(0), 0, 0,
            )  # fmt: skip
            setting = settings.backward_keys
            tiles, blocks = _tiles(call.schedule_k, call.cu_seqlens_k, k, setting.block_k)
            call.launch(
                _backward_keys, blocks * num_heads_kv, shorter, setting, q, k,
                q, k, v, lse, dout, delta, dk, dv, *positions, tiles, *strides, *rows_k,
            )  # fmt: skip
        for x, starts in zip(gradients, (call.cu_seqlens, *[call.cu_seqlens_k] * 2), strict=False):
            _clear(x, starts)
    return gradients


_forward_op = register(
    f"attention_forward(Tensor[] inputs, int num_heads_kv, {_Call.SCHEMA}) -> (Tensor, Tensor)",
    _forward,
    _allocate_forward,
)
_backward_op = register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor[] inputs, int num_heads_kv, Tensor out, "
    f"Tensor lse, {_Call.SCHEMA}) -> Tensor[]",
    _backward,
    _allocate_backward,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, return_lse: bool, num_heads_kv: int, call: _Call, *inputs: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = _forward_op(inputs, num_heads_kv, *call)
        ctx.save_for_backward(*inputs, out, lse, *call[: _Call.NUM_TENSORS])
        ctx.num_inputs, ctx.num_heads_kv = len(inputs), num_heads_kv
        ctx.numbers = call[_Call.NUM_TENSORS :]
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        # once_differentiable would say nothing where dout is a constant, as that of a sum is.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("Triton's attention has no second derivative; use impl='reference'")
        saved = ctx.saved_tensors
        inputs, rest = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
        gradients = _backward_op(dout, dlse, inputs, ctx.num_heads_kv, *rest, *ctx.numbers)
        return None, None, None, *gradients


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`slap_fast.ops.attention`, which documents and checks the arguments."""
    return _attend((q, k, v), k.shape[1], cu_seqlens, max_seqlen, **options)


def attention_qkvpacked(
    qkv: Tensor, num_heads_kv: int, cu_seqlens: Tensor, max_seqlen: int, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`slap_fast.ops.attention_qkvpacked`, which documents and checks the arguments."""
    return _attend((qkv,), num_heads_kv, cu_seqlens, max_seqlen, **options)


def _attend(
    inputs: tuple[Tensor, ...],
    num_heads_kv: int,
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
    schedule: Tensor | None = None,
    schedule_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    cos, sin = (None, None) if rope is None else (x.contiguous() for x in rope)
    sides = (window_size[0], 0 if causal else window_size[1])
    left, right = (OPEN if size == -1 else min(size, OPEN) for size in sides)
    scale = inputs[0].shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if cu_seqlens_k is None:
        cu_seqlens_k, schedule_k, max_seqlen_k = cu_seqlens, schedule, max_seqlen
    tensors = (cu_seqlens, cu_seqlens_k, schedule, schedule_k, cos, sin)
    call = _Call(*tensors, max_seqlen, max_seqlen_k, left, right, scale)
    return _Attention.apply(return_lse, num_heads_kv, call, *inputs)
