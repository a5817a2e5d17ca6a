"""Folders that are written whole or not at all, by one writer, and checked when they are read.

A folder is filled beside its place, every file's SHA-256 goes into ``manifest.sha256`` (what
``sha256sum -c`` reads), all of it is flushed to disk, and one rename puts it there. What stood
there before stays until then, or for good as ``<name>.old``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import safetensors

MANIFEST = "manifest.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\n]+)\n")
_BLOCK = 1 << 20


class CheckpointError(ValueError):
    """A folder that is no checkpoint, is damaged, or is newer than this package."""


def write_folder(path: Path, write: Callable[[Path], None], *, keep_old: bool = False) -> None:
    """Fills a folder through ``write`` and puts it at ``path`` in one rename.

    Args:
        path: where it belongs.
        write: is given an empty folder, and writes files into it.
        keep_old: what stood at ``path`` stays as ``<name>.old`` until the next time.

    Raises:
        OSError: the disk is full, broken or read-only; what was there before is still there.
    """
    fresh, old = path.with_name(f"{path.name}.tmp"), old_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(fresh)  # of a run that was killed here
        fresh.mkdir()
        write(fresh)
        _seal(fresh)
        if path.exists():
            _remove(old)
            path.rename(old)
        fresh.rename(path)
        sync(path.parent)
        if not keep_old:
            _remove(old)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise OSError(
            f"{path}: cannot be written, what was saved before is kept: {error}"
        ) from error


def replace_file(path: Path, text: str) -> None:
    """Writes a text file so that a reader, or a crash, meets the old one or the new one."""
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    sync(fresh)
    fresh.replace(path)
    sync(path.parent)


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
    """Where the one before is kept."""
    return path.with_name(f"{path.name}.old")


def find_folder(path: str | Path) -> Path:
    """The folder itself, or the one a rename that was cut short left beside it."""
    path = Path(path)
    old = old_folder(path)
    return old if old.is_dir() and not path.exists() else path


def recover(path: Path, verify: Callable[[Path], None]) -> Path:
    """The newest of a folder and the one before it that passes ``verify``.

    A damaged one is moved out of the way, to ``<name>.damaged``, so that the next write does not
    replace the good one by it. Raises CheckpointError, of the newest, when neither passes.
    """
    try:
        verify(find_folder(path))
    except CheckpointError:
        old = old_folder(path)
        if not (path.exists() and old.is_dir()):
            raise
        try:
            verify(old)
        except CheckpointError:
            pass
        else:
            damaged = path.with_name(f"{path.name}.damaged")
            _remove(damaged)
            path.rename(damaged)
            return old
        raise
    return find_folder(path)


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Compares files with the folder's manifest. Raises CheckpointError that names a wrong one."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("ascii")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found, expected beside what slap-fast wrote") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    lines = list(_LINE.finditer(text))
    if "".join(line[0] for line in lines) != text:
        raise CheckpointError(f"{path}: damaged: a line is not a SHA-256 and a name")
    digests = {line[2]: line[1] for line in lines}
    for name in names:
        if name not in digests:
            raise CheckpointError(f"{path}: damaged: does not list {name}")
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name}: not found, expected a folder that slap-fast wrote"
            )
        if _sha256(folder / name) != digests[name]:
            raise CheckpointError(
                f"{folder / name}: damaged, or edited: its SHA-256 is not the one in {MANIFEST}"
            )


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the folder against a second run. Raises ValueError where one holds it already.

    The lock is the kernel's, so it ends with the process however that ends, and is not inherited
    by the loader's workers.
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
            # Some network file systems have no locks: there the user has to take care.
        yield


class Writer:
    """Runs one write after the other: at once, or by option in a thread beside the training."""

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()

    def submit(self, write: Callable[[], None]) -> None:
        """Waits for the write before; raises what that raised."""
        self.wait()
        if self._pool is None:
            write()
        else:
            self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Until nothing is being written; raises what the last write raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _seal(folder: Path) -> None:
    """Writes the manifest and flushes everything."""
    files = sorted(folder.iterdir())
    lines = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    manifest = folder / MANIFEST
    manifest.write_bytes(lines.encode("ascii"))
    for file in (*files, manifest):
        sync(file)
    sync(folder)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
