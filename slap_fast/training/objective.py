"""What a step minimises: one pack's losses, or a whole step's when its packs must share one.

The contrastive loss and the teacher's targets depend on which clips meet. With ``grad_cache`` they
are those of the whole step, however many packs it takes: a first pass embeds every pack and keeps
no activations, the loss of all embeddings gives the gradient of each, and the second pass, pack by
pack, carries that gradient on into the model (GradCache, arXiv 2101.06983). The step is the one of
a single large pack, for one more forward of the towers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slap_fast import distributed, losses
from slap_fast.config import TrainConfig
from slap_fast.losses import chunked, self_distillation
from slap_fast.losses.self_distillation import Targets
from slap_fast.packed import PackedBatch
from slap_fast.precision import compute_dtype
from slap_fast.training.state import TrainState

Rows = Sequence[dict[str, int]]
"""The rows of each loss, of each rank."""


class Cached(NamedTuple):
    """What the first pass found out for one pack."""

    rng_state: list[Tensor]
    """Before the pack: dropout in the second pass is that of the first."""
    contrastive: Tensor | None
    """0-d: the step's contrastive loss at its first pack, 0 at the others."""
    gradients: list[Tensor]
    """Of that loss: at the pack's audio and text features, logit scale and logit bias."""
    targets: Targets | None
    """Of the pack's masked patches."""


