"""The format of model and run folders: names of files, versions, checksums and damage.

A model folder holds ``config.json``, ``model.safetensors``, ``tokenizer.json`` and ``card.json``; a
checkpoint of a run adds ``run.json`` (its settings), ``training.json`` (counters) and
``training.safetensors`` (optimiser, teacher, random generators). There is never a pickle.
:mod:`slap_fast.atomic_files` writes the folders, and the manifest with their checksums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from slap_fast.atomic_files import MANIFEST, file_sha256, find_folder, old_folder, remove

FORMAT_VERSION = 3
"""1 had no manifest, and 0-d parameters, which FSDP2 cannot shard. 2 stored what a run's stop rules
judge by, and its run.json had neither a checksum nor the data's fingerprint."""

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "card.json")
TRAINING_FILES = ("run.json", "training.json", "training.safetensors")

Files = dict[str, str | dict[str, Tensor]]
"""The content of a folder: texts and tensors by file name, the tensors copied to the CPU."""

_MANIFEST_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\n]+)\n")


class CheckpointError(ValueError):
    """A folder that is no checkpoint, is damaged, or is newer than this package."""


def find_model(path: str | Path) -> Path:
    """A model's folder: the one given, or the best (else the last) checkpoint of a run's folder."""
    folder = find_folder(path)
    if (folder / "run.json").exists():
        for name in ("best", "last"):
            if (checkpoint := find_folder(folder / name)).is_dir():
                return checkpoint
    return folder


def verify(folder: Path, names: tuple[str, ...] = MODEL_FILES + TRAINING_FILES) -> None:
    """Raises CheckpointError that names the file that is damaged or missing, or is too new."""
    version = read_versioned(folder / "config.json")["format_version"]
    if version >= 2 or (folder / MANIFEST).exists():
        verify_manifest(folder, names)


def verify_manifest(folder: Path, names: Iterable[str]) -> None:
    """Compares files with the folder's manifest. Raises CheckpointError that names a wrong one."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("ascii")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found, expected beside what slap-fast wrote") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    lines = list(_MANIFEST_LINE.finditer(text))
    if "".join(line[0] for line in lines) != text:
        raise CheckpointError(f"{path}: damaged: a line is not a SHA-256 and a name")
    digests = {line[2]: line[1] for line in lines}
    for name in names:
        if name not in digests:
            raise CheckpointError(f"{path}: damaged: does not list {name}")
        if not (folder / name).is_file():
            raise _not_found(folder / name)
        if file_sha256(folder / name) != digests[name]:
            raise CheckpointError(
                f"{folder / name}: damaged, or edited: its SHA-256 is not the one in {MANIFEST}"
            )


def recover(path: Path, verify: Callable[[Path], None] = verify) -> Path:
    """The newer of a folder and the one before it that passes ``verify``.

    A damaged one is moved out of the way, to ``<name>.damaged``, so that the next write does not
    replace the good one by it. Raises CheckpointError, of the newer, when neither passes.
    """
    try:
        verify(find_folder(path))
    except CheckpointError:
        old = old_folder(path)
        if not (path.exists() and old.is_dir()):
            raise
        try:
            verify(old)
        except CheckpointError:
            pass
        else:
            damaged = path.with_name(f"{path.name}.damaged")
            remove(damaged)
            path.rename(damaged)
            return old
        raise
    return find_folder(path)


def write_files(folder: Path, files: Files) -> None:
    """Fills a folder; for :func:`slap_fast.atomic_files.write_folder`."""
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            (folder / name).touch()
            mode = (folder / name).stat().st_mode
            try:
                save_file(content, folder / name)
            except safetensors.SafetensorError as error:  # as it calls a full disk, too
                raise OSError(error) from None
            (folder / name).chmod(mode)  # safetensors writes a file that only its owner can read


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises CheckpointError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _not_found(path) from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def read_versioned(path: Path) -> dict[str, Any]:
    """The object in a JSON file with a ``format_version`` that this package reads, else raises."""
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
        raise _not_found(path) from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def _not_found(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: not found, expected a folder that slap-fast wrote")
