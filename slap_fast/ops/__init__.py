"""The public operations: what they compute and what they accept.

Everything works on packed sequences: the tokens of B sequences end to end, T rows in all, with
``cu_seqlens`` int32 [B + 1] saying where each begins; an empty sequence is legal. Rows past
``cu_seqlens[-1]`` are never read; in outputs and gradients they are exactly 0 (``lse`` -inf).

``impl`` is None (the best there is for the device), "triton", "cpp", "flash" or "reference". A
request that cannot be met raises NotImplementedError: nothing falls back in silence.
:func:`slap_fast.which` tells what runs.

Arguments are checked on every call: dtype, shape, device and a dense last axis. The values of
``cu_seqlens`` and of a schedule are checked on a CPU, and elsewhere with ``SLAP_FAST_DEBUG=1``, as
that syncs. Every mistake is a ValueError that names the argument, what was found and what was
expected.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slap_fast.config import MelConfig
from slap_fast.ops import compiled_reference, dispatch, flash_attention
from slap_fast.ops.dispatch import DEFAULT_MEL
from slap_fast.ops.validation import (
    check_masks,
    check_rope,
    check_schedule,
    check_sequences,
    check_starts,
    check_tensor,
    check_window,
)
from slap_fast.packed import PackedPatches
from slap_fast.reference import attention as reference_attention
from slap_fast.reference import map_pool as reference_map_pool
from slap_fast.reference import mel_patches as reference_mel_patches
from slap_fast.reference import packing as reference_pack
from slap_fast.reference import rope as reference_rope

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mel_patches(
    waveform: Tensor,
    cu_samples: Tensor,
    config: MelConfig = DEFAULT_MEL,
    *,
    masks: Tensor | None = None,
    impl: str | None = None,
) -> PackedPatches:
    """Log-mel patches of packed clips (SLAP, arXiv 2601.12594, section 3). Not differentiable.

    Args:
        waveform: [num_samples] float32 in -1 .. 1 or int16, all clips end to end.
        cu_samples: int64 [B + 1], where each clip begins; its last entry is where the last ends.
        config: the front end.
        masks: int32 [M, 4] = (clip, axis, start, stop), SpecAugment's spans: frames (axis 0) or mel
            bins (axis 1) start .. stop - 1 of the clip become 0, the mean of the normalised
            log-mel. :func:`slap_fast.data.augment.draw_masks` draws them.
        impl: see the module.

    A clip without samples has no patches; any other has at least one column, filled with silence. A
    frame with a sample that is not finite is NaN, and no other frame is. A waveform that requires a
    gradient is refused: patches are data. On a GPU two numbers are read from the device, which
    syncs: how many patches there are, and the longest clip.
    """
    check_tensor("waveform", waveform, (torch.float32, torch.int16), ("num_samples",))
    check_starts("cu_samples", cu_samples, torch.int64, waveform, "waveform")
    if masks is not None:
        check_masks(masks, cu_samples)
    if waveform.requires_grad and torch.is_grad_enabled():
        raise ValueError("waveform: found requires_grad, expected data: patches carry no gradient")
    chosen = dispatch.choose(
        "mel_patches", impl, waveform.device, waveform.dtype, dispatch.mel_limits(config)
    )
    if chosen == "triton":
        from slap_fast.kernels import mel_patches as triton_mel_patches

        constants = reference_mel_patches.constants
        return PackedPatches(
            *triton_mel_patches.mel_patches(waveform, cu_samples, config, constants, masks)
        )
    if chosen == "cpp":
        return _mel_patches_cpp(waveform, cu_samples, config, masks)
    return PackedPatches(*reference_mel_patches.mel_patches(waveform, cu_samples, config, masks))


def _mel_patches_cpp(
    waveform: Tensor, cu_samples: Tensor, config: MelConfig, masks: Tensor | None
) -> PackedPatches:
    if masks is None:
        masks = torch.empty(0, 4, dtype=torch.int32)
    *arrays, max_seqlen = _mel_cpp(config)(
        waveform.detach().numpy(),
        cu_samples.numpy(),
        masks.contiguous().numpy(),
        torch.get_num_threads(),
    )
    return PackedPatches(*map(torch.from_numpy, arrays), max_seqlen)


@functools.lru_cache(maxsize=16)
def _mel_cpp(config: MelConfig, instruction_set: str | None = None) -> Any:
    """A ``_C.MelPatches``, by default for the best instruction set of this machine."""
    window, filterbank = reference_mel_patches.constants(config, torch.float32, torch.device("cpu"))
    return dispatch.EXTENSION.MelPatches(
        kaldi=config.preset == "kaldi",
        n_fft=config.n_fft,
        hop_length=config.hop_length,
        patch_time=config.patch_time,
        patch_freq=config.patch_freq,
        floor=config.floor,
        mean=config.mean,
        std=config.std,
        window=window.numpy(),
        filterbank=filterbank.numpy(),
        instruction_set=instruction_set or dispatch.EXTENSION.mel_instruction_sets()[0],
    )


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
            raise ValueError(
                f"max_seqlen_k: found {max_seqlen_k}, expected None without cu_seqlens_k"
            )
        if schedule_k is not None:
            raise ValueError("schedule_k: found tiles, expected None without cu_seqlens_k")
    else:
        check_sequences("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, k, "k")
        if len(cu_seqlens_k) != len(cu_seqlens):
            raise ValueError(
                f"cu_seqlens_k: found {len(cu_seqlens_k)} entries, expected {len(cu_seqlens)} as "
                "in cu_seqlens"
            )
        if rope is not None:
            raise ValueError("rope: found tables, expected None with cu_seqlens_k: rotate before")
    check_rope(rope, q)
    check_window(window_size)
    options = {
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_k": max_seqlen_k,
        "rope": rope,
        "window_size": window_size,
        "causal": causal,
        "softmax_scale": softmax_scale,
        "return_lse": return_lse,
    }
    schedules = {
        "schedule": (schedule, cu_seqlens, len(q)),
        "schedule_k": (schedule_k, cu_seqlens_k, len(k)),
    }
    module, schedules = _attention_module(impl, q, schedules)
    return module.attention(q, k, v, cu_seqlens, max_seqlen, **options, **schedules)


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
        schedule: by :func:`attention_schedule`, for all calls with the same ``cu_seqlens``; None:
            built in the call.

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
    check_rope(rope, qkv)
    check_window(window_size)
    options = {
        "rope": rope,
        "window_size": window_size,
        "causal": causal,
        "softmax_scale": softmax_scale,
        "return_lse": return_lse,
    }
    schedules = {"schedule": (schedule, cu_seqlens, len(qkv))}
    module, schedules = _attention_module(impl, qkv, schedules)
    return module.attention_qkvpacked(
        qkv, num_heads_kv, cu_seqlens, max_seqlen, **options, **schedules
    )


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


def map_pool(
    x: Tensor, score_weight: Tensor, cu_seqlens: Tensor, *, impl: str | None = None
) -> Tensor:
    """Attention pooling: pooled[b, h] = sum_i softmax_i(x_i . score_weight[h]) x_i over sequence b.

    Args:
        x: [T, C], fp16, bf16, fp32 or fp64.
        score_weight: [H, C]: for head h the probe's query, folded into the key projection and
            scaled, W_k,h^T q_h / sqrt(D). A key bias would drop out of the softmax.
        cu_seqlens: int32 [B + 1], where each sequence begins.
        impl: see the module.

    Returns:
        [B, H, C] in x's dtype; an empty sequence gives zeros.

    Source: multi-head attention pooling, arXiv 2106.04560, appendix; SigLIP's head.
    """
    check_tensor("x", x, FLOATS, ("T", "C"))
    check_tensor("score_weight", score_weight, (x.dtype,), ("H", x.shape[1]), x.device)
    check_starts("cu_seqlens", cu_seqlens, torch.int32, x, "x")
    limits = dispatch.pool_limits(x.shape[1], len(score_weight), x.dtype)
    if dispatch.choose("map_pool", impl, x.device, x.dtype, limits) == "triton":
        from slap_fast.kernels.map_pool import map_pool as run

        return run(x, score_weight, cu_seqlens)
    if torch.compiler.is_compiling():
        return compiled_reference.map_pool(x, score_weight, cu_seqlens)
    return reference_map_pool.map_pool(x, score_weight, cu_seqlens)


def rope_tables(coords: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin for ``rope``, each fp32 [T, head_dim / 2], from angles in fp64.

    Args:
        coords: int32 [T, 1], positions, or [T, 2], (time, freq): each axis owns half the angles.
        head_dim: D, a multiple of twice the number of axes.
        theta: base of the frequencies.

    Source: RoFormer, arXiv 2104.09864; the two-axis form is SLAP's (arXiv 2601.12594, section 3).
    """
    check_tensor("coords", coords, (torch.int32,), ("T", "1 or 2"))
    axes = coords.shape[1]
    if axes not in (1, 2):
        raise ValueError(f"coords: found {axes} axes, expected 1 or 2")
    if head_dim <= 0 or head_dim % (2 * axes):
        raise ValueError(f"head_dim: found {head_dim}, expected a positive multiple of {2 * axes}")
    return reference_rope.rope_tables(coords, head_dim, theta)


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most ``max_tokens``, by first-fit decreasing.

    Deterministic: the longest first, the lower index where lengths are equal, each into the
    earliest bin with room. Runs on the host, in C++ where it is built.

    Raises ValueError that names the first length below 0 or above ``max_tokens``.
    """
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"lengths: found {array.dtype} of shape {list(array.shape)}, expected integers [n]"
        )
    array = array.astype(np.int64)
    if dispatch.EXTENSION is not None:
        return dispatch.EXTENSION.pack(array, max_tokens)
    return reference_pack.pack(array.tolist(), max_tokens)


def _attention_module(
    impl: str | None,
    q: Tensor,
    schedules: dict[str, tuple[Tensor | None, Tensor | None, int]],
) -> tuple[ModuleType, dict[str, Tensor | None]]:
    """The module that runs attention on q (or qkv), and which of the schedules it takes.

    Each of them comes with the starts and the number of rows that it has to be of.
    """
    for name, (schedule, _, _) in schedules.items():
        if schedule is not None:
            check_tensor(name, schedule, (torch.int32,), ("tiles", 2), q.device)
    impl = dispatch.choose("attention", impl, q.device, q.dtype, dispatch.head_limits(q.shape[2]))
    if impl == "reference" and torch.compiler.is_compiling():
        return compiled_reference, {}
    if impl != "triton":
        return (flash_attention if impl == "flash" else reference_attention), {}
    # Here, so that importing the package does not import triton.
    from slap_fast.kernels import attention

    for name, (schedule, starts, num_rows) in schedules.items():
        if schedule is not None:
            make = functools.partial(attention.schedule_tiles, starts, num_rows)
            check_schedule(name, schedule, attention.num_tiles(starts, num_rows), make)
    return attention, {name: schedule for name, (schedule, _, _) in schedules.items()}
