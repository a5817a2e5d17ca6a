"""The members of a third-party tar, read in one pass: nothing is extracted or trusted.

Reads ustar, pax and GNU tars. tarfile's own reader takes a damaged header for the end, accepts any
size, and keeps every member in memory.
"""

from __future__ import annotations

import errno
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from slap_fast.data.audio.track import AudioError
from slap_fast.data.shards.index import BLOCK, padded

MAX_HEADER = 1 << 20
"""Most bytes of a header that extends another."""
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
HEADER_ONLY = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
}
"""Types without contents, whatever size the header declares."""
EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE) + (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
"""Types that extend the header of the next member, or (XGLTYPE) of all."""
RECORD = re.compile(rb"(\d{1,8}) ([^=]+)=")
TEXT = ("utf-8", "backslashreplace")
"""Decoding of names: any becomes Unicode, and names that differ stay different."""


class Member(NamedTuple):
    """A member whose contents come next in ``file``."""

    file: BinaryIO
    name: str
    size: int
    """Bytes."""
    refused: str
    """Why it is not read; empty for a file."""

    def split(self) -> tuple[str, str]:
        """(key, suffix in lower case), as WebDataset: at the first dot of the base name.

        The suffix is empty where there is no dot, or the base name starts with it.
        """
        folder, slash, base = self.name.rpartition("/")
        key, _, suffix = base.partition(".")
        return (folder + slash + key, suffix.lower()) if key else (self.name, "")

    def read(self) -> bytes:
        return _read(self.file, self.size)


def members(tar: Path) -> Iterator[Member]:
    """Yields all members but folders; read one, if at all, before the next is requested.

    Raises OSError, or AudioError where it cannot continue: E_SHARD_TRUNCATED (the file ends before
    the archive), E_SHARD_CORRUPT (no header where one belongs, or data after the archive's end).
    """
    if not tar.is_file():  # opening a pipe would block
        raise FileNotFoundError(errno.ENOENT, "no such file")
    with tar.open("rb") as file:
        try:
            yield from _members(file)
        except tarfile.HeaderError as error:
            raise AudioError("E_SHARD_CORRUPT", tar, str(error), "a whole archive") from None


def _members(file: BinaryIO) -> Iterator[Member]:
    at, end = 0, os.fstat(file.fileno()).st_size
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    while any(block := _read(file, BLOCK)):
        try:
            info = tarfile.TarInfo.frombuf(block, *TEXT)
        except tarfile.HeaderError as error:
            raise tarfile.HeaderError(f"{error} at byte {at}: {block[:12]!r}") from None
        if info.size < 0:
            raise tarfile.HeaderError(f"size {info.size} at byte {at}")
        size = info.size
        if info.type in EXTENSIONS:
            (shared if info.type == tarfile.XGLTYPE else own).update(_extension(file, info))
        else:
            records, own = shared | own, {}
            size = 0 if info.type in HEADER_ONLY else int(records.get("size", size))
            path = records.get("path", info.name)
            if info.type != tarfile.DIRTYPE:
                name = "/".join(part for part in path.split("/") if part not in ("", "."))
                yield Member(file, name, size, _refusal(info, path, records))
        at += padded(size)
        file.seek(min(at, end))
    while rest := file.read(1 << 20):
        if any(rest):
            raise tarfile.HeaderError(f"more after the end of the archive at byte {at}")


def _extension(file: BinaryIO, info: tarfile.TarInfo) -> dict[str, str]:
    """What extends the next member's header: a long name, or lines of LENGTH KEY=VALUE (pax)."""
    if info.size > MAX_HEADER:
        raise tarfile.HeaderError(f"{info.size:,} bytes of header")
    data = _read(file, info.size)
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode(*TEXT)}
    records, at = {}, 0
    while at < len(data):
        head = RECORD.match(data, at)
        stop = at + int(head[1]) if head else 0
        if head is None or data[stop - 1 : stop] != b"\n" or stop <= head.end():
            raise tarfile.HeaderError(f"no pax record: {data[at : at + 40]!r}")
        key, value = head[2].decode(*TEXT), data[head.end() : stop - 1]
        if key == "size" and not re.fullmatch(rb"\d{1,18}", value):
            raise tarfile.HeaderError(f"size {value[:20]!r}")
        records[key], at = value.decode(*TEXT), stop
    return records


def _refusal(info: tarfile.TarInfo, path: str, records: dict[str, str]) -> str:
    if info.type not in FILES:
        return HEADER_ONLY.get(info.type, f"type {info.type!r}")
    if any(key.startswith("GNU.sparse.") for key in records):
        return "a sparse file"
    return f"path {path!r}" if path.startswith("/") or ".." in path.split("/") else ""


def _read(file: BinaryIO, size: int) -> bytes:
    end = os.fstat(file.fileno()).st_size
    data = file.read(min(size, max(0, end - file.tell())))  # allocates no more than exists
    if len(data) < size:
        raise AudioError("E_SHARD_TRUNCATED", file, f"its end at byte {end}", "a whole archive")
    return data
