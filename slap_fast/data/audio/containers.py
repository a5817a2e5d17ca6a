"""What an audio file is by its first bytes, what it declares, and its frames block by block.

Only formats on the list below reach a parser; what a header claims is checked against the bytes
that are there. :mod:`slap_fast.data.audio.decode` makes one mono waveform of it.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import soundfile

from slap_fast.data.audio import integrity

Source = str | os.PathLike | bytes | BinaryIO

CHANNELS = range(1, 9)
SAMPLE_RATES = range(4_000, 384_001)
WAV_TAGS = (0x1, 0x3, 0x6, 0x7, 0x11, 0x55, 0xFFFE)
"""PCM, float, A-law, mu-law, IMA ADPCM, MP3, extensible."""
EXPECTED = "WAV, FLAC, Ogg, MP3, AIFF or CAF (or m4a, mp4, webm with slap-fast[av])"
AUDIO_CHUNKS = {
    "WAV": (12, "<4sI", b"data"),
    "AIFF": (12, ">4sI", b"SSND"),
    "CAF": (8, ">4sq", b"data"),
}
"""Where a format's chunks start, how a chunk's header reads, and which chunk holds the samples."""
COMPLETE = 0.95
"""A file that gives less than this share of what it declares is truncated."""
UNKNOWN_FRAMES = 1 << 62
"""libsndfile reports a length it does not know as more than this."""


class AudioError(ValueError):
    """One file that cannot be used: ``code`` (E_...), ``path``, and what was found and expected."""

    def __init__(self, code: str, source: Source | str, found: str, expected: str) -> None:
        name = (
            source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "<bytes>")
        )
        self.code, self.path = code, str(name)
        # All four as args, or the error cannot travel back from a worker process.
        super().__init__(code, self.path, found, expected)

    def named(self, name: str) -> AudioError:
        """The same fault of something that has a better name."""
        code, _, found, expected = self.args
        return AudioError(code, name, found, expected)

    def __str__(self) -> str:
        code, path, found, expected = self.args
        return f"{path}: {code}: found {found}, expected {expected}"


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a header says."""

    seconds: float
    """Duration of the whole file. An MP3 without a Xing header gives an estimate."""
    sample_rate: int
    """Hz, of the file."""
    channels: int
    """1 .. 8."""
    format: str
    """WAV, FLAC, OGG, MP3, AIFF, CAF, MP4 or WEBM."""


@dataclass(frozen=True, slots=True)
class Track:
    """An open file."""

    info: AudioInfo
    declared_frames: int
    """Frames that the header promises; 0 where it promises none."""
    cut_short: str
    """How the container shows that bytes are missing; empty where it does not."""
    blocks: Callable[[int, int], Iterator[np.ndarray]]
    """(first frame, most frames) -> float32 [n, channels], n > 0, to the end of the file."""
    damage: Callable[[], str] = str
    """W_CORRUPT or W_TRUNCATED where the file itself tells of it and decoders do not, else empty;
    reads all of it."""


@contextmanager
def open_track(source: Source) -> Iterator[Track]:
    """Opens a path, the bytes of a file, or a seekable binary file; leaves a given file open."""
    if not isinstance(source, (str, os.PathLike, bytes)) and not hasattr(source, "seek"):
        found = type(source).__name__
        raise ValueError(f"source: found {found}, expected a path, bytes or a seekable binary file")
    with _binary(source) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(36)
        kind = sniff(head)
        if kind is None:
            found = f"a file that starts with {head[:12]!r}" if size else "0 bytes"
            raise AudioError("E_FORMAT", source, found, EXPECTED)
        cut_short = ""
        if kind == "WAV":
            _check_wav(file, source)
        if kind in AUDIO_CHUNKS:
            cut_short = _missing_chunk_bytes(file, kind, head, size)
        elif kind == "OGG":
            cut_short = integrity.missing_page_bytes(file, size)
        promised = integrity.xing_frames(file, head) if kind == "MP3" else None
        file.seek(0)
        if kind in ("MP4", "WEBM"):
            from slap_fast.data.audio.pyav import open_av

            with open_av(file, kind, source) as track:
                yield track
            return
        try:
            sound = _Sound(_View(file))
        except soundfile.LibsndfileError as error:
            if cut_short:
                raise AudioError("E_TRUNCATED", source, cut_short, "the whole file") from None
            raise AudioError("E_DECODE", source, f"{kind}: {error.error_string}", "audio") from None
        with sound:
            check_layout(source, sound.channels, sound.samplerate)
            frames = sound.frames
            known = frames < UNKNOWN_FRAMES
            promised = (frames if known else 0) if promised is None else promised

            def blocks(first: int, most: int) -> Iterator[np.ndarray]:
                return _sound_blocks(sound, source, first, most)

            if not known:
                frames = sum(map(len, blocks(0, 1 << 16)))
            info = AudioInfo(frames / sound.samplerate, sound.samplerate, sound.channels, kind)

            def damage() -> str:
                if kind == "OGG":
                    return integrity.ogg_damage(file)
                damaged = kind == "MP3" and integrity.mp3_is_damaged(file, head)
                return "W_CORRUPT" if damaged else ""

            yield Track(info, promised, cut_short, blocks, damage)


