"""WAV, FLAC, Ogg, MP3, AIFF and CAF through libsndfile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

import numpy as np
import soundfile

from slap_fast.data.audio import integrity
from slap_fast.data.audio.track import AudioError, AudioInfo, Source, Track, check_layout

UNKNOWN_FRAMES = 1 << 62
"""libsndfile reports a length it does not know as more than this."""


@contextmanager
def open_sndfile(
    file: BinaryIO, format: str, source: Source, head: bytes, missing: str
) -> Iterator[Track]:
    """A file as :func:`slap_fast.data.audio.containers.open_track` gives it.

    ``head`` is its first bytes, ``missing`` becomes the field of the track.
    """
    declared = integrity.xing_frames(file, head) if format == "MP3" else None
    file.seek(0)
    try:
        sound = _Sound(_View(file))
    except soundfile.LibsndfileError as error:
        if missing:
            raise AudioError("E_TRUNCATED", source, missing, "the whole file") from None
        raise AudioError("E_DECODE", source, f"{format}: {error.error_string}", "audio") from None
    with sound:
        check_layout(source, sound.channels, sound.samplerate)
        frames = sound.frames
        is_known = frames < UNKNOWN_FRAMES
        if declared is None:
            declared = frames if is_known else 0

        def blocks(first: int, most: int) -> Iterator[np.ndarray]:
            return _blocks(sound, source, first, most)

        if not is_known:
            frames = sum(map(len, blocks(0, 1 << 16)))
        info = AudioInfo(frames / sound.samplerate, sound.samplerate, sound.channels, format)

        def damage() -> str:
            if format == "OGG":
                return integrity.ogg_damage(file)
            is_damaged = format == "MP3" and integrity.mp3_is_damaged(file, head)
            return "W_CORRUPT" if is_damaged else ""

        yield Track(info, declared, missing, blocks, damage)


class _Sound(soundfile.SoundFile):
    """A file read from one end to the other."""

    def seekable(self) -> bool:
        # True makes soundfile seek after every read, which fails where the length is unknown.
        return False


class _View:
    """A file as libsndfile is to see it.

    Without its name, as soundfile refuses a WAV that is called x.raw; and a seek to before its
    start, which damaged headers ask for, does nothing: soundfile would print a traceback.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.tell, self.readinto, self._seek = file.tell, file.readinto, file.seek

    def seek(self, offset: int, whence: int) -> None:
        with suppress(OSError, ValueError):
            self._seek(offset, whence)


def _blocks(
    sound: soundfile.SoundFile, source: Source, first: int, most: int
) -> Iterator[np.ndarray]:
    if first >= sound.frames:
        return
    try:
        sound.seek(first)
        while len(block := sound.read(most, dtype="float32", always_2d=True)):
            yield block
    except soundfile.LibsndfileError as error:
        reason = error.error_string or f"libsndfile error {error.code}"
        raise AudioError("E_DECODE", source, reason, "frames that decode") from None
