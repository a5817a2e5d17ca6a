"""Schedules over the steps of a run: learning rate, teacher momentum and temperature."""

from __future__ import annotations

import math

from slap_fast.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to ``lr``, then a cosine to ``lr_final`` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr_final + (config.lr - config.lr_final) * _cosine(share)


def ema_momentum(config: TrainConfig, step: int) -> float:
    """A cosine from ``ema_momentum`` to 1.0."""
    return 1.0 - (1.0 - config.ema_momentum) * _cosine(step / config.steps)


def teacher_temperature(config: TrainConfig, step: int) -> float:
    """Linear warm-up from ``ssl.teacher_temperature_start`` to ``ssl.teacher_temperature``."""
    ssl = config.model.ssl
    share = min(1.0, step / max(1.0, ssl.teacher_temperature_warmup * config.steps))
    return ssl.teacher_temperature_start + share * (
        ssl.teacher_temperature - ssl.teacher_temperature_start
    )


def _cosine(share: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
