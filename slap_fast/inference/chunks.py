"""Long audio as 30 s windows, and windows packed into forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor

from slap_fast.data.audio.track import AudioError

CHUNK_SECONDS, CHUNK_HOP_SECONDS = 30.0, 15.0
MIN_SECONDS = 0.025


def chunks(blocks: Iterable[np.ndarray], sample_rate: int, name: str) -> Iterator[np.ndarray]:
    """30 s windows every 15 s, the last one ending where the audio ends; a short clip is one.

    ``blocks`` are the samples of one clip, in any lengths. Raises AudioError, which gives the
    clip's ``name``, for less than ``MIN_SECONDS`` of audio.
    """
    size, hop = round(CHUNK_SECONDS * sample_rate), round(CHUNK_HOP_SECONDS * sample_rate)
    before = pending = np.zeros(0, dtype=np.float32)
    for block in blocks:
        pending = np.concatenate([pending, block])
        while len(pending) > size:
            yield pending[:size]
            before, pending = pending[:hop], pending[hop:]
    if not len(before):
        if len(pending) < MIN_SECONDS * sample_rate:
            seconds = f"{len(pending) / sample_rate:.4f} s of audio"
            raise AudioError("E_TOO_SHORT", name, seconds, f"at least {MIN_SECONDS:g} s")
        yield pending
    elif len(pending) > size - hop:
        yield np.concatenate([before, pending])[-size:]


def packs(
    chunks: Iterable[tuple[int, Tensor]], max_tokens: int
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Runs of (item, patches of one of its chunks) of at most ``max_tokens`` patches, or of one
    chunk, as (items, patches)."""
    items, run, tokens = [], [], 0
    for item, patches in chunks:
        if run and tokens + len(patches) > max_tokens:
            yield items, run
            items, run, tokens = [], [], 0
        items.append(item)
        run.append(patches)
        tokens += len(patches)
    if run:
        yield items, run
