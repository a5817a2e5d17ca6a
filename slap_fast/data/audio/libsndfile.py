"""WAV, FLAC, Ogg, MP3, AIFF, CAF, W64 and AU through libsndfile."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO

import numpy as np
import soundfile

from slap_fast.data.audio import integrity, mp3
from slap_fast.data.audio.track import AudioError, AudioInfo, Source, Track, check_layout
from slap_fast.data.audio.window import Window

UNKNOWN_FRAMES = 1 << 62
"""libsndfile reports a length it does not know as more than this."""


@contextmanager
def open_sndfile(file: BinaryIO, format: str, source: Source, missing: str) -> Iterator[Track]:
    """A file as :func:`slap_fast.data.audio.containers.open_track` gives it.

    ``missing`` becomes the field of the track. Streams joined end to end are one track; one of
    another layout than the first ends it.
    """
    parts = _parts(file, format, source)
    with ExitStack() as stack:
        sounds = [stack.enter_context(_open(parts[0][0], format, source, missing))]
        channels, rate = sounds[0].channels, sounds[0].samplerate
        check_layout(source, channels, rate)
        for part, _ in parts[1:]:
            try:
                sound = stack.enter_context(_open(part, format, source, missing))
            except AudioError:
                break
            if (sound.channels, sound.samplerate) != (channels, rate):
                break
            sounds.append(sound)
        frames = [_frames(sound, source) for sound in sounds]
        declared = sum(
            (sound.frames if sound.frames < UNKNOWN_FRAMES else 0) if count is None else count
            for sound, (_, count) in zip(sounds, parts, strict=False)
        )

        def blocks(first: int, most: int) -> Iterator[np.ndarray]:
            for sound, count in zip(sounds, frames, strict=True):
                if first < count:
                    yield from _blocks(sound, source, first, most)
                first = max(0, first - count)

        info = AudioInfo(sum(frames) / rate, rate, channels, format)

        def damage() -> str:
            if len(sounds) < len(parts):
                return "W_UNREAD"
            if format == "OGG":
                return integrity.ogg_damage(file)
            is_damaged = format == "MP3" and mp3.mp3_is_damaged(file)
            return "W_CORRUPT" if is_damaged else ""

        yield Track(info, declared, missing, blocks, damage)


def _parts(file: BinaryIO, format: str, source: Source) -> list[tuple[BinaryIO, int | None]]:
    """The streams of a file, one after the other, and how many frames each declares."""
    if format == "MP3":
        streams = mp3.mp3_streams(file)
        if not streams:
            raise AudioError("E_DECODE", source, "MP3: no frame", "audio")
        return [
            (_window(file, one.start, one.end, one.prefix()), one.declared_samples())
            for one in streams
        ]
    links = integrity.ogg_links(file) if format == "OGG" else []
    if len(links) > 1:
        return [(_window(file, start, end), None) for start, end in links]
    return [(file, None)]


def _window(file: BinaryIO, start: int, end: int, prefix: bytes = b"") -> BinaryIO:
    return io.BufferedReader(Window(file, start, end, prefix))


def _open(file: BinaryIO, format: str, source: Source, missing: str) -> _Sound:
    file.seek(0)
    try:
        return _Sound(_View(file))
    except soundfile.LibsndfileError as error:
        if missing:
            raise AudioError("E_TRUNCATED", source, missing, "the whole file") from None
        raise AudioError("E_DECODE", source, f"{format}: {error.error_string}", "audio") from None


def _frames(sound: _Sound, source: Source) -> int:
    """Frames of a stream; counted where the header does not know."""
    if sound.frames < UNKNOWN_FRAMES:
        return sound.frames
    return sum(map(len, _blocks(sound, source, 0, 1 << 16)))


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
