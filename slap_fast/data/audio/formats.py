"""The audio formats that are read: their names, how a file of each begins, and what reads it."""

from __future__ import annotations

import re
from typing import NamedTuple


class Chunks(NamedTuple):
    """Chunks of a container."""

    start: int
    """Offset of the first, bytes."""
    header: str
    """:mod:`struct` format of a chunk's name and size."""
    audio: bytes
    """Name of the chunk that holds the samples."""
    align: int = 2
    """Chunks start at a multiple of it."""
    counts_header: bool = False
    """Whether a chunk's size counts its own name and size."""
    is_long: bool = False
    """Whether sizes have 64 bits; else large ones mean an unknown size."""


class Format(NamedTuple):
    """One audio format."""

    name: str
    suffixes: tuple[str, ...]
    """Lower case, the usual one first."""
    magic: re.Pattern[bytes]
    """Matches the first bytes of a file."""
    chunks: Chunks | None = None
    """Chunk names of a format that libsndfile reads."""
    demuxer: str = ""
    """FFmpeg's name, for PyAV; empty: libsndfile reads it."""


def _magic(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


# An MPEG frame header: sync, version, layer; then bit rate 0 .. 14 and sample rate 0 .. 2.
_MPEG = rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff][%s]" % b"".join(
    rb"\x%x0-\x%xb" % (bitrate, bitrate) for bitrate in range(15)
)
# Of Wave64: 16-byte names, sizes of 64 bits.
_W64 = Chunks(40, "<16sq", b"data\xf3\xac\xd3\x11\x8c\xd1\0\xc0\x4f\x8e\xdb\x8a", 8, True, True)
FORMATS = (
    Format("WAV", (".wav",), _magic(rb"(RIFF|RF64)....WAVE"), Chunks(12, "<4sI", b"data")),
    Format("AIFF", (".aiff", ".aif"), _magic(rb"FORM....AIF[FC]"), Chunks(12, ">4sI", b"SSND")),
    Format("MP4", (".m4a", ".mp4"), _magic(rb"....ftyp"), demuxer="mp4"),
    Format("FLAC", (".flac",), _magic(rb"fLaC")),
    Format("OGG", (".ogg", ".oga", ".opus"), _magic(rb"OggS")),
    Format("CAF", (".caf",), _magic(rb"caff"), Chunks(8, ">4sq", b"data", is_long=True)),
    Format("MP3", (".mp3",), _magic(rb"ID3|" + _MPEG)),
    Format("W64", (".w64",), _magic(rb"riff\x2e\x91\xcf\x11.{16}wave"), _W64),
    Format("AU", (".au", ".snd"), _magic(rb"\.snd")),
    Format("WEBM", (".webm",), _magic(rb"\x1a\x45\xdf\xa3"), demuxer="matroska"),
)
"""Tried in this order."""
SUPPORTED = "WAV, FLAC, Ogg, MP3, AIFF, CAF, W64 or AU (or m4a, mp4, webm with slap-fast[av])"
WAV_CODECS = (0x1, 0x2, 0x3, 0x6, 0x7, 0x11, 0x55, 0xFFFE)
"""PCM, Microsoft ADPCM, float, A-law, mu-law, IMA ADPCM, MP3, extensible."""
BY_SUFFIX = {suffix: format for format in FORMATS for suffix in format.suffixes}
"""The format that a file name promises."""
BY_NAME = {format.name: format for format in FORMATS}


def sniff(head: bytes) -> Format | None:
    """The format of a file by its first 36 bytes, None where it is not in the table."""
    return next((format for format in FORMATS if format.magic.match(head)), None)
