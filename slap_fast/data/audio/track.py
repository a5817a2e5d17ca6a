"""An open audio file, and the error of one that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

Source = str | os.PathLike | bytes | BinaryIO

CHANNELS = range(1, 9)
SAMPLE_RATES = range(4_000, 384_001)
COMPLETE = 0.95
"""A file that gives less than this share of what it declares is truncated."""


class AudioError(ValueError):
    """One file that cannot be used: ``code`` (E_...), ``path``, and what was found and expected."""

    def __init__(self, code: str, source: Source | str, found: str, expected: str) -> None:
        name = (
            source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "<bytes>")
        )
        self.code, self.path = code, str(name)
        # All four as args, or the error cannot be sent back by a worker process.
        super().__init__(code, self.path, found, expected)

    def named(self, name: str) -> AudioError:
        """The same error under a better name."""
        code, _, found, expected = self.args
        return AudioError(code, name, found, expected)

    def __str__(self) -> str:
        code, path, found, expected = self.args
        return f"{path}: {code}: found {found}, expected {expected}"


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a header declares."""

    seconds: float
    """Duration of the whole file."""
    sample_rate: int
    """Hz, of the file."""
    channels: int
    """1 .. 8."""
    format: str
    """A name of :mod:`slap_fast.data.audio.formats`, such as FLAC."""


@dataclass(frozen=True, slots=True)
class Track:
    """An open file."""

    info: AudioInfo
    declared_frames: int
    """Frames that the header declares; 0 where it declares none."""
    missing: str
    """How the container shows that bytes are missing; empty where it does not."""
    blocks: Callable[[int, int], Iterator[np.ndarray]]
    """(first frame, most frames) -> float32 [n, channels], n > 0, to the end of the file."""
    damage: Callable[[], str] = str
    """W_CORRUPT or W_TRUNCATED where the file shows damage that decoders pass over, else empty;
    reads all of it."""


def check_layout(source: Source, channels: int, sample_rate: int) -> None:
    """Raises AudioError where the channels or the sample rate are out of range."""
    if channels not in CHANNELS:
        raise AudioError("E_CHANNELS", source, f"{channels} channels", "1 to 8")
    if sample_rate not in SAMPLE_RATES:
        raise AudioError("E_SAMPLE_RATE", source, f"{sample_rate} Hz", "4,000 to 384,000 Hz")
