"""The dtype of products under torch.autocast, for what does not leave it to torch."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of ``x`` is computed in: under autocast, its dtype; fp64 stays."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
