"""The contents of sources and steps, for the tests of shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slap_fast.data.audio.track import AudioError
from slap_fast.data.loader import StepData
from slap_fast.data.shards.index import ROWS, padded
from slap_fast.data.source import ClipSource
from slap_fast.models.tokenizer import CaptionTokenizer


def contents_by_captions(
    source: ClipSource,
) -> dict[tuple[str, ...], tuple[bytes, float, str | None]]:
    """Samples, duration and label of each clip by its captions."""
    return {
        source.captions(i): (source.audio(i).waveform.tobytes(), source.seconds(i), source.label(i))
        for i in range(len(source))
    }


def error_codes(source: ClipSource) -> dict[int, str]:
    """Codes of the clips that cannot be read, by index."""
    lost = {}
    for i in range(len(source)):
        try:
            source.item(i)
        except AudioError as error:
            lost[i] = error.code
    return lost


def spans(folder: Path) -> list[tuple[int, int]]:
    """[first byte, end) of each clip of a one-shard folder, in index order."""
    rows = np.load(folder / ROWS)
    first = rows["offset"].astype(int)
    ends = [padded(int(r["audio_bytes"])) + padded(int(r["notes_bytes"])) for r in rows]
    return list(zip(first, first + np.array(ends), strict=True))


def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.load(None, 96)


def trained(step: StepData) -> int:
    """Number of clips in the step's batches."""
    return sum(len(batch.groups) for batch in step.batches)
