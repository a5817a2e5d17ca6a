"""Settings of the model: what a checkpoint's ``config.json`` holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from slap_fast.config.parsing import check, check_choices, check_positive


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
    """Subtracted from the log-mel; 0 for the raw one. AST's AudioSet figure (arXiv 2104.01778)."""
    std: float = 4.569
    """The log-mel is divided by it after the mean; 1 for the raw log-mel. AST's AudioSet figure."""

    def __post_init__(self) -> None:
        check_choices(self, "mel.")
        names = ("sample_rate", "hop_length", "n_mels", "patch_time", "patch_freq")
        check_positive(self, "mel.", *names)
        fits = 0 < self.win_length <= self.n_fft
        check(fits, "mel.win_length", self.win_length, "1 .. mel.n_fft")
        expected = f"a multiple of mel.patch_freq {self.patch_freq}"
        check(self.n_mels % self.patch_freq == 0, "mel.n_mels", self.n_mels, expected)
        edges, nyquist = (self.f_min, self.f_max), self.sample_rate / 2
        expected = f"0 <= f_min < f_max <= {nyquist}"
        check(0 <= self.f_min < self.f_max <= nyquist, "mel.f_min, mel.f_max", edges, expected)
        check_positive(self, "mel.", "std")

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
        expected = f"a multiple of 4 x audio.num_heads = {4 * self.num_heads}"
        fits = self.hidden_size % (4 * self.num_heads) == 0
        check(fits, "audio.hidden_size", self.hidden_size, expected)
        check_positive(self, "audio.", "num_layers", "global_every")
        check(self.local_window >= 0, "audio.local_window", self.local_window, ">= 0")


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
        expected = f"a multiple of 2 x caption.num_heads = {2 * self.num_heads}"
        fits = self.hidden_size % (2 * self.num_heads) == 0
        check(fits, "caption.hidden_size", self.hidden_size, expected)


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
        check(0 < self.mask_ratio < 1, "ssl.mask_ratio", self.mask_ratio, "above 0, below 1")
        check(0 < self.mask_clips <= 1, "ssl.mask_clips", self.mask_clips, "above 0, at most 1")
        check(self.prototypes >= 2, "ssl.prototypes", self.prototypes, "at least 2")
        check_choices(self, "ssl.")


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
        audio, text = self.audio.hidden_size, self.text.hidden_size
        sizes = f"audio.hidden_size {audio}, text.hidden_size {text}"
        expected = f"a number, as the towers differ: {sizes}"
        check(self.embed_dim is not None or audio == text, "model.embed_dim", None, expected)
