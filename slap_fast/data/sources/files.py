"""Files that a manifest lists as clips."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slap_fast.data.audio.decode import IN_PROCESS, Decoder
from slap_fast.data.manifest import Row
from slap_fast.data.source import EncodedClips


class ManifestClips(EncodedClips):
    """The rows of a manifest as a source."""

    def __init__(
        self,
        rows: Sequence[Row],
        sample_rate: int = 16_000,
        decoder: Decoder = IN_PROCESS,
        min_seconds: float = 0.025,
    ) -> None:
        self.rows, self.sample_rate, self.decoder = rows, sample_rate, decoder
        self.min_seconds = min_seconds
        with ThreadPoolExecutor(8) as pool:
            self._seconds = list(pool.map(self._row_seconds, rows))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return str(self.rows[index].path)

    def seconds(self, index: int) -> float:
        return self._seconds[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.rows[index].captions

    def label(self, index: int) -> str | None:
        return self.rows[index].label

    def item(self, index: int) -> Any:
        row = self.rows[index]
        return row.path, row.start, row.end

    def _row_seconds(self, row: Row) -> float:
        end = row.end or row.seconds or self.header_seconds(row.path)
        return max(0.0, end - row.start)
