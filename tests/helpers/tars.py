"""WebDataset tars as other tools write them, and the clips read from them."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from slap_fast.data.audio.track import AudioError
from slap_fast.data.shards.import_tars import read_tars

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SUFFIXES = ("flac", "wav", "ogg", "aiff")


def audio(seed: int, suffix: str = "flac") -> bytes:
    """A file of noise, 0.04 s at 16 kHz and longer with the seed."""
    file = io.BytesIO()
    noise = 0.1 * np.random.default_rng(seed).standard_normal(600 + 7 * seed)
    soundfile.write(file, noise, 16_000, format=suffix)
    return file.getvalue()


def archive(members: Iterable[Any], kind: str = "pax") -> bytes:
    """A tar of (name, contents), or of ready TarInfos without contents."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind]) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def pair(key: str, seed: int = 0, caption: str = "a dog") -> list[tuple[str, bytes]]:
    """The members of a clip."""
    return [(f"{key}.flac", audio(seed)), (f"{key}.txt", caption.encode())]


def read(*tars: Path) -> tuple[list, list[AudioError], Counter[str]]:
    """Clips as (path in the tar, captions, bytes), errors, and ignored members by suffix."""
    ignored = Counter()
    clips, errors = [], []
    for clip in read_tars(tars, ignored):
        if isinstance(clip, AudioError):
            errors.append(clip)
            continue
        row, data = clip
        tar = next(tar for tar in tars if str(row.path).startswith(f"{tar}/"))
        clips.append((str(row.path.relative_to(tar)), row.captions, data))
    return clips, errors, ignored


def codes(errors: list[AudioError]) -> dict[str, int]:
    """Errors by code."""
    return dict(Counter(error.code for error in errors))


def written(folder: Path, content: bytes, name: str = "a.tar") -> Path:
    """The path of a file with the contents."""
    (folder / name).write_bytes(content)
    return folder / name
