"""Audio files opened by their first bytes, whatever their names say.

Only the formats of :mod:`slap_fast.data.audio.formats` reach a parser, and what a header declares
is compared with the bytes of the file. :mod:`slap_fast.data.audio.decode` makes one mono waveform
of it.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from slap_fast.data.audio import integrity
from slap_fast.data.audio.formats import SUPPORTED, WAV_CODECS, Format, sniff
from slap_fast.data.audio.libsndfile import open_sndfile
from slap_fast.data.audio.pyav import open_av
from slap_fast.data.audio.track import COMPLETE, AudioError, Source, Track, check_layout


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
        format = sniff(head)
        if format is None:
            found = f"a file that starts with {head[:12]!r}" if size else "0 bytes"
            raise AudioError("E_FORMAT", source, found, SUPPORTED)
        if format.demuxer:
            file.seek(0)
            reader = open_av(file, format, source)
        else:
            missing = _missing_bytes(file, format, head, size, source)
            reader = open_sndfile(file, format.name, source, head, missing)
        with reader as track:
            yield track


@contextmanager
def _binary(source: Source) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        try:
            if not stat.S_ISREG(os.stat(source).st_mode):  # opening a pipe would block
                raise AudioError("E_MISSING", source, "no regular file", "a readable file")
            file = open(source, "rb")
        except OSError as error:
            raise AudioError("E_MISSING", source, error.strerror, "a readable file") from None
        with file:
            yield file
    else:
        yield source


def _missing_bytes(file: BinaryIO, format: Format, head: bytes, size: int, source: Source) -> str:
    """How many bytes the container shows to be missing; empty where it shows none."""
    if format.name == "WAV":
        _check_wav(file, source)
    if format.chunks is not None:
        return _missing_chunk_bytes(file, format, head, size)
    return integrity.missing_page_bytes(file, size) if format.name == "OGG" else ""


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
    """Checks the codec tag and the layout of a WAV, before libsndfile sees it."""
    for name, at, size in _chunks(file, 12, "<4sI"):
        if name == b"fmt " and size >= 16:
            file.seek(at)
            body = file.read(26).ljust(26, b"\0")
            tag, channels, sample_rate = struct.unpack_from("<HHI", body)
            codec = struct.unpack_from("<H", body, 24)[0] if tag == 0xFFFE else tag
            if codec not in WAV_CODECS:
                expected = f"one of {', '.join(f'{tag:#x}' for tag in WAV_CODECS)}"
                raise AudioError("E_FORMAT", source, f"WAV codec tag {codec:#x}", expected)
            check_layout(source, channels, sample_rate)
            return
    raise AudioError("E_FORMAT", source, "a WAV without a fmt chunk", "a fmt chunk")


def _missing_chunk_bytes(file: BinaryIO, format: Format, head: bytes, size: int) -> str:
    """How many bytes of a chunked file are missing. A size of 0 or all ones is an unknown one."""
    total = 0
    if head[:4] == b"RF64":
        total = int.from_bytes(head[20:28], "little")
    elif format.name != "CAF":
        total = int.from_bytes(head[4:8], "little" if format.name == "WAV" else "big")
    # One byte of grace: writers forget the pad byte of an odd chunk.
    if total not in (0, 0xFFFFFFFF) and total + 8 > size + 1:
        return f"{size} bytes of {total + 8}"
    for name, at, declared in _chunks(file, format.chunks.start, format.chunks.header):
        if name == format.chunks.audio:
            is_known = declared not in (0, -1, 0xFFFFFFFF)
            is_short = is_known and size - at < COMPLETE * declared
            return f"{size - at} bytes of audio, of {declared}" if is_short else ""
    return ""
