"""A folder of vectors: ``vectors.npy``, ``items.jsonl`` and ``model.json``.

It is written row by row in ``unfinished/`` below it. What was there before stays until the last row
is written, and a write that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slap_fast.atomic_files import replace_file, sync, to_json, write_json

VECTORS, ITEMS, MODEL, PLAN = "vectors.npy", "items.jsonl", "model.json", "plan.json"
UNFINISHED = "unfinished"


class VectorWriter:
    """Rows of vectors and what is known of each; made by :func:`write_vectors`."""

    def __init__(self, folder: Path, header: bytes, shape: tuple[int, int]) -> None:
        self._folder, self._header, self._shape = folder, header, shape
        self.items = _whole_rows(folder, len(header), shape)
        """Of the rows so far; at first those of a write that was cut off."""
        self._vectors: BinaryIO = (folder / VECTORS).open("r+b")
        self._vectors.truncate(len(header) + len(self.items) * shape[1] * 4)
        self._vectors.seek(0, os.SEEK_END)
        lines = [to_json(item, indent=None) for item in self.items]
        replace_file(folder / ITEMS, "".join(lines))
        self._lines = (folder / ITEMS).open("ab")

    def add(self, vector: np.ndarray, item: dict[str, Any]) -> None:
        """Writes the next row: fp32 [E], NaN where the item is bad; and its JSON values."""
        self._vectors.write(np.ascontiguousarray(vector, dtype="<f4").tobytes())
        self._vectors.flush()
        self._lines.write(to_json(item, indent=None).encode())
        self._lines.flush()
        self.items.append(item)

    def finish(self, model: dict[str, Any]) -> None:
        """Puts the files in place; ``model`` goes into ``model.json``."""
        assert len(self.items) == self._shape[0]
        self.close()
        for name in (VECTORS, ITEMS):
            sync(self._folder / name)
        write_json(self._folder / MODEL, model)  # that it exists means: whole
        _put_in_place(self._folder)

    def discard(self) -> None:
        """Deletes the rows; what was there before stays."""
        self.close()
        shutil.rmtree(self._folder)

    def close(self) -> None:
        """Closes the files; what they hold stays for the next time."""
        self._vectors.close()
        self._lines.close()


@contextmanager
def write_vectors(
    out: Path, plan: dict[str, Any], shape: tuple[int, int]
) -> Iterator[VectorWriter]:
    """Writes ``vectors.npy`` float32 [N, E], ``items.jsonl`` of N lines and ``model.json``.

    Args:
        out: the folder; the caller holds its lock.
        plan: JSON values that say which rows these are: only a write of an equal plan is gone on
            with, another one is deleted.
        shape: (N, E).

    Raises:
        OSError: the disk is full or broken; earlier files, and the rows so far, are kept.
    """
    folder = out / UNFINISHED
    if (folder / MODEL).exists():
        _put_in_place(folder)
    if not folder.exists() or _read(folder / PLAN) != plan:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        header = _header(shape)
        (folder / VECTORS).write_bytes(header)
        write_json(folder / PLAN, plan)
    writer = VectorWriter(folder, _header(shape), shape)
    try:
        yield writer
    finally:
        writer.close()


def _header(shape: tuple[int, int]) -> bytes:
    from io import BytesIO

    file = BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def _whole_rows(folder: Path, offset: int, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """The items whose line and vector are both there and fit each other."""
    try:
        lines = (folder / ITEMS).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    count = min(((folder / VECTORS).stat().st_size - offset) // (4 * shape[1]), len(lines))
    vectors = np.fromfile(folder / VECTORS, "<f4", max(count, 0) * shape[1], offset=offset)
    items = []
    for line, vector in zip(lines, vectors.reshape(-1, shape[1]), strict=False):
        item = json.loads(line) if line.endswith(b"\n") else {}
        # A machine that lost its power may leave zeros.
        length = np.linalg.norm(vector)
        whole = np.isnan(length) if item.get("status") == "bad" else abs(length - 1) < 0.1
        if not item or not whole:
            break
        items.append(item)
    return items


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _put_in_place(folder: Path) -> None:
    for name in (VECTORS, ITEMS, MODEL):  # the last one says that the others were whole
        if (folder / name).exists():
            (folder / name).replace(folder.parent / name)
    sync(folder.parent)
    shutil.rmtree(folder)
