"""What a checkpoint of a run adds to its model: optimiser, teacher, random generators, counters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slap_fast import distributed
from slap_fast.atomic_files import to_json
from slap_fast.checkpoint.format import FORMAT_VERSION, Files, read_tensors, read_versioned
from slap_fast.checkpoint.model import copy_to_cpu, load_tensors


def training_files(
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, Any],
    run: dict[str, Any],
) -> Files:
    """The files that a run, beside its model's, resumes from exactly. All ranks call it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"optimizer.{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    if teacher is not None:
        tensors |= {f"teacher.{k}": v for k, v in teacher.state_dict().items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return {
        "run.json": to_json(run),
        "training.json": to_json({"format_version": FORMAT_VERSION, **counters}),
        "training.safetensors": copy_to_cpu(tensors),
    }


def read_training(
    folder: Path,
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Restores teacher, optimiser and random generators; returns the counters."""
    path = folder / "training.safetensors"
    tensors = read_tensors(path)
    if teacher is not None:
        load_tensors(teacher, tensors_under(tensors, "teacher."), path)
    names = {parameter: name for name, parameter in model.named_parameters()}
    stored = tensors_under(tensors, "optimizer.")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = tensors_under(stored, f"{names[parameter]}.")
            if state:
                # AdamW's fused kernel reads its step counter on the parameter's device.
                optimizer.state[parameter] = {
                    key: value.to(parameter.device)
                    if key == "step"
                    else distributed.like(value, parameter)
                    for key, value in state.items()
                }
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return read_versioned(folder / "training.json")


def tensors_under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
