"""The state of a run between two steps: new, saved in a checkpoint, and restored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from slap_fast import compilation, distributed
from slap_fast.checkpoint.format import Files, read_tensors, verify
from slap_fast.checkpoint.model import load_tensors, model_files, read_model
from slap_fast.checkpoint.training import read_training, training_files
from slap_fast.config import TrainConfig
from slap_fast.data.source import ClipSource
from slap_fast.models.slap import SlapModel, Teacher
from slap_fast.models.text_encoder import resolve_pretrained
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.training.clip_counts import ClipCounts
from slap_fast.training.optimizer import make_optimizer
from slap_fast.training.settings import with_settings


@dataclass
class TrainState:
    """A run between two steps."""

    config: TrainConfig
    model: SlapModel
    replica: nn.Module
    """The model as a forward calls it: with DDP around it on several ranks."""
    teacher: Teacher | None
    """None when the self-supervised loss has no weight."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    step: int = 0
    clip_counts: ClipCounts = field(default_factory=ClipCounts)
    """Clips so far."""
    skipped: int = 0
    """Steps so far whose loss or gradient was not finite, and which changed nothing."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last one that was not; not stored, as :mod:`stop_rules` judges."""
    evaluated: int = 0
    """The step of the last evaluation."""
    best: float = -math.inf
    """The best validation score so far."""


def new_state(config: TrainConfig, model: SlapModel, device: torch.device) -> TrainState:
    """A run at step 0."""
    model.to(device)
    model.freeze_unused(config.loss)
    teacher = Teacher(model).to(device) if config.loss.ssl else None
    sharded = config.ranks == "fsdp" and distributed.world_size() > 1
    towers = [*model.audio_encoder.layers, *model.text_encoder.model.layers]
    teacher_layers = [] if teacher is None else [*teacher.audio_encoder.layers]
    if config.compile:
        # FSDP's gathers would break a model's graph, so it compiles block by block.
        models = [model] if teacher is None else [model, teacher]
        compilation.compile_modules([*towers, *teacher_layers] if sharded else models, device)
    replica = model
    if sharded:
        distributed.shard(model, towers, device, trains=True)
        if teacher is not None:
            distributed.shard(teacher, teacher_layers, device, trains=False)
    else:
        replica = distributed.replicate(model)
    return TrainState(config, model, replica, teacher, make_optimizer(model, config), device)


def begin(
    config: TrainConfig,
    tokenizer: str | None,
    init: str | Path | None,
    device: torch.device,
    model_settings: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[TrainState, CaptionTokenizer]:
    """A new run and its tokenizer: from random weights, a pretrained text tower, or ``init``.

    Args:
        config: the run.
        tokenizer: as :meth:`CaptionTokenizer.load`; None takes the pretrained text tower's, else
            the bundled one.
        init: a model folder whose architecture and weights the run starts from (fine-tuning),
            instead of ``config.model``.
        device: where it trains.
        model_settings: of ``init``'s model, those to change, by dotted key below ``model.``.

    Raises:
        ValueError: a setting or a tokenizer that does not fit the weights of ``init``.
    """
    torch.manual_seed(config.seed)
    if init is not None:
        model, loaded, _ = read_model(init)
        model = with_settings(model, model_settings)
        loaded.max_tokens = model.config.text.max_tokens
        if tokenizer is not None:
            check_tokenizer(tokenizer, loaded, f"--init {init}")
        config = dataclasses.replace(config, model=model.config)
        return new_state(config, model, device), loaded
    pretrained = config.model.text.pretrained
    text = resolve_pretrained(config.model.text)
    loaded = CaptionTokenizer.load(tokenizer or pretrained, text.max_tokens)
    if loaded.vocab_size > text.vocab_size:
        raise ValueError(
            f"model.text.vocab_size: found {text.vocab_size}, expected at least the tokenizer's "
            f"{loaded.vocab_size}"
        )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    model = SlapModel(config.model)
    if pretrained is not None:
        model.text_encoder.load_pretrained(pretrained)
    return new_state(config, model, device), loaded


def go_on(
    config: TrainConfig, folder: Path, device: torch.device
) -> tuple[TrainState, CaptionTokenizer]:
    """The run in a checkpoint, and its tokenizer. Raises CheckpointError, as :func:`restore`."""
    tokenizer = CaptionTokenizer.load(str(folder), config.model.text.max_tokens)
    state = new_state(config, SlapModel(config.model), device)
    restore(state, folder)
    return state, tokenizer


def check_tokenizer(name: str, expected: CaptionTokenizer, whose: str) -> None:
    """Raises ValueError unless ``name`` is the tokenizer that the weights were trained with."""
    if CaptionTokenizer.load(name, expected.max_tokens).sha256 != expected.sha256:
        raise ValueError(
            f"--tokenizer: found {name}, expected the one of {whose}: its token embeddings are of "
            f"that one's {expected.vocab_size} tokens"
        )


def describe(state: TrainState, source: ClipSource) -> str:
    """One line about a run, for when it starts."""
    config = state.config
    millions = sum(p.numel() for p in state.model.parameters()) / 1e6
    hours = source.total_seconds() / 3600
    batch = min(config.batch_size, len(source))
    short = (
        "" if batch == config.batch_size else f" (batch_size {config.batch_size}: all there are)"
    )
    return (
        f"{len(source)} clips, {hours:.2f} h; {millions:.1f} M parameters on {state.device}; "
        f"steps {state.step} to {config.steps}, {batch} clips each{short}"
    )


def snapshot(
    state: TrainState, tokenizer: CaptionTokenizer, card: dict[str, Any], run: dict[str, Any]
) -> Files:
    """The files of a checkpoint that :func:`restore` resumes from exactly. All ranks call it."""
    counters = {name: getattr(state, name) for name in COUNTERS} | {
        "clips": state.clip_counts.to_dict(),
        "best": state.best if math.isfinite(state.best) else None,
    }
    return model_files(state.model, tokenizer, card) | training_files(
        state.model, state.teacher, state.optimizer, counters, run
    )


COUNTERS = ("step", "skipped", "evaluated")


def restore(state: TrainState, folder: Path) -> None:
    """Takes model, teacher, optimiser and counters from a checkpoint of a run of this config.

    Raises CheckpointError that names the damaged file.
    """
    verify(folder)
    path = folder / "model.safetensors"
    load_tensors(state.model, read_tensors(path), path)
    counters = read_training(folder, state.model, state.teacher, state.optimizer)
    for name in COUNTERS:
        setattr(state, name, counters[name])
    state.clip_counts = ClipCounts.from_dict(counters["clips"])
    state.best = -math.inf if counters["best"] is None else counters["best"]
