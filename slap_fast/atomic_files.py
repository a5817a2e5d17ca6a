"""Files and folders that are written whole or not at all, by one writer.

A folder is filled beside its place, every file's SHA-256 goes into ``manifest.sha256`` (what
``sha256sum -c`` reads), all of it is flushed to disk, and one rename puts it there. What stood
there before stays until then, or until the next write as ``<name>.old``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.sha256"


def write_folder(path: Path, write: Callable[[Path], None], *, keep_old: bool = False) -> None:
    """Fills a folder through ``write`` and puts it at ``path`` in one rename.

    Args:
        path: where it belongs.
        write: fills an empty folder with files.
        keep_old: what stood at ``path`` stays as ``<name>.old`` until the next write.

    Raises:
        OSError: the disk is full, broken or read-only; what was there before is still there.
    """
    fresh, old = path.with_name(f"{path.name}.tmp"), old_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(fresh)  # of a process that was killed while it wrote
        fresh.mkdir()
        write(fresh)
        write_manifest(fresh)
        if path.exists():
            remove(old)
            path.rename(old)
        fresh.rename(path)
        sync(path.parent)
        if not keep_old:
            remove(old)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise OSError(
            f"{path}: cannot be written, what was saved before is kept: {error}"
        ) from error


def write_manifest(folder: Path) -> None:
    """Lists the folder's files with their SHA-256, and flushes all of them to disk."""
    files = sorted(folder.iterdir())
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    manifest = folder / MANIFEST
    manifest.write_bytes(lines.encode("ascii"))
    for path in (*files, manifest, folder):
        sync(path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def replace_file(path: Path, text: str) -> None:
    """Writes a text file; a reader, also one after a crash, finds the old text or the new one."""
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    sync(fresh)
    fresh.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any, *, indent: int = 2, ensure_ascii: bool = False) -> None:
    """Writes a JSON file as :func:`replace_file` does."""
    replace_file(path, to_json(value, indent=indent, ensure_ascii=ensure_ascii))


def to_json(value: Any, *, indent: int = 2, ensure_ascii: bool = False) -> str:
    """Indented JSON that ends with a newline."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii) + "\n"


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def old_folder(path: Path) -> Path:
    """Where :func:`write_folder` keeps what stood at ``path`` before."""
    return path.with_name(f"{path.name}.old")


def find_folder(path: str | Path) -> Path:
    """The folder itself, or the one that an interrupted :func:`write_folder` left beside it."""
    path = Path(path)
    old = old_folder(path)
    return old if old.is_dir() and not path.exists() else path


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Locks the folder against other processes. Raises ValueError where one has locked it.

    The operating system drops the lock when the process ends, in whatever way, and does not pass
    it on to the loader's workers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"{folder}: another process is writing there") from None
            # Some network file systems have no locks: two writers go unnoticed there.
        yield


class BackgroundWriter:
    """Runs one write after the other: in a thread, or at once where ``background`` is False."""

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()

    def submit(self, write: Callable[[], None]) -> None:
        """Starts a write once the previous one has ended; raises what the previous one raised."""
        self.wait()
        if self._pool is None:
            write()
        else:
            self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Waits for the last write; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def remove(path: Path) -> None:
    """Deletes a file or a folder, where one exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
