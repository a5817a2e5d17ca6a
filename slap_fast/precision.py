"""Dtypes of a computation: that of its products under torch.autocast, and that of its sums."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products of ``x`` are computed in: autocast's where it is on; fp64 stays."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, logarithms and exponentials: fp32, and fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)
