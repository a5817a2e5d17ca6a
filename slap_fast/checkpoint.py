"""Checkpoints: folders of JSON and safetensors, written whole or not at all. Never a pickle.

A model folder holds ``config.json``, ``model.safetensors``, ``tokenizer.json`` and ``card.json``; a
checkpoint of a run adds ``training.json`` and ``training.safetensors`` (optimiser, teacher,
counters).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slap_fast.config import ModelConfig, from_dict, to_dict
from slap_fast.data.tokenizer import CaptionTokenizer
from slap_fast.models.slap import SlapModel

FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A folder that is no checkpoint, is damaged, or is newer than this package."""


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fills a folder through ``write`` and puts it at ``path`` in one rename.

    What stood there before is kept until the new folder is complete and on disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = path.with_name(f"{path.name}.tmp"), path.with_name(f"{path.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    write(fresh)
    for file in fresh.iterdir():
        _sync(file)
    _sync(fresh)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    fresh.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_folder(path: str | Path) -> Path:
    """The folder itself, or the one a rename that was cut short left beside it."""
    path = Path(path)
    old = path.with_name(f"{path.name}.old")
    return old if old.is_dir() and not path.exists() else path


def find_model(path: str | Path) -> Path:
    """A model's folder: the one given, or the best (else the last) checkpoint of a run's folder."""
    folder = find_folder(path)
    checkpoints = [find_folder(folder / name) for name in ("best", "last")]
    there = [found for found in checkpoints if (folder / "run.json").exists() and found.is_dir()]
    return there[0] if there else folder


def write_json(path: Path, value: Any) -> None:
    """Readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises CheckpointError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not found, expected a folder that slap-fast wrote"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def write_model(
    folder: Path, model: SlapModel, tokenizer: CaptionTokenizer, card: dict[str, Any]
) -> None:
    """The files that ``Slap.from_pretrained`` reads."""
    write_json(
        folder / "config.json",
        {
            "format_version": FORMAT_VERSION,
            "tokenizer_sha256": tokenizer.sha256,
            "model": to_dict(model.config),
        },
    )
    write_json(folder / "card.json", {"format_version": FORMAT_VERSION, **card})
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    save_file(_plain(model.state_dict()), folder / "model.safetensors")


def read_model(folder: str | Path) -> tuple[SlapModel, CaptionTokenizer, dict[str, Any]]:
    """(model, tokenizer, card) of a model's or a run's folder, on the CPU in fp32.

    Raises CheckpointError that names the file, and the tensor, that is wrong.
    """
    folder = find_model(folder)
    stored = _versioned(folder / "config.json")
    config = from_dict(ModelConfig, stored["model"], "model.")
    tokenizer = CaptionTokenizer.load(str(folder), config.text.max_tokens)
    if tokenizer.sha256 != stored["tokenizer_sha256"]:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: is not the one the model was saved with"
        )
    model = SlapModel(config)
    load_tensors(model, read_tensors(folder / "model.safetensors"), folder / "model.safetensors")
    return model, tokenizer, _versioned(folder / "card.json")


def _versioned(path: Path) -> dict[str, Any]:
    stored = read_json(path)
    version = stored.get("format_version") if isinstance(stored, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{path}: has no format_version, expected a slap-fast checkpoint")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format_version {version}, this slap-fast reads up to {FORMAT_VERSION}: "
            "upgrade slap-fast"
        )
    return stored


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError that names it."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not found, expected a folder that slap-fast wrote"
        ) from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies tensors into a module; every name and shape must match."""
    expected = module.state_dict()
    for name, value in expected.items():
        found = tensors.get(name)
        if found is None:
            raise CheckpointError(f"{path}: has no {name}, expected shape {list(value.shape)}")
        if found.shape != value.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(found.shape)}, expected {list(value.shape)}"
            )
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise CheckpointError(f"{path}: has unknown tensors, first {unknown[0]}")
    module.load_state_dict(tensors)


def write_training(
    folder: Path,
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, Any],
) -> None:
    """What a run needs, beside its model, to go on exactly: optimiser, teacher, counters."""
    tensors = {f"optimizer.{k}": v for k, v in _optimizer_tensors(model, optimizer).items()}
    if teacher is not None:
        tensors |= {f"teacher.{k}": v for k, v in teacher.state_dict().items()}
    save_file(_plain(tensors), folder / "training.safetensors")
    write_json(folder / "training.json", {"format_version": FORMAT_VERSION, **counters})


def read_training(
    folder: Path,
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Restores what :func:`write_training` wrote and returns the counters."""
    path = folder / "training.safetensors"
    tensors = read_tensors(path)
    if teacher is not None:
        load_tensors(teacher, _below(tensors, "teacher."), path)
    names = {parameter: name for name, parameter in model.named_parameters()}
    stored = _below(tensors, "optimizer.")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = _below(stored, f"{names[parameter]}.")
            if state:
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in state.items()
                }
    return _versioned(folder / "training.json")


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
