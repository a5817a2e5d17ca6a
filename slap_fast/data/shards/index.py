"""The index of clips in tar shards that WebDataset reads too.

A folder of shards holds::

    train-000000.tar ...   per clip KEY.wav (the original bytes, whatever the format) and KEY.json
                           (the fields of a manifest row)
    index.json             splits, totals, and of each shard its name, bytes, clips and SHA-256
    index.npy              one ROW per clip, split by split

A clip is one read at a known offset. Its checksum covers all of it, tar headers and the index's row
included, so damage to a shard costs exactly the clips that it touched.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FORMAT_VERSION = 1
INDEX, ROWS = "index.json", "index.npy"
BLOCK = 512
"""Bytes of a tar header; contents are padded to a multiple of it."""
ROW = np.dtype(
    [
        ("shard", "<u4"),  # position in the index's list
        ("offset", "<u8"),  # of the clip's first tar header in the shard
        ("audio_bytes", "<u4"),
        ("notes_bytes", "<u4"),  # of KEY.json
        ("seconds", "<f8"),
        ("checksum", "<u8"),  # of the fields above and the clip's bytes, headers and padding
    ]
)


class ShardError(ValueError):
    """A folder of shards whose index cannot be used; names what was found and expected."""


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
    """SHA-256 of ``index.npy``."""
    splits: dict[str, Split]
    """By name, "" for clips without one; end to end they are all the rows."""
    shards: list[Shard]


def read_index(folder: Path) -> Index:
    """Reads and checks ``index.json``. Raises ShardError."""
    path = folder / INDEX
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version {version!r}, expected {FORMAT_VERSION}")
        shards = [
            Shard(str(s["name"]), int(s["bytes"]), int(s["clips"]), str(s["sha256"]))
            for s in fields["shards"]
        ]
        splits = {
            name: Split(
                int(s["first"]), int(s["last"]), float(s["total_seconds"]),
                float(s["longest_seconds"]),
            )
            for name, s in fields["splits"].items()
        }  # fmt: skip
        index = Index(int(fields["rows"]), str(fields["rows_sha256"]), splits, shards)
    except _INVALID as error:
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


_INVALID = (
    OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError
)  # fmt: skip


class Rows:
    """``index.npy``, read a row at a time: memory-mapped, a shuffle would load all of its pages.

    Raises ShardError where it differs from what ``index.json`` declares.
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
        if hasattr(os, "pread"):  # forked processes share a file's position
            data = os.pread(self._file.fileno(), ROW.itemsize, at)
        else:
            self._file.seek(at)
            data = self._file.read(ROW.itemsize)
        return np.frombuffer(data, ROW)[0]
