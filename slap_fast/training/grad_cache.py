"""GradCache (arXiv 2101.06983): a step in several packs has the losses of one large pack.

The contrastive loss and the teacher's targets depend on which clips meet. With ``grad_cache`` they
are those of the whole step, however many packs it takes: a first pass embeds every pack and keeps
no activations, the loss of all embeddings gives the gradient of each, and the second pass, pack by
pack, propagates that gradient through the model. It costs one more forward of the towers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slap_fast.losses.self_distillation import Targets
from slap_fast.packed import PackedBatch
from slap_fast.precision import compute_dtype
from slap_fast.training.objective import contrastive_loss, teacher_targets
from slap_fast.training.state import TrainState


class CachedPack(NamedTuple):
    """What the first pass keeps for the second pass of one pack."""

    rng_state: list[Tensor]
    """Before the pack: dropout in the second pass is that of the first."""
    contrastive: Tensor | None
    """0-d: the step's contrastive loss at its first pack, 0 at the others."""
    gradients: list[Tensor]
    """Gradients of that loss at the pack's audio and text features, logit scale and logit bias."""
    targets: Targets | None
    """Targets of the pack's masked patches."""

    @contextmanager
    def random_numbers(self, device: torch.device) -> Iterator[None]:
        """Inside, a forward draws the random numbers that the first pass drew."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.set_rng_state(self.rng_state[0])
            for rng_state in self.rng_state[1:]:
                torch.cuda.set_rng_state(rng_state, device)
            yield

    def contrastive_loss(self, *inputs: Tensor) -> Tensor:
        """The pack's part of the step's loss, whose backward gives the stored gradients.

        Args:
            inputs: the pack's audio and text features, logit scale and logit bias.
        """
        return _Replay.apply(self.contrastive, self.gradients, *inputs)


@torch.no_grad()
def first_pass(
    state: TrainState, batches: Sequence[PackedBatch], clips: Sequence[int], temperature: float
) -> list[CachedPack]:
    """Embeds a step's packs; returns for each what its second pass needs of the others.

    Args:
        state: the run.
        batches: this rank's packs; every rank has as many.
        clips: number of clips in the whole step, of each rank.
        temperature: the teacher's.
    """
    weights, device = state.config.loss, state.device
    shared = state.config.model.ssl.student_pass == "shared"
    needed = dataclasses.replace(weights, caption=0.0, ssl=weights.ssl if shared else 0.0)
    rng_states, outs, teacher_features = [], [], []
    for batch in batches:
        batch = batch.to(device)
        rng_states.append(_rng_state(device))
        if weights.contrastive:
            out = state.replica(batch, needed)._replace(student_features=None, prototypes=None)
            outs.append(out)
        if weights.ssl:
            features, prototypes = state.teacher(batch)
            teacher_features.append(features.to(compute_dtype(features)))
    loss, gradients = None, [[] for _ in batches]
    if weights.contrastive:
        loss, gradients = _contrastive_gradients(state, outs, batches, clips)
    targets = [None] * len(batches)
    if weights.ssl:
        joint = teacher_targets(state, torch.cat(teacher_features), prototypes, temperature)
        sizes = [len(features) for features in teacher_features]
        targets = [joint._replace(features=part) for part in joint.features.split(sizes)]
    zero = None if loss is None else torch.zeros_like(loss)
    losses = [loss, *[zero] * (len(batches) - 1)]
    return [
        CachedPack(*parts) for parts in zip(rng_states, losses, gradients, targets, strict=True)
    ]


def _contrastive_gradients(
    state: TrainState, outs: Sequence[Any], batches: Sequence[PackedBatch], clips: Sequence[int]
) -> tuple[Tensor, list[list[Tensor]]]:
    """The step's contrastive loss, and its gradients at each pack's features; those at the logit
    scale and bias go to the first pack."""
    audio, text = (
        torch.cat([getattr(out, name) for out in outs]).requires_grad_()
        for name in ("audio_features", "text_features")
    )
    scale, bias = (getattr(outs[0], name).clone() for name in ("logit_scale", "logit_bias"))
    inputs = audio, text, scale.requires_grad_(), bias.requires_grad_()
    widest = max(batch.groups.shape[1] for batch in batches)
    groups = torch.cat([_widened(batch.groups, widest) for batch in batches]).to(state.device)
    with torch.enable_grad():
        loss = contrastive_loss(state, *inputs, groups, clips)
        dinputs = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    sizes = [len(out.audio_features) for out in outs]
    daudio, dtext = (x.split(sizes) for x in dinputs[:2])
    gradients = [
        [a, t, *map(torch.zeros_like, dinputs[2:])] for a, t in zip(daudio, dtext, strict=True)
    ]
    gradients[0][2:] = dinputs[2:]
    return loss.detach(), gradients


def _widened(groups: Tensor, width: int) -> Tensor:
    """groups [B, M] -> [B, width]: a number that is repeated changes nothing."""
    return torch.cat([groups, groups[:, :1].expand(-1, width - groups.shape[1])], 1)


class _Replay(torch.autograd.Function):
    """A loss and its gradients at its inputs, all computed before."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(dloss.to(x.dtype) * x for x in ctx.gradients)


def _rng_state(device: torch.device) -> list[Tensor]:
    """The state of the generators that a forward may draw from."""
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]
