"""The launch settings of attention's kernels: a plain table, nothing is tuned at run time."""

from __future__ import annotations

from typing import NamedTuple


class Setting(NamedTuple):
    """How a kernel is launched."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Settings(NamedTuple):
    """How all kernels are launched for one kind of head and dtype.

    The whole ways are by the longest sequence that takes them, the shortest first.
    """

    forward_whole: dict[int, Setting]
    forward_tiled: Setting
    backward_whole: dict[int, Setting]
    backward_queries: Setting
    backward_keys: Setting


SETTINGS = {
    (64, 2): Settings(
        forward_whole={64: Setting(64, 64, 4, 1), 256: Setting(64, 256, 4, 2)},
        forward_tiled=Setting(128, 64, 8, 2),
        backward_whole={64: Setting(64, 64, 4, 1), 256: Setting(256, 32, 8, 2)},
        backward_queries=Setting(128, 64, 8, 2),
        backward_keys=Setting(32, 128, 8, 2),
    ),
    (128, 2): Settings(
        forward_whole={64: Setting(64, 64, 4, 1), 128: Setting(64, 128, 4, 2)},
        forward_tiled=Setting(128, 64, 8, 2),
        backward_whole={128: Setting(128, 32, 8, 2)},
        backward_queries=Setting(128, 64, 8, 2),
        backward_keys=Setting(16, 64, 8, 2),
    ),
    (64, 4): Settings({}, Setting(64, 32, 8, 1), {}, Setting(32, 16, 4, 1), Setting(32, 32, 8, 1)),
    (128, 4): Settings({}, Setting(16, 16, 8, 1), {}, Setting(16, 16, 8, 1), Setting(16, 16, 8, 1)),
}
"""By the least of 64 and 128 that holds head_dim, and the bytes of an element. Chosen by what sm_90
needs of registers (no spills) and shared memory; to be measured. No matrix unit computes in fp32:
its products take many registers, so its blocks are small."""