def sniff(head: bytes) -> str | None:
    """The format of a file by its first bytes, None where it is not on the list."""
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "WAV"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "AIFF"
    if head[4:8] == b"ftyp":
        return "MP4"
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    if len(head) > 2 and head[0] == 0xFF and head[1] >= 0xE0:
        version, layer, bitrate, rate = (
            head[1] >> 3 & 3,
            head[1] >> 1 & 3,
            head[2] >> 4,
            head[2] >> 2 & 3,
        )
        if version != 1 and layer != 0 and bitrate != 15 and rate != 3:
            return "MP3"
    return None


MAGIC = {
    b"fLaC": "FLAC",
    b"OggS": "OGG",
    b"caff": "CAF",
    b"ID3": "MP3",
    b"\x1a\x45\xdf\xa3": "WEBM",
}


def check_layout(source: Source, channels: int, sample_rate: int) -> None:
    """Raises AudioError where the channels or the sample rate are out of range."""
    if channels not in CHANNELS:
        raise AudioError("E_CHANNELS", source, f"{channels} channels", "1 to 8")
    if sample_rate not in SAMPLE_RATES:
        raise AudioError("E_SAMPLE_RATE", source, f"{sample_rate} Hz", "4,000 to 384,000 Hz")


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


@contextmanager
def _binary(source: Source) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        try:
            if not stat.S_ISREG(os.stat(source).st_mode):  # a pipe would be waited for
                raise AudioError("E_MISSING", source, "no regular file", "a readable file")
            file = open(source, "rb")
        except OSError as error:
            raise AudioError("E_MISSING", source, error.strerror, "a readable file") from None
        with file:
            yield file
    else:
        yield source


def _sound_blocks(
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


def _chunks(file: BinaryIO, at: int, layout: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, where the body starts, size) of a container's chunks, 100 at most."""
    header = struct.Struct(layout)
    for _ in range(100):
        file.seek(at)
        raw = file.read(header.size)
        if len(raw) < header.size:
            return
        name, size = header.unpack(raw)
        at += header.size
        yield name, at, size
        if size < 0:
            return
        at += size + size % 2


def _check_wav(file: BinaryIO, source: Source) -> None:
    """The codec tag and the layout of a WAV, before libsndfile sees it."""
    for name, at, size in _chunks(file, 12, "<4sI"):
        if name == b"fmt " and size >= 16:
            file.seek(at)
            body = file.read(26).ljust(26, b"\0")
            tag, channels, sample_rate = struct.unpack_from("<HHI", body)
            actual = struct.unpack_from("<H", body, 24)[0] if tag == 0xFFFE else tag
            if actual not in WAV_TAGS:
                tags = ", ".join(f"{t:#x}" for t in WAV_TAGS)
                raise AudioError("E_FORMAT", source, f"WAV codec tag {actual:#x}", f"one of {tags}")
            check_layout(source, channels, sample_rate)
            return
    raise AudioError("E_FORMAT", source, "a WAV without a fmt chunk", "a fmt chunk")


def _missing_chunk_bytes(file: BinaryIO, kind: str, head: bytes, size: int) -> str:
    """How much of a chunked file is not there. 0 and all ones mean a size that is not known."""
    start, layout, audio = AUDIO_CHUNKS[kind]
    total = 0
    if head[:4] == b"RF64":
        total = int.from_bytes(head[20:28], "little")
    elif kind != "CAF":
        total = int.from_bytes(head[4:8], "little" if kind == "WAV" else "big")
    # One byte of grace: writers forget the pad byte of an odd chunk.
    if total not in (0, 0xFFFFFFFF) and total + 8 > size + 1:
        return f"{size} bytes of {total + 8}"
    for name, at, declared in _chunks(file, start, layout):
        if name == audio:
            known = declared not in (0, -1, 0xFFFFFFFF)
            short = known and size - at < COMPLETE * declared
            return f"{size - at} bytes of audio, of {declared}" if short else ""
    return ""