def batch_losses(
    state: TrainState,
    batch: PackedBatch,
    rows: Rows,
    temperature: float,
    cached: Cached | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses that have a weight, each a mean over its own rows, and health figures; with
    centering, also ``mean_scores`` [K], towards which the centre is to move.

    The contrastive loss is that of the clips of all ranks; the others are of this rank's rows.

    Args:
        state: the run.
        batch: this rank's forward.
        rows: of each rank's forward.
        temperature: the teacher's.
        cached: of the first pass over the step's packs, where there was one.
    """
    config, weights = state.config, state.config.loss
    targets = cached and cached.targets
    if weights.ssl and targets is None:
        # Before the student: what it needs on its way is gone when the activations come.
        targets = teacher_targets(state, *state.teacher(batch), temperature)
    with _replayed(cached, state.device):
        out = state.replica(batch, weights)
    values, health = {}, {}
    if weights.contrastive:
        pair = out.audio_features, out.text_features, out.logit_scale, out.logit_bias
        if cached is None:
            values["contrastive"] = _contrastive(state, *pair, batch.groups, rows)
        else:
            values["contrastive"] = _Replay.apply(cached.contrastive, cached.gradients, *pair)
    if weights.ssl:
        loss = as_graph(config, self_distillation.self_distillation_loss)
        student = out.student_features, out.prototypes
        values["ssl"], health = loss(*student, targets, config.model.ssl.student_temperature)
        if config.model.ssl.targets == "centering":
            health["mean_scores"] = self_distillation.mean_scores(targets)
    if weights.caption:
        in_graph = weights.caption_impl != "liger"  # which reads back to the host
        loss = as_graph(config, losses.caption_loss) if in_graph else losses.caption_loss
        words = out.caption_hidden, out.caption_weight, batch.labels
        values["caption"] = loss(*words, impl=weights.caption_impl)
    return values, health


@torch.no_grad()
def first_pass(
    state: TrainState, batches: Sequence[PackedBatch], rows: Rows, temperature: float
) -> list[Cached]:
    """What each of a step's packs needs to know of the others.

    Args:
        state: the run.
        batches: this rank's packs; every rank has as many.
        rows: of the whole step, of each rank.
        temperature: the teacher's.
    """
    weights, device = state.config.loss, state.device
    shared = state.config.model.ssl.student_pass == "shared"
    needed = dataclasses.replace(weights, caption=0.0, ssl=weights.ssl if shared else 0.0)
    rng_states, outs, taught = [], [], []
    for batch in batches:
        batch = batch.to(device)
        rng_states.append(_rng_state(device))
        if weights.contrastive:
            out = state.replica(batch, needed)._replace(student_features=None, prototypes=None)
            outs.append(out)
        if weights.ssl:
            features, prototypes = state.teacher(batch)
            taught.append(features.to(compute_dtype(features)))
    loss, gradients = None, [[] for _ in batches]
    if weights.contrastive:
        loss, gradients = _contrastive_gradients(state, outs, batches, rows)
    targets = [None] * len(batches)
    if weights.ssl:
        whole = teacher_targets(state, torch.cat(taught), prototypes, temperature)
        sizes = [len(part) for part in taught]
        targets = [whole._replace(features=part) for part in whole.features.split(sizes)]
    here = [loss if i == 0 or loss is None else torch.zeros_like(loss) for i in range(len(batches))]
    return [Cached(*each) for each in zip(rng_states, here, gradients, targets, strict=True)]


def _contrastive_gradients(
    state: TrainState, outs: Sequence[Any], batches: Sequence[PackedBatch], rows: Rows
) -> tuple[Tensor, list[list[Tensor]]]:
    """The step's contrastive loss, and its gradients at each pack's features; the logit scale's and
    bias's belong to the first pack."""
    audio, text = (
        torch.cat([getattr(out, name) for out in outs]).requires_grad_()
        for name in ("audio_features", "text_features")
    )
    scale, bias = (getattr(outs[0], name).clone() for name in ("logit_scale", "logit_bias"))
    inputs = audio, text, scale.requires_grad_(), bias.requires_grad_()
    widest = max(batch.groups.shape[1] for batch in batches)
    groups = torch.cat([_widened(batch.groups, widest) for batch in batches]).to(state.device)
    with torch.enable_grad():
        loss = _contrastive(state, *inputs, groups, rows)
        found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    sizes = [len(out.audio_features) for out in outs]
    daudio, dtext = (x.split(sizes) for x in found[:2])
    gradients = [
        [a, t, *map(torch.zeros_like, found[2:])] for a, t in zip(daudio, dtext, strict=True)
    ]
    gradients[0][2:] = found[2:]
    return loss.detach(), gradients


def _widened(groups: Tensor, width: int) -> Tensor:
    """groups [B, M] -> [B, width]: a number that is there once more changes nothing."""
    return torch.cat([groups, groups[:, :1].expand(-1, width - groups.shape[1])], 1)


class _Replay(torch.autograd.Function):
    """A loss that is known already, whose gradient at its inputs is known too."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(dloss.to(x.dtype) * x for x in ctx.gradients)


def _contrastive(
    state: TrainState,
    audio: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    groups: Tensor,
    rows: Rows,
) -> Tensor:
    """Of the clips of all ranks."""
    clips = [each["contrastive"] for each in rows]
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
    """What the teacher's features [M, D] and prototypes [K, D] ask of the student, all ranks' rows
    together."""
    ssl = state.config.model.ssl
    teacher = features, prototypes
    if ssl.targets == "sinkhorn":
        # A tensor: as a number, a graph would be made anew for each of the teacher's temperatures.
        options = features.new_full((), temperature, dtype=torch.float32), ssl.sinkhorn_iterations
        if distributed.world_size() == 1:
            return as_graph(state.config, self_distillation.sinkhorn)(*teacher, *options)
        compiled = state.config.compile and features.is_cuda
        return self_distillation.sinkhorn(
            *teacher, *options, distributed.logsumexp, compiled=compiled
        )
    return self_distillation.centered_targets(*teacher, state.teacher.center, temperature)


def as_graph(config: TrainConfig, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled for tensors of any size where the run is."""
    return chunked.as_graph(function) if config.compile else function


def _rng_state(device: torch.device) -> list[Tensor]:
    """The generators that a forward may draw from."""
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


@contextmanager
def _replayed(cached: Cached | None, device: torch.device) -> Iterator[None]:
    """Inside, a forward draws what the first pass's of the same pack drew."""
    if cached is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(cached.rng_state[0])
        for rng_state in cached.rng_state[1:]:
            torch.cuda.set_rng_state(rng_state, device)
        yield
