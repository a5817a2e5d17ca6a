"""Rotary tables: the arguments and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from slap_fast.ops.validation import check_tensor
from slap_fast.reference import rope as reference


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
    return reference.rope_tables(coords, head_dim, theta)
