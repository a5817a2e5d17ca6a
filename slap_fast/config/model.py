"""Settings of the model: what a checkpoint's ``config.json`` holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from slap_fast.config.bounds import (
    AnyNumber,
    Bounds,
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    Share,
    check,
    check_fields,
)


@dataclass(frozen=True, slots=True)
class MelConfig:
    """The log-mel front end and the patch grid (paper, section 3; AST's normalisation)."""

    preset: Literal["kaldi", "torchaudio"] = "kaldi"
    """``kaldi``: fbank (pre-emphasis 0.97, DC removal, Kaldi mel scale, natural log floored at
    float32 eps, snip_edges). ``torchaudio``: MelSpectrogram (centred, reflect padding, HTK scale),
    ln(max(mel, 1e-10))."""
    sample_rate: Annotated[int, Bounds(at_least=4_000, at_most=384_000)] = 16_000
    """Hz. With another rate, the settings in samples and f_max change with it unless they are set
    too."""
    n_fft: Count = 512
    """FFT length, samples."""
    win_length: Count = 400
    """Hann window, samples (25 ms)."""
    hop_length: Count = 160
    """Frame step, samples (10 ms)."""
    n_mels: Count = 64
    """Mel bins; a multiple of ``patch_freq``."""
    f_min: PositiveOrZero = 20.0
    """Lower edge of the lowest filter, Hz."""
    f_max: Positive = 8_000.0
    """Upper edge of the highest filter, Hz; at most half the sample rate."""
    patch_time: Count = 16
    """Frames in a patch."""
    patch_freq: Count = 16
    """Mel bins in a patch."""
    mean: AnyNumber = -4.268
    """Subtracted from the log-mel; 0 for the raw log-mel. AST's AudioSet figure (arXiv
    2104.01778)."""
    std: Positive = 4.569
    """The log-mel is divided by it after the mean; 1 for the raw log-mel. AST's AudioSet figure."""

    def __post_init__(self) -> None:
        check_fields(self, "model.mel.")
        check(
            self.win_length <= self.n_fft,
            "model.mel.win_length",
            self.win_length,
            f"at most model.mel.n_fft {self.n_fft}",
        )
        check(
            self.n_mels % self.patch_freq == 0,
            "model.mel.n_mels",
            self.n_mels,
            f"a multiple of model.mel.patch_freq {self.patch_freq}",
        )
        check(
            self.f_min < self.f_max <= self.sample_rate / 2,
            "model.mel.f_min, model.mel.f_max",
            (self.f_min, self.f_max),
            f"0 <= f_min < f_max <= {self.sample_rate / 2}",
        )

    def following(self, changes: dict[str, Any]) -> dict[str, Any]:
        """What else changes where the sample rate does: the window, the step and the FFT keep their
        length in seconds, and the filters their share of the band."""
        ratio = changes.get("sample_rate", self.sample_rate) / self.sample_rate
        if ratio == 1 or ratio < 0:
            return {}
        names = "win_length", "hop_length"
        samples = {name: max(1, round(getattr(self, name) * ratio)) for name in names}
        # The C++ front end takes powers of two.
        window = changes.get("win_length", samples["win_length"])
        shortest = max(window, round(self.n_fft * ratio), 1)
        return {**samples, "n_fft": 1 << (shortest - 1).bit_length(), "f_max": self.f_max * ratio}

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

    hidden_size: Count = 768
    """Width C."""
    num_layers: Count = 12
    """Blocks."""
    num_heads: Count = 12
    """Attention heads; hidden_size / num_heads must be a multiple of 4 (2-D rotary)."""
    intermediate_size: Count = 3072
    """Width of the SwiGLU's gate and of its up projection."""
    local_window: CountOrZero = 12
    """Patch columns a local layer sees to each side (the paper's window of 24 in all)."""
    global_every: Count = 3
    """Every n-th layer is global: 3 gives local, local, global; 1 makes every layer global."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: Positive = 1e-6
    """Epsilon of every RMSNorm."""

    def __post_init__(self) -> None:
        check_fields(self, "model.audio.")
        check(
            self.hidden_size % (4 * self.num_heads) == 0,
            "model.audio.hidden_size",
            self.hidden_size,
            f"a multiple of 4 x model.audio.num_heads = {4 * self.num_heads}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """transformers' ModernBERT (arXiv 2412.13663); the defaults are ModernBERT-base."""

    pretrained: str | None = None
    """A folder or hub id whose weights and tokenizer start the text tower; its sizes replace the
    ones below. None: random weights of the sizes below."""
    vocab_size: Count = 50_368
    """Token ids; the tokenizer's own size is the least it may be."""
    hidden_size: Count = 768
    """Width."""
    num_layers: Count = 22
    """Layers."""
    num_heads: Count = 12
    """Attention heads."""
    intermediate_size: Count = 1152
    """Width of the GeGLU."""
    global_every: Count = 3
    """Every n-th layer, from the first, attends globally."""
    local_attention: Annotated[int, Bounds(at_least=2)] = 128
    """Tokens in a local layer's window, both sides together."""
    max_tokens: Annotated[int, Bounds(at_least=3)] = 256
    """A caption is cut to this many tokens, [CLS] and [SEP] included."""

    def __post_init__(self) -> None:
        check_fields(self, "model.text.")
        check(
            self.hidden_size % (2 * self.num_heads) == 0,
            "model.text.hidden_size",
            self.hidden_size,
            f"a multiple of 2 x model.text.num_heads = {2 * self.num_heads}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionDecoderConfig:
    """An autoregressive transformer that reads the dense audio features (paper, section 3)."""

    hidden_size: Count = 512
    """Width."""
    num_layers: Count = 8
    """Blocks: causal self-attention, cross-attention, SwiGLU."""
    num_heads: Count = 8
    """Attention heads."""
    intermediate_size: Count = 1408
    """Width of the SwiGLU: 8/3 of hidden_size, rounded up to 128; the paper does not give it."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary frequencies over caption positions."""
    norm_eps: Positive = 1e-6
    """Epsilon of every RMSNorm."""

    def __post_init__(self) -> None:
        check_fields(self, "model.caption.")
        check(
            self.hidden_size % (2 * self.num_heads) == 0,
            "model.caption.hidden_size",
            self.hidden_size,
            f"a multiple of 2 x model.caption.num_heads = {2 * self.num_heads}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfDistillationConfig:
    """Masked self-distillation over prototypes (DINO arXiv 2104.14294, iBOT arXiv 2111.07832)."""

    mask_ratio: Annotated[float, Bounds(above=0, below=1)] = 0.5
    """Share of a clip's patches that the student does not see."""
    mask_clips: Annotated[float, Bounds(above=0, at_most=1)] = 1.0
    """Share of the clips that are masked at all, drawn per clip; iBOT masks half of its images."""
    prototypes: Annotated[int, Bounds(at_least=2)] = 8192
    """Rows of the prototype matrix."""
    head_hidden_size: Count = 2048
    """Width of the head's MLP."""
    bottleneck_size: Count = 256
    """Width of the normalised feature that meets the prototypes."""
    student_temperature: Positive = 0.1
    """Divides the student's scores."""
    teacher_temperature: Positive = 0.07
    """Divides the teacher's scores, once warmed up."""
    teacher_temperature_start: Positive = 0.04
    """The teacher's temperature at step 0."""
    teacher_temperature_warmup: Share = 0.1
    """Share of the run over which the teacher's temperature rises, linearly."""
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    """How the teacher's scores become targets that use every prototype."""
    sinkhorn_iterations: Count = 3
    """Row and column normalisations (SwAV arXiv 2006.09882)."""
    center_momentum: Annotated[float, Bounds(at_least=0, below=1)] = 0.9
    """Momentum of the running centre, for ``targets="centering"``."""
    student_pass: Literal["shared", "separate"] = "shared"
    """``shared``: one masked pass feeds all three losses. ``separate``: the contrastive and caption
    losses get an unmasked pass of their own."""

    def __post_init__(self) -> None:
        check_fields(self, "model.ssl.")


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
    embed_dim: Count | None = None
    """Width of the shared space. None: both towers have one width and their pooled features are the
    embeddings; a number adds one bias-free projection to each tower."""
    logit_scale: Positive = 14.285714
    """The contrastive logit scale at the start: 1 / 0.07 (CLIP arXiv 2103.00020)."""
    logit_scale_max: Positive = 100.0
    """The learned logit scale is clamped to at most this."""

    def __post_init__(self) -> None:
        check_fields(self, "model.")
        check(
            self.logit_scale <= self.logit_scale_max,
            "model.logit_scale",
            self.logit_scale,
            f"at most model.logit_scale_max {self.logit_scale_max}",
        )
        check(
            self.embed_dim is not None or self.audio.hidden_size == self.text.hidden_size,
            "model.embed_dim",
            None,
            f"a number, as the towers differ: model.audio.hidden_size {self.audio.hidden_size}, "
            f"model.text.hidden_size {self.text.hidden_size}",
        )
