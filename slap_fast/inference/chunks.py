"""Long audio as windows, and windows gathered into forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from slap_fast.data.audio.track import AudioError

MIN_SECONDS = 0.025


def windows(
    blocks: Iterable[np.ndarray], sample_rate: int, seconds: float, name: str
) -> Iterator[np.ndarray]:
    """Windows that overlap by half, the last one ending where the audio ends; a short clip is one.

    Args:
        blocks: the samples of one clip, in blocks of any length.
        sample_rate: of the samples.
        seconds: of a window.
        name: the clip's, for the error.

    Raises:
        AudioError: less than ``MIN_SECONDS`` of audio.
    """
    size, hop = round(seconds * sample_rate), round(seconds / 2 * sample_rate)
    pending = np.zeros(0, dtype=np.float32)
    before, long = pending, False
    for block in blocks:
        pending = np.concatenate([pending, block])
        while len(pending) > size:
            yield pending[:size]
            before, pending, long = pending[:hop], pending[hop:], True
    if long and len(pending) > size - hop:
        yield np.concatenate([before, pending])[-size:]
    elif not long:
        if len(pending) < MIN_SECONDS * sample_rate:
            seconds = f"{len(pending) / sample_rate:.4f} s of audio"
            raise AudioError("E_TOO_SHORT", name, seconds, f"at least {MIN_SECONDS:g} s")
        yield pending


def packs(
    windows: Iterable[tuple[int, Any]], max_size: int, size_of: Callable[[Any], int]
) -> Iterator[tuple[list[int], list[Any]]]:
    """Runs of (item, one of its windows) of at most ``max_size`` together, or of one window, as
    (items, windows)."""
    items: list[int] = []
    run: list[Any] = []
    total = 0
    for item, window in windows:
        size = size_of(window)
        if run and total + size > max_size:
            yield items, run
            items, run, total = [], [], 0
        items.append(item)
        run.append(window)
        total += size
    if run:
        yield items, run
