"""What a step minimises: the losses of one pack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slap_fast import compilation, distributed, losses
from slap_fast.config import TrainConfig
from slap_fast.losses import self_distillation
from slap_fast.losses.self_distillation import Targets
from slap_fast.packed import PackedBatch
from slap_fast.training.state import TrainState

if TYPE_CHECKING:
    from slap_fast.training.grad_cache import CachedPack


def batch_losses(
    state: TrainState,
    batch: PackedBatch,
    clips: Sequence[int],
    temperature: float,
    cached: CachedPack | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses that have a weight, each a mean over its own rows, and health figures; with
    centering, also ``mean_scores`` [K], towards which the teacher's centre moves.

    The contrastive loss is that of the clips of all ranks; the others are of this rank's rows.

    Args:
        state: the run.
        batch: this rank's pack.
        clips: number of clips in each rank's pack.
        temperature: the teacher's.
        cached: of the first pass over the step's packs, where there was one.
    """
    config, weights = state.config, state.config.loss
    targets = cached and cached.targets
    if weights.ssl and targets is None:
        # Before the student: the teacher's temporary memory is free again when activations fill it.
        targets = teacher_targets(state, *state.teacher(batch), temperature)
    with cached.random_numbers(state.device) if cached else nullcontext():
        out = state.replica(batch, weights)
    values, health = {}, {}
    if weights.contrastive:
        pair = out.audio_features, out.text_features, out.logit_scale, out.logit_bias
        if cached is None:
            values["contrastive"] = contrastive_loss(state, *pair, batch.groups, clips)
        else:
            values["contrastive"] = cached.contrastive_loss(*pair)
    if weights.ssl:
        loss = as_graph(config, self_distillation.self_distillation_loss)
        student = out.student_features, out.prototypes
        values["ssl"], health = loss(*student, targets, config.model.ssl.student_temperature)
        if config.model.ssl.targets == "centering":
            health["mean_scores"] = self_distillation.mean_scores(targets)
    if weights.caption:
        in_graph = weights.caption_impl != "liger"  # it waits for values from the device
        loss = as_graph(config, losses.caption_loss) if in_graph else losses.caption_loss
        hidden = out.caption_hidden, out.caption_weight, batch.labels
        values["caption"] = loss(*hidden, impl=weights.caption_impl)
    return values, health


def contrastive_loss(
    state: TrainState,
    audio: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    groups: Tensor,
    clips: Sequence[int],
) -> Tensor:
    """The loss of the clips of all ranks.

    Args:
        state: the run.
        audio: this rank's features [B, D].
        text: as ``audio``.
        logit_scale: 0-d.
        logit_bias: 0-d, of the sigmoid loss.
        groups: this rank's :class:`PackedBatch` ``groups`` [B, M].
        clips: B of each rank.
    """
    audio, text = (distributed.gather_rows(x, clips) for x in (audio, text))
    groups = distributed.gather_groups(groups, clips)
    if state.config.loss.contrastive_kind == "sigmoid":
        loss = as_graph(state.config, losses.sigmoid_contrastive_loss)
        return loss(audio, text, logit_scale, logit_bias, groups=groups)
    loss = as_graph(state.config, losses.contrastive_loss)
    return loss(audio, text, logit_scale, groups=groups)


def teacher_targets(
    state: TrainState, features: Tensor, prototypes: Tensor, temperature: float
) -> Targets:
    """The student's targets, by the teacher's features [M, D] and prototypes [K, D]; Sinkhorn's
    balance the rows of all ranks together."""
    ssl = state.config.model.ssl
    teacher = features, prototypes
    if ssl.targets == "sinkhorn":
        # A tensor: with a number, each of the teacher's temperatures would be recompiled.
        options = features.new_full((), temperature, dtype=torch.float32), ssl.sinkhorn_iterations
        if distributed.world_size() == 1:
            return as_graph(state.config, self_distillation.sinkhorn)(*teacher, *options)
        compiled = state.config.compile and features.is_cuda
        return self_distillation.sinkhorn(
            *teacher, *options, distributed.logsumexp, compiled=compiled
        )
    return self_distillation.centered_targets(*teacher, state.teacher.center, temperature)


def as_graph(config: TrainConfig, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled for tensors of any size where the run is compiled."""
    return compilation.compile_for_any_size(function) if config.compile else function
