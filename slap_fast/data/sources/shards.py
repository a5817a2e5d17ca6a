"""Clips in tar shards, each one read at a known offset and verified.

A clip that is damaged raises AudioError: E_SHARD_MISSING (the shard does not exist or cannot be
read), E_SHARD_TRUNCATED (it ends before the clip does), E_SHARD_CORRUPT (other bytes than were
written), E_SHARD_INDEX (the index's row is out of range).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from slap_fast.data.audio.decode import IN_PROCESS, Decoder
from slap_fast.data.audio.track import AudioError
from slap_fast.data.manifest import ManifestError, Row, row_of
from slap_fast.data.shards.index import (
    BLOCK,
    ROWS,
    Index,
    Rows,
    ShardError,
    checksum,
    padded,
    read_index,
)
from slap_fast.data.source import EncodedClips


class ShardClips(EncodedClips):
    """A split of a folder of shards."""

    def __init__(
        self,
        folder: str | Path,
        split: str | None = None,
        sample_rate: int = 16_000,
        decoder: Decoder = IN_PROCESS,
        index: Index | None = None,
        min_seconds: float = 0.025,
    ) -> None:
        """``index``: the folder's, where it has been read already."""
        self.folder, self.split = Path(folder), split
        self.sample_rate, self.decoder, self.min_seconds = sample_rate, decoder, min_seconds
        self._index = read_index(self.folder) if index is None else index
        self._rows = Rows(self.folder / ROWS, self._index.rows)
        splits = self._index.splits
        if split is not None and split not in splits:
            raise ShardError(f"{folder}: found no split {split!r}, there are: {', '.join(splits)}")
        self._parts = [splits[split]] if split is not None else list(splits.values())
        self._first, self._last = self._parts[0].first, self._parts[-1].last
        self._last_clip: tuple[int, bytes, Row] | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits these clips are of, "" for clips without one."""
        return tuple(self._index.splits) if self.split is None else (self.split,)

    @property
    def rows_sha256(self) -> str:
        """SHA-256 of the folder's table of clips, in which each clip's bytes have a checksum."""
        return self._index.rows_sha256

    def __reduce__(self) -> tuple[Any, ...]:
        # An open file cannot be sent to a worker process.
        options = self.sample_rate, self.decoder, None, self.min_seconds
        return ShardClips, (self.folder, self.split, *options)

    def __len__(self) -> int:
        return self._last - self._first

    def name(self, index: int) -> str:
        number, shards = self._first + index, self._index.shards
        shard = int(self._rows[number]["shard"])
        file = shards[shard].name if shard < len(shards) else f"#{shard}"
        return str(self.folder / file / f"{number:09d}")

    def seconds(self, index: int) -> float:
        return float(self._rows[self._first + index]["seconds"])

    def total_seconds(self) -> float:
        return sum(part.total_seconds for part in self._parts)

    def longest_seconds(self) -> float:
        return max(part.longest_seconds for part in self._parts)

    def captions(self, index: int) -> tuple[str, ...]:
        return self.clip(index)[1].captions

    def label(self, index: int) -> str | None:
        return self.clip(index)[1].label

    def item(self, index: int) -> Any:
        audio, row = self.clip(index)
        return audio, row.start, row.end

    def clip(self, index: int) -> tuple[bytes, Row]:
        """The bytes of the audio file and its row; the last clip is kept for the next call."""
        if self._last_clip is None or self._last_clip[0] != index:
            self._last_clip = (index, *self._read(index))
        return self._last_clip[1:]

    def _read(self, index: int) -> tuple[bytes, Row]:
        row, name = self._rows[self._first + index], Path(self.name(index))
        audio_bytes, notes_bytes = int(row["audio_bytes"]), int(row["notes_bytes"])
        clip = self._bytes(name, row, padded(audio_bytes) + padded(notes_bytes))
        notes = clip[padded(audio_bytes) + BLOCK :][:notes_bytes]
        try:
            fields = {**json.loads(notes), "path": name.name}
            return clip[BLOCK : BLOCK + audio_bytes], row_of(name, 1, "", fields)
        except ManifestError as error:
            raise AudioError(error.code, name, str(error), "a caption") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise AudioError("E_MANIFEST", name, str(error), "JSON fields") from None

    def _bytes(self, name: Path, row: np.void, size: int) -> bytes:
        number, offset = int(row["shard"]), int(row["offset"])
        path, shards = name.parent, self._index.shards
        if number >= len(shards) or offset + size > shards[number].bytes:
            expected = f"a place in one of {len(shards)} shards"
            raise AudioError("E_SHARD_INDEX", name, f"shard {number}, byte {offset}", expected)
        try:
            if not path.is_file():  # opening a pipe would block
                raise FileNotFoundError("no such file")
            with path.open("rb") as file:
                file.seek(offset)
                clip = file.read(size)
        except OSError as error:
            reason = error.strerror or str(error)
            raise AudioError("E_SHARD_MISSING", name, reason, "a readable file") from None
        if len(clip) < size:
            truncated = f"a shard of {path.stat().st_size} bytes"
            raise AudioError("E_SHARD_TRUNCATED", name, truncated, f"{shards[number].bytes}")
        if checksum(row, clip) != int(row["checksum"]):
            raise AudioError("E_SHARD_CORRUPT", name, "other bytes", "those that were packed")
        return clip
