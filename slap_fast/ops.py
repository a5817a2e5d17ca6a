"""The public operations: what they compute, what they accept, and which implementation runs.

Everything works on packed sequences: the tokens of B sequences end to end, T rows in all, with
``cu_seqlens`` int32 [B + 1] saying where each begins; an empty sequence is legal. Rows past
``cu_seqlens[-1]`` are never read; in outputs and gradients they are exactly 0 (``lse`` -inf).

``impl`` is None (the best there is for the device), "triton", "cpp", "flash" or "reference". A
request that cannot be met raises NotImplementedError: nothing falls back in silence. ``which``
tells what runs.

Arguments are checked on every call: dtype, shape, device and a dense last axis. The values of
``cu_seqlens`` and of a schedule are checked on a CPU, and elsewhere with ``SLAP_FAST_DEBUG=1``, as
that syncs. Every mistake is a ValueError that names the argument, what was found and what was
expected.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slap_fast import flash, opaque
from slap_fast.checks import (
    check_masks,
    check_rope,
    check_schedule,
    check_sequences,
    check_starts,
    check_tensor,
    check_window,
)
from slap_fast.config import MelConfig
from slap_fast.reference import attention as reference_attention
from slap_fast.reference import map_pool as reference_map_pool
from slap_fast.reference import mel_patches as reference_mel_patches
from slap_fast.reference import pack as reference_pack
from slap_fast.reference import rope as reference_rope

try:
    from slap_fast import _C
except ImportError:  # not built: pack runs in Python, as which() says
    _C = None

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run on a CPU, slowly: for tests."""

IMPLS = ("triton", "cpp", "flash", "reference")
IMPLEMENTATIONS = {
    "mel_patches": ("triton", "cpp", "reference"),
    "attention": ("triton", "reference", "flash"),
    "map_pool": ("triton", "reference"),
    "pack": ("cpp", "reference"),
}
"""The implementations of an operation, best first; those after "reference" run on request only."""

