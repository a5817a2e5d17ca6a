"""Packs clips into tar shards with an index, see :mod:`slap_fast.data.shards.index`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from slap_fast.atomic_files import file_sha256, write_json
from slap_fast.console import Progress
from slap_fast.data.audio.decode import probe
from slap_fast.data.audio.folder import why_missing
from slap_fast.data.audio.formats import BY_NAME
from slap_fast.data.audio.track import AudioError
from slap_fast.data.manifest import ManifestError, Row
from slap_fast.data.order import permute
from slap_fast.data.shards.index import (
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
MAX_OPEN = 16
"""Most shards open at once; where splits alternate, each has one."""


class NothingPackedError(ShardError):
    """All clips were left out; ``skipped.jsonl`` lists them."""


Clip = tuple[Row, bytes]
"""A row and the bytes of its audio file."""


def write_shards(
    rows: Sequence[Row],
    out: Path,
    *,
    bad: Sequence[ManifestError] = (),
    shard_mb: int = 256,
    progress: bool = False,
) -> Counter[str]:
    """Writes the files of a manifest as :func:`write_clips` does, split by split.

    Within a split, clips are shuffled for tools that read shards from end to end. A file that
    cannot be opened, and a row that cannot be used (``bad``), is left out.
    """
    clips, total = chain(bad, _files(rows)), len(bad) + len(rows)
    return write_clips(clips, out, shard_mb=shard_mb, progress=progress, total=total)


def write_clips(
    clips: Iterable[Clip | AudioError | ManifestError],
    out: Path,
    *,
    shard_mb: int = 256,
    progress: bool = False,
    total: int | None = None,
) -> Counter[str]:
    """Writes a folder of shards and returns how many clips were left out, by code.

    The bytes of a file are stored as they are, once per clip. An error in place of a clip, and a
    clip whose header is bad, is left out and listed in ``skipped.jsonl``. The index is written
    last: without it, the folder does not count as one of shards.

    Args:
        clips: taken one at a time; their splits may come in any order.
        out: the folder; created where it does not exist.
        shard_mb: a shard is closed once it holds this many MB (10^6 bytes).
        progress: show a bar.
        total: how many clips will come, for the bar.

    Raises:
        ShardError: ``out`` holds shards already.
        NothingPackedError: no clip could be packed.
    """
    if (out / INDEX).exists():
        raise ShardError(f"{out}: already holds shards, choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    writer = _Writer(out, shard_mb * 1_000_000)
    skipped: Counter[str] = Counter()
    bar = Progress(total=total, desc="packing", unit="clip", show=progress)
    with (out / "skipped.jsonl").open("w", encoding="utf-8") as log, bar, writer:
        for clip in clips:
            bar.update()
            try:
                if isinstance(clip, (AudioError, ManifestError)):
                    raise clip
                writer.add(*clip, *_header(*clip))
            except (AudioError, ManifestError) as error:
                skipped[error.code] += 1
                line = {
                    "path": getattr(error, "path", None),
                    "code": error.code,
                    "message": str(error),
                }
                log.write(json.dumps(line) + "\n")
    if not writer.count:
        raise NothingPackedError(f"{out}: no clip could be packed: {dict(skipped)}")
    splits: dict[str, Split] = {}
    first = 0
    for name, packed in writer.rows.items():
        seconds = np.frombuffer(packed, ROW)["seconds"]
        last = first + len(seconds)
        splits[name] = Split(first, last, float(seconds.sum()), float(seconds.max()))
        first = last
    rows = np.frombuffer(b"".join(writer.rows.values()), ROW)
    np.save(out / ROWS, rows, allow_pickle=False)
    write_index_json(out, writer.count, splits, writer.shards)
    return skipped


def write_index_json(
    out: Path, rows: int, splits: dict[str, Split], shards: Sequence[Shard]
) -> None:
    """Writes ``index.json`` beside an ``index.npy``, atomically."""
    index = {
        "format_version": FORMAT_VERSION,
        "rows": rows,
        "rows_sha256": file_sha256(out / ROWS),
        "splits": {name: dataclasses.asdict(split) for name, split in splits.items()},
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    write_json(out / INDEX, index, indent=1, ensure_ascii=True)


def _files(rows: Sequence[Row]) -> Iterator[Clip | AudioError]:
    by_split: dict[str | None, list[Row]] = {}
    for row in rows:
        by_split.setdefault(row.split, []).append(row)
    for members in by_split.values():
        order = permute(np.arange(len(members)), len(members), (0,))
        yield from (_file(members[i]) for i in order.tolist())


def _file(row: Row) -> Clip | AudioError:
    if not row.path.is_file():
        found = why_missing(row.path, "no such file")
        return AudioError("E_MISSING", row.path, found, "a readable file")
    try:
        with row.path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        return AudioError("E_MISSING", row.path, str(error.strerror), "a readable file")
    return (row, data) if len(data) <= MAX_BYTES else too_large(str(row.path))


def too_large(name: str) -> AudioError:
    """The error of an audio file that is too large to be packed."""
    return AudioError("E_TOO_LONG", name, "more", f"at most {MAX_BYTES:,} bytes")


def _header(row: Row, data: bytes) -> tuple[str, float]:
    """(suffix by content, seconds of the clip)."""
    try:
        info = probe(data)
    except AudioError as error:
        raise error.named(str(row.path)) from None
    seconds = min(info.seconds, row.end or info.seconds) - row.start
    if seconds <= 0:
        found = f"{info.seconds:g} s of audio"
        raise AudioError("E_TOO_SHORT", row.path, found, f"more than start, {row.start:g} s")
    return BY_NAME[info.format].suffixes[0], seconds


class _Writer:
    """Writes clips to shards, each of one split; closes the open ones on exit."""

    def __init__(self, out: Path, shard_bytes: int) -> None:
        self.out, self.shard_bytes = out, shard_bytes
        self.count = 0
        self.rows: dict[str, bytearray] = {}
        """ROWs of each split, "" for clips without one."""
        self.shards: list[Shard] = []
        self._open: dict[str, _Tar] = {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for split in list(self._open):
            self._close(split)

    def add(self, row: Row, audio: bytes, suffix: str, seconds: float) -> None:
        split, key = row.split or "", f"{self.count:09d}"
        notes = json.dumps(_notes(row), ensure_ascii=False).encode()
        tar = self._open.get(split) or self._start(split)
        clip = _member(key + suffix, audio) + _member(f"{key}.json", notes)
        place = (tar.number, tar.bytes, len(audio), len(notes), seconds, 0)
        packed = np.array([place], dtype=ROW)
        packed["checksum"] = checksum(packed[0], clip)
        tar.write(clip)
        tar.clips += 1
        self.rows.setdefault(split, bytearray()).extend(packed.tobytes())
        self.count += 1
        if tar.bytes >= self.shard_bytes:
            self._close(split)

    def _start(self, split: str) -> _Tar:
        if len(self._open) == MAX_OPEN:
            self._close(next(iter(self._open)))
        tar = self._open[split] = _Tar(self.out, split or "all", len(self.shards))
        self.shards.append(Shard(tar.path.name, 0, 0, ""))  # its place until it is closed
        return tar

    def _close(self, split: str) -> None:
        tar = self._open.pop(split)
        self.shards[tar.number] = tar.close()


class _Tar:
    """A shard that is being written."""

    def __init__(self, out: Path, split: str, number: int) -> None:
        # The split's name comes from a manifest: it must not lead out of the folder.
        self.path = out / f"{re.sub('[^A-Za-z0-9_-]', '_', split)[:64]}-{number:06d}.tar"
        self.number, self.bytes, self.clips = number, 0, 0
        self._file = self.path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def close(self) -> Shard:
        """Ends the archive and syncs it to disk."""
        self.write(bytes(2 * BLOCK))
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return Shard(self.path.name, self.bytes, self.clips, self._digest.hexdigest())


def _member(name: str, data: bytes) -> bytes:
    """A file in a tar: header, contents, padding; deterministic."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def _notes(row: Row) -> dict[str, Any]:
    """The fields of a manifest row: unpacked shards are a folder that ``read_manifest`` reads."""
    fields = {
        "caption": list(row.captions) or None,
        "label": row.label,
        "split": row.split,
        "start": row.start or None,
        "end": row.end,
        "source": row.path.name,
    }
    return {key: value for key, value in fields.items() if value is not None}
