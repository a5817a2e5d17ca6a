"""What kernels over packed rows share: products, the span of a sequence, heads loaded and stored.

Heads are loaded as their two halves, rotated in fp32, rounded once and joined pair by pair (element
2 c is c, element 2 c + 1 is c + D / 2): the order does not change a product over a head, and what
comes out of one is split again, turned back and stored by halves.

Shapes: D head size, PADDED to a power of two; rows int64 [ROWS], of the packed tensor; valid bool
[ROWS]; a pointer is at its head's first row.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def padded(head_dim):
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def dot(a, b, acc=None):
    if INTERPRET:  # the interpreter's product of bf16 is garbage
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def span(cu_ptr, sequence, total):
    """First row and length of a sequence, inside the tensor whatever cu_seqlens says."""
    begin = tl.maximum(tl.load(cu_ptr + sequence), 0)
    end = tl.minimum(tl.load(cu_ptr + sequence + 1), total)
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def load(ptr, stride, rows, valid, HEAD_DIM: tl.constexpr):
    """[ROWS, PADDED] of one head; 0 where not valid. rows are int64."""
    cols = tl.arange(0, padded(HEAD_DIM))[None, :]
    mask = valid[:, None] & (cols < HEAD_DIM)
    return tl.load(ptr + rows[:, None] * stride + cols, mask=mask, other=0.0)


@triton.jit
def store(ptr, stride, rows, valid, x, HEAD_DIM: tl.constexpr):
    cols = tl.arange(0, padded(HEAD_DIM))[None, :]
    mask = valid[:, None] & (cols < HEAD_DIM)
    tl.store(ptr + rows[:, None] * stride + cols, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _angles(cos_ptr, sin_ptr, rows, valid, HEAD_DIM: tl.constexpr):
    """cos and sin [ROWS, PADDED / 2], their columns and where they are valid."""
    cols = tl.arange(0, padded(HEAD_DIM) // 2)[None, :]
    mask = valid[:, None] & (cols < HEAD_DIM // 2)
    at = rows[:, None] * (HEAD_DIM // 2) + cols
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0)
    return cos, sin, cols, mask


@triton.jit
def load_rotated(ptr, stride, rows, valid, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr):
    """load, rotated and joined pair by pair; without tables, load itself."""
    if cos_ptr is None:
        x = load(ptr, stride, rows, valid, HEAD_DIM)
    else:
        cos, sin, cols, mask = _angles(cos_ptr, sin_ptr, rows, valid, HEAD_DIM)
        lower_ptr = ptr + rows[:, None] * stride + cols
        lower = tl.load(lower_ptr, mask=mask, other=0.0).to(tl.float32)
        upper = tl.load(lower_ptr + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
        x = tl.join(lower * cos - upper * sin, upper * cos + lower * sin)
        x = tl.reshape(x, (rows.shape[0], padded(HEAD_DIM))).to(ptr.dtype.element_ty)
    return x


@triton.jit
def store_turned_back(ptr, stride, rows, valid, x, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr):
    """Stores the gradient of what load_rotated loaded, given that of its result."""
    if cos_ptr is None:
        store(ptr, stride, rows, valid, x, HEAD_DIM)
    else:
        cos, sin, cols, mask = _angles(cos_ptr, sin_ptr, rows, valid, HEAD_DIM)
        lower, upper = tl.split(tl.reshape(x, (rows.shape[0], padded(HEAD_DIM) // 2, 2)))
        lower_ptr = ptr + rows[:, None] * stride + cols
        dtype = ptr.dtype.element_ty
        tl.store(lower_ptr, (lower * cos + upper * sin).to(dtype), mask=mask)
        tl.store(lower_ptr + HEAD_DIM // 2, (upper * cos - lower * sin).to(dtype), mask=mask)
