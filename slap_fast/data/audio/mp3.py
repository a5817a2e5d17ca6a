"""The frames of an MP3: where its streams start and end, how long they are, and what is damaged.

Files joined end to end are several streams, each with a header of its own that counts its frames;
a decoder stops where the first count ends. A file without a header has no count, and a decoder's
estimate is wrong where the bit rate varies. So the streams are found here, and each is given to the
decoder with a header that is true.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = (44_100, 48_000, 32_000)
RESYNC = 1 << 16
"""Bytes in which a decoder looks for the next frame."""


@dataclass(slots=True)
class Stream:
    """One MP3 stream of a file."""

    start: int
    """Offset of its first frame, the header frame included."""
    end: int
    header: bytes
    """The 4 bytes that begin its first frame."""
    declared: int
    """Audio frames by its Xing or Info header; 0 without one."""
    frames: int = 0
    """Frames by walking, without the header frame; 0 where the header was trusted."""

    def samples_per_frame(self) -> int:
        return 1152 if self.header[1] >> 3 & 3 == 3 else 576

    def declared_samples(self) -> int:
        """Samples that are due at least; 0 where nothing is declared.

        Three frames fewer, as a decoder drops the encoder's delay and padding.
        """
        return max(0, (self.declared or self.frames) - 3) * self.samples_per_frame()

    def prefix(self) -> bytes:
        """A header frame with the true count, where the stream has none that is true."""
        if not self.frames or self.frames <= self.declared + 1:
            return b""
        head = bytes(
            (self.header[0], self.header[1] | 1, 0x90 | self.header[2] & 0xC, self.header[3])
        )
        body = bytearray(mp3_frame_bytes(head))
        body[:4] = head
        at = _side_bytes(head)
        body[at : at + 12] = b"Xing" + struct.pack(">II", 1, self.frames)
        return bytes(body)


def tags_end(file: BinaryIO, at: int = 0) -> int:
    """Offset after the ID3v2, ID3v1 and APE tags that begin at ``at``."""
    while True:
        file.seek(at)
        head = file.read(32)
        if head[:3] == b"ID3" and len(head) >= 10 and not any(byte & 0x80 for byte in head[6:10]):
            size = sum(b << shift for b, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
            at += 10 + size + (10 if head[5] & 0x10 else 0)
        elif head[:3] == b"TAG":
            at += 128
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            is_header = head[23] & 0x20  # else the footer, which counts itself
            at += int.from_bytes(head[12:16], "little") + 32 if is_header else 32
        else:
            return at


def mp3_streams(file: BinaryIO) -> list[Stream]:
    """The streams of a file in order; empty where there is no frame.

    A header that says how many bytes it counts, and whose stream ends there at a tag, another
    header or the end of the file, is trusted. Else all frames are walked.
    """
    size, streams = file.seek(0, os.SEEK_END), []
    at = _first_frame(file, tags_end(file))
    while 0 <= at < size:
        stream, length = _open(file, at, size)
        if not length or not _ends_cleanly(file, at + length, size):
            return walk(file)[0]
        stream.end = min(at + length, size)
        streams.append(stream)
        at = tags_end(file, stream.end)
        if at >= size or not _is_frame(file, at):
            break
    return streams


def mp3_is_damaged(file: BinaryIO) -> bool:
    """Whether there are bytes between two frames that a decoder skips to find the next.

    Tags are no damage, and anything may follow the last frame.
    """
    return walk(file)[1]


def walk(file: BinaryIO) -> tuple[list[Stream], bool]:
    """The streams by all their frames, and whether there is damage between them."""
    size, streams, is_damaged = file.seek(0, os.SEEK_END), [], False
    at = _first_frame(file, tags_end(file))
    while 0 <= at < size:
        file.seek(at)
        head = file.read(200)
        if frame := mp3_frame_bytes(head):
            is_header = _xing_at(head) > 0
            if not streams or is_header or _layout(head) != _layout(streams[-1].header):
                streams.append(_open(file, at, size)[0])
            streams[-1].frames += not is_header
            at += frame
            streams[-1].end = min(at, size)
            continue
        after = tags_end(file, at)
        if after == at:
            after = _first_frame(file, at)
            is_damaged |= after >= 0
        at = after
    return streams, is_damaged


def _layout(head: bytes) -> tuple[int, int, bool]:
    """Version, sample rate, and whether there is one channel: what a stream keeps."""
    return head[1] & 0x18, head[2] & 0xC, head[3] >> 6 == 3


def _open(file: BinaryIO, at: int, size: int) -> tuple[Stream, int]:
    """The stream that starts with the frame at ``at``, and its bytes by its header; 0: unknown."""
    file.seek(at)
    head = file.read(200)
    tag = _xing_at(head)
    flags = head[tag + 7] if tag and len(head) >= tag + 16 else 0
    declared = int.from_bytes(head[tag + 8 : tag + 12], "big") if flags & 1 else 0
    length = int.from_bytes(head[tag + 12 : tag + 16], "big") if flags & 3 == 3 else 0
    return Stream(at, size, head[:4], declared), length


def _side_bytes(head: bytes) -> int:
    """Where a header frame has its tag: after the side information (ISO 11172-3, 2.4.1.7)."""
    is_mono = head[3] >> 6 == 3
    if head[1] >> 3 & 3 == 3:
        return 21 if is_mono else 36
    return 13 if is_mono else 21


def _xing_at(head: bytes) -> int:
    if len(head) < 4 or not mp3_frame_bytes(head):
        return 0
    at = _side_bytes(head)
    return next((i for i in (at, at + 2) if head[i : i + 4] in (b"Xing", b"Info")), 0)


def _ends_cleanly(file: BinaryIO, at: int, size: int) -> bool:
    if at >= size or tags_end(file, at) > at:
        return True
    file.seek(at)
    head = file.read(200)
    return _xing_at(head) > 0


def _is_frame(file: BinaryIO, at: int) -> bool:
    file.seek(at)
    return mp3_frame_bytes(file.read(4)) > 0


def mp3_frame_bytes(head: bytes) -> int:
    """Size of the layer III frame with this header (ISO 11172-3, 13818-3); 0: not such a header."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return 0
    version, bitrate, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return 0
    samples, kbps = (1152, _KBPS_1) if version == 3 else (576, _KBPS_2)
    hz = _RATES[rate] >> (3 - version if version else 2)
    return samples // 8 * kbps[bitrate] * 1000 // hz + (head[2] >> 1 & 1)


def _first_frame(file: BinaryIO, at: int) -> int:
    """Offset of the next frame, else of two that touch within 64 KiB; -1: there is none."""
    file.seek(at)
    rest = file.read(RESYNC)
    if mp3_frame_bytes(rest[:4]):
        return at
    i = rest.find(0xFF)
    while 0 <= i < len(rest) - 4:
        if frame := mp3_frame_bytes(rest[i : i + 4]):
            if mp3_frame_bytes(rest[i + frame : i + frame + 4]):
                return at + i
        i = rest.find(0xFF, i + 1)
    return -1
