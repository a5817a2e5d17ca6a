"""Files that a manifest lists as clips."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from slap_fast.data.audio.decode import IN_PROCESS, Decoder
from slap_fast.data.audio.track import AudioError
from slap_fast.data.manifest import ManifestError, Row
from slap_fast.data.source import EncodedClips

SAMPLE, UNIT = 8, 100
"""Files whose durations are compared, and the factor that only another unit explains."""


class ManifestClips(EncodedClips):
    """The rows of a manifest as a source."""

    def __init__(
        self,
        rows: Sequence[Row],
        sample_rate: int = 16_000,
        decoder: Decoder = IN_PROCESS,
        min_seconds: float = 0.025,
    ) -> None:
        """Raises ManifestError where ``duration_s`` is not in seconds."""
        self.rows, self.sample_rate, self.decoder = rows, sample_rate, decoder
        self.min_seconds = min_seconds
        self._check_durations()
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

    def _check_durations(self) -> None:
        """Compares ``duration_s`` with the headers of a few files: wrong units lose every clip."""
        given = [row for row in self.rows if row.seconds is not None and row.end is None]
        ratios = []
        for row in given[:: max(1, len(given) // SAMPLE)][:SAMPLE]:
            with suppress(AudioError):
                ratios.append((row.seconds / self.decoder.probe(row.path).seconds, row))
        if ratios and min(ratio for ratio, _ in ratios) > UNIT:
            ratio, row = ratios[0]
            raise ManifestError(
                f"{row.path}: duration_s: found {row.seconds:g}, expected "
                f"{row.seconds / ratio:g} seconds",
                line=row.line,
            )

    def _row_seconds(self, row: Row) -> float:
        end = row.end or row.seconds or self.header_seconds(row.path)
        return max(0.0, end - row.start)
