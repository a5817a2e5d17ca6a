"""The shapes that every benchmark shares, and the constants of the floors.

C1 .. C5 are packs of about 256,000 tokens, the step of one GPU; a clip of 10 s is 250 tokens. A
``scale`` below 1 shrinks them for a machine without a GPU: the same code, fewer clips.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NUM_HEADS, HEAD_DIM, HIDDEN_SIZE = 12, 64, 768
WINDOW = (48, 48)
TOKENS = 256_000
TOKENS_PER_SECOND = 25

COPY_BYTES_PER_S = 4.3e12
"""One H200, read plus written, measured."""
BF16_FLOP_PER_S = 790e12
"""One H200, a large bf16 product, measured (power-limited)."""
DATASHEET_FLOP_PER_S = 989e12
"""The peak that MFU is a share of."""


class Case(NamedTuple):
    """One pack."""

    name: str
    what: str
    lengths: list[int]
    """Tokens of each clip."""


def packs(scale: float = 1.0) -> list[Case]:
    """C1 .. C5; C3's lengths are drawn from a fixed seed."""

    def count(clips: int) -> int:
        return max(1, round(clips * scale))

    log_uniform = torch.empty(4096).uniform_(0, 1, generator=torch.Generator().manual_seed(0))
    lengths = (TOKENS_PER_SECOND * 30**log_uniform).long()
    within = lengths.cumsum(0) <= TOKENS * scale
    return [
        Case("C1", "10 s clips", [250] * count(1024)),
        Case("C2", "30 s clips", [750] * count(342)),
        Case("C3", "1 to 30 s, log-uniform", lengths[within].tolist()),
        Case("C4", "1 s clips", [25] * count(8192)),
        Case("C5", "one clip of 10 minutes", [max(25, round(15_000 * scale))]),
    ]


def cu_seqlens(lengths: list[int], device: torch.device) -> torch.Tensor:
    """int32 [B + 1]."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return starts.to(device, torch.int32)


def visible_pairs(length: int, window: tuple[int, int]) -> int:
    """(query, key) pairs of one sequence that a window leaves; (-1, -1) leaves all."""
    left, right = (length if side == -1 else min(side, length) for side in window)
    rows = torch.arange(length)
    first, last = (rows - left).clamp(min=0), (rows + right).clamp(max=length - 1)
    return int((last - first + 1).sum())
