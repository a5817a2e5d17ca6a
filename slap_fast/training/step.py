"""One optimiser step over the packs of all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slap_fast import distributed, losses
from slap_fast.config import TrainConfig
from slap_fast.packed import PackedBatch
from slap_fast.training.grad_cache import CachedPack, first_pass
from slap_fast.training.objective import batch_losses
from slap_fast.training.schedules import ema_momentum, learning_rate, teacher_temperature
from slap_fast.training.state import TrainState

LOSSES = ("loss", "contrastive", "ssl", "caption")
"""Metrics that are losses: the total, and the three."""
HEALTH = ("prototype_use", "target_entropy", "marginal_entropy", "feature_std")
"""Metrics of :func:`slap_fast.losses.self_distillation.self_distillation_loss`."""


class LossCounts(NamedTuple):
    """Numbers of rows that each loss is a mean over."""

    contrastive: int = 0
    """Clips."""
    ssl: int = 0
    """Masked patches."""
    caption: int = 0
    """Predicted tokens."""

    @classmethod
    def of(cls, batch: PackedBatch) -> LossCounts:
        """The counts of one pack."""
        clips = len(batch.groups)
        return cls(clips, len(batch.mask_indices), len(batch.labels) - clips)

    @classmethod
    def sum(cls, counts: Iterable[LossCounts]) -> LossCounts:
        """The sum of each count."""
        return cls(*map(sum, zip(*counts, strict=True)))

    def shares(self, forward: Sequence[LossCounts]) -> dict[str, float]:
        """Factors by which this rank's losses of a forward add up to means over the whole step.

        The products are added over the forwards and averaged over ranks.

        Args:
            self: the counts of the whole step, of all ranks.
            forward: of one forward, the counts of each rank.
        """
        own = forward[distributed.rank()]
        share = {
            # Every rank has the contrastive loss of all ranks' clips.
            "contrastive": sum(counts.contrastive for counts in forward),
            "ssl": len(forward) * own.ssl,
            "caption": len(forward) * own.caption,
        }
        return {name: share[name] / max(1, total) for name, total in self._asdict().items()}


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether the config and the device make products in bf16."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bf16" or (config.precision == "auto" and has_bf16)


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """bf16 where the config and the device allow it, else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device))


def train_step(state: TrainState, batches: Sequence[PackedBatch]) -> dict[str, Tensor]:
    """One optimiser step over the ``batches`` of all ranks; returns 0-d tensors, equal on all.

    A step whose loss or gradient is not finite changes nothing but ``state.skipped``. Whether they
    are finite is the one value that is read back from the device.
    """
    config, model, teacher, step = state.config, state.model, state.teacher, state.step
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    model.train()
    counts = _counts_of_forwards(batches)
    total = LossCounts.sum(itertools.chain(*counts))
    metrics = _forwards_and_backwards(state, batches, counts, total)
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, config.clip_grad_norm)
    metrics["grad_norm"] = distributed.full(norm)
    metrics["logit_scale"] = distributed.full(model.logit_scale.detach())
    scores = metrics.pop("mean_scores", None)
    if scores is not None:
        (scores,) = distributed.mean({"mean_scores": scores}).values()
    metrics = distributed.mean(metrics)
    finite = bool(torch.isfinite(metrics["loss"] + metrics["grad_norm"]))
    if finite:
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if finite and teacher is not None:
        teacher.update(model, ema_momentum(config, step))
        if scores is not None and total.ssl:
            teacher.center.lerp_(scores.to(teacher.center), 1.0 - config.model.ssl.center_momentum)
    state.skipped += not finite
    state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
    return metrics


def _counts_of_forwards(batches: Sequence[PackedBatch]) -> list[tuple[LossCounts, ...]]:
    """The counts of each forward of the step, by rank; 0 where a rank has no more packs."""
    ranks = distributed.exchange([LossCounts.of(batch) for batch in batches])
    counts = ([LossCounts(*pack) for pack in packs] for packs in ranks)
    return list(itertools.zip_longest(*counts, fillvalue=LossCounts()))


def _forwards_and_backwards(
    state: TrainState,
    batches: Sequence[PackedBatch],
    counts: Sequence[Sequence[LossCounts]],
    total: LossCounts,
) -> dict[str, Tensor]:
    """Adds the step's gradients, of ``counts`` by forward and rank; returns its metrics."""
    config, metrics = state.config, {}
    missing = len(counts) - len(batches)
    batches = [*batches, *[PackedBatch.empty(config.model.mel.patch_dim)] * missing]
    temperature = teacher_temperature(config, state.step)
    cached = [None] * len(batches)
    if config.grad_cache and len(batches) > 1:
        clips = [LossCounts.sum(packs).contrastive for packs in zip(*counts, strict=True)]
        with autocast(config, state.device):
            cached = first_pass(state, batches, clips, temperature)
    for i, batch in enumerate(batches):
        shares = total.shares(counts[i]) | ({"contrastive": 1.0} if cached[i] else {})
        clips = [packs.contrastive for packs in counts[i]]
        with distributed.accumulating(state.replica, last=i == len(batches) - 1):
            batch = batch.to(state.device)
            values = _forward_backward(state, batch, clips, shares, temperature, cached[i])
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + value
    return metrics


def _forward_backward(
    state: TrainState,
    batch: PackedBatch,
    clips: Sequence[int],
    shares: dict[str, float],
    temperature: float,
    cached: CachedPack | None,
) -> dict[str, Tensor]:
    """Adds to the gradients; returns this forward's part of the metrics."""
    with autocast(state.config, state.device):
        values, health = batch_losses(state, batch, clips, temperature, cached)
        values = {name: shares[name] * value for name, value in values.items()}
        total = losses.total_loss(values, state.config.loss)
    total.backward()
    if shares["ssl"]:
        health = {name: shares["ssl"] * value for name, value in health.items()}
    else:  # without rows they are NaN
        health = {name: torch.zeros_like(value) for name, value in health.items()}
    return {name: x.detach() for name, x in {"loss": total, **values, **health}.items()}
