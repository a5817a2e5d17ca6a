"""Attention pooling over packed sequences, forward and backward; the probe is folded into the keys.

    pooled_bh = sum_i p_hi x_i    p_hi = exp(s_hi - lse_bh)    s_hi = w_h . x_i

over the tokens i of sequence b. The backward recomputes s and p from x, w and lse, and has

    dx_i = sum_h p_hi dout_bh + ds_hi w_h    dw_h = sum_i ds_hi x_i
    ds_hi = p_hi (dout_bh . x_i - delta_bh)    delta_bh = dout_bh . pooled_bh

The ds of a head sum to 0 over a sequence, so dw is taken as sum_i ds_hi (x_i - pooled_bh): what
rounding adds to delta would else be multiplied by the mean of x, which is large after a norm.
Forward and backward read x once, a tile of whole rows at a time.

- Forward: a sequence is cut into pieces of SPLIT tokens from its own beginning, a program each, and
  the pieces of a longer one are combined in their order: its bits ignore its neighbours. Sequence b
  owns programs from cu_seqlens[b] // SPLIT + b on, as many as its pieces at least, so no table is
  needed: a program finds its piece in cu_seqlens.
- Backward: a program takes a fixed range of rows, whatever sequences lie in it, and adds up one
  partial dw; the partials are summed in their order. Nothing is atomic.

The probe's score weights of all heads ride along in 16 rows of a tensor-core tile, and C is cut
into tiles of BLOCK_C columns, so that C = 768 pays for no more.

Source: multi-head attention pooling, arXiv 2106.04560, appendix; the online softmax and its
combination as in FlashAttention-2 and Flash-Decoding, arXiv 2307.08691.

Shapes: T packed rows, B sequences, H heads, C hidden size. x, dx [T, C]; w, dw [H, C]; pooled, dout
[B, H, C]; lse fp32 [B, H]; parts fp32 [2 (T // SPLIT), H, C] with part_lse fp32 [2 (T // SPLIT),
H]; dw_parts fp32 [programs, H, C].

No GPU has run this file yet: the settings come from registers and shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from slap_fast.kernels._compile import CompileCase
from slap_fast.kernels._packed import dot
from slap_fast.registration import register

SPLIT = 512
"""Tokens of a piece: a constant, as the bits of a sequence depend on it."""
BACKWARD_PROGRAMS = 528
"""At most; four for each of an H200's 132 multiprocessors."""
COMBINE_WARPS = 4


