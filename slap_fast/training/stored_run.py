"""What a run was started with: its folder's ``run.json``, and whether someone edited it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from slap_fast import distributed
from slap_fast.atomic_files import find_folder, to_json
from slap_fast.checkpoint.format import CheckpointError, read_json, recover
from slap_fast.config import TrainConfig, from_dict
from slap_fast.training.settings import flat


def stored_run(out: Path) -> tuple[dict[str, Any], Path | None]:
    """(the content of ``run.json``, the newest undamaged checkpoint) of a run's folder.

    The content is that of the folder's own ``run.json``, as the run was last started or resumed;
    the checkpoint's where that one is damaged, or was edited. The checkpoint is None when the run
    was stopped before its first. Raises CheckpointError when every checkpoint is damaged.
    """
    stored = None
    if distributed.rank() == 0:
        folder = recover(out / "last") if find_folder(out / "last").is_dir() else None
        run = _own_run(out) if folder else read_json(out / "run.json")
        stored = run or read_json(folder / "run.json"), folder and str(folder)
    run, name = distributed.exchange(stored)[0]
    return run, name and Path(name)


def _own_run(out: Path) -> dict[str, Any] | None:
    """The folder's ``run.json``; None where it is not as it was written."""
    try:
        run = read_json(out / "run.json")
    except CheckpointError:
        return None
    return run if is_sealed(run) else None


def seal(run: dict[str, Any]) -> dict[str, Any]:
    """The content of ``run.json`` with its SHA-256, by which an edit shows."""
    content = {key: value for key, value in run.items() if key != "sha256"}
    return {**content, "sha256": hashlib.sha256(to_json(content).encode()).hexdigest()}


def is_sealed(run: Any) -> bool:
    """Whether the content of ``run.json`` is as :func:`seal` left it."""
    return isinstance(run, dict) and "sha256" in run and seal(run) == run


def edits(out: Path, run: dict[str, Any], folder: Path | None) -> str:
    """One line about an edited ``run.json`` beside ``run``, which is used; empty where none is.

    Those of format version 2 had no checksum, so one that equals the checkpoint's is not edited.
    """
    path = out / "run.json"
    try:
        own = read_json(path)
    except CheckpointError as error:
        return f"{error}; the checkpoint's is used"
    if is_sealed(own) or (own == run and run["format_version"] < 3):
        return ""
    if folder is None:
        return f"{path}: edited since slap-fast wrote it; used as it is, there is no checkpoint yet"
    config = own.get("config") if isinstance(own, dict) else None
    old, new = flat(run["config"]), flat(config if isinstance(config, dict) else {})
    keys = [key for key in old if key in new and old[key] != new[key]]
    what = ", ".join(f"{key} {old[key]} to {new[key]}" for key in keys) or "not its settings"
    return (
        f"{path}: edited since slap-fast wrote it ({what}); the edit is not used, settings change "
        "by --resume --set KEY=VALUE"
    )


def stored_config(run: dict[str, Any]) -> TrainConfig:
    """The config in the content of ``run.json``."""
    return from_dict(TrainConfig, run["config"])
