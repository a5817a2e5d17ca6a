"""Settings of a run: weights of the losses, the data, the optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from slap_fast.config.model import ModelConfig
from slap_fast.config.parsing import check, check_choices, check_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Weights of the total; a weight of 0 skips that loss's work altogether (paper, section 3)."""

    contrastive: float = 1.0
    """L_CLAP."""
    ssl: float = 1.0
    """L_SSL."""
    caption: float = 0.5
    """L_CAP."""
    contrastive_kind: Literal["softmax", "sigmoid"] = "softmax"
    """``softmax``: symmetric InfoNCE (CLIP). ``sigmoid``: pairwise (SigLIP arXiv 2303.15343)."""
    caption_impl: Literal["blockwise", "liger"] = "blockwise"
    """What runs L_CAP's product and softmax. ``liger``: the package liger-kernel's, on a GPU."""

    def __post_init__(self) -> None:
        for name in ("contrastive", "ssl", "caption"):
            value = getattr(self, name)
            check(value >= 0 and math.isfinite(value), f"loss.{name}", value, "a number >= 0")
        weights = (self.contrastive, self.ssl, self.caption)
        check(sum(weights) > 0, "loss", weights, "at least one weight above 0")
        check_choices(self, "loss.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """How clips become packed batches."""

    max_seconds: float = 30.0
    """A longer clip is cropped at random to this in training, seconds."""
    min_seconds: float = 0.025
    """A shorter clip is a bad item (E_TOO_SHORT), seconds: one analysis window."""
    time_masks: int = 2
    """SpecAugment (arXiv 1904.08779): spans of frames filled with the mean, per clip."""
    time_mask_share: float = 0.1
    """Longest span, as a share of the clip's frames."""
    freq_masks: int = 2
    """Spans of mel bins filled with the mean, per clip."""
    freq_mask_bins: int = 8
    """Longest span of bins."""
    cache_gb: float = 1.0
    """Memory for patches, GB: clips that fit are computed once; 0 decodes every time."""
    max_bad_share: float = 0.01
    """Training saves and stops when more than this share of the distinct clips is bad, of the last
    50,000 to 100,000 draws, once 20 of them are (or half of a smaller set)."""

    def __post_init__(self) -> None:
        limits, name = (self.min_seconds, self.max_seconds), "data.min_seconds, data.max_seconds"
        check(0 < limits[0] < limits[1], name, limits, "0 < min_seconds < max_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run. The defaults are the paper's pretraining."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the three losses."""
    data: DataConfig = field(default_factory=DataConfig)
    """Decode, crop, augment."""
    steps: int = 106_446
    """Optimiser steps: 2 epochs of 109 M pairs at a batch of 2,048."""
    batch_size: int = 2048
    """Clips in an optimiser step, over all ranks."""
    max_tokens: int = 262_144
    """Most audio tokens in one forward; a larger batch is split and its gradients accumulated."""
    grad_cache: bool = False
    """A batch that is split has the contrastive loss and the teacher's targets of all of it, not of
    each part: GradCache (arXiv 2101.06983), for one more forward of the towers."""
    lr: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 2_000
    """Linear warm-up; cosine decay to ``lr_final`` afterwards."""
    lr_final: float = 0.0
    """Learning rate at the last step."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW."""
    weight_decay: float = 0.1
    """AdamW, on matrices only."""
    clip_grad_norm: float = 1.0
    """Largest gradient norm."""
    ema_momentum: float = 0.994
    """The teacher's momentum at step 0; rises to 1.0 along a cosine."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto``: bf16 autocast on a GPU that has it, else fp32."""
    compile: bool = False
    """torch.compile of the student, the teacher and each loss, for packs of any size: minutes at
    the start, then less memory in every step; time as benchmarks/results have it. On a CPU it needs
    a C++ compiler. With ``fsdp`` the towers are compiled block by block."""
    seed: int = 0
    """Seed of the weights, the order, the crops and the masks."""
    log_every: int = 10
    """Steps between lines of ``metrics.jsonl``."""
    eval_every: int = 1_000
    """Steps between evaluations on the validation split; 0: only at the end."""
    save_every: int = 1_000
    """Steps between checkpoints."""
    saving: Literal["blocking", "background"] = "blocking"
    """``background``: training goes on while a thread writes a copy in the CPU's memory."""
    max_skipped_steps: int = 10
    """Training stops when more steps in a row than this have a loss or gradient that is not finite;
    such a step changes nothing."""
    ranks: Literal["ddp", "fsdp"] = "ddp"
    """How ranks hold the model. ``ddp``: each has all parameters. ``fsdp``: they are spread over
    the ranks (FSDP2), as are gradients, optimiser and teacher."""

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "max_tokens", "log_every", "save_every")
        check_positive(self, "", *names)
        check(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "a positive, finite number")
        check(0 <= self.ema_momentum <= 1, "ema_momentum", self.ema_momentum, "0 .. 1")
        check(self.max_skipped_steps >= 0, "max_skipped_steps", self.max_skipped_steps, ">= 0")
        check_choices(self)
