"""Any common audio file to a float32 mono waveform at one sample rate, in bounded memory.

libsndfile decodes and soxr (HQ) resamples, block by block; m4a, mp4 and webm go through PyAV where
it is installed. What a file cannot give is an :class:`AudioError` with a code; nothing is cut,
clipped or repaired silently.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import soxr
from numpy.typing import ArrayLike

from slap_fast.data.audio.containers import open_track
from slap_fast.data.audio.formats import BY_SUFFIX
from slap_fast.data.audio.track import (
    COMPLETE,
    SAMPLE_RATES,
    AudioError,
    AudioInfo,
    Source,
    Track,
)

BLOCK_BYTES = 1 << 20
"""Most bytes of decoded audio in one read."""
PEAK = 16.0
"""A sample beyond it is no audio. Decoded lossy audio may well pass 1.0 and is left as it is."""


@dataclass(frozen=True, slots=True)
class Audio:
    """A decoded clip."""

    waveform: np.ndarray
    """float32 [num_samples], mono."""
    seconds: float
    """num_samples / sample_rate."""
    warnings: tuple[str, ...]
    """W_SILENT: all samples equal. W_CROPPED: the file continues after ``end``. W_EXT_MISMATCH: the
    file's suffix is of another format than its bytes. W_CORRUPT: read to its end, an Ogg or MP3
    file shows damage that the decoder has passed over. W_TRUNCATED: an Ogg file has whole pages,
    but no last one. W_UNREAD: streams of another rate or channel count are joined to the first, and
    are not read."""


@dataclass(slots=True)
class _Observed:
    """Range of a stream's samples and its warnings so far."""

    low: float = math.inf
    high: float = -math.inf
    warnings: list[str] = field(default_factory=list)


def probe(source: Source) -> AudioInfo:
    """Duration and format from the header alone. Raises AudioError as :func:`decode` does."""
    with open_track(source) as track:
        return track.info


def stream(
    source: Source, *, sample_rate: int = 16_000, start: float = 0.0, end: float | None = None
) -> Iterator[np.ndarray]:
    """Yields float32 mono blocks [n] at ``sample_rate``, from ``start`` to ``end`` seconds.

    ``source`` is a path, the bytes of a file, or a seekable binary file. Channels are averaged.
    Memory does not grow with the file. Raises AudioError, as :func:`decode` does; a truncated file
    raises after its last block.
    """
    return _stream(source, sample_rate, start, end, _Observed())


