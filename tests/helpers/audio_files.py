"""Audio files that tests write."""

from __future__ import annotations

import io
import struct

import numpy as np
import soundfile

RATE = 16_000


def tones(
    num_samples: int, channels: int = 1, rate: int = RATE, amplitude: float = 0.4
) -> np.ndarray:
    """float64 [num_samples, channels]: a tone per channel, and a constant that 8 bits must keep."""
    time = np.arange(num_samples)[:, None] / rate
    return 0.05 + amplitude * np.sin(2 * np.pi * time * (200 + 130 * np.arange(channels)))


def encode(
    signal: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str | None = None
) -> bytes:
    """The bytes of a file, by libsndfile's names of format and subtype."""
    file = io.BytesIO()
    soundfile.write(file, signal, rate, format=format, subtype=subtype)
    return file.getvalue()


def patched(data: bytes, at: int, layout: str, *values: int) -> bytes:
    """A copy with packed values at an offset."""
    out = bytearray(data)
    struct.pack_into(layout, out, at, *values)
    return bytes(out)
