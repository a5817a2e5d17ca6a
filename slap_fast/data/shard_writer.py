"""Packs the clips of a manifest into tar shards with an index, see :mod:`slap_fast.data.shards`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from slap_fast.data.containers import AudioError, open_track
from slap_fast.data.manifest import Row
from slap_fast.data.order import permute
from slap_fast.data.shards import (
    BLOCK,
    FORMAT_VERSION,
    INDEX,
    ROW,
    ROWS,
    Shard,
    ShardError,
    Split,
    checksum,
)

MAX_BYTES = 1 << 30
"""Largest audio file that is packed."""
SUFFIXES = {"MP4": "m4a"}
"""Of formats whose suffix is not their name in lower case."""


def write_shards(
    rows: Sequence[Row], out: Path, *, shard_mb: int = 256, progress: bool = False
) -> Counter[str]:
    """Writes a folder of shards and returns how many clips were left out, by code.

    Splits follow one another; within one, clips are shuffled for those who read shards from end to
    end. The bytes of a file are stored as they are, once per clip. A file that cannot be opened, or
    whose header is bad, is left out and listed in ``skipped.jsonl``. The index comes last: until it
    is there, the folder is none of shards.

    Args:
        rows: of a manifest.
        out: the folder; made where it is not there.
        shard_mb: a shard is closed once it holds this many MB (10^6 bytes).
        progress: show a bar.

    Raises:
        ShardError: ``out`` holds shards already, or no clip could be packed.
    """
    if (out / INDEX).exists():
        raise ShardError(f"{out}: already holds shards, choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    writer = _Writer(out, shard_mb * 1_000_000)
    skipped: Counter[str] = Counter()
    splits: dict[str, Split] = {}
    bar = tqdm(total=len(rows), desc="packing", unit="clip", disable=not progress)
    with (out / "skipped.jsonl").open("w", encoding="utf-8") as log, bar, writer:
        for name, members in _splits(rows):
            first = writer.count
            for row in members:
                bar.update()
                try:
                    writer.add(row, *_audio(row))
                except AudioError as error:
                    skipped[error.code] += 1
                    line = {"path": str(row.path), "code": error.code, "message": str(error)}
                    log.write(json.dumps(line) + "\n")
            writer.close()
            seconds = writer.rows()["seconds"][first:]
            if len(seconds):
                totals = float(seconds.sum()), float(seconds.max())
                splits[name] = Split(first, writer.count, *totals)
    if not writer.count:
        raise ShardError(f"{out}: no clip could be packed: {dict(skipped)}")
    np.save(out / ROWS, writer.rows(), allow_pickle=False)
    write_index_json(out, writer.count, splits, writer.shards)
    return skipped


def write_index_json(
    out: Path, rows: int, splits: dict[str, Split], shards: Sequence[Shard]
) -> None:
    """``index.json`` over the ``index.npy`` that is there, in one rename."""
    index = {
        "format_version": FORMAT_VERSION,
        "rows": rows,
        "rows_sha256": file_sha256(out / ROWS),
        "splits": {name: dataclasses.asdict(split) for name, split in splits.items()},
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    fresh = out / f"{INDEX}.tmp"
    fresh.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    fresh.replace(out / INDEX)


def file_sha256(path: Path) -> str:
    """Of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _splits(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.split or "", []).append(row)
    for name, members in by_name.items():
        order = permute(np.arange(len(members)), len(members), (0,))
        yield name, [members[i] for i in order.tolist()]


def _audio(row: Row) -> tuple[bytes, str, float]:
    """(the file's bytes, its suffix by content, seconds of the clip)."""
    if not row.path.is_file():
        raise AudioError("E_MISSING", row.path, "no such file", "a readable file")
    try:
        with row.path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AudioError("E_MISSING", row.path, str(error.strerror), "a readable file") from None
    if len(data) > MAX_BYTES:
        raise AudioError("E_TOO_LONG", row.path, "more", f"at most {MAX_BYTES:,} bytes")
    try:
        with open_track(data) as track:
            info = track.info
    except AudioError as error:
        raise error.named(str(row.path)) from None
    seconds = min(info.seconds, row.end or info.seconds) - row.start
    if seconds <= 0:
        found = f"{info.seconds:g} s of audio"
        raise AudioError("E_TOO_SHORT", row.path, found, f"more than start, {row.start:g} s")
    return data, SUFFIXES.get(info.format, info.format.lower()), seconds


class _Writer:
    """Clips into shards; on exit the open one is closed."""

    def __init__(self, out: Path, shard_bytes: int) -> None:
        self.out, self.shard_bytes = out, shard_bytes
        self.count = 0
        self._rows = bytearray()
        self.shards: list[Shard] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rows(self) -> np.ndarray:
        """ROW [count]."""
        return np.frombuffer(bytes(self._rows), ROW)

    def add(self, row: Row, audio: bytes, suffix: str, seconds: float) -> None:
        key = f"{self.count:09d}"
        notes = json.dumps(_notes(row), ensure_ascii=False).encode()
        if self._file is None:
            self._open(row.split or "all")
        clip = _member(f"{key}.{suffix}", audio) + _member(f"{key}.json", notes)
        place = (len(self.shards), self._bytes, len(audio), len(notes), seconds, 0)
        packed = np.array([place], dtype=ROW)
        packed["checksum"] = checksum(packed[0], clip)
        self._write(clip)
        self._rows += packed.tobytes()
        self.count += 1
        if self._bytes >= self.shard_bytes:
            self.close()

    def _open(self, split: str) -> None:
        # The split's name comes from a manifest: no way out of the folder.
        name = f"{re.sub('[^A-Za-z0-9_-]', '_', split)[:64]}-{len(self.shards):06d}.tar"
        self._file = (self.out / name).open("wb")
        self._name, self._bytes, self._first = name, 0, self.count
        self._digest = hashlib.sha256()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def close(self) -> None:
        """Ends the open shard, if there is one, and puts it on disk."""
        if self._file is None:
            return
        self._write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        clips = self.count - self._first
        self.shards.append(Shard(self._name, self._bytes, clips, self._digest.hexdigest()))


def _member(name: str, data: bytes) -> bytes:
    """A file in a tar: header, contents, padding. The same input gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def _notes(row: Row) -> dict[str, Any]:
    """The fields of a manifest row, so that shards that are unpacked are a manifest's folder."""
    fields = {
        "caption": list(row.captions),
        "label": row.label,
        "split": row.split,
        "start": row.start or None,
        "end": row.end,
        "source": row.path.name,
    }
    return {key: value for key, value in fields.items() if value is not None}