def decode(
    source: Source,
    *,
    sample_rate: int = 16_000,
    start: float = 0.0,
    end: float | None = None,
    min_seconds: float = 0.025,
    max_seconds: float = 14_400.0,
) -> Audio:
    """Decodes ``source``, or its part from ``start`` to ``end`` seconds, to one waveform.

    Raises AudioError: E_MISSING, E_FORMAT (no audio format that is read), E_CHANNELS (not 1 .. 8),
    E_SAMPLE_RATE (not 4 .. 384 kHz), E_DECODE (the decoder gave up), E_TRUNCATED, E_NONFINITE,
    E_RANGE (a sample beyond 16), E_TOO_SHORT (under ``min_seconds``), E_TOO_LONG (over
    ``max_seconds``, raised before more than that is held in memory). ValueError where ``start``
    and ``end`` are no span, or ``source`` is of another type.
    """
    observed, blocks, num_samples = _Observed(), [], 0
    with closing(_stream(source, sample_rate, start, end, observed)) as parts:
        for block in parts:
            blocks.append(block)
            num_samples += len(block)
            if num_samples > max_seconds * sample_rate:
                raise AudioError(
                    "E_TOO_LONG", source, "more", f"at most {max_seconds:g} s; pass end= to crop"
                )
    if num_samples < round(min_seconds * sample_rate) or not num_samples:
        found = f"{num_samples / sample_rate:.4f} s of audio"
        raise AudioError("E_TOO_SHORT", source, found, f"at least {min_seconds:g} s")
    if observed.low == observed.high:
        observed.warnings.append("W_SILENT")
    return Audio(np.concatenate(blocks), num_samples / sample_rate, tuple(observed.warnings))


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a clip is, without its samples."""

    seconds: float
    """Seconds of audio."""
    sample_rate: int
    """Hz, of the file."""
    channels: int
    """1 .. 8."""
    warnings: tuple[str, ...]
    """As of :class:`Audio`."""
    digest: str
    """Hash of the samples at the file's own rate, channels averaged, as 16-bit integers: equal for
    the same audio in two lossless files."""


def inspect(
    source: Source, *, start: float = 0.0, end: float | None = None, min_seconds: float = 0.025
) -> Inspection:
    """Decodes to the end, in memory that does not grow with the file; raises as :func:`decode`."""
    observed, digest, num_samples = _Observed(), hashlib.blake2b(digest_size=16), 0
    info = probe(source)
    with closing(_stream(source, info.sample_rate, start, end, observed)) as parts:
        for block in parts:
            digest.update(np.rint(block * 32_767).astype("<i4").tobytes())
            num_samples += len(block)
    seconds = num_samples / info.sample_rate
    if seconds < min_seconds:
        raise AudioError(
            "E_TOO_SHORT", source, f"{seconds:.4f} s of audio", f"at least {min_seconds:g} s"
        )
    if observed.low == observed.high:
        observed.warnings.append("W_SILENT")
    digest.update(f"{info.sample_rate}".encode())
    warnings = tuple(observed.warnings)
    return Inspection(seconds, info.sample_rate, info.channels, warnings, digest.hexdigest())


def _stream(
    source: Source, sample_rate: int, start: float, end: float | None, observed: _Observed
) -> Iterator[np.ndarray]:
    if not 0 <= start < (math.inf if end is None else end):
        raise ValueError(f"start, end: found {start}, {end}, expected 0 <= start < end, in seconds")
    with open_track(source) as track:
        info = track.info
        if _names_another_format(source, info.format):
            observed.warnings.append("W_EXT_MISMATCH")
        if end is not None and info.seconds > end:
            observed.warnings.append("W_CROPPED")
        first = round(start * info.sample_rate)
        last = None if end is None else round(end * info.sample_rate)
        blocks = _mono(source, track, first, last, observed)
        if info.sample_rate == sample_rate:
            yield from blocks
            return
        resampler = soxr.ResampleStream(info.sample_rate, sample_rate, 1, "float32", "HQ")
        for block in blocks:
            if len(part := resampler.resample_chunk(block)):
                yield part
        if len(part := resampler.resample_chunk(np.zeros(0, np.float32), last=True)):
            yield part


def _mono(
    source: Source, track: Track, first: int, last: int | None, observed: _Observed
) -> Iterator[np.ndarray]:
    """Frames ``first`` to ``last`` of a track, checked, channels averaged in float64."""
    position = first
    if first == last:
        return
    for block in track.blocks(first, BLOCK_BYTES // (4 * track.info.channels)):
        if last is not None:
            block = block[: last - position]
        position += len(block)
        low, high = float(block.min()), float(block.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise AudioError("E_NONFINITE", source, "a NaN or infinite sample", "finite samples")
        if max(-low, high) > PEAK:
            raise AudioError("E_RANGE", source, f"a peak of {max(-low, high):g}", f"<= {PEAK:g}")
        observed.low, observed.high = min(observed.low, low), max(observed.high, high)
        mono = block[:, 0]
        if block.shape[1] > 1:
            total = mono.astype(np.float64)
            for channel in block.T[1:]:
                total += channel
            mono = (total / block.shape[1]).astype(np.float32)
        yield np.ascontiguousarray(mono)
        if last is not None and position >= last:
            return
    if position < COMPLETE * track.declared_frames:
        found = f"{position} frames"
        raise AudioError("E_TRUNCATED", source, found, f"the {track.declared_frames} it declares")
    if track.missing:
        raise AudioError("E_TRUNCATED", source, track.missing, "the whole file")
    if damage := track.damage():
        observed.warnings.append(damage)


def _names_another_format(source: Source, format: str) -> bool:
    if not isinstance(source, (str, os.PathLike)):
        return False
    named = BY_SUFFIX.get(Path(os.fsdecode(source)).suffix.lower())
    return named is not None and named.name != format


def as_waveform(
    samples: ArrayLike, source_rate: int, *, sample_rate: int = 16_000, min_seconds: float = 0.025
) -> np.ndarray:
    """Checks and resamples an array of decoded samples as :func:`decode` does a file.

    Args:
        samples: mono, [num_samples], a NumPy array or a CPU tensor: floats of full scale 1.0, or
            int16 of full scale 32,768.
        source_rate: its rate, Hz.
        sample_rate: of the result, Hz.
        min_seconds: shortest that is accepted.

    Returns:
        float32 [num_samples] at ``sample_rate``.

    Raises:
        AudioError: E_SAMPLE_RATE, E_NONFINITE, E_RANGE, E_TOO_SHORT.
        ValueError: another shape or dtype.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1:
        raise ValueError(
            f"audio: found an array of shape {samples.shape}, expected mono [num_samples]"
        )
    if samples.dtype != np.int16 and samples.dtype.kind != "f":
        raise ValueError(f"audio: found dtype {samples.dtype}, expected a float or int16")
    name = f"array of {len(samples)} samples"
    if source_rate not in SAMPLE_RATES:
        expected = f"{SAMPLE_RATES.start} .. {SAMPLE_RATES.stop - 1} Hz"
        raise AudioError("E_SAMPLE_RATE", name, f"{source_rate} Hz", expected)
    scale = 32_768.0 if samples.dtype == np.int16 else 1.0
    waveform = (samples / np.float32(scale)).astype(np.float32)
    peak = float(np.abs(waveform).max(initial=0.0))
    if not math.isfinite(peak):
        raise AudioError("E_NONFINITE", name, "a NaN or infinite sample", "finite samples")
    if peak > PEAK:
        raise AudioError("E_RANGE", name, f"a peak of {peak:g}", f"<= {PEAK:g}")
    if source_rate != sample_rate:
        waveform = soxr.resample(waveform, source_rate, sample_rate)
    if len(waveform) < round(min_seconds * sample_rate):
        found = f"{len(waveform) / sample_rate:.4f} s of audio"
        raise AudioError("E_TOO_SHORT", name, found, f"at least {min_seconds:g} s")
    return waveform


class Decoder(Protocol):
    """What a source of clips decodes its files with."""

    def decode(self, source: Source, **options: float | None) -> Audio:
        """As :func:`decode`."""

    def probe(self, source: Source) -> AudioInfo:
        """As :func:`probe`."""

    def inspect(self, source: Source, **options: float | None) -> Inspection:
        """As :func:`inspect`."""


class InProcessDecoder:
    """The functions of this module as a :class:`Decoder`."""

    decode, probe, inspect = staticmethod(decode), staticmethod(probe), staticmethod(inspect)


IN_PROCESS = InProcessDecoder()
