"""A part of a binary file, read as a file of its own."""

from __future__ import annotations

import io
import os
from typing import BinaryIO


class Window(io.RawIOBase):
    """``prefix``, then the bytes ``start`` to ``end`` of a seekable file; leaves it open."""

    def __init__(self, file: BinaryIO, start: int, end: int, prefix: bytes = b"") -> None:
        self._file, self._start, self._prefix = file, start, prefix
        self._size, self._at = len(prefix) + end - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"offset: found {base + offset}, expected at least 0")
        self._at = base + offset
        return self._at

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self._size - self._at))
        done = 0
        if self._at < len(self._prefix):
            part = self._prefix[self._at : self._at + count]
            view[: len(part)] = part
            done = len(part)
        if done < count:
            self._file.seek(self._start + self._at + done - len(self._prefix))
            data = self._file.read(count - done)
            view[done : done + len(data)] = data
            done += len(data)
        self._at += done
        return done
