"""Whether a collection is the one that a run was started with."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePath
from typing import Any

from slap_fast.data.audio.track import AudioError
from slap_fast.data.source import ClipSource
from slap_fast.data.sources.mixture import MixedClips
from slap_fast.data.sources.shards import ShardClips


def fingerprint(source: ClipSource) -> dict[str, Any]:
    """``clips``, ``seconds`` and a ``sha256`` of the clips in their order, as JSON values.

    The digest is of file names without folders, durations, captions and labels; of shards, of their
    index. So it stays the same when the data is moved.
    """
    return {
        "clips": len(source),
        "seconds": round(source.total_seconds(), 3),
        "sha256": _digest(source).hexdigest(),
    }


def _digest(source: ClipSource) -> hashlib._Hash:
    digest = hashlib.sha256()
    if isinstance(source, ShardClips):
        digest.update(f"{source.rows_sha256} {source.split}".encode())
    elif isinstance(source, MixedClips):
        for part, size_and_weight in zip(source.sources, source.parts, strict=True):
            digest.update(_digest(part).digest() + repr(size_and_weight).encode())
    else:
        for i in range(len(source)):
            digest.update(json.dumps(_clip(source, i)).encode())
    return digest


def _clip(source: ClipSource, index: int) -> list[Any]:
    name, seconds = PurePath(source.name(index)).name, round(source.seconds(index), 3)
    try:
        return [name, seconds, source.captions(index), source.label(index)]
    except AudioError as error:
        return [name, seconds, error.code]
