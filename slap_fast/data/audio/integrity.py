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


def ogg_links(file: BinaryIO) -> list[tuple[int, int]]:
    """Where each link of a chained Ogg file starts and ends (RFC 3533, section 4)."""
    size, at = file.seek(0, os.SEEK_END), 0
    starts, was_first = [0], True
    while at < size:
        file.seek(at)
        head = file.read(27 + 255)
        if len(head) < 27 or head[:4] != b"OggS":
            break
        is_first = bool(head[5] & 2)  # tracks side by side have all their first pages first
        if is_first and not was_first:
            starts.append(at)
        was_first = is_first
        at += 27 + head[26] + sum(head[27 : 27 + head[26]])
    return list(zip(starts, [*starts[1:], size], strict=True))
