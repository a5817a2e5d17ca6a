"""A run between two steps: how it begins, what a checkpoint keeps of it, and how it goes on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slap_fast import compilation, distributed
from slap_fast.atomic_files import find_folder
from slap_fast.checkpoint.format import Files, read_json, read_tensors, recover, verify
from slap_fast.checkpoint.model import load_tensors, model_files, read_model
from slap_fast.checkpoint.training import read_training, training_files
from slap_fast.config import TrainConfig, from_dict
from slap_fast.data.source import ClipSource
from slap_fast.models.slap import SlapModel, Teacher
from slap_fast.models.text_encoder import resolve_pretrained
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.training.clip_counts import ClipCounts
from slap_fast.training.optimizer import make_optimizer


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
    """Skipped steps since the last one that was not."""
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
    config: TrainConfig, tokenizer: str | None, init: str | Path | None, device: torch.device
) -> tuple[TrainState, CaptionTokenizer]:
    """A new run and its tokenizer: from random weights, a pretrained text tower, or ``init``.

    Args:
        config: the run.
        tokenizer: as :meth:`CaptionTokenizer.load`; None takes the pretrained text tower's, else
            the bundled one.
        init: a model folder whose architecture and weights the run starts from (fine-tuning).
        device: where it trains.
    """
    torch.manual_seed(config.seed)
    if init is not None:
        model, loaded, _ = read_model(init)
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


COUNTERS = ("step", "skipped", "skipped_in_a_row", "evaluated")


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


def stored_run(out: Path) -> tuple[dict[str, Any], Path | None]:
    """(the content of ``run.json``, the newest undamaged checkpoint) of a run's folder.

    The checkpoint is None when the run was stopped before its first. Raises CheckpointError when
    every checkpoint is damaged.
    """
    stored = None
    if distributed.rank() == 0:
        folder = None
        if find_folder(out / "last").is_dir():
            folder = recover(out / "last")
        stored = read_json((folder or out) / "run.json"), folder and str(folder)
    run, name = distributed.exchange(stored)[0]
    return run, name and Path(name)


def stored_config(run: dict[str, Any]) -> TrainConfig:
    """The config in the content of ``run.json``."""
    return from_dict(TrainConfig, run["config"])
