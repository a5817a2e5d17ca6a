"""``slap_fast.load``: any model of audio and text that this package knows, by folder or hub id."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slap_fast.atomic_files import MANIFEST, find_folder
from slap_fast.checkpoint.format import CheckpointError, find_model
from slap_fast.checkpoint.hub import download
from slap_fast.inference.audio_text import AudioTextModel
from slap_fast.inference.slap import Slap

FILES = ("*.json", "*.txt", "*.model", "*.safetensors", MANIFEST)
"""Configuration, vocabulary and weights: never code, never a pickle."""

KINDS = "slap-fast, transformers (clap, pe_audio, pe_audio_video), sentence-transformers"


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
) -> AudioTextModel:
    """Loads a model of audio and text: ours, a CLAP, PE-AV's audio-text part, or a
    sentence-transformers model that takes audio.

    Weights come from safetensors alone, code from the installed packages alone.

    Args:
        name: a folder, a run's folder (its best checkpoint), or a hub id.
        device: where it runs.
        revision: branch, tag or commit of a hub id.
        local_files_only: of a hub id, only what was downloaded before.

    Raises:
        CheckpointError: there is no such model, it is of no kind that is known, it lacks a file, or
            its package is not installed; names it.
    """
    folder = find_folder(name)
    if not folder.is_dir():
        folder = download(str(name), FILES, revision, local_files_only)
    folder = find_model(folder)
    if (folder / "modules.json").exists():
        from slap_fast.interop.pretrained.sentence_transformers import SentenceTransformerModel

        return SentenceTransformerModel.from_folder(folder, str(name), device)
    config = _config(folder)
    if "format_version" in config:
        slap = Slap.from_pretrained(folder, device=device)
        slap.name = str(name)
        return slap
    return _loader(config, folder)(folder, str(name), device)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; known kinds of model: {KINDS}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: found {type(config).__name__}, expected an object")
    return config


def _loader(
    config: dict[str, Any], folder: Path
) -> Callable[[Path, str, str | torch.device], AudioTextModel]:
    kind = config.get("model_type")
    if kind == "clap":
        from slap_fast.interop.pretrained.clap import Clap

        return Clap.from_folder
    if kind in ("pe_audio", "pe_audio_video"):
        from slap_fast.interop.pretrained.pe_audio import PeAudio

        return PeAudio.from_folder
    raise CheckpointError(
        f"{folder / 'config.json'}: found model_type {kind!r}, expected one of: {KINDS}"
    )
