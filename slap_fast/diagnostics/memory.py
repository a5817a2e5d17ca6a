"""The device memory that a run needs, estimated from its config: ``slap-fast plan``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from slap_fast.config import ModelConfig, TrainConfig
from slap_fast.losses import captioning, self_distillation
from slap_fast.models.slap import SlapModel

TOKENS_PER_CAPTION = 40
SECONDS_PER_CLIP = 10.0
RESERVED = 0.1
"""Share of a device's memory that the driver, its libraries and fragmentation take."""
LOSS_BLOCKS = 3
"""Blocks of fp32 that exist at once in a loss: logits, probabilities, copies."""


class Saved(NamedTuple):
    """Numbers that a forward keeps for its backward, per token of each kind."""

    audio_token: int
    masked_pass_token: int
    """Of a masked clip, in the pass of its own that it has where ``student_pass`` is separate."""
    masked_patch: int
    text_token: int


def saved_for_backward(config: ModelConfig, compiled: bool) -> Saved:
    """Counts a student's forward, in the dtype of its products, without scores and targets.

    A block keeps its input, q, k and v, the attention's output, the MLP's input, its gate and up.
    Uncompiled it also keeps what a compiled backward recomputes: its norms' outputs (on a CPU their
    quotients too) and the product of gate and up; ModernBERT's own keeps silu(gate) too.
    """
    audio, text, caption, ssl = config.audio, config.text, config.caption, config.ssl
    norm, layer_norm, mlp, text_mlp = (1, 1, 2, 2) if compiled else (3, 2, 3, 4)

    def block(size: int, intermediate: int) -> int:
        return (2 * norm + 4) * size + mlp * intermediate

    c, d = audio.hidden_size, caption.hidden_size
    encoded = config.mel.patch_dim + audio.num_layers * block(c, audio.intermediate_size)
    encoded += (1 if compiled else norm + 1) * c
    audio_token = encoded + caption.num_layers * 2 * d
    decoded = caption.num_layers * (block(d, caption.intermediate_size) + (norm + 2) * d) + norm * d
    # ModernBERT keeps q and k rotated too.
    t = text.hidden_size
    text_encoder = text.num_layers * ((2 * layer_norm + 6) * t + text_mlp * text.intermediate_size)
    text_encoder += (2 * layer_norm - 1) * t
    head = 2 * ssl.head_hidden_size + ssl.bottleneck_size
    head = head if compiled else 2 * head + c
    masked_pass_token = encoded if ssl.student_pass == "separate" else 0
    return Saved(audio_token, masked_pass_token, head, text_encoder + decoded)


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Counts the parameters of each part and of the teacher; allocates no weights."""
    with torch.device("meta"):
        model = SlapModel(config)
    parts = model.named_children()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts}
    counts["teacher"] = counts["audio_encoder"] + counts["prototype_head"]
    return counts


def estimate_memory(config: TrainConfig, memory: float) -> dict[str, Any]:
    """Estimates the bytes of every kind, and the largest forward that fits.

    Args:
        config: the run.
        memory: of the device, bytes.
    """
    model, ssl = config.model, config.model.ssl
    product_bytes = 4 if config.precision == "fp32" else 2
    counts = parameter_counts(model)
    teacher = counts.pop("teacher") * bool(config.loss.ssl)
    trained = sum(counts.values())
    largest_block = max(
        captioning.CHUNK_ROWS * model.text.vocab_size, self_distillation.CHUNK_ROWS * ssl.prototypes
    )
    fixed = {
        "parameters": 4 * trained,
        "gradients": 4 * trained,
        "AdamW's moments": 8 * trained,
        "teacher": 4 * teacher,
        "bf16 copies of the weights": 2 * trained if product_bytes == 2 else 0,
        "blocks of logits": LOSS_BLOCKS * 4 * largest_block,
        "reserved": RESERVED * memory,
    }
    saved = saved_for_backward(model, config.compile)
    masked_clips = ssl.mask_clips if config.loss.ssl else 0.0
    masked = ssl.mask_ratio * masked_clips
    clip = model.mel.num_patches(round(SECONDS_PER_CLIP * model.mel.sample_rate))
    # The teacher's features are fp32; under autocast the product with the prototypes copies them.
    # A gradient cache holds them in the product's dtype only, and joins them while no activations
    # are kept.
    features = masked * ssl.bottleneck_size
    if config.grad_cache and masked:
        kept = product_bytes * features * config.batch_size * clip
        fixed["teacher's features of the whole batch"] = kept
    per_token = {
        "activations, audio": product_bytes * saved.audio_token + 4 * model.mel.patch_dim,
        "activations, separate pass": masked_clips * product_bytes * saved.masked_pass_token,
        "activations, masked patches": masked * product_bytes * saved.masked_patch,
        "teacher's features": features * (4 if product_bytes == 4 else 6),
        "activations, text": product_bytes * saved.text_token * TOKENS_PER_CAPTION / clip,
    }
    tokens = max(0, int((memory - sum(fixed.values())) / sum(per_token.values())))
    mixed = "bf16 under autocast, parameters and AdamW in fp32"
    precision = "fp32" if product_bytes == 4 else mixed
    return {
        "memory": memory,
        "trained_parameters": trained,
        "fixed_bytes": fixed,
        "bytes_per_token": per_token,
        "max_tokens": tokens,
        "clips": tokens // clip,
        "seconds_of_audio": tokens / clip * SECONDS_PER_CLIP,
        "assumptions": [
            f"clips of {SECONDS_PER_CLIP:g} s ({clip} tokens), captions of {TOKENS_PER_CAPTION}",
            f"{masked:.0%} of the patches are masked; precision {precision}",
            f"compile={str(config.compile).lower()}, attention and pooling fused, one rank",
            f"{RESERVED:.0%} of the memory is the driver's and fragments",
            "all parameters are trained",
        ],
    }


def memory_of(text: str) -> float:
    """Parses "24GB" or "80GiB" to bytes. Raises ValueError for anything else."""
    units = {"GiB": 2.0**30, "GB": 1e9}
    unit = next((unit for unit in units if text.endswith(unit)), None)
    try:
        size = float(text.removesuffix(unit or "?"))
    except ValueError:
        size = 0.0
    if unit is None or not 0 < size < float("inf"):
        raise ValueError(f"--gpu: found {text!r}, expected a size such as 24GB or 80GiB")
    return size * units[unit]


def render(estimate: dict[str, Any], console: Any) -> None:
    """Prints the estimate as a table, and its assumptions."""
    from rich.table import Table

    table = Table("what", "GB", title=f"{estimate['trained_parameters'] / 1e6:.0f} M parameters")
    for name, size in estimate["fixed_bytes"].items():
        table.add_row(name, f"{size / 1e9:.2f}")
    for name, size in estimate["bytes_per_token"].items():
        if size:
            total = size * estimate["max_tokens"] / 1e9
            table.add_row(f"{name} of {estimate['max_tokens']} tokens", f"{total:.2f}")
    console.print(table)
    if estimate["clips"]:
        console.print(
            f"largest forward: --max-tokens {estimate['max_tokens']}, about {estimate['clips']} "
            f"clips ({estimate['seconds_of_audio']:.0f} s of audio). A larger batch_size is split; "
            "with --set grad_cache=true its losses are those of the whole batch"
        )
    else:
        console.print(
            "does not fit: there is room for no clip; fsdp spreads the parameters, "
            "and grad_cache holds less of a smaller batch_size"
        )
    for assumption in estimate["assumptions"]:
        console.print(f"assumed: {assumption}")
