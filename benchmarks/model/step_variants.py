"""The variants of a training step that are compared: reference, compiled reference and fused."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from slap_fast import losses
from slap_fast.config import TrainConfig, override
from slap_fast.losses import self_distillation
from slap_fast.models.slap import SlapModel, SlapOutput
from slap_fast.ops import dispatch
from slap_fast.packed import IGNORE_INDEX, PackedBatch
from slap_fast.training import objective
from slap_fast.training.state import TrainState, new_state
from slap_fast.training.step import autocast

VARIANTS = {
    "reference": {"compiled": False, "fused": False},
    "compiled reference": {"compiled": True, "fused": False},
    "fused": {"compiled": True, "fused": True},
}


def textbook_losses(
    state: TrainState,
    out: SlapOutput,
    features: Tensor,
    prototypes: Tensor,
    batch: PackedBatch,
) -> dict[str, Tensor]:
    """The three losses as a paper writes them: all logits exist at once."""
    ssl = state.config.model.ssl
    targets = (features @ prototypes.T).float() / ssl.teacher_temperature
    for _ in range(ssl.sinkhorn_iterations):
        targets = (targets - targets.logsumexp(0)).log_softmax(1)
    targets = targets.exp()
    logits = (out.logit_scale * out.audio_features @ out.text_features.T).float()
    positives = torch.arange(len(logits), device=logits.device)
    student_logits = (out.student_features @ out.prototypes.T).float() / ssl.student_temperature
    caption_logits = (out.caption_hidden @ out.caption_weight.T).float()
    audio_to_text, text_to_audio = (F.cross_entropy(x, positives) for x in (logits, logits.T))
    return {
        "contrastive": (audio_to_text + text_to_audio) / 2,
        "ssl": -(targets * student_logits.log_softmax(1)).sum(1).mean(),
        "caption": F.cross_entropy(caption_logits, batch.labels, ignore_index=IGNORE_INDEX),
    }


def chunked_losses(
    state: TrainState,
    out: SlapOutput,
    features: Tensor,
    prototypes: Tensor,
    batch: PackedBatch,
) -> dict[str, Tensor]:
    """The losses as the trainer computes them, in chunks."""
    ssl = state.config.model.ssl
    targets = objective.teacher_targets(state, features, prototypes, ssl.teacher_temperature)
    student = out.student_features, out.prototypes
    pair = out.audio_features, out.text_features
    words = out.caption_hidden, out.caption_weight
    contrastive, ssl_loss, caption = (
        objective.as_graph(state.config, loss)
        for loss in (
            losses.contrastive_loss,
            self_distillation.self_distillation_loss,
            losses.caption_loss,
        )
    )
    return {
        "contrastive": contrastive(*pair, out.logit_scale, groups=batch.groups),
        "ssl": ssl_loss(*student, targets, ssl.student_temperature)[0],
        "caption": caption(*words, batch.labels),
    }


WITHOUT_KERNELS = {"attention": "torch", "map_pool": "reference"}
"""What runs the operations of the model where the step is not fused."""


class StepResult(NamedTuple):
    """One step: its loss, its times and its memory."""

    loss: float
    laps: dict[str, float]
    """Seconds of each stage."""
    peak_bytes: int | None
    """At the peak, beyond those before the step; None where the system has no count."""

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(self.laps.values())


class StepVariant:
    """A variant of the step, with a model of its own that starts from the same weights."""

    def __init__(
        self, config: TrainConfig, device: torch.device, *, compiled: bool, fused: bool
    ) -> None:
        config = override(config, {"compile": compiled})
        torch.manual_seed(0)
        self.state = new_state(config, SlapModel(config.model), device)
        textbook = objective.as_graph(config, textbook_losses)
        self.losses_of = chunked_losses if fused else textbook
        self.fused = fused
        if not fused:
            groups = self.state.optimizer.param_groups
            groups = [{k: g[k] for k in ("params", "weight_decay")} for g in groups]
            options = {"lr": config.lr, "betas": config.betas}
            self.state.optimizer = torch.optim.AdamW(groups, foreach=False, **options)

    def step(self, batch: PackedBatch, lap: Callable[[str], None]) -> Tensor:
        """One step; ``lap`` is called at the end of each stage. Returns the loss."""
        state = self.state
        with autocast(state.config, state.device):
            teacher_output = state.teacher(batch)
            lap("teacher")
            out = state.model(batch, state.config.loss)
            lap("student, text, decoder")
            values = self.losses_of(state, out, *teacher_output, batch)
            total = losses.total_loss(values, state.config.loss)
        del out, teacher_output, values
        lap("losses")
        total.backward()
        lap("backward")
        trained = [p for group in state.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, state.config.clip_grad_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        lap("optimiser")
        state.teacher.update(state.model, 0.99)
        lap("EMA")
        return total.detach()

    def timed(self, batch: PackedBatch) -> StepResult:
        """One step with its times and its memory."""
        laps: dict[str, float] = {}
        last = now(self.state.device)

        def lap(name: str) -> None:
            nonlocal last
            time_now = now(self.state.device)
            laps[name] = time_now - last
            last = time_now

        peak = harness.Peak(self.state.device)
        with nullcontext() if self.fused else dispatch.using(WITHOUT_KERNELS), peak:
            last = now(self.state.device)
            loss = self.step(batch, lap)
        return StepResult(float(loss), laps, peak.bytes)


def now(device: torch.device) -> float:
    """Seconds on the clock, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
