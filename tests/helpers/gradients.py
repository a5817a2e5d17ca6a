"""Losses and gradients of one step, for comparisons between ranks and between packs."""

from __future__ import annotations

from typing import Any

import numpy as np

from slap_fast import distributed
from slap_fast.config import TrainConfig
from slap_fast.data.loader import TrainSteps
from slap_fast.training.state import begin
from slap_fast.training.step import train_step
from tests.helpers import runs

NO_LOSS = {"loss.contrastive": 0.0, "loss.ssl": 0.0, "loss.caption": 0.0}
HEALTH = ("prototype_use", "target_entropy", "marginal_entropy", "feature_std")
"""Metrics of each rank's own rows, averaged: they depend on how rows are spread over ranks."""


def gradients_of(config: TrainConfig) -> dict[str, np.ndarray]:
    """Losses, gradients and the teacher's centre of one step, as this rank has them."""
    state, tokenizer = begin(config, None, None, runs.CPU)
    ranks = distributed.rank(), distributed.world_size()
    data = TrainSteps(runs.clips(), tokenizer, config, None, *ranks)
    values: dict[str, Any] = {}

    def keep() -> None:
        for name, parameter in state.model.named_parameters():
            if parameter.grad is not None:
                values[f"gradient of {name}"] = distributed.full(parameter.grad).clone()

    state.optimizer.step = keep
    values |= train_step(state, data[0].batches)
    if state.teacher is not None:
        values["centre"] = state.teacher.center
    return {name: value.numpy() for name, value in values.items() if name not in HEALTH}
