"""What counts as an audio file: in a folder, by a name in a manifest, or given by hand.

Hidden names (``._x.wav`` of a Mac, ``.cache/``), what is no regular file, and names that are not
Unicode are left out and counted. A linked folder is followed once, so loops end.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import unicodedata
from collections import Counter
from pathlib import Path

from slap_fast.data.audio.formats import BY_SUFFIX

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_DRIVE = re.compile(r"(.*/)?([A-Za-z]:\\|\\\\)")


def audio_files(path: str | os.PathLike, ignored: Counter[str] | None = None) -> list[Path]:
    """The file itself, or every audio file below a folder, sorted.

    ``ignored`` counts what has an audio file's suffix and is none, by reason; without it one line
    of the log tells.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    counts: Counter[str] = Counter() if ignored is None else ignored
    files = sorted(_below(path, counts, set()))
    if ignored is None and counts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        name = os.fsencode(path).decode(errors="backslashreplace")
        logging.getLogger(__name__).warning("%s: not read as audio: %s", name, reasons)
    return files


def _below(folder: Path, counts: Counter[str], visited: set[tuple[int, int]]) -> list[Path]:
    files, folders = [], [folder]
    while folders:
        try:
            current = folders.pop()
            info = current.stat()
            if (info.st_dev, info.st_ino) in visited:
                continue
            visited.add((info.st_dev, info.st_ino))
            entries = sorted(current.iterdir())
        except OSError:
            counts["folder that cannot be opened"] += 1
            continue
        for entry in entries:
            is_audio = entry.suffix.lower() in BY_SUFFIX
            is_folder = entry.is_dir()
            if entry.name.startswith("."):
                counts["hidden"] += is_audio
            elif is_folder:
                counts["folder named as a file"] += is_audio
                folders.append(entry)
            elif is_audio and not _is_unicode(entry.name):
                counts["name that is not Unicode"] += 1
            elif is_audio and not _is_file(entry):
                counts["no regular file"] += 1
            elif is_audio:
                files.append(entry)
    for reason in [reason for reason, count in counts.items() if not count]:
        del counts[reason]
    return files


def _is_file(path: Path) -> bool:
    """True of a broken link too: it is a file that is missing, which reading it tells."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def local_path(folder: str, name: str) -> Path:
    """The file of a relative or absolute name, which may not exist.

    A name that differs from the file's by its normal form (NFC, NFD) or by the slashes of Windows
    is the file's name.
    """
    path = os.path.join(folder, name)
    if (name.isascii() and "\\" not in name) or os.path.exists(path):
        return Path(path)
    for slashes in (name, name.replace("\\", "/")):
        for form in ("NFC", "NFD"):
            other = os.path.join(folder, unicodedata.normalize(form, slashes))
            if os.path.exists(other):
                return Path(other)
    return Path(path)


def why_missing(path: str | os.PathLike, reason: str | None) -> str:
    """Why a path does not open: ``reason``, or that it is the name of something else."""
    name = os.fspath(path)
    if match := isinstance(name, str) and _URL.search(name):
        return f"a URL ({match.group()}...)"
    if isinstance(name, str) and _DRIVE.match(name):
        return "a path of Windows"
    return reason or "no such file"
