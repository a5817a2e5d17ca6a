"""The weighted sum of the losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class LossWeights(Protocol):
    """The weights of :func:`total_loss`; ``config.LossConfig`` has them."""

    contrastive: float
    ssl: float
    caption: float


def total_loss(losses: Mapping[str, Tensor], weights: LossWeights) -> Tensor:
    """The weighted sum, 0-d, of ``losses``: any of ``contrastive``, ``ssl`` and ``caption``.

    A weight of 0 leaves its loss out, so that not even a NaN of it counts. Raises ValueError for
    another key, or when nothing is left to train on.
    """
    for name in losses:
        if name not in ("contrastive", "ssl", "caption"):
            raise ValueError(f"losses: found {name!r}, expected contrastive, ssl or caption")
    factors = {name: getattr(weights, name) for name in losses}
    parts = [factors[name] * loss for name, loss in losses.items() if factors[name]]
    if not parts:
        raise ValueError(f"losses: found {list(losses)}, expected one with a weight above 0")
    return torch.stack(parts).sum()
