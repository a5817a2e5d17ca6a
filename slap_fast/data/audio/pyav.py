"""m4a, mp4 and webm through PyAV, an extra: ``pip install slap-fast[av]``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np

from slap_fast.data.audio.formats import Format
from slap_fast.data.audio.track import AudioError, AudioInfo, Source, Track, check_layout


@contextmanager
def open_av(file: BinaryIO, format: Format, source: Source) -> Iterator[Track]:
    """The first audio track of a file, as :func:`slap_fast.data.audio.containers.open_track`."""
    try:
        import av
    except Exception:
        found = f"{format.name}, which needs PyAV"
        raise AudioError("E_FORMAT", source, found, "pip install slap-fast[av]") from None
    try:
        with av.open(file, format=format.demuxer) as container:
            if not container.streams.audio:
                raise AudioError("E_FORMAT", source, f"{format.name} without an audio track", "one")
            stream = container.streams.audio[0]
            rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
            check_layout(source, channels, rate)
            declared = round(stream.duration * stream.time_base * rate) if stream.duration else 0
            seconds = declared / rate or (container.duration or 0) / av.time_base

            def blocks(first: int, most: int) -> Iterator[np.ndarray]:
                return _blocks(av, container, stream, first, most)

            if not seconds:  # a browser's recorder writes no duration
                seconds = sum(map(len, blocks(0, 1 << 16))) / rate
                container.seek(0)
            yield Track(AudioInfo(seconds, rate, channels, format.name), declared, "", blocks)
    except av.FFmpegError as error:
        raise AudioError("E_DECODE", source, f"{format.name}: {error.strerror}", "audio") from None


def _blocks(av, container, stream, first: int, most: int) -> Iterator[np.ndarray]:
    planar = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
    position = 0
    for decoded in container.decode(stream):
        for frame in planar.resample(decoded):
            block = frame.to_ndarray().T[max(0, first - position) :]
            position += frame.samples
            for at in range(0, len(block), most):
                yield block[at : at + most]
