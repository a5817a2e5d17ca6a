"""Damage that compressed files show in their own structure, and that decoders skip silently."""

from __future__ import annotations

import os
import zlib
from typing import BinaryIO

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def missing_page_bytes(file: BinaryIO, size: int) -> str:
    """How much of the last page of an Ogg file is missing; a page is at most 65,307 bytes."""
    file.seek(max(0, size - 65_536))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    segments = page[26] if len(page) > 26 else 0
    whole = 27 + segments + sum(page[27 : 27 + segments])
    return f"{len(page)} bytes of the last Ogg page, of {whole}" if len(page) < whole else ""


def ogg_damage(file: BinaryIO) -> str:
    """W_CORRUPT: a page does not start where the one before it ends, or its checksum is wrong.
    W_TRUNCATED: the last page is not marked as the last."""
    file.seek(0)
    is_last = False
    while head := file.read(27):
        if len(head) < 27 or head[:4] != b"OggS":
            return "W_CORRUPT"
        segments = file.read(head[26])
        body = file.read(sum(segments))
        page = head[:22] + bytes(4) + head[26:] + segments + body
        if ogg_checksum(page) != int.from_bytes(head[22:26], "little"):
            return "W_CORRUPT"
        is_last = bool(head[5] & 4)
    return "" if is_last else "W_TRUNCATED"


def ogg_checksum(page: bytes) -> int:
    """CRC-32 of polynomial 0x04c11db7, most significant bit first (RFC 3533, section 6).

    zlib's runs from the least significant bit: on bits reversed it is the same, from C.
    """
    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(crc.to_bytes(4, "little").translate(_REVERSED), "big")


def mp3_start(head: bytes) -> int:
    """Offset of the first frame of an MP3, after an ID3v2 tag."""
    if head[:3] != b"ID3":
        return 0
    return 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))


def xing_frames(file: BinaryIO, head: bytes) -> int:
    """Audio frames by the Xing or Info header of an MP3; 0 without one.

    libsndfile's own count is an estimate in that case. Three MPEG frames fewer than declared, as a
    decoder drops the encoder's delay and padding.
    """
    file.seek(mp3_start(head))
    frame = file.read(256)
    tag = max(frame.find(b"Xing"), frame.find(b"Info"))
    if tag < 0 or len(frame) < tag + 12 or not frame[tag + 7] & 1:
        return 0
    samples = 1152 if frame[1] >> 3 & 3 == 3 else 576
    return max(0, int.from_bytes(frame[tag + 8 : tag + 12], "big") - 3) * samples


_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = (44_100, 48_000, 32_000)


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


def mp3_is_damaged(file: BinaryIO, head: bytes) -> bool:
    """Whether there are bytes between two frames that a decoder skips to find the next.

    Anything may follow the last frame: tags do.
    """
    at, size = mp3_start(head), file.seek(0, os.SEEK_END)
    while at < size:
        file.seek(at)
        frame = mp3_frame_bytes(file.read(4))
        if not frame:
            return _frames_follow(file, at)
        at += frame
    return False


def _frames_follow(file: BinaryIO, at: int) -> bool:
    """Whether two frames, one at the end of the other, come within 64 KiB."""
    file.seek(at)
    rest = file.read(1 << 16)
    for i in range(len(rest) - 4):
        if rest[i] == 0xFF and (frame := mp3_frame_bytes(rest[i : i + 4])):
            if mp3_frame_bytes(rest[i + frame : i + frame + 4]):
                return True
    return False
