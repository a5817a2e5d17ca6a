"""Settings of a run: weights of the losses, the data, the optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from slap_fast.config.bounds import (
    Bounds,
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    Share,
    check,
    check_fields,
)
from slap_fast.config.model import ModelConfig

_Beta = Annotated[float, Bounds(at_least=0, below=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Weights of the total; a weight of 0 skips that loss's work altogether (paper, section 3)."""

    contrastive: PositiveOrZero = 1.0
    """L_CLAP."""
    ssl: PositiveOrZero = 1.0
    """L_SSL."""
    caption: PositiveOrZero = 0.5
    """L_CAP."""
    contrastive_kind: Literal["softmax", "sigmoid"] = "softmax"
    """``softmax``: symmetric InfoNCE (CLIP). ``sigmoid``: pairwise (SigLIP arXiv 2303.15343)."""
    caption_impl: Literal["blockwise", "liger"] = "blockwise"
    """What runs L_CAP's product and softmax. ``liger``: the package liger-kernel's, on a GPU."""

    def __post_init__(self) -> None:
        check_fields(self, "loss.")
        check(
            self.contrastive + self.ssl + self.caption > 0,
            "loss",
            (self.contrastive, self.ssl, self.caption),
            "at least one weight above 0",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """How clips become packed batches."""

    max_seconds: Positive = 30.0
    """A longer clip is cropped at random to this in training, seconds."""
    min_seconds: Positive = 0.025
    """A shorter clip is a bad item (E_TOO_SHORT), seconds: one analysis window."""
    time_masks: CountOrZero = 2
    """SpecAugment (arXiv 1904.08779): spans of frames filled with the mean, per clip."""
    time_mask_share: Share = 0.1
    """Longest span, as a share of the clip's frames."""
    freq_masks: CountOrZero = 2
    """Spans of mel bins filled with the mean, per clip."""
    freq_mask_bins: CountOrZero = 8
    """Longest span of bins."""
    cache_gb: PositiveOrZero = 1.0
    """Patches of clips that fit in this much memory are computed once and kept; 0 decodes every
    time."""
    max_bad_share: Share = 0.01
    """Training saves and stops when more than this share of the distinct clips is bad, of the last
    50,000 to 100,000 draws, once 20 of them are (or half of a smaller set)."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        check(
            self.min_seconds < self.max_seconds,
            "data.min_seconds, data.max_seconds",
            (self.min_seconds, self.max_seconds),
            "min_seconds < max_seconds",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run. The defaults are the paper's pretraining."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the three losses."""
    data: DataConfig = field(default_factory=DataConfig)
    """Decode, crop, augment."""
    steps: Count = 106_446
    """Optimiser steps: 2 epochs of 109 M pairs at a batch of 2,048."""
    batch_size: Count = 2048
    """Clips in an optimiser step, over all ranks."""
    max_tokens: Count = 262_144
    """Most audio tokens in one forward; a larger batch is split and its gradients accumulated."""
    grad_cache: bool = False
    """A batch that is split has the contrastive loss and the teacher's targets of all of it, not of
    each part: GradCache (arXiv 2101.06983), for one more forward of the towers."""
    lr: Positive = 1e-4
    """Peak learning rate."""
    warmup_steps: CountOrZero = 2_000
    """Linear warm-up; cosine decay to ``lr_final`` afterwards. With fewer ``steps`` than this it is
    as long as the run, unless it is set too."""
    lr_final: PositiveOrZero = 0.0
    """Learning rate at the last step."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.98)
    """AdamW."""
    weight_decay: PositiveOrZero = 0.1
    """AdamW, on matrices only."""
    clip_grad_norm: Positive = 1.0
    """Largest gradient norm."""
    ema_momentum: Share = 0.994
    """The teacher's momentum at step 0; rises to 1.0 along a cosine."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto``: bf16 autocast on a GPU that has it, else fp32."""
    compile: bool = False
    """torch.compile of the student, the teacher and each loss, for packs of any size: minutes at
    the start, then less memory in every step; time as benchmarks/results have it. On a CPU it needs
    a C++ compiler. With ``fsdp`` the towers are compiled block by block."""
    seed: Annotated[int, Bounds(at_least=0, below=2**63)] = 0
    """Seed of the weights, the order, the crops and the masks."""
    log_every: Count = 10
    """Steps between lines of ``metrics.jsonl``."""
    eval_every: CountOrZero = 1_000
    """Steps between evaluations on the validation split; 0: only at the end."""
    save_every: Count = 1_000
    """Steps between checkpoints."""
    saving: Literal["blocking", "background"] = "blocking"
    """``background``: training goes on while a thread writes a copy in the CPU's memory."""
    max_skipped_steps: CountOrZero = 10
    """Training stops when more steps in a row than this have a loss or gradient that is not finite;
    such a step changes nothing."""
    ranks: Literal["ddp", "fsdp"] = "ddp"
    """How ranks hold the model. ``ddp``: each has all parameters. ``fsdp``: they are spread over
    the ranks (FSDP2), as are gradients, optimiser and teacher."""

    def __post_init__(self) -> None:
        check_fields(self)
        check(self.lr_final <= self.lr, "lr_final", self.lr_final, f"at most lr {self.lr}")
        check(
            self.warmup_steps <= self.steps,
            "warmup_steps",
            self.warmup_steps,
            f"at most steps {self.steps}",
        )
        check(
            self.batch_size > 1 or not self.loss.contrastive,
            "batch_size",
            self.batch_size,
            "at least 2: the contrastive loss of one pair is always 0; or loss.contrastive=0",
        )

    def following(self, changes: dict[str, Any]) -> dict[str, Any]:
        """What else changes where ``steps`` does: a warm-up that would be longer."""
        return {"warmup_steps": min(self.warmup_steps, changes.get("steps", self.steps))}
