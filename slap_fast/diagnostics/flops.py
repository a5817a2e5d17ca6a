"""Floating-point operations of a step, counted from sizes alone: the numerator of MFU.

Only products count, a multiply and an add each. Pairs of a query and a key that a window or a
causal mask hides do not count, nor does recomputation. A backward counts twice its forward, as each
product has two gradients; the patches need none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from slap_fast.config import LossConfig, ModelConfig
from slap_fast.packed import PackedBatch

PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12,
}  # fmt: skip
"""FLOP/s of bf16 products by the datasheets, dense."""


def datasheet_peak(gpu: str) -> float | None:
    """bf16 FLOP/s of a GPU by its name, such as "NVIDIA H100 80GB HBM3"; None: not known."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", gpu)), None)


class StepShape(NamedTuple):
    """Lengths of the sequences of a step."""

    audio: Sequence[int]
    """Patches of each clip."""
    text: Sequence[int]
    """Tokens of its caption."""
    masked_clips: int
    """Clips with masked patches, which come first."""
    masked: int
    """Masked patches."""
    predicted: int
    """Caption tokens that are predicted: all but each last one."""

    @classmethod
    def of(cls, batch: PackedBatch) -> StepShape:
        """Reads the shape of one packed batch from its ``cu_seqlens``."""
        audio, text = (x.cu_seqlens.diff().tolist() for x in (batch.audio, batch.text))
        return cls(audio, text, batch.masked_clips, len(batch.mask_indices), len(batch.labels))


def forward(config: ModelConfig, loss: LossConfig, shape: StepShape) -> dict[str, float]:
    """Counts the FLOPs of each stage's forward: student, audio_head, prototypes, teacher, text,
    decoder, logits, contrastive; a loss of weight 0 has none."""
    audio, ssl, c = config.audio, config.ssl, config.audio.hidden_size
    patches, tokens, clips = sum(shape.audio), sum(shape.text), len(shape.audio)
    masked_audio, width = shape.audio[: shape.masked_clips], ssl.head_hidden_size
    head = c * width + width * width + width * ssl.bottleneck_size
    prototypes = 2 * shape.masked * (head + ssl.bottleneck_size * ssl.prototypes)
    passes = _passes(config, loss, shape)
    stages = {"student": sum(audio_encoder(config, lengths) for lengths in passes)}
    if loss.ssl:
        stages["prototypes"] = prototypes
        stages["teacher"] = audio_encoder(config, masked_audio) + prototypes
    if loss.contrastive:
        text, size, shared = config.text, config.text.hidden_size, config.embed_dim or c
        project = config.embed_dim is not None
        stages["audio_head"] = _pool(c, audio.num_heads, patches, clips)
        stages["audio_head"] += 2 * clips * c * shared * project
        layer = 2 * tokens * (4 * size**2 + 3 * size * text.intermediate_size)
        stages["text"] = text.num_layers * layer + _pool(size, text.num_heads, tokens, clips)
        stages["text"] += 2 * clips * size * shared * project
        for i in range(text.num_layers):
            side = None if i % text.global_every == 0 else text.local_attention // 2
            stages["text"] += 4 * size * sum(_pairs(n, side) for n in shape.text)
        stages["contrastive"] = 2 * 2 * clips * clips * shared
    if loss.caption:
        decoder = config.caption
        d, inner = decoder.hidden_size, decoder.intermediate_size
        pairs = sum(n * (n + 1) // 2 + n * k for n, k in zip(shape.text, shape.audio, strict=True))
        products = 2 * tokens * (6 * d**2 + 3 * d * inner) + 2 * patches * c * 2 * d + 4 * d * pairs
        stages["decoder"] = decoder.num_layers * products
        stages["logits"] = 2 * shape.predicted * d * config.text.vocab_size
    return {name: float(flops) for name, flops in stages.items()}


def step(config: ModelConfig, loss: LossConfig, shape: StepShape) -> float:
    """Counts the FLOPs of forward and backward; the teacher has no backward."""
    stages = forward(config, loss, shape)
    teacher = stages.pop("teacher", 0.0)
    tokens = sum(map(sum, _passes(config, loss, shape)))
    patches = 2 * tokens * config.mel.patch_dim * config.audio.hidden_size
    return 3 * sum(stages.values()) - patches + teacher


def _passes(config: ModelConfig, loss: LossConfig, shape: StepShape) -> list[Sequence[int]]:
    """Lengths of the clips in each of the student's passes through the audio encoder."""
    masked_audio = shape.audio[: shape.masked_clips]
    if not loss.ssl or config.ssl.student_pass == "shared":
        return [shape.audio]
    return [masked_audio, shape.audio] if loss.contrastive or loss.caption else [masked_audio]


def audio_encoder(config: ModelConfig, lengths: Sequence[int]) -> int:
    """Counts the FLOPs of a forward of the audio encoder on clips of these lengths, in patches."""
    audio, c = config.audio, config.audio.hidden_size
    side = audio.local_window * config.mel.patches_per_column
    tokens = sum(lengths)
    flops = 2 * tokens * config.mel.patch_dim * c
    for i in range(audio.num_layers):
        window = None if (i + 1) % audio.global_every == 0 else side
        flops += 2 * tokens * (4 * c**2 + 3 * c * audio.intermediate_size)
        flops += 4 * c * sum(_pairs(n, window) for n in lengths)
    return flops


def _pool(size: int, heads: int, tokens: int, sequences: int) -> float:
    """Counts a MAP head: scores and sums per token, then value, output and MLP per sequence."""
    return 2 * (2 * heads * size * tokens + 10 * size**2 * sequences + 2 * size**2)


def _pairs(length: int, side: int | None) -> int:
    """Counts (query, key) pairs at most ``side`` apart; None: all."""
    if side is None or side >= length:
        return length * length
    return length * (2 * side + 1) - side * (side + 1)
