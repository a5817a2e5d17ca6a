"""A run between two steps: how it begins, what a checkpoint keeps of it, and how it goes on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slap_fast import atomic_files, checkpoint, compilation, distributed
from slap_fast.config import TrainConfig, from_dict
from slap_fast.data.source import ClipSource
from slap_fast.models.slap import SlapModel, Teacher
from slap_fast.models.text_encoder import resolve_pretrained
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.training.clip_counts import Tally


@dataclass
class TrainState:
    """A run between two steps."""

    config: TrainConfig
    model: SlapModel
    replica: nn.Module
    """What a forward goes through: the model, or DDP around it."""
    teacher: Teacher | None
    """None when the self-supervised loss has no weight."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    step: int = 0
    tally: Tally = field(default_factory=Tally)
    """Clips so far."""
    skipped: int = 0
    """Steps so far whose loss or gradient was not finite, and which changed nothing."""
    skipped_in_a_row: int = 0
    """Those at the end."""
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
    heard = [] if teacher is None else [*teacher.audio_encoder.layers]
    if config.compile:
        # FSDP's gathers would break a graph: there each block is one of its own.
        whole = [model] if teacher is None else [model, teacher]
        compilation.compile_modules([*towers, *heard] if sharded else whole, device)
    replica = model
    if sharded:
        distributed.shard(model, towers, device, trains=True)
        if teacher is not None:
            distributed.shard(teacher, heard, device, trains=False)
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
        model, words, _ = checkpoint.read_model(init)
        config = dataclasses.replace(config, model=model.config)
        return new_state(config, model, device), words
    pretrained = config.model.text.pretrained
    text = resolve_pretrained(config.model.text)
    words = CaptionTokenizer.load(tokenizer or pretrained, text.max_tokens)
    if words.vocab_size > text.vocab_size:
        raise ValueError(
            f"model.text.vocab_size: found {text.vocab_size}, expected at least the tokenizer's "
            f"{words.vocab_size}"
        )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    model = SlapModel(config.model)
    if pretrained is not None:
        model.text_encoder.load_pretrained(pretrained)
    return new_state(config, model, device), words


def describe(state: TrainState, source: ClipSource) -> str:
    """One line about a run that is about to start."""
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


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (norms, scales and single vectors have none)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Of slap_tiny on one CPU thread: 12 ms a step, against 35 ms one by one and 45 ms by foreach.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def snapshot(
    state: TrainState, tokenizer: CaptionTokenizer, card: dict[str, Any], run: dict[str, Any]
) -> checkpoint.Files:
    """A checkpoint that :func:`restore` goes on from exactly."""
    counters = {name: getattr(state, name) for name in COUNTERS} | {
        "clips": state.tally.to_dict(),
        "best": state.best if math.isfinite(state.best) else None,
    }
    return checkpoint.model_files(state.model, tokenizer, card) | checkpoint.training_files(
        state.model, state.teacher, state.optimizer, counters, run
    )


COUNTERS = ("step", "skipped", "skipped_in_a_row", "evaluated")


def restore(state: TrainState, folder: Path) -> None:
    """Takes model, teacher, optimiser and counters from a checkpoint of a run of this config.

    Raises CheckpointError that names what is damaged.
    """
    checkpoint.verify(folder)
    path = folder / "model.safetensors"
    checkpoint.load_tensors(state.model, checkpoint.read_tensors(path), path)
    counters = checkpoint.read_training(folder, state.model, state.teacher, state.optimizer)
    for name in COUNTERS:
        setattr(state, name, counters[name])
    state.tally = Tally.of(counters["clips"])
    state.best = -math.inf if counters["best"] is None else counters["best"]


def stored_run(out: Path) -> tuple[dict[str, Any], Path | None]:
    """(what ``run.json`` holds, the newest checkpoint that is not damaged) of a run's folder.

    The checkpoint is None when the run was stopped before its first. Raises CheckpointError when
    all there are are damaged.
    """
    found = None
    if distributed.rank() == 0:
        folder = None
        if atomic_files.find_folder(out / "last").is_dir():
            folder = atomic_files.recover(out / "last", checkpoint.verify)
        found = checkpoint.read_json((folder or out) / "run.json"), folder and str(folder)
    run, name = distributed.exchange(found)[0]
    return run, name and Path(name)


def stored_config(run: dict[str, Any]) -> TrainConfig:
    """The config that ``run.json`` holds."""
    return from_dict(TrainConfig, run["config"])
