"""Which implementation runs an operation: what each has kernels for, and where."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slap_fast.config import MelConfig
from slap_fast.ops import flash_attention

try:
    from slap_fast import _C as EXTENSION
except ImportError:  # not built: something else runs in its place
    EXTENSION = None

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run on a CPU, slowly: for tests."""

IMPLS = ("triton", "cpp", "torch", "flash", "reference")
IMPLEMENTATIONS = {
    "mel_patches": ("triton", "cpp", "torch", "reference"),
    "attention": ("triton", "torch", "reference", "flash"),
    "map_pool": ("triton", "reference"),
    "pack": ("cpp", "reference"),
}
"""The implementations of an operation. By default the first one that can run does; those after
"torch", or "reference" where there is no "torch", run on request only."""
_PREFERRED: dict[str, str] = {}
"""{operation: implementation} inside :func:`using`."""

MAX_HEAD_DIM = 128
"""Of Triton's attention."""
MAX_HIDDEN_SIZE, MAX_HIDDEN_SIZE_FP32, MAX_POOL_HEADS = 1024, 768, 16
"""Of Triton's map_pool; the backward of a wider fp32 x does not fit the shared memory of sm_80."""
NO_LIMITS: dict[str, str] = {}
DEFAULT_MEL = MelConfig()


def which(
    op: str | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    mel: MelConfig = DEFAULT_MEL,
    head_dim: int = 64,
    hidden_size: int = 768,
) -> dict[str, str]:
    """What runs with ``impl=None`` for tensors of a device and dtype, and why nothing faster does.

    Of every operation, or of ``op`` alone: {operation: "implementation: why"}. ``mel`` is the front
    end of ``mel_patches``, ``head_dim`` D of ``attention``, ``hidden_size`` C of ``map_pool``.
    """
    if op is not None and op not in IMPLEMENTATIONS:
        raise ValueError(f"op: found {op!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    where = torch.device(device)
    limits = {
        "mel_patches": mel_limits(mel),
        "attention": head_limits(head_dim),
        "map_pool": pool_limits(hidden_size, 1, dtype),
        "pack": NO_LIMITS,
    }
    answers = {}
    for name in [op] if op else IMPLEMENTATIONS:
        chosen = choose(name, None, where, dtype, limits[name])
        earlier = IMPLEMENTATIONS[name][: IMPLEMENTATIONS[name].index(chosen)]
        why = [f"{impl} {obstacle(impl, where, dtype, limits[name])}" for impl in earlier]
        why = ["asked for by dispatch.using"] if name in _PREFERRED else why
        answers[name] = f"{chosen}: {'; '.join(why) or f'the best there is for {where.type}'}"
    return answers


@contextmanager
def using(impls: dict[str, str]) -> Iterator[None]:
    """Inside, these operations run these implementations where a call has ``impl=None``.

    {operation: implementation}; one that cannot run raises as if each call had asked for it.
    """
    for op in impls.keys() - IMPLEMENTATIONS.keys():
        raise ValueError(f"impls: found {op!r}, expected some of {', '.join(IMPLEMENTATIONS)}")
    before = dict(_PREFERRED)
    _PREFERRED.update(impls)
    try:
        yield
    finally:
        _PREFERRED.clear()
        _PREFERRED.update(before)


def mel_limits(config: MelConfig) -> dict[str, str]:
    """Why implementations cannot run such a front end, by name."""
    limits = {}
    if config.n_fft < 4 or config.n_fft & (config.n_fft - 1):
        limits["cpp"] = f"takes an n_fft that is a power of two, not {config.n_fft}"
    if config.n_fft != 512 or config.n_mels > 128 or config.patch_time > 128:
        limits["triton"] = (
            "takes n_fft 512 and at most 128 n_mels and patch_time, "
            f"not {config.n_fft}, {config.n_mels} and {config.patch_time}"
        )
    return limits


def head_limits(head_dim: int) -> dict[str, str]:
    """Why implementations of attention have no such heads, by name."""
    if head_dim <= MAX_HEAD_DIM:
        return NO_LIMITS
    return {"triton": f"has no kernels for head_dim {head_dim}, at most {MAX_HEAD_DIM}"}


def pool_limits(hidden_size: int, num_heads: int, dtype: torch.dtype) -> dict[str, str]:
    """Why implementations of map_pool have no such sizes, by name."""
    widest = MAX_HIDDEN_SIZE_FP32 if dtype == torch.float32 else MAX_HIDDEN_SIZE
    if hidden_size <= widest and num_heads <= MAX_POOL_HEADS:
        return NO_LIMITS
    most = f"at most {widest} and {MAX_POOL_HEADS}"
    return {"triton": f"has no kernels for C = {hidden_size} and H = {num_heads}, {most}"}


def choose(
    op: str,
    impl: str | None,
    device: torch.device,
    dtype: torch.dtype,
    limits: dict[str, str] = NO_LIMITS,
) -> str:
    """The implementation that runs a call; ``limits`` are those of its sizes."""
    available = IMPLEMENTATIONS[op]
    impl = _PREFERRED.get(op) if impl is None else impl
    if impl is None:
        return next(name for name in available if obstacle(name, device, dtype, limits) is None)
    if impl not in IMPLS:
        raise ValueError(f"impl: found {impl!r}, expected None or one of {', '.join(IMPLS)}")
    if impl not in available:
        raise NotImplementedError(
            f"{op} has no {impl!r} implementation; use impl=None or one of {', '.join(available)}"
        )
    interpreted = INTERPRETED and impl == "triton" and device.type == "cpu"
    why_not = obstacle(impl, torch.device("cuda") if interpreted else device, dtype, limits)
    if why_not:
        raise NotImplementedError(f"impl: found {impl!r}, which {why_not}; use impl=None")
    return impl


def obstacle(
    impl: str, device: torch.device, dtype: torch.dtype, limits: dict[str, str]
) -> str | None:
    """Why an implementation cannot run for such tensors; None where it can."""
    if impl in ("torch", "reference"):
        return None
    if impl == "cpp":
        if device.type != "cpu":
            return f"runs on a CPU, not on {device.type}"
        if EXTENSION is None:
            return "is not built (no slap_fast._C)"
    else:
        if impl == "triton" and not HAS_TRITON:
            return "is not installed"
        if device.type != "cuda":
            return f"runs on a GPU, not on {device.type}"
        halves = (torch.float16, torch.bfloat16)
        if dtype == torch.float64 or (impl == "flash" and dtype not in halves):
            return f"has no kernels for {dtype}"
        if impl == "flash" and flash_attention.varlen() is None:
            return "is not installed"
    return limits.get(impl)