MAX_HEAD_DIM = 128
"""Of Triton's attention."""
MAX_HIDDEN_SIZE, MAX_HIDDEN_SIZE_FP32, MAX_POOL_HEADS = 1024, 768, 16
"""Of Triton's map_pool; the backward of a wider fp32 x does not fit the shared memory of sm_80."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEFAULT_MEL = MelConfig()
NO_LIMITS: dict[str, str] = {}


class PackedPatches(NamedTuple):
    """Audio clips as one packed run of log-mel patches."""

    patches: Tensor
    """float32 [T, patch_dim]. A patch is its 16 frames x 16 bins, frame-major; a clip's patches
    come column by column, lowest bins first."""
    coords: Tensor
    """int32 [T, 2], the patch's (time, freq) inside its clip."""
    cu_seqlens: Tensor
    """int32 [B + 1], where each clip begins."""
    max_seqlen: int
    """Patches of the longest clip."""


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
    chosen = _choose("mel_patches", impl, waveform.device, waveform.dtype, _mel_limits(config))
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
    return _C.MelPatches(
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
        instruction_set=instruction_set or _C.mel_instruction_sets()[0],
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
    if _choose("attention", None, cu_seqlens.device, torch.float32) != "triton":
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
    limits = _pool_limits(x.shape[1], len(score_weight), x.dtype)
    if _choose("map_pool", impl, x.device, x.dtype, limits) == "triton":
        from slap_fast.kernels.map_pool import map_pool as run

        return run(x, score_weight, cu_seqlens)
    if torch.compiler.is_compiling():
        return opaque.map_pool(x, score_weight, cu_seqlens)
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
    if _C is not None:
        return _C.pack(array, max_tokens)
    return reference_pack.pack(array.tolist(), max_tokens)


def which(
    op: str | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    mel: MelConfig = DEFAULT_MEL,
    head_dim: int = 64,
    hidden_size: int = 768,
) -> dict[str, str]:
    """What runs with ``impl=None`` for tensors of a device and dtype, and why nothing better does.

    Of every operation, or of ``op`` alone: {operation: "implementation: why"}. ``mel`` is the front
    end of ``mel_patches``, ``head_dim`` D of ``attention``, ``hidden_size`` C of ``map_pool``.
    """
    if op is not None and op not in IMPLEMENTATIONS:
        raise ValueError(f"op: found {op!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    where = torch.device(device)
    limits = {
        "mel_patches": _mel_limits(mel),
        "attention": _head_limits(head_dim),
        "map_pool": _pool_limits(hidden_size, 1, dtype),
        "pack": NO_LIMITS,
    }
    told = {}
    for name in [op] if op else IMPLEMENTATIONS:
        chosen = _choose(name, None, where, dtype, limits[name])
        better = IMPLEMENTATIONS[name][: IMPLEMENTATIONS[name].index(chosen)]
        why = [f"{impl} {_obstacle(impl, where, dtype, limits[name])}" for impl in better]
        told[name] = f"{chosen}: {'; '.join(why) or f'the best there is for {where.type}'}"
    return told


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
    impl = _choose("attention", impl, q.device, q.dtype, _head_limits(q.shape[2]))
    if impl == "reference" and torch.compiler.is_compiling():
        return opaque, {}
    if impl != "triton":
        return (flash if impl == "flash" else reference_attention), {}
    # Here, so that importing the package does not import triton.
    from slap_fast.kernels import attention

    for name, (schedule, starts, num_rows) in schedules.items():
        if schedule is not None:
            make = functools.partial(attention.schedule_tiles, starts, num_rows)
            check_schedule(name, schedule, attention.num_tiles(starts, num_rows), make)
    return attention, {name: schedule for name, (schedule, _, _) in schedules.items()}


def _mel_limits(config: MelConfig) -> dict[str, str]:
    """Of the implementations that cannot run such a front end: why."""
    limits = {}
    if config.n_fft < 4 or config.n_fft & (config.n_fft - 1):
        limits["cpp"] = f"takes an n_fft that is a power of two, not {config.n_fft}"
    if config.n_fft != 512 or config.n_mels > 128 or config.patch_time > 128:
        limits["triton"] = (
            "takes n_fft 512 and at most 128 n_mels and patch_time, "
            f"not {config.n_fft}, {config.n_mels} and {config.patch_time}"
        )
    return limits


def _head_limits(head_dim: int) -> dict[str, str]:
    """Of the implementations of attention that have no such heads: why."""
    if head_dim <= MAX_HEAD_DIM:
        return NO_LIMITS
    return {"triton": f"has no kernels for head_dim {head_dim}, at most {MAX_HEAD_DIM}"}


def _pool_limits(hidden_size: int, num_heads: int, dtype: torch.dtype) -> dict[str, str]:
    """Of the implementations of map_pool that have no such sizes: why."""
    widest = MAX_HIDDEN_SIZE_FP32 if dtype == torch.float32 else MAX_HIDDEN_SIZE
    if hidden_size <= widest and num_heads <= MAX_POOL_HEADS:
        return NO_LIMITS
    most = f"at most {widest} and {MAX_POOL_HEADS}"
    return {"triton": f"has no kernels for C = {hidden_size} and H = {num_heads}, {most}"}


def _choose(
    op: str,
    impl: str | None,
    device: torch.device,
    dtype: torch.dtype,
    limits: dict[str, str] = NO_LIMITS,
) -> str:
    """The implementation that runs a call; ``limits`` are those of its sizes."""
    there = IMPLEMENTATIONS[op]
    if impl is None:
        return next(name for name in there if _obstacle(name, device, dtype, limits) is None)
    if impl not in IMPLS:
        raise ValueError(f"impl: found {impl!r}, expected None or one of {', '.join(IMPLS)}")
    if impl not in there:
        raise NotImplementedError(
            f"{op} has no {impl!r} implementation; use impl=None or one of {', '.join(there)}"
        )
    interpreted = INTERPRETED and impl == "triton" and device.type == "cpu"
    obstacle = _obstacle(impl, torch.device("cuda") if interpreted else device, dtype, limits)
    if obstacle:
        raise NotImplementedError(f"impl: found {impl!r}, which {obstacle}; use impl=None")
    return impl


def _obstacle(
    impl: str, device: torch.device, dtype: torch.dtype, limits: dict[str, str]
) -> str | None:
    """Why an implementation cannot run for such tensors; None where it can."""
    if impl == "reference":
        return None
    if impl == "cpp":
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if _C is None:
            return "is not built (no slap_fast._C)"
    else:
        if impl == "triton" and not HAS_TRITON:
            return "is not installed"
        if device.type != "cuda":
            return f"runs on a GPU, not on {device.type}"
        halves = (torch.float16, torch.bfloat16)
        if dtype == torch.float64 or (impl == "flash" and dtype not in halves):
            return f"has no kernels for {dtype}"
        if impl == "flash" and not flash.is_installed():
            return "is not installed"
    return limits.get(impl)
