"""A model's folder: configuration, weights, tokenizer and card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slap_fast import distributed
from slap_fast.atomic_files import to_json, write_folder
from slap_fast.checkpoint.format import (
    FORMAT_VERSION,
    MODEL_FILES,
    CheckpointError,
    Files,
    find_model,
    read_tensors,
    read_versioned,
    verify,
    write_files,
)
from slap_fast.config import ModelConfig, from_dict, to_dict
from slap_fast.models.slap import SlapModel
from slap_fast.models.tokenizer import CaptionTokenizer


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
        "model.safetensors": copy_to_cpu(model.state_dict()),
    }


def write_model(
    folder: Path, model: SlapModel, tokenizer: CaptionTokenizer, card: dict[str, Any]
) -> None:
    """Writes a model's folder, whole or not at all."""
    files = model_files(model, tokenizer, card)
    write_folder(folder, lambda path: write_files(path, files))


def read_model(folder: str | Path) -> tuple[SlapModel, CaptionTokenizer, dict[str, Any]]:
    """(model, tokenizer, card) of a model's or a run's folder, on the CPU in fp32.

    Raises CheckpointError that names the file, or the tensor, that is wrong.
    """
    folder = find_model(folder)
    verify(folder, MODEL_FILES)
    stored = read_versioned(folder / "config.json")
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
    return model, tokenizer, read_versioned(folder / "card.json")


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies tensors into a module; every name and shape must match."""
    expected = module.state_dict()
    for name, value in expected.items():
        stored = tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{path}: has no {name}, expected shape {list(value.shape)}")
        if stored.shape != value.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(stored.shape)}, expected {list(value.shape)}"
            )
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise CheckpointError(f"{path}: has unknown tensors, first {unknown[0]}")
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(distributed.like(tensors[name], value))


def copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unsharded copies that share no memory with the tensors. All ranks call it."""
    return {
        name: distributed.full(value.detach()).to("cpu", copy=True).contiguous()
        for name, value in tensors.items()
    }
