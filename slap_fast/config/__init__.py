"""Every setting of the model, the data and a run, as frozen dataclasses; recipes return them.

A run is a recipe plus overrides: ``override(slap_tiny(), {"steps": 200, "loss.ssl": 0.0})``. This
module imports nothing of ours, so anything may import it.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal


def _check(condition: bool, name: str, found: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: found {found!r}, expected {expected}")


@dataclass(frozen=True, slots=True)
class MelConfig:
    """The log-mel front end and the patch grid (paper, section 3; AST's normalisation)."""

    preset: Literal["kaldi", "torchaudio"] = "kaldi"
    """``kaldi``: fbank (pre-emphasis 0.97, DC removal, Kaldi mel scale, natural log floored at
    float32 eps, snip_edges). ``torchaudio``: MelSpectrogram (centred, reflect padding, HTK scale),
    ln(max(mel, 1e-10))."""
    sample_rate: int = 16_000
    """Hz."""
    n_fft: int = 512
    """FFT length, samples."""
    win_length: int = 400
    """Hann window, samples (25 ms)."""
    hop_length: int = 160
    """Frame step, samples (10 ms)."""
    n_mels: int = 64
    """Mel bins; a multiple of ``patch_freq``."""
    f_min: float = 20.0
    """Lower edge of the lowest filter, Hz."""
    f_max: float = 8_000.0
    """Upper edge of the highest filter, Hz; at most half the sample rate."""
    patch_time: int = 16
    """Frames in a patch."""
    patch_freq: int = 16
    """Mel bins in a patch."""
    mean: float = -4.268
    """Subtracted from the log-mel; 0 for the raw log-mel. AST's AudioSet figure (arXiv
    2104.01778)."""
    std: float = 4.569
    """The log-mel is divided by it after the mean; 1 for the raw log-mel. AST's AudioSet figure."""

    def __post_init__(self) -> None:
        presets = ("kaldi", "torchaudio")
        _check(self.preset in presets, "mel.preset", self.preset, f"one of {presets}")
        for name in ("sample_rate", "hop_length", "n_mels", "patch_time", "patch_freq"):
            _check(getattr(self, name) > 0, f"mel.{name}", getattr(self, name), "a positive number")
        _check(
            0 < self.win_length <= self.n_fft, "mel.win_length", self.win_length, "1 .. mel.n_fft"
        )
        _check(
            self.n_mels % self.patch_freq == 0,
            "mel.n_mels",
            self.n_mels,
            f"a multiple of mel.patch_freq {self.patch_freq}",
        )
        _check(
            0 <= self.f_min < self.f_max <= self.sample_rate / 2,
            "mel.f_min, mel.f_max",
            (self.f_min, self.f_max),
            f"0 <= f_min < f_max <= {self.sample_rate / 2}",
        )
        _check(self.std > 0, "mel.std", self.std, "a positive number")

    @property
    def patch_dim(self) -> int:
        """Values in one patch, frame-major: patch_time x patch_freq."""
        return self.patch_time * self.patch_freq

    @property
    def patches_per_column(self) -> int:
        """Tokens that cover the same frames, lowest bins first."""
        return self.n_mels // self.patch_freq

    @property
    def floor(self) -> float:
        """The preset's silence as a mel power: kaldi 2^-23 (float32 eps), torchaudio 1e-10."""
        return 2.0**-23 if self.preset == "kaldi" else 1e-10

    @property
    def log_floor(self) -> float:
        """ln(floor)."""
        return math.log(self.floor)

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip: none without samples, at least one with."""
        if num_samples <= 0:
            return 0
        if self.preset == "torchaudio":
            return num_samples // self.hop_length + 1
        return max(0, num_samples - self.win_length) // self.hop_length + 1

    def num_patches(self, num_samples: int) -> int:
        """Tokens of a clip: whole columns, the last one filled with silence."""
        return -(-self.num_frames(num_samples) // self.patch_time) * self.patches_per_column


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioEncoderConfig:
    """A ViT over packed patches: RMSNorm, SwiGLU, 2-D rotary, no bias (paper, section 3)."""

    hidden_size: int = 768
    """Width C."""
    num_layers: int = 12
    """Blocks."""
    num_heads: int = 12
    """Attention heads; hidden_size / num_heads must be a multiple of 4 (2-D rotary)."""
    intermediate_size: int = 3072
    """Width of the SwiGLU's gate and of its up projection."""
    local_window: int = 12
    """Patch columns a local layer sees to each side (the paper's window of 24 in all)."""
    global_every: int = 3
    """Every n-th layer is global: 3 gives local, local, global; 1 makes every layer global."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""

    def __post_init__(self) -> None:
        _check(
            self.hidden_size % (4 * self.num_heads) == 0,
            "audio.hidden_size",
            self.hidden_size,
            f"a multiple of 4 x audio.num_heads = {4 * self.num_heads}",
        )
        _check(self.num_layers > 0, "audio.num_layers", self.num_layers, "a positive number")
        _check(self.global_every > 0, "audio.global_every", self.global_every, "a positive number")
        _check(self.local_window >= 0, "audio.local_window", self.local_window, ">= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """transformers' ModernBERT (arXiv 2412.13663); the defaults are ModernBERT-base."""

    pretrained: str | None = None
    """A folder or hub id whose weights and tokenizer start the text tower; its sizes replace the
    ones below. None: random weights of the sizes below."""
    vocab_size: int = 50_368
    """Token ids; the tokenizer's own size is the least it may be."""
    hidden_size: int = 768
    """Width."""
    num_layers: int = 22
    """Layers."""
    num_heads: int = 12
    """Attention heads."""
    intermediate_size: int = 1152
    """Width of the GeGLU."""
    global_every: int = 3
    """Every n-th layer, from the first, attends globally."""
    local_attention: int = 128
    """Tokens in a local layer's window, both sides together."""
    max_tokens: int = 256
    """A caption is cut to this many tokens, [CLS] and [SEP] included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionDecoderConfig:
    """An autoregressive transformer that reads the dense audio features (paper, section 3)."""

    hidden_size: int = 512
    """Width."""
    num_layers: int = 8
    """Blocks: causal self-attention, cross-attention, SwiGLU."""
    num_heads: int = 8
    """Attention heads."""
    intermediate_size: int = 1408
    """Width of the SwiGLU: 8/3 of hidden_size, rounded up to 128; the paper does not give it."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies over caption positions."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""

    def __post_init__(self) -> None:
        _check(
            self.hidden_size % (2 * self.num_heads) == 0,
            "caption.hidden_size",
            self.hidden_size,
            f"a multiple of 2 x caption.num_heads = {2 * self.num_heads}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfDistillationConfig:
    """Masked self-distillation over prototypes (DINO arXiv 2104.14294, iBOT arXiv 2111.07832)."""

    mask_ratio: float = 0.5
    """Share of a clip's patches that the student does not see."""
    mask_clips: float = 1.0
    """Share of the clips that are masked at all, drawn per clip; iBOT masks half of its images."""
    prototypes: int = 8192
    """Rows of the prototype matrix."""
    head_hidden_size: int = 2048
    """Width of the head's MLP."""
    bottleneck_size: int = 256
    """Width of the normalised feature that meets the prototypes."""
    student_temperature: float = 0.1
    """Divides the student's scores."""
    teacher_temperature: float = 0.07
    """Divides the teacher's scores, once warmed up."""
    teacher_temperature_start: float = 0.04
    """The teacher's temperature at step 0."""
    teacher_temperature_warmup: float = 0.1
    """Share of the run over which the teacher's temperature rises, linearly."""
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    """How the teacher's scores become targets that use every prototype."""
    sinkhorn_iterations: int = 3
    """Row and column normalisations (SwAV arXiv 2006.09882)."""
    center_momentum: float = 0.9
    """Momentum of the running centre, for ``targets="centering"``."""
    student_pass: Literal["shared", "separate"] = "shared"
    """``shared``: one masked pass feeds all three losses. ``separate``: the contrastive and caption
    losses get an unmasked pass of their own."""

    def __post_init__(self) -> None:
        _check(0 < self.mask_ratio < 1, "ssl.mask_ratio", self.mask_ratio, "above 0, below 1")
        _check(0 < self.mask_clips <= 1, "ssl.mask_clips", self.mask_clips, "above 0, at most 1")
        _check(self.prototypes >= 2, "ssl.prototypes", self.prototypes, "at least 2")
        targets, passes = ("sinkhorn", "centering"), ("shared", "separate")
        _check(self.targets in targets, "ssl.targets", self.targets, f"one of {targets}")
        _check(
            self.student_pass in passes, "ssl.student_pass", self.student_pass, f"one of {passes}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What a checkpoint's ``config.json`` holds: the defaults are the paper's model."""

    mel: MelConfig = field(default_factory=MelConfig)
    """Waveform to patches."""
    audio: AudioEncoderConfig = field(default_factory=AudioEncoderConfig)
    """Audio tower."""
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """Text tower."""
    caption: CaptionDecoderConfig = field(default_factory=CaptionDecoderConfig)
    """Caption decoder."""
    ssl: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    """Teacher, masks and prototypes."""
    embed_dim: int | None = None
    """Width of the shared space. None: both towers have one width and their pooled features are the
    embeddings; a number adds one bias-free projection to each tower."""
    logit_scale: float = 14.285714
    """The contrastive logit scale at the start: 1 / 0.07 (CLIP arXiv 2103.00020)."""
    logit_scale_max: float = 100.0
    """The learned logit scale is clamped to at most this."""

    def __post_init__(self) -> None:
        _check(
            self.embed_dim is not None or self.audio.hidden_size == self.text.hidden_size,
            "model.embed_dim",
            None,
            f"a number, as the towers differ: audio.hidden_size {self.audio.hidden_size}, "
            f"text.hidden_size {self.text.hidden_size}",
        )


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
    """Of L_CAP's product and softmax. ``liger``: the package liger-kernel's, on a GPU."""

    def __post_init__(self) -> None:
        for name in ("contrastive", "ssl", "caption"):
            value = getattr(self, name)
            _check(value >= 0 and math.isfinite(value), f"loss.{name}", value, "a number >= 0")
        _check(
            self.contrastive + self.ssl + self.caption > 0,
            "loss",
            (self.contrastive, self.ssl, self.caption),
            "at least one weight above 0",
        )
        kinds = ("softmax", "sigmoid")
        _check(
            self.contrastive_kind in kinds,
            "loss.contrastive_kind",
            self.contrastive_kind,
            f"one of {kinds}",
        )
        impls = ("blockwise", "liger")
        _check(
            self.caption_impl in impls, "loss.caption_impl", self.caption_impl, f"one of {impls}"
        )


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
    """Patches of clips that fit in this much memory are computed once and kept; 0 decodes every
    time."""
    max_bad_share: float = 0.01
    """Training saves and stops when more than this share of the clips is bad, of the last 50,000 to
    100,000 (or of all, past 100)."""

    def __post_init__(self) -> None:
        _check(
            0 < self.min_seconds < self.max_seconds,
            "data.min_seconds, data.max_seconds",
            (self.min_seconds, self.max_seconds),
            "0 < min_seconds < max_seconds",
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
    steps: int = 106_446
    """Optimiser steps: 2 epochs of 109 M pairs at a batch of 2,048."""
    batch_size: int = 2048
    """Clips in an optimiser step, over all ranks."""
    max_tokens: int = 262_144
    """Most audio tokens in one forward; a larger batch is split and its gradients accumulated."""
    grad_cache: bool = False
    """Of a batch that is split, take the contrastive loss and the teacher's targets over all of it,
    not over each part: GradCache (arXiv 2101.06983), for one more forward of the towers."""
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
    """Of the weights, the order, the crops and the masks."""
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
    """Of several ranks. ``ddp``: each has all parameters. ``fsdp``: they are spread over the ranks
    (FSDP2), as are gradients, optimiser and teacher."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_tokens", "log_every", "save_every"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        _check(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "a positive, finite number")
        _check(0 <= self.ema_momentum <= 1, "ema_momentum", self.ema_momentum, "0 .. 1")
        _check(self.max_skipped_steps >= 0, "max_skipped_steps", self.max_skipped_steps, ">= 0")
        savings, kinds = ("blocking", "background"), ("ddp", "fsdp")
        _check(self.saving in savings, "saving", self.saving, f"one of {savings}")
        _check(self.ranks in kinds, "ranks", self.ranks, f"one of {kinds}")
        precisions = ("auto", "fp32", "bf16")
        _check(self.precision in precisions, "precision", self.precision, f"one of {precisions}")


def slap_base() -> TrainConfig:
    """The paper's configuration (arXiv 2601.12594, section 3), ModernBERT-base as the text
    tower."""
    return TrainConfig(
        model=ModelConfig(text=TextEncoderConfig(pretrained="answerdotai/ModernBERT-base"))
    )


def slap_tiny() -> TrainConfig:
    """A model of the same shape that learns the built-in sounds on two CPU cores in minutes.

    A run this short cannot spend what the paper's can: frames are 20 ms apart, which halves the
    tokens, and a quarter of the clips are masked.
    """
    return TrainConfig(
        model=ModelConfig(
            mel=MelConfig(hop_length=320),
            audio=AudioEncoderConfig(
                hidden_size=128, num_layers=3, num_heads=4, intermediate_size=256
            ),
            text=TextEncoderConfig(
                vocab_size=2048,
                hidden_size=128,
                num_layers=3,
                num_heads=4,
                intermediate_size=192,
                max_tokens=96,
            ),
            caption=CaptionDecoderConfig(
                hidden_size=128, num_layers=2, num_heads=4, intermediate_size=256
            ),
            ssl=SelfDistillationConfig(
                mask_clips=0.25, prototypes=256, head_hidden_size=256, bottleneck_size=64
            ),
        ),
        steps=360,
        batch_size=64,
        max_tokens=65_536,
        lr=1.2e-3,
        warmup_steps=40,
        eval_every=0,
        save_every=200,
    )


RECIPES = {"base": slap_base, "tiny": slap_tiny}


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict[str, Any], path: str = "") -> Any:
    """A config from plain JSON values; a field left out keeps its default.

    Raises ValueError that names the path of an unknown key, with the closest known one, or of a
    value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path or kind.__name__}: found {values!r}, expected a mapping")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(_unknown(f"{path}{key}", str(key), hints))
    return kind(**{k: _typed(hints[k], v, f"{path}{k}") for k, v in values.items()})


def override(config: Any, changes: dict[str, Any], path: str = "") -> Any:
    """A copy of ``config`` with dotted keys changed: ``{"model.audio.num_layers": 6}``.

    Strings are read as the field's type, as a command line gives them. Raises ValueError as
    :func:`from_dict` does.
    """
    hints = typing.get_type_hints(type(config))
    here: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if head not in hints:
            raise ValueError(_unknown(f"{path}{head}", head, hints))
        if rest and not dataclasses.is_dataclass(hints[head]):
            raise ValueError(f"{path}{head}: has no settings of its own, found {path}{key!r}")
        if rest:
            below.setdefault(head, {})[rest] = value
        else:
            here[head] = _typed(hints[head], value, f"{path}{head}")
    for head, inner in below.items():
        here[head] = override(here.get(head, getattr(config, head)), inner, f"{path}{head}.")
    return dataclasses.replace(config, **here)


def _unknown(path: str, key: str, known: dict[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{path}: unknown setting{hint} Known here: {', '.join(known)}"


def _typed(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{path}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value in ("none", "None", "null"):
            return None
        return _typed(arguments[0], value, path)
    if origin is Literal:
        _check(value in arguments, path, value, f"one of {arguments}")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        _check(
            isinstance(items, (list, tuple)) and len(items) == len(arguments),
            path,
            value,
            f"{len(arguments)} values",
        )
        pairs = zip(arguments, items, strict=True)
        return tuple(_typed(a, v, path) for a, v in pairs)
    if hint is bool:
        known = {True: True, False: False, "true": True, "false": False}
        _check(isinstance(value, (bool, str)) and value in known, path, value, "true or false")
        return known[value]
    if isinstance(value, bool):
        raise ValueError(f"{path}: found {value!r}, expected {hint.__name__}")
    try:
        number = hint(value)
    except (TypeError, ValueError):
        raise ValueError(f"{path}: found {value!r}, expected {hint.__name__}") from None
    if hint is str and not isinstance(value, str):
        raise ValueError(f"{path}: found {value!r}, expected a string")
    if hint is int and isinstance(value, float) and value != number:
        raise ValueError(f"{path}: found {value!r}, expected an integer")
    if hint is float:
        _check(math.isfinite(number), path, value, "a finite number")
    return number
