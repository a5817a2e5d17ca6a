"""Packed attention: the arguments, the checks, and the choice of what runs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from slap_fast.ops import compiled_reference, dispatch, flash_attention, torch_attention, validation
from slap_fast.ops.attention_options import AttentionOptions
from slap_fast.ops.validation import FLOATS, check_sequences, check_tensor
from slap_fast.reference import attention as reference


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
    schedule: Tensor | None = None,
    schedule_k: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v inside each packed sequence, local or global, rotary included.

    Args:
        q: [T, H, D], any strides with a dense last axis; fp16, bf16, fp32 or fp64.
        k: [Tk, Hkv, D], H a multiple of Hkv: H / Hkv consecutive query heads share a key head.
        v: [Tk, Hkv, D].
        cu_seqlens: int32 [B + 1], where each sequence begins.
        max_seqlen: length of the longest.
        cu_seqlens_k: int32 [B + 1] of k and v, where they differ from q's (cross-attention);
            query i then sits at position i + len_k - len_q among its keys.
        max_seqlen_k: length of the longest of those, required with ``cu_seqlens_k``.
        rope: (cos, sin), each fp32 [T, D / 2], rotating the pairs (j, j + D / 2) of q and k; not
            with ``cu_seqlens_k``.
        window_size: (left, right) token distances, inclusive, -1 open.
        causal: no key after the query's position.
        softmax_scale: None: D ** -0.5.
        return_lse: also return the log-sum-exp of the scaled scores.
        schedule: of ``cu_seqlens``, by :func:`attention_schedule`; None: built in the call.
        schedule_k: of ``cu_seqlens_k``, likewise.
        impl: see the module.

    Returns:
        out [T, H, D] in q's dtype; with ``return_lse`` also lse [H, T], natural log, fp32 (fp64 for
        fp64 inputs), differentiable. A row that sees no key gives 0 and -inf.

    Source: FlashAttention's ``flash_attn_varlen_func`` (arXiv 2307.08691), whose words these are.
    """
    check_tensor("q", q, FLOATS, ("T", "H", "D"))
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, (q.dtype,), ("Tk", "Hkv", q.shape[2]), q.device)
    if v.shape != k.shape:
        raise ValueError(f"v: found shape {list(v.shape)}, expected k's, {list(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: found {k.shape[1]} heads, expected a divisor of q's {q.shape[1]}")
    check_sequences("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, q, "q")
    if cu_seqlens_k is None:
        if len(k) != len(q):
            raise ValueError(f"k: found {len(k)} rows, expected {len(q)} as q without cu_seqlens_k")
        if max_seqlen_k is not None:
            expected = "expected None without cu_seqlens_k"
            raise ValueError(f"max_seqlen_k: found {max_seqlen_k}, {expected}")
        if schedule_k is not None:
            raise ValueError("schedule_k: found tiles, expected None without cu_seqlens_k")
    else:
        check_sequences("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, k, "k")
        if len(cu_seqlens_k) != len(cu_seqlens):
            expected = f"expected {len(cu_seqlens)} as in cu_seqlens"
            raise ValueError(f"cu_seqlens_k: found {len(cu_seqlens_k)} entries, {expected}")
        if rope is not None:
            raise ValueError("rope: found tables, expected None with cu_seqlens_k: rotate before")
    options = AttentionOptions(
        cu_seqlens_k, max_seqlen_k, rope, window_size, causal, softmax_scale, return_lse
    )
    schedules = {
        "schedule": (schedule, cu_seqlens, len(q)),
        "schedule_k": (schedule_k, cu_seqlens_k, len(k)),
    }
    arguments = q, k, v, cu_seqlens, max_seqlen
    return _run("attention", impl, arguments, options, schedules)


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
    schedule: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` on a projection as it comes; its backward writes one gradient.

    Args:
        qkv: [T, H + 2 Hkv, D]: H query heads, then Hkv key heads, then Hkv value heads.
        num_heads_kv: Hkv.
        schedule: of ``cu_seqlens``, by :func:`attention_schedule`; None: built in the call.

    The other arguments and the result are those of :func:`attention`.
    """
    check_tensor("qkv", qkv, FLOATS, ("T", "H + 2 Hkv", "D"))
    num_heads = qkv.shape[1] - 2 * num_heads_kv
    if num_heads_kv < 1 or num_heads < 1 or num_heads % num_heads_kv:
        raise ValueError(
            f"num_heads_kv: found {num_heads_kv}, expected Hkv >= 1 such that qkv's "
            f"{qkv.shape[1]} heads are H + 2 Hkv, H a multiple of Hkv"
        )
    check_sequences("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, qkv, "qkv")
    options = AttentionOptions(None, None, rope, window_size, causal, softmax_scale, return_lse)
    arguments = qkv, num_heads_kv, cu_seqlens, max_seqlen
    schedules = {"schedule": (schedule, cu_seqlens, len(qkv))}
    return _run("attention_qkvpacked", impl, arguments, options, schedules)


def attention_schedule(cu_seqlens: Tensor, max_seqlen: int, total_tokens: int) -> Tensor | None:
    """What a GPU works off for packed sequences: built once per batch, shared by all its layers.

    Args:
        cu_seqlens: int32 [B + 1], where each sequence begins.
        max_seqlen: length of the longest.
        total_tokens: T, the rows of what is attended to.

    Returns:
        For ``schedule``: an int32 tensor of the device, made without a sync; None where attention
        needs none.
    """
    check_tensor("cu_seqlens", cu_seqlens, (torch.int32,), ("B + 1",))
    if dispatch.choose("attention", None, cu_seqlens.device, torch.float32) != "triton":
        return None
    from slap_fast.kernels import attention

    return attention.schedule_tiles(cu_seqlens, total_tokens)


def _run(
    function: str,
    impl: str | None,
    arguments: tuple[Any, ...],
    options: AttentionOptions,
    schedules: dict[str, tuple[Tensor | None, Tensor | None, int]],
) -> Tensor | tuple[Tensor, Tensor]:
    """Checks options and schedules, which have their starts and rows, and calls the engine."""
    x = arguments[0]
    validation.check_rope(options.rope, x)
    validation.check_window(options.window_size)
    for name, (schedule, _, _) in schedules.items():
        if schedule is not None:
            check_tensor(name, schedule, (torch.int32,), ("tiles", 2), x.device)
    impl = dispatch.choose("attention", impl, x.device, x.dtype, dispatch.head_limits(x.shape[2]))
    if impl == "triton":
        # Here, so that importing the package does not import triton.
        from slap_fast.kernels import attention as kernels

        for name, (schedule, starts, num_rows) in schedules.items():
            if schedule is not None:
                make = functools.partial(kernels.schedule_tiles, starts, num_rows)
                num_tiles = kernels.num_tiles(starts, num_rows)
                validation.check_schedule(name, schedule, num_tiles, make)
        tiles = {name: schedule for name, (schedule, _, _) in schedules.items()}
        return getattr(kernels, function)(*arguments, **options._asdict(), **tiles)
    if impl == "flash":
        return getattr(flash_attention, function)(*arguments, options)
    if torch.compiler.is_compiling():
        return compiled_reference.attention(impl, function, arguments, options)
    if impl == "torch":
        return getattr(torch_attention, function)(*arguments, options)
    return getattr(reference, function)(*arguments, **options._asdict())
