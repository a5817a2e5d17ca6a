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
from slap_fast.data.audio.folder import why_missing
from slap_fast.data.audio.formats import (
    BY_NAME,
    SUPPORTED,
    WAV_CODECS,
    Chunks,
    Format,
    sniff,
)
from slap_fast.data.audio.libsndfile import open_sndfile
from slap_fast.data.audio.mp3 import tags_end
from slap_fast.data.audio.pyav import open_av
from slap_fast.data.audio.track import AudioError, Source, Track, check_layout
from slap_fast.data.audio.window import Window

UNKNOWN_BYTES = 0x7FFFF000
"""A size of 32 bits that is no smaller is what pipes write; so is 0."""


@contextmanager
def open_track(source: Source) -> Iterator[Track]:
    """Opens a path, the bytes of a file, or a seekable binary file; leaves a given file open."""
    if not isinstance(source, (str, os.PathLike, bytes)) and not hasattr(source, "seek"):
        found = type(source).__name__
        raise ValueError(f"source: found {found}, expected a path, bytes or a seekable binary file")
    with _binary(source) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = tags_end(file) if file.read(3) == b"ID3" else 0
        file.seek(start)
        head = file.read(36)
        format = sniff(head)
        if start and format is not None and format.name != "MP3":  # an ID3 tag before a FLAC
            file = io.BufferedReader(Window(file, start, size))
            size -= start
        elif start:
            format = BY_NAME["MP3"]
        if format is None:
            found = f"a file that starts with {head[:12]!r}" if size else "0 bytes"
            raise AudioError("E_FORMAT", source, found, SUPPORTED)
        if format.demuxer:
            file.seek(0)
            reader = open_av(file, format, source)
        else:
            missing = _missing_bytes(file, format, head, size, source)
            if format.name == "WAV":
                file = _with_size(file, format, size)
            reader = open_sndfile(file, format.name, source, missing)
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
            found = why_missing(source, error.strerror)
            raise AudioError("E_MISSING", source, found, "a readable file") from None
        with file:
            yield file
    else:
        yield source


def _missing_bytes(file: BinaryIO, format: Format, head: bytes, size: int, source: Source) -> str:
    """How many bytes the container shows to be missing; empty where it shows none."""
    if format.name in ("WAV", "W64"):
        _check_wav(file, format, source)
    if format.name == "AU":
        start, declared = struct.unpack(">II", head[4:12].ljust(8, b"\0"))
        is_short = 0 < declared < UNKNOWN_BYTES and size - start < declared
        return f"{size - start} bytes of audio, of {declared}" if is_short else ""
    if format.chunks is not None:
        return _missing_chunk_bytes(file, format, head, size)
    return integrity.missing_page_bytes(file, size) if format.name == "OGG" else ""


def _chunks(file: BinaryIO, layout: Chunks) -> Iterator[tuple[bytes, int, int]]:
    """(name, where the body starts, size) of a container's chunks, 100 at most."""
    header, at = struct.Struct(layout.header), layout.start
    for _ in range(100):
        file.seek(at)
        raw = file.read(header.size)
        if len(raw) < header.size:
            return
        name, size = header.unpack(raw)
        at += header.size
        if layout.counts_header:
            size -= header.size
        yield name, at, size
        if size < 0:
            return
        at += size + -size % layout.align


def _check_wav(file: BinaryIO, format: Format, source: Source) -> None:
    """Checks the codec tag and the layout of a WAV, before libsndfile sees it."""
    for name, at, size in _chunks(file, format.chunks):
        if name[:4] == b"fmt " and size >= 16:
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


def _with_size(file: BinaryIO, format: Format, size: int) -> BinaryIO:
    """A WAV whose data chunk says 0 bytes, as some recorders leave it, with what there is."""
    for name, at, declared in _chunks(file, format.chunks):
        if name == format.chunks.audio:
            rest = Chunks(at, format.chunks.header, b"")
            ends = [begin + length for _, begin, length in _chunks(file, rest)]
            if declared or size == at or (ends and ends[-1] + ends[-1] % 2 in (size, size + 1)):
                return file
            file.seek(0)
            head = file.read(at - 4) + struct.pack("<I", min(size - at, UNKNOWN_BYTES))
            return io.BufferedReader(Window(file, at, size, head))
    return file


def _missing_chunk_bytes(file: BinaryIO, format: Format, head: bytes, size: int) -> str:
    """How many bytes of the audio are missing, by the size of its chunk.

    The size of the file itself, RIFF's or FORM's, proves nothing: recorders and pipes leave it
    wrong.
    """
    layout = format.chunks
    for name, at, declared in _chunks(file, layout):
        if name == layout.audio:
            if head[:4] == b"RF64" and declared == 0xFFFFFFFF:
                declared = int.from_bytes(head[28:36], "little")
            is_known = 0 < declared and (layout.is_long or declared < UNKNOWN_BYTES)
            is_short = is_known and size - at < declared
            return f"{size - at} bytes of audio, of {declared}" if is_short else ""
    return ""
