"""Packed rotary attention, ours and its peers, each a function of the projection.

The peers get what they take best: a compiled rotary pass before, masks and schedules built once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import NotInstalled, load
from benchmarks.ops import cudnn_varlen
from slap_fast import ops


class Problem(NamedTuple):
    """What a variant is built for."""

    lengths: list[int]
    window: tuple[int, int]
    num_heads: int
    cu_seqlens: Tensor
    rope: tuple[Tensor, Tensor]

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)


Attend = Callable[[Tensor], Tensor]
"""qkv [T, 3 H, D] -> out [T, H, D]."""


def ours(problem: Problem, impl: str | None = None) -> Attend:
    """``ops.attention_qkvpacked``: Triton on a GPU, with the schedule that layers share."""
    starts, longest = problem.cu_seqlens, problem.max_seqlen
    schedule = ops.attention_schedule(starts, longest, sum(problem.lengths))
    return lambda qkv: ops.attention_qkvpacked(
        qkv,
        problem.num_heads,
        starts,
        longest,
        rope=problem.rope,
        window_size=problem.window,
        schedule=schedule,
        impl=impl,
    )


@torch.compile(dynamic=True)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D], cos and sin [T, D / 2], the pairs (j, j + D / 2)."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rotated(problem: Problem, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [T, H, D] as the peers need them."""
    qk, v = qkv.split((2 * problem.num_heads, problem.num_heads), dim=1)
    q, k = rotate(qk, *problem.rope).chunk(2, dim=1)
    return q, k, v


def varlen(flash: Callable[..., Any], problem: Problem, window: tuple[Any, Any]) -> Attend:
    """A function with FlashAttention's arguments for packed sequences."""
    starts, longest = problem.cu_seqlens, problem.max_seqlen
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    packed = dict(zip(names, (starts, starts, longest, longest), strict=True))

    def attend(qkv: Tensor) -> Tensor:
        out = flash(*rotated(problem, qkv), **packed, window_size=window)
        return out[0] if isinstance(out, tuple) else out

    return attend


def fa2_torch(problem: Problem) -> Attend:
    """FlashAttention 2 in torch: ``varlen_attn``."""
    flash = load("torch.nn.attention.varlen").varlen_attn
    starts, longest = problem.cu_seqlens, problem.max_seqlen
    return lambda qkv: flash(
        *rotated(problem, qkv), starts, starts, longest, longest, window_size=problem.window
    )


def fa2_package(problem: Problem) -> Attend:
    """The flash-attn package."""
    return varlen(load("flash_attn").flash_attn_varlen_func, problem, problem.window)


def fa3(problem: Problem) -> Attend:
    """FlashAttention 3; some builds have no backward."""
    module = load("flash_attn_interface")
    return varlen(module.flash_attn_varlen_func, problem, problem.window)


def fa4(problem: Problem) -> Attend:
    """FlashAttention 4 (CuTe), which writes an open side of a window as None."""
    window = tuple(None if side == -1 else side for side in problem.window)
    return varlen(load("flash_attn.cute").flash_attn_varlen_func, problem, window)


def flex(problem: Problem) -> Attend:
    """FlexAttention, compiled for the case."""
    module = load("torch.nn.attention.flex_attention")
    mask = block_mask(problem)
    compiled = torch.compile(module.flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in rotated(problem, qkv))
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return attend


def block_mask(problem: Problem, size: int = 128) -> Any:
    """FlexAttention's mask, from the starts alone: no [T, T] is made."""
    from torch.nn.attention.flex_attention import BlockMask

    device, total = problem.cu_seqlens.device, sum(problem.lengths)
    lengths = torch.tensor(problem.lengths, device=device)
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    left, right = (total if side == -1 else side for side in problem.window)
    token = torch.arange(total, device=device)
    starts = problem.cu_seqlens.long()
    first = torch.maximum(starts[document], token - left)
    last = torch.minimum(starts[document + 1] - 1, token + right)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & (j >= i - left) & (j <= i + right)

    # Both bounds grow with the token, and each token sees itself: the keys that a block of queries
    # sees are one range, from its first row's first to its last row's last; those that all of its
    # rows see, from its last row's first to its first row's last.
    begin = torch.arange(0, total, size, device=device)
    end = (begin + size).clamp(max=total) - 1
    some = (begin + size > first[begin][:, None]) & (begin <= last[end][:, None])
    every = (begin >= first[end][:, None]) & (begin + size - 1 <= last[begin][:, None])
    every &= (begin + size <= total)[:, None]
    blocks = []
    for present in (some & ~every, every):
        count = present.sum(1, dtype=torch.int32)
        indices = (~present).int().argsort(dim=1, stable=True).int()
        blocks += [count[None, None], indices[None, None]]
    return BlockMask.from_kv_blocks(
        *blocks, BLOCK_SIZE=size, mask_mod=visible, seq_lengths=(total, total)
    )


def cudnn(problem: Problem) -> Attend:
    """cuDNN's dense attention: what equal lengths with no window could reach at best."""
    attention = load("torch.nn.attention")
    if len(set(problem.lengths)) > 1:
        raise NotInstalled("takes equal lengths")
    if problem.window != (-1, -1):
        raise NotInstalled("takes no window")

    def attend(qkv: Tensor) -> Tensor:
        batched = [x.unflatten(0, (len(problem.lengths), -1)) for x in rotated(problem, qkv)]
        with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in batched))
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def cudnn_ragged(problem: Problem) -> Attend:
    """cuDNN's attention on packs, windows too, from its own frontend."""
    attention = cudnn_varlen.Attention(
        load("cudnn"), problem.cu_seqlens, problem.lengths, problem.window, problem.num_heads
    )
    return lambda qkv: attention(*rotated(problem, qkv))


def padded(problem: Problem) -> Attend:
    """PyTorch's attention on a batch padded to the longest, as models without packing run it."""
    lengths = torch.tensor(problem.lengths, device=problem.cu_seqlens.device)
    token = torch.arange(problem.max_seqlen, device=lengths.device)
    left, right = (len(token) if side == -1 else side for side in problem.window)
    distance = token[None] - token[:, None]
    inside = token < lengths[:, None]
    # A row of padding sees itself, so that it is not NaN.
    mask = inside[:, None, :] & (distance >= -left) & (distance <= right) | (distance == 0)
    if inside.all() and problem.window == (-1, -1):
        mask = None  # the fast kernel
    places = inside.flatten().nonzero()[:, 0]

    def padded_to_longest(x: Tensor) -> Tensor:
        # Not pad_sequence, whose backward copies the whole gradient once for each clip.
        rows = x.new_zeros(inside.numel(), *x.shape[1:]).index_copy(0, places, x)
        return rows.unflatten(0, inside.shape).transpose(1, 2)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (padded_to_longest(x) for x in rotated(problem, qkv))
        shared = None if mask is None else mask[:, None]
        out = F.scaled_dot_product_attention(q, k, v, shared)
        return out.transpose(1, 2).flatten(0, 1)[places]

    return attend


VARIANTS: dict[str, Callable[[Problem], Attend]] = {
    "slap-fast": ours,
    "FA2 in torch": fa2_torch,
    "FA2 (flash-attn)": fa2_package,
    "FA3": fa3,
    "FA4": fa4,
    "FlexAttention": flex,
    "cuDNN dense": cudnn,
    "cuDNN ragged": cudnn_ragged,
    "SDPA, padded": padded,
}
