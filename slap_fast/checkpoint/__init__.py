"""Checkpoints: what is in a folder of JSON and safetensors. Never a pickle.

A model folder holds ``config.json``, ``model.safetensors``, ``tokenizer.json`` and ``card.json``; a
checkpoint of a run adds ``run.json`` (its settings), ``training.json`` (counters) and
``training.safetensors`` (optimiser, teacher, random generators). :mod:`slap_fast.atomic_files`
writes them to disk, and has the checksums.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slap_fast import atomic_files, distributed
from slap_fast.atomic_files import CheckpointError, find_folder
from slap_fast.config import ModelConfig, from_dict, to_dict
from slap_fast.models.slap import SlapModel, Teacher
from slap_fast.models.tokenizer import CaptionTokenizer

FORMAT_VERSION = 2
"""1 had no manifest, and 0-d parameters, which FSDP2 cannot shard."""

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "card.json")
TRAINING_FILES = ("run.json", "training.json", "training.safetensors")

Files = dict[str, str | dict[str, Tensor]]
"""What a folder will hold: texts and tensors by file name, the tensors copied to the CPU."""


def to_json(value: Any) -> str:
    """Readable JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def find_model(path: str | Path) -> Path:
    """A model's folder: the one given, or the best (else the last) checkpoint of a run's folder."""
    folder = find_folder(path)
    checkpoints = [find_folder(folder / name) for name in ("best", "last")]
    there = [found for found in checkpoints if (folder / "run.json").exists() and found.is_dir()]
    return there[0] if there else folder


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, replaced in one go."""
    atomic_files.replace_file(path, to_json(value))


def write_files(folder: Path, files: Files) -> None:
    """Fills a folder; see :func:`atomic_files.write_folder`."""
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            save_file(content, folder / name)


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


def model_files(model: SlapModel, tokenizer: CaptionTokenizer, card: dict[str, Any]) -> Files:
    """The files that ``Slap.from_pretrained`` reads. All ranks call it."""
    config = {
        "format_version": FORMAT_VERSION,
        "tokenizer_sha256": tokenizer.sha256,
        "model": to_dict(model.config),
    }
    return {
        "config.json": to_json(config),
        "card.json": to_json({"format_version": FORMAT_VERSION, **card}),
        "tokenizer.json": tokenizer.to_json(),
        "model.safetensors": _copied(model.state_dict()),
    }


def read_model(folder: str | Path) -> tuple[SlapModel, CaptionTokenizer, dict[str, Any]]:
    """(model, tokenizer, card) of a model's or a run's folder, on the CPU in fp32.

    Raises CheckpointError that names the file, and the tensor, that is wrong.
    """
    folder = find_model(folder)
    verify(folder, MODEL_FILES)
    stored = _versioned(folder / "config.json")
    config = from_dict(ModelConfig, stored["model"], "model.")
    tokenizer = CaptionTokenizer.load(str(folder), config.text.max_tokens)
    if tokenizer.sha256 != stored["tokenizer_sha256"]:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: is not the one the model was saved with"
        )
    model = SlapModel(config)
    path = folder / "model.safetensors"
    tensors = read_tensors(path)
    if stored["format_version"] < 2:
        tensors = {k: v.reshape(1) if v.ndim == 0 else v for k, v in tensors.items()}
    load_tensors(model, tensors, path)
    return model, tokenizer, _versioned(folder / "card.json")


def export(folder: str | Path, out: Path, weights: str) -> None:
    """Writes one model of a run's checkpoint as a model folder of its own, without the optimiser.

    Args:
        folder: a checkpoint, such as ``runs/my/last``.
        out: the model folder.
        weights: ``"student"``, or ``"teacher"``: the audio encoder and the prototype head are the
            moving averages, all else is the student's, which alone has it.

    Raises:
        ValueError: another name, or a checkpoint without a teacher.
    """
    folder = find_model(folder)
    model, tokenizer, card = read_model(folder)
    if weights == "teacher":
        verify(folder, TRAINING_FILES)
        path = folder / "training.safetensors"
        tensors = _below(read_tensors(path), "teacher.")
        if not tensors:
            raise ValueError(f"weights: {folder} has no teacher: its loss.ssl is 0")
        teacher = Teacher(model)
        load_tensors(teacher, tensors, path)
        model.audio_encoder, model.prototype_head = teacher.audio_encoder, teacher.prototype_head
    elif weights != "student":
        raise ValueError(f"weights: found {weights!r}, expected student or teacher")
    files = model_files(model, tokenizer, {**card, "weights": weights})
    atomic_files.write_folder(out, lambda path: write_files(path, files))


def verify(folder: Path, names: tuple[str, ...] = MODEL_FILES + TRAINING_FILES) -> None:
    """Raises CheckpointError that names the file that is damaged or missing, or is too new."""
    version = _versioned(folder / "config.json")["format_version"]
    if version >= 2 or (folder / atomic_files.MANIFEST).exists():
        atomic_files.check_files(folder, names)


def _versioned(path: Path) -> dict[str, Any]:
    stored = read_json(path)
    version = stored.get("format_version") if isinstance(stored, dict) else None
    if not isinstance(version, int) or version < 1:
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
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(distributed.like(tensors[name], value))


def training_files(
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, Any],
    run: dict[str, Any],
) -> Files:
    """What a run needs, beside its model, to go on exactly. All ranks call it."""
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
        "training.safetensors": _copied(tensors),
    }


def read_training(
    folder: Path,
    model: nn.Module,
    teacher: nn.Module | None,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Restores what :func:`training_files` holds and returns the counters."""
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
                # AdamW's fused kernel wants the count of its steps where the parameter is.
                optimizer.state[parameter] = {
                    key: value.to(parameter.device)
                    if key == "step"
                    else distributed.like(value, parameter)
                    for key, value in state.items()
                }
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return _versioned(folder / "training.json")


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU that share nothing with those that training goes on to change."""
    return {
        name: distributed.full(value.detach()).to("cpu", copy=True).contiguous()
        for name, value in tensors.items()
    }
