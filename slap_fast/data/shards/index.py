"""Clips in tar shards that WebDataset reads too, found through an index, checked as they are read.

A folder of shards holds::

    train-000000.tar ...   per clip KEY.wav (the original bytes, whatever the format) and KEY.json
                           (the fields of a manifest row)
    index.json             splits, totals, and of each shard its name, bytes, clips and SHA-256
    index.npy              one ROW per clip, split by split

A clip is one read at a known place. Its checksum covers all of it, tar headers and the index's row
included, so whatever happened to a shard costs exactly the clips it touched, each with a code:
E_SHARD_MISSING (the file is not there or cannot be read), E_SHARD_TRUNCATED (it ends before the
clip does), E_SHARD_CORRUPT (other bytes than were written), E_SHARD_INDEX (the row points nowhere).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slap_fast.data.audio.decode import IN_PROCESS, Audio, AudioError, Decoder
from slap_fast.data.manifest import ManifestError, Row, row_of

FORMAT_VERSION = 1
INDEX, ROWS = "index.json", "index.npy"
BLOCK = 512
"""Bytes of a tar header; contents are padded to a multiple of it."""
ROW = np.dtype(
    [
        ("shard", "<u4"),  # its place in the index's list
        ("offset", "<u8"),  # of the clip's first tar header in the shard
        ("audio_bytes", "<u4"),
        ("notes_bytes", "<u4"),  # of KEY.json
        ("seconds", "<f8"),
        ("checksum", "<u8"),  # of the fields above and the clip's bytes, headers and padding
    ]
)


class ShardError(ValueError):
    """A folder of shards whose index cannot be used; says what was found and expected."""


def padded(size: int) -> int:
    """Bytes that contents of this size take in a tar, header included."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def checksum(row: np.void, clip: bytes) -> int:
    """BLAKE2b-64 of a row's other fields and the clip's bytes."""
    head = row.tobytes()[: -ROW["checksum"].itemsize]
    return struct.unpack("<Q", hashlib.blake2b(head + clip, digest_size=8).digest())[0]


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file."""

    name: str
    bytes: int
    clips: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Split:
    """Clips ``first .. last - 1`` of the index."""

    first: int
    last: int
    total_seconds: float
    longest_seconds: float


@dataclass(frozen=True, slots=True)
class Index:
    """``index.json``."""

    rows: int
    rows_sha256: str
    """Of ``index.npy``."""
    splits: dict[str, Split]
    """By name, "" for clips without one; end to end they are all the rows."""
    shards: list[Shard]


def read_index(folder: Path) -> Index:
    """``index.json``, checked. Raises ShardError."""
    path = folder / INDEX
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version {version!r}, expected {FORMAT_VERSION}")
        shards = [
            Shard(str(s["name"]), int(s["bytes"]), int(s["clips"]), str(s["sha256"]))
            for s in found["shards"]
        ]
        splits = {
            name: Split(
                int(s["first"]), int(s["last"]), float(s["total_seconds"]),
                float(s["longest_seconds"]),
            )
            for name, s in found["splits"].items()
        }  # fmt: skip
        index = Index(int(found["rows"]), str(found["rows_sha256"]), splits, shards)
    except _NO_INDEX as error:
        raise ShardError(f"{path}: cannot be used: {type(error).__name__} {error}") from None
    for shard in shards:
        if "/" in shard.name or "\\" in shard.name or not shard.name.endswith(".tar"):
            raise ShardError(f"{path}: found {shard.name!r}, expected the name of a .tar beside it")
    ends = [0, *(split.last for split in splits.values())]
    starts = [*(split.first for split in splits.values()), index.rows]
    if not splits or ends != starts or ends != sorted(ends):
        raise ShardError(f"{path}: found splits {splits}, expected them to fill {index.rows} rows")
    if not all(0 <= s.longest_seconds <= s.total_seconds < math.inf for s in splits.values()):
        raise ShardError(f"{path}: found splits {splits}, expected finite seconds")
    return index


_NO_INDEX = (
    OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError
)  # fmt: skip


class Rows:
    """``index.npy``, read a row at a time: mapped, its pages would fill the memory of a shuffle.

    Raises ShardError where it is not what ``index.json`` says.
    """

    def __init__(self, path: Path, count: int) -> None:
        try:
            self._file = path.open("rb", buffering=0)
            version = np.lib.format.read_magic(self._file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(self._file)
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise ShardError(f"{path}: cannot be read: {error}") from None
        self._first = self._file.tell()
        size = (path.stat().st_size - self._first) / ROW.itemsize
        if dtype != ROW or shape != (count,) or size != count:
            found = f"{dtype} {shape}, {size:g} of them there"
            raise ShardError(f"{path}: found {found}, expected {count} rows of a shard index")

    def __getitem__(self, index: int) -> np.void:
        at = self._first + index * ROW.itemsize
        if hasattr(os, "pread"):  # processes that are forked share a file's position
            data = os.pread(self._file.fileno(), ROW.itemsize, at)
        else:
            self._file.seek(at)
            data = self._file.read(ROW.itemsize)
        return np.frombuffer(data, ROW)[0]


class ShardClips:
    """A split of a folder of shards as a source, see :mod:`slap_fast.data.source`."""

    def __init__(
        self,
        folder: str | Path,
        split: str | None = None,
        sample_rate: int = 16_000,
        decoder: Decoder = IN_PROCESS,
        index: Index | None = None,
    ) -> None:
        """``index``: the folder's, where it has been read already."""
        self.folder, self.split = Path(folder), split
        self.sample_rate, self.decoder = sample_rate, decoder
        self._index = read_index(self.folder) if index is None else index
        self._rows = Rows(self.folder / ROWS, self._index.rows)
        splits = self._index.splits
        if split is not None and split not in splits:
            raise ShardError(f"{folder}: found no split {split!r}, there are: {', '.join(splits)}")
        self._parts = [splits[split]] if split is not None else list(splits.values())
        self._first, self._last = self._parts[0].first, self._parts[-1].last
        self._held: tuple[int, bytes, Row] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # An open file does not travel to a worker process.
        return ShardClips, (self.folder, self.split, self.sample_rate, self.decoder)

    def __len__(self) -> int:
        return self._last - self._first

    def name(self, index: int) -> str:
        number = self._first + index
        return str(self._shard(self._rows[number]) / f"{number:09d}")

    def seconds(self, index: int) -> float:
        return float(self._rows[self._first + index]["seconds"])

    def total_seconds(self) -> float:
        return sum(part.total_seconds for part in self._parts)

    def longest_seconds(self) -> float:
        return max(part.longest_seconds for part in self._parts)

    def captions(self, index: int) -> tuple[str, ...]:
        return self.clip(index)[1].captions

    def meaning(self, index: int, caption: str) -> Hashable:
        return caption.casefold()

    def label(self, index: int) -> str | None:
        return self.clip(index)[1].label

    def item(self, index: int) -> Any:
        audio, row = self.clip(index)
        return audio, row.start, row.end

    def audio(self, index: int, start: float = 0.0, end: float | None = None) -> Audio:
        audio, row = self.clip(index)
        last = row.end if end is None else row.start + end
        try:
            return self.decoder.decode(
                audio, sample_rate=self.sample_rate, start=row.start + start, end=last
            )
        except AudioError as error:
            raise error.named(self.name(index)) from None

    def _shard(self, row: np.void) -> Path:
        shards, number = self._index.shards, int(row["shard"])
        return self.folder / (shards[number].name if number < len(shards) else f"#{number}")

    def clip(self, index: int) -> tuple[bytes, Row]:
        """The bytes of the audio file and its row; the last clip is kept for the next call."""
        if self._held is None or self._held[0] != index:
            self._held = (index, *self._read(index))
        return self._held[1:]

    def _read(self, index: int) -> tuple[bytes, Row]:
        row = self._rows[self._first + index]
        audio_bytes, notes_bytes = int(row["audio_bytes"]), int(row["notes_bytes"])
        clip = self._bytes(index, row, padded(audio_bytes) + padded(notes_bytes))
        notes_at = padded(audio_bytes) + BLOCK
        try:
            name = Path(self.name(index))
            fields = {**json.loads(clip[notes_at : notes_at + notes_bytes]), "path": name.name}
            return clip[BLOCK : BLOCK + audio_bytes], row_of(name, 1, "", fields)
        except ManifestError as error:
            raise AudioError(error.code, self.name(index), str(error), "a caption") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise AudioError("E_MANIFEST", self.name(index), str(error), "JSON fields") from None

    def _bytes(self, index: int, row: np.void, size: int) -> bytes:
        name, path, offset = self.name(index), self._shard(row), int(row["offset"])
        number, shards = int(row["shard"]), self._index.shards
        if number >= len(shards) or offset + size > shards[number].bytes:
            expected = f"a place in one of {len(shards)} shards"
            raise AudioError("E_SHARD_INDEX", name, f"shard {number}, byte {offset}", expected)
        try:
            if not path.is_file():  # a pipe would be waited for
                raise FileNotFoundError("no such file")
            with path.open("rb") as file:
                file.seek(offset)
                clip = file.read(size)
        except OSError as error:
            found = error.strerror or str(error)
            raise AudioError("E_SHARD_MISSING", name, found, "a readable file") from None
        if len(clip) < size:
            found = f"a shard of {path.stat().st_size} bytes"
            raise AudioError("E_SHARD_TRUNCATED", name, found, f"{shards[number].bytes}")
        if checksum(row, clip) != int(row["checksum"]):
            raise AudioError("E_SHARD_CORRUPT", name, "other bytes", "those that were packed")
        return clip
