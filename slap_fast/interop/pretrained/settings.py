"""The text files of a model's folder, which beside its weights decide its vectors."""

from __future__ import annotations

from pathlib import Path


def read_settings(folder: Path) -> str:
    """Names and texts of configuration and vocabulary, in a fixed order."""
    files = sorted(file for kind in ("*.json", "*.txt") for file in folder.rglob(kind))
    return "\n".join(f"{file.relative_to(folder)}\n{file.read_text('utf-8')}" for file in files)
