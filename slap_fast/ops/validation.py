"""Argument checks of the public operations.

Each mistake is a ValueError that names the argument, what was found and what was expected.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[str | int, ...],
    device: torch.device | None = None,
) -> None:
    """Dtype, shape, dense last axis and device; ``shape`` has letters where sizes are free."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: found {type(x).__name__}, expected a tensor")
    if x.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: found {x.dtype}, expected {expected}")
    if x.ndim != len(shape) or any(
        not isinstance(expected, str) and size != expected
        for size, expected in zip(x.shape, shape, strict=True)
    ):
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name}: found shape {list(x.shape)}, expected [{sizes}]")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: found stride {x.stride(-1)} on the last axis, expected 1")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: found device {x.device}, expected {device}")


def check_starts(
    name: str, starts: Tensor, dtype: torch.dtype, x: Tensor, x_name: str
) -> Tensor | None:
    """Checks the starts of the sequences of ``x``; returns their lengths if reading is cheap."""
    check_tensor(name, starts, (dtype,), ("B + 1",), x.device)
    if len(starts) == 0:
        raise ValueError(f"{name}: found no entries, expected B + 1")
    if not _values_are_cheap(starts):
        return None
    lengths = starts.diff()
    if starts[0] != 0:
        raise ValueError(f"{name}: found {int(starts[0])} first, expected 0")
    if (lengths < 0).any():
        where = int((lengths < 0).nonzero()[0, 0])
        raise ValueError(
            f"{name}[{where + 1}]: found {int(starts[where + 1])} after {int(starts[where])}, "
            "expected no decrease"
        )
    if starts[-1] > len(x):
        expected = f"expected at most {x_name}'s {len(x)} rows"
        raise ValueError(f"{name}: found {int(starts[-1])} last, {expected}")
    return lengths


def _values_are_cheap(x: Tensor) -> bool:
    """Whether ``x`` has values, and reading them neither breaks a graph nor, unasked, syncs."""
    if type(x) is not Tensor or x.is_meta or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("SLAP_FAST_DEBUG") == "1"


def check_masks(masks: Tensor, cu_samples: Tensor) -> None:
    """Checks SpecAugment's spans; their values only if cheap."""
    check_tensor("masks", masks, (torch.int32,), ("M", 4), cu_samples.device)
    if not _values_are_cheap(masks):
        return
    clip, axis, start, stop = masks.unbind(1)
    good = (clip >= 0) & (clip < len(cu_samples) - 1) & (axis >= 0) & (axis <= 1)
    good &= (start >= 0) & (start <= stop)
    if not good.all():
        where = int((~good).nonzero()[0, 0])
        raise ValueError(
            f"masks[{where}]: found {masks[where].tolist()}, expected (clip, axis, start, stop) "
            f"with clip in 0 .. {len(cu_samples) - 2}, axis 0 or 1, and 0 <= start <= stop"
        )


def check_sequences(
    name: str, cu_seqlens: Tensor, max_name: str, max_seqlen: Any, x: Tensor, x_name: str
) -> None:
    """The starts and the longest length of the sequences of ``x``."""
    lengths = check_starts(name, cu_seqlens, torch.int32, x, x_name)
    if not isinstance(max_seqlen, (int, torch.SymInt)):
        raise ValueError(f"{max_name}: found {max_seqlen!r}, expected an integer")
    if lengths is not None and len(lengths) and max_seqlen < lengths.max():
        raise ValueError(
            f"{max_name}: found {max_seqlen}, expected at least {int(lengths.max())}, the longest "
            f"length in {name}"
        )


def check_schedule(name: str, schedule: Tensor, tiles: int, make: Callable[[], Tensor]) -> None:
    """A schedule of ``tiles``; its values, against what ``make`` returns, only if cheap.

    A schedule of other sequences would leave rows of the output unwritten.
    """
    check_tensor(name, schedule, (torch.int32,), (tiles, 2))
    if _values_are_cheap(schedule) and not torch.equal(schedule, make()):
        expected = "expected attention_schedule's of these starts"
        raise ValueError(f"{name}: found other tiles, {expected}")


def check_rope(rope: tuple[Tensor, Tensor] | None, q: Tensor) -> None:
    """Tables for the rows of ``q`` [T, heads, D]."""
    if rope is None:
        return
    num_rows, head_dim = q.shape[0], q.shape[-1]
    if head_dim % 2:
        raise ValueError(f"rope: found tables with head_dim {head_dim}, expected an even head_dim")
    if len(rope) != 2:
        raise ValueError(f"rope: found {len(rope)} tables, expected (cos, sin)")
    for name, table in zip(("rope cos", "rope sin"), rope, strict=True):
        check_tensor(name, table, (torch.float32,), (num_rows, head_dim // 2), q.device)


def check_window(window_size: tuple[int, int]) -> None:
    """FlashAttention's (left, right)."""
    if len(window_size) != 2 or any(int(size) != size or size < -1 for size in window_size):
        expected = "expected (left, right), each -1 (open) or more"
        raise ValueError(f"window_size: found {window_size}, {expected}")