@triton.jit
def _place(rows, stride, last_row, j, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets [rows, BLOCK_C] from column tile j, and which of them exist. rows are int64."""
    cols = tl.arange(0, BLOCK_C)
    exists = (rows < last_row)[:, None]
    if C % BLOCK_C != 0:
        exists = exists & (cols < C - j * BLOCK_C)
    return rows[:, None] * stride + cols, exists


@triton.jit
def _load(ptr, rows, stride, last_row, j, C: tl.constexpr, BLOCK_C: tl.constexpr):
    offsets, exists = _place(rows, stride, last_row, j, C, BLOCK_C)
    return tl.load(ptr + j * BLOCK_C + offsets, mask=exists, other=0.0)


@triton.jit
def _store(ptr, rows, stride, last_row, j, value, C: tl.constexpr, BLOCK_C: tl.constexpr):
    offsets, exists = _place(rows, stride, last_row, j, C, BLOCK_C)
    tl.store(ptr + j * BLOCK_C + offsets, value.to(ptr.dtype.element_ty), mask=exists)


@triton.jit
def _start(cu_ptr, sequence, total):
    """cu_seqlens[sequence], inside the tensor whatever it says."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + sequence), 0), total)


@triton.jit
def _find(cu_ptr, value, num_sequences, total, SPLIT: tl.constexpr, STEP: tl.constexpr):
    """The last sequence b with cu_seqlens[b] // SPLIT + STEP b <= value."""
    low, high = 0, num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if _start(cu_ptr, middle, total) // SPLIT + STEP * middle <= value:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["total", "num_sequences"])
def _forward_kernel(
    x_ptr,
    w_ptr,
    cu_ptr,
    pooled_ptr,
    lse_ptr,
    parts_ptr,
    part_lse_ptr,
    x_stride,
    total,
    num_sequences,
    H: tl.constexpr,
    C: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    sequence = _find(cu_ptr, program, num_sequences, total, SPLIT, 1)
    begin, end = _start(cu_ptr, sequence, total), _start(cu_ptr, sequence + 1, total)
    piece = program - begin // SPLIT - sequence
    start = begin + piece * SPLIT
    stop = tl.minimum(start + SPLIT, end)
    if (piece > 0) & (start >= end):
        return

    heads = tl.arange(0, BLOCK_H).to(tl.int64)
    w = ()
    acc = ()
    for j in tl.static_range(TILES):
        w = w + (_load(w_ptr, heads, C, H, j, C, BLOCK_C),)
        acc = acc + (tl.zeros([BLOCK_H, BLOCK_C], tl.float32),)
    row_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    for t in range(start, stop, BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T).to(tl.int64)
        x = ()
        s = tl.zeros([BLOCK_H, BLOCK_T], tl.float32)
        for j in tl.static_range(TILES):
            x = x + (_load(x_ptr, rows, x_stride, stop, j, C, BLOCK_C),)
            s = dot(w[j], tl.trans(x[j]), s)
        s = tl.where(rows < stop, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp(s - new_max[:, None])
        shrink = tl.exp(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        row_max = new_max
        p = p.to(x_ptr.dtype.element_ty)
        before = acc
        acc = ()
        for j in tl.static_range(TILES):
            acc = acc + (dot(p, x[j], before[j] * shrink[:, None]),)

    row_sum = tl.where(start < stop, row_sum, 1.0)  # of an empty sequence: pooled 0, lse -inf
    lse = row_max + tl.log(row_sum)
    if end - begin <= SPLIT:
        out = sequence.to(tl.int64) * H
        tl.store(lse_ptr + out + heads, lse, mask=heads < H)
        for j in tl.static_range(TILES):
            value = acc[j] / row_sum[:, None]
            _store(pooled_ptr + out * C, heads, C, H, j, value, C, BLOCK_C)
    else:
        # More than one piece: twice the distance between starts has room for all of them.
        out = (2 * (begin // SPLIT) + piece).to(tl.int64) * H
        tl.store(part_lse_ptr + out + heads, lse, mask=heads < H)
        for j in tl.static_range(TILES):
            value = acc[j] / row_sum[:, None]
            _store(parts_ptr + out * C, heads, C, H, j, value, C, BLOCK_C)


@triton.jit(do_not_specialize=["total"])
def _combine_kernel(
    cu_ptr,
    pooled_ptr,
    lse_ptr,
    parts_ptr,
    part_lse_ptr,
    total,
    H: tl.constexpr,
    C: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One head of one sequence that has several pieces."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin, end = _start(cu_ptr, sequence, total), _start(cu_ptr, sequence + 1, total)
    if end - begin <= SPLIT:
        return
    cols = tl.arange(0, BLOCK_C)
    first = 2 * (begin // SPLIT)
    row_max, row_sum = float("-inf"), 0.0
    acc = tl.zeros([BLOCK_C], tl.float32)
    for part in range(first, first + tl.cdiv(end - begin, SPLIT)):
        row = tl.cast(part, tl.int64) * H + head
        lse = tl.load(part_lse_ptr + row)
        new_max = tl.maximum(row_max, lse)
        shrink, weight = tl.exp(row_max - new_max), tl.exp(lse - new_max)
        value = tl.load(parts_ptr + row * C + cols, mask=cols < C, other=0.0)
        acc = acc * shrink + weight * value
        row_sum = row_sum * shrink + weight
        row_max = new_max
    row = sequence.to(tl.int64) * H + head
    tl.store(lse_ptr + row, row_max + tl.log(row_sum))
    pooled = (acc / row_sum).to(pooled_ptr.dtype.element_ty)
    tl.store(pooled_ptr + row * C + cols, pooled, mask=cols < C)


@triton.jit(do_not_specialize=["total", "num_sequences"])
def _backward_kernel(
    x_ptr,
    w_ptr,
    cu_ptr,
    pooled_ptr,
    lse_ptr,
    dout_ptr,
    dx_ptr,
    dw_parts_ptr,
    x_stride,
    total,
    num_sequences,
    rows_per_program,
    H: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    first_row = program * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, total)
    first = _find(cu_ptr, first_row, num_sequences, total, 1, 0)
    last = _find(cu_ptr, last_row - 1, num_sequences, total, 1, 0)

    heads = tl.arange(0, BLOCK_H).to(tl.int64)
    w = ()
    dw = ()
    for j in tl.static_range(TILES):
        w = w + (_load(w_ptr, heads, C, H, j, C, BLOCK_C),)
        dw = dw + (tl.zeros([BLOCK_H, BLOCK_C], tl.float32),)
    for sequence in range(first, last + 1):
        start = tl.maximum(_start(cu_ptr, sequence, total), first_row)
        stop = tl.minimum(_start(cu_ptr, sequence + 1, total), last_row)
        out = tl.cast(sequence, tl.int64) * H
        lse = tl.load(lse_ptr + out + heads, mask=heads < H, other=0.0)
        delta = tl.zeros([BLOCK_H], tl.float32)
        ds_sum = tl.zeros([BLOCK_H], tl.float32)
        dout = ()
        for j in tl.static_range(TILES):
            dout = dout + (_load(dout_ptr + out * C, heads, C, H, j, C, BLOCK_C),)
            pooled = _load(pooled_ptr + out * C, heads, C, H, j, C, BLOCK_C)
            delta += tl.sum(dout[j].to(tl.float32) * pooled.to(tl.float32), 1)
        for t in range(start, stop, BLOCK_T):
            rows = t + tl.arange(0, BLOCK_T).to(tl.int64)
            x = ()
            s = tl.zeros([BLOCK_H, BLOCK_T], tl.float32)
            dp = tl.zeros([BLOCK_H, BLOCK_T], tl.float32)
            for j in tl.static_range(TILES):
                x = x + (_load(x_ptr, rows, x_stride, stop, j, C, BLOCK_C),)
                s = dot(w[j], tl.trans(x[j]), s)
                dp = dot(dout[j], tl.trans(x[j]), dp)
            # Masked: exp of a row that is not there may be infinite.
            p = tl.where(rows < stop, tl.exp(s - lse[:, None]), 0.0)
            ds = (p * (dp - delta[:, None])).to(x_ptr.dtype.element_ty)
            ds_sum += tl.sum(ds.to(tl.float32), 1)
            p = p.to(x_ptr.dtype.element_ty)
            before = dw
            dw = ()
            for j in tl.static_range(TILES):
                dw = dw + (dot(ds, x[j], before[j]),)
                dx = dot(tl.trans(p), dout[j], tl.zeros([BLOCK_T, BLOCK_C], tl.float32))
                dx = dot(tl.trans(ds), w[j], dx)
                _store(dx_ptr, rows, C, stop, j, dx, C, BLOCK_C)
        before = dw
        dw = ()
        for j in tl.static_range(TILES):
            pooled = _load(pooled_ptr + out * C, heads, C, H, j, C, BLOCK_C).to(tl.float32)
            dw = dw + (before[j] - ds_sum[:, None] * pooled,)
    for j in tl.static_range(TILES):
        out_ptr = dw_parts_ptr + program.to(tl.int64) * H * C
        _store(out_ptr, heads, C, H, j, dw[j], C, BLOCK_C)

    # Rows past the last sequence.
    start = tl.maximum(_start(cu_ptr, num_sequences, total), first_row)
    for t in range(start, last_row, BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T).to(tl.int64)
        for j in tl.static_range(TILES):
            nothing = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
            _store(dx_ptr, rows, C, last_row, j, nothing, C, BLOCK_C)


class Launch(NamedTuple):
    """How a kernel is launched."""

    block_t: int
    block_c: int
    num_warps: int
    num_stages: int


# (bytes of an element, widest C): (forward, backward). On sm_90 two programs of the 16-bit forward
# fit a multiprocessor; the backward of 65 to 128 columns takes two tiles of them, as in one it
# spills there with Triton 3.6. An fp32 product has no tensor cores and takes many registers: the
# backward of a wide x needs 16 warps, narrow tiles and no pipeline, or it spills there. On gfx942
# it spills 350 to 845 registers at any of 16 x 32 to 256, with 8 and 16 warps; the forward 44
# at best.
SETTINGS = {
    (2, 128): (Launch(32, 128, 4, 3), Launch(32, 64, 4, 3)),
    (2, 768): (Launch(16, 128, 8, 4), Launch(32, 128, 8, 3)),
    (2, 1024): (Launch(16, 256, 8, 3), Launch(16, 128, 8, 3)),
    (4, 128): (Launch(16, 128, 4, 2), Launch(16, 128, 4, 2)),
    (4, 768): (Launch(16, 128, 8, 2), Launch(16, 32, 16, 1)),
}


def _settings(element_size: int, hidden_size: int) -> tuple[Launch, Launch]:
    widths = [width for size, width in SETTINGS if size == element_size and hidden_size <= width]
    forward, backward = SETTINGS[element_size, min(widths)]
    if torch.version.hip:
        # AMD's 64 KB of shared memory hold one tile, and its pipelining pass (Triton 3.6, 3.7)
        # fails on the backward.
        return forward._replace(num_stages=1), backward._replace(num_stages=1)
    return forward, backward


def _constexprs(launch: Launch, num_heads: int, hidden_size: int) -> dict[str, int]:
    return {
        "H": num_heads,
        "C": hidden_size,
        "BLOCK_T": launch.block_t,
        "BLOCK_H": max(16, triton.next_power_of_2(num_heads)),  # rows of a tensor-core tile
        "BLOCK_C": max(16, min(launch.block_c, triton.next_power_of_2(hidden_size))),
    }


def _forward(x: Tensor, score_weight: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    pooled, lse = _forward_fake(x, score_weight, cu_seqlens)
    total, (num_sequences, num_heads, hidden_size) = len(x), pooled.shape
    if num_sequences == 0:
        return pooled, lse
    num_parts = 2 * (total // SPLIT)
    parts = x.new_empty(num_parts, num_heads, hidden_size, dtype=torch.float32)
    part_lse = x.new_empty(num_parts, num_heads, dtype=torch.float32)
    launch, _ = _settings(x.element_size(), hidden_size)
    with torch.cuda.device_of(x):
        _forward_kernel[(total // SPLIT + num_sequences,)](
            x,
            score_weight.contiguous(),
            cu_seqlens,
            pooled,
            lse,
            parts,
            part_lse,
            x.stride(0),
            total,
            num_sequences,
            SPLIT=SPLIT,
            **_constexprs(launch, num_heads, hidden_size),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if total > SPLIT:
            _combine_kernel[num_sequences, num_heads](
                cu_seqlens,
                pooled,
                lse,
                parts,
                part_lse,
                total,
                H=num_heads,
                C=hidden_size,
                SPLIT=SPLIT,
                BLOCK_C=triton.next_power_of_2(hidden_size),
                num_warps=COMBINE_WARPS,
            )
    return pooled, lse


def _forward_fake(x: Tensor, score_weight: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    num_sequences, num_heads = cu_seqlens.shape[0] - 1, score_weight.shape[0]
    pooled = x.new_empty(num_sequences, num_heads, x.shape[1])
    return pooled, x.new_empty(num_sequences, num_heads, dtype=torch.float32)


def _backward(
    x: Tensor,
    score_weight: Tensor,
    cu_seqlens: Tensor,
    pooled: Tensor,
    lse: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor]:
    dx, dw = _backward_fake(x, score_weight, cu_seqlens, pooled, lse, dout)
    total, (num_sequences, num_heads, hidden_size) = len(x), pooled.shape
    if num_sequences == 0 or total == 0:
        return dx.zero_(), dw.zero_()
    _, launch = _settings(x.element_size(), hidden_size)
    rows = launch.block_t * triton.cdiv(total, launch.block_t * BACKWARD_PROGRAMS)
    programs = triton.cdiv(total, rows)
    dw_parts = x.new_empty(programs, num_heads, hidden_size, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[(programs,)](
            x,
            score_weight.contiguous(),
            cu_seqlens,
            pooled,
            lse,
            dout.contiguous(),
            dx,
            dw_parts,
            x.stride(0),
            total,
            num_sequences,
            rows,
            **_constexprs(launch, num_heads, hidden_size),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return dx, dw.copy_(dw_parts.sum(0))


def _backward_fake(
    x: Tensor,
    score_weight: Tensor,
    cu_seqlens: Tensor,
    pooled: Tensor,
    lse: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), score_weight.new_empty(score_weight.shape)


_forward_op = register(
    "map_pool(Tensor x, Tensor score_weight, Tensor cu_seqlens) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = register(
    "map_pool_backward(Tensor x, Tensor score_weight, Tensor cu_seqlens, Tensor pooled, "
    "Tensor lse, Tensor dout) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _MapPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, score_weight: Tensor, cu_seqlens: Tensor) -> Tensor:
        pooled, lse = _forward_op(x, score_weight, cu_seqlens)
        ctx.save_for_backward(x, score_weight, cu_seqlens, pooled, lse)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_backward_op(*ctx.saved_tensors, dout), None


_SCALARS = ("x_stride", "total", "num_sequences", "rows_per_program")
_FP32 = ("lse_ptr", "parts_ptr", "part_lse_ptr", "dw_parts_ptr")


def compile_cases() -> Iterator[CompileCase]:
    """Every kernel and setting, for a compiler without a GPU."""
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for hidden_size in (64, 100, 768, *([1024] if size == 2 else [])):
            forward, backward = _settings(size, hidden_size)
            constexprs = _constexprs(forward, 12, hidden_size) | {"SPLIT": SPLIT}
            combine = {"H": 12, "C": hidden_size, "SPLIT": SPLIT}
            combine["BLOCK_C"] = triton.next_power_of_2(hidden_size)
            for kernel, constants, num_warps, num_stages in (
                (_forward_kernel, constexprs, forward.num_warps, forward.num_stages),
                (_combine_kernel, combine, COMBINE_WARPS, 1),
                (
                    _backward_kernel,
                    _constexprs(backward, 12, hidden_size),
                    backward.num_warps,
                    backward.num_stages,
                ),
            ):
                types = dict.fromkeys(kernel.arg_names, f"*{dtype}")
                types |= dict.fromkeys(_FP32, "*fp32") | dict.fromkeys(_SCALARS, "i32")
                types |= {"cu_ptr": "*i32"} | dict.fromkeys(constants, "constexpr")
                signature = {name: types[name] for name in kernel.arg_names}
                name = f"{kernel.__name__.strip('_')}-{dtype}-{hidden_size}"
                yield CompileCase(name, kernel, signature, constants, num_warps, num_stages)


def map_pool(x: Tensor, score_weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """pooled[b, h] = sum_i softmax_i(x_i . score_weight[h]) x_i over the tokens i of sequence b.

    x [T, C] fp16, bf16 or fp32 with a dense last axis, score_weight [H, C] of its dtype, cu_seqlens
    int32 [B + 1] -> [B, H, C] in x's dtype, differentiable once. A sequence without tokens gives
    zeros; rows past ``cu_seqlens[-1]`` are not read, and their gradient is 0. C is at most 1024
    (768 for fp32), H at most 16: ``ops.map_pool`` sees to it.
    """
    return _MapPool.apply(x, score_weight, cu_seqlens)
