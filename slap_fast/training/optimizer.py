"""The optimiser of a run."""

from __future__ import annotations

import torch
from torch import nn

from slap_fast.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (norms, scales and single vectors have none)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # A step of slap_tiny on one CPU thread: fused 12 ms, single-tensor 35 ms, foreach 45 ms.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
