"""The launch settings of attention's kernels: a plain table, nothing is tuned at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Setting(NamedTuple):
    """How a kernel is launched."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Settings(NamedTuple):
    """How all kernels are launched for one kind of GPU, head and dtype.

    The short-sequence kernels are by the longest sequence that they compute, the shortest first.
    """

    forward_short: dict[int, Setting]
    forward_tiled: Setting
    backward_short: dict[int, Setting]
    backward_queries: Setting
    backward_keys: Setting


@functools.cache
def architecture(device: torch.device) -> str:
    """The rows of SETTINGS for a device; an interpreted kernel has those of sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    # 8: A100 and, with 99 KB of shared memory, its small sisters; 12, the small Blackwell, as well.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


_HOPPER = {
    64: Settings(
        forward_short={64: Setting(64, 64, 4, 1), 256: Setting(64, 256, 4, 2)},
        forward_tiled=Setting(128, 64, 8, 2),
        backward_short={64: Setting(64, 64, 4, 1), 256: Setting(256, 32, 8, 2)},
        backward_queries=Setting(128, 64, 8, 2),
        backward_keys=Setting(32, 128, 8, 2),
    ),
    128: Settings(
        forward_short={64: Setting(64, 64, 4, 1), 128: Setting(64, 128, 4, 2)},
        forward_tiled=Setting(128, 64, 8, 2),
        backward_short={128: Setting(128, 32, 8, 2)},
        backward_queries=Setting(128, 64, 8, 2),
        backward_keys=Setting(16, 64, 8, 2),
    ),
}

_HALF = {
    "sm_90": _HOPPER,
    "sm_100": _HOPPER
    | {
        64: _HOPPER[64]._replace(
            forward_short={64: Setting(64, 64, 4, 1), 256: Setting(64, 256, 8, 2)},
            backward_short={64: Setting(64, 64, 4, 1), 256: Setting(256, 16, 8, 1)},
        ),
        128: _HOPPER[128]._replace(
            forward_short={64: Setting(64, 64, 8, 1), 128: Setting(64, 128, 4, 2)},
            backward_short={128: Setting(128, 32, 8, 1)},
        ),
    },
    "sm_80": {
        64: Settings(
            forward_short={64: Setting(64, 64, 4, 1), 256: Setting(64, 256, 8, 1)},
            forward_tiled=Setting(128, 64, 8, 2),
            backward_short={64: Setting(64, 32, 8, 1), 128: Setting(128, 32, 8, 2)},
            backward_queries=Setting(128, 32, 8, 1),
            backward_keys=Setting(16, 128, 8, 1),
        ),
        128: Settings(
            forward_short={64: Setting(32, 64, 8, 1), 128: Setting(32, 128, 8, 1)},
            forward_tiled=Setting(64, 64, 8, 1),
            backward_short={},
            backward_queries=Setting(64, 64, 8, 1),
            backward_keys=Setting(32, 64, 8, 1),
        ),
    },
    "gfx942": {
        64: Settings(
            forward_short={64: Setting(64, 64, 4, 1), 256: Setting(64, 256, 4, 1)},
            forward_tiled=Setting(128, 64, 8, 2),
            backward_short={64: Setting(64, 64, 4, 1), 128: Setting(128, 32, 4, 1)},
            backward_queries=Setting(128, 64, 8, 2),
            backward_keys=Setting(32, 64, 4, 1),
        ),
        128: Settings(
            forward_short={64: Setting(64, 64, 4, 1), 128: Setting(64, 128, 4, 2)},
            forward_tiled=Setting(64, 64, 4, 2),
            backward_short={64: Setting(64, 32, 4, 1)},
            backward_queries=Setting(64, 32, 4, 1),
            backward_keys=Setting(16, 64, 8, 2),
        ),
    },
}

# No matrix unit computes in fp32: its products take many registers, so its blocks are small. With
# 64 queries sm_100's would do it after all, in tf32, whatever precision a product asks for.
_FP32 = {
    64: Settings({}, Setting(32, 32, 8, 1), {}, Setting(32, 16, 4, 1), Setting(32, 32, 8, 1)),
    128: Settings({}, Setting(16, 16, 8, 1), {}, Setting(16, 16, 8, 1), Setting(16, 16, 8, 1)),
}

SETTINGS = {
    (name, head_dim, size): settings
    for name, halves in _HALF.items()
    for size, table in ((2, halves), (4, _FP32))
    for head_dim, settings in table.items()
} | {("gfx942", 64, 4): _FP32[64]._replace(backward_keys=Setting(32, 32, 4, 1))}
"""By :func:`architecture`, the least of 64 and 128 that holds head_dim, and bytes of an element.
Chosen by registers (no spills), shared memory and L2 traffic; to be measured."""
