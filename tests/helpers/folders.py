"""Small folders for tests of writing to disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def write(text: str) -> Callable[[Path], int]:
    """A function that fills a folder with one file ``a``."""
    return lambda folder: (folder / "a").write_text(text)


def names(folder: Path) -> list[str]:
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir())
