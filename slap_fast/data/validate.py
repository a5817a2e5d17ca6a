"""Validation of a manifest, a folder or shards, clip by clip, before training on it."""

from __future__ import annotations

import copy
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slap_fast.atomic_files import file_sha256
from slap_fast.console import Progress
from slap_fast.data.audio.decode import Inspection
from slap_fast.data.audio.isolated import IsolatedDecoder
from slap_fast.data.audio.track import AudioError
from slap_fast.data.manifest import ManifestError, Row, read_manifest
from slap_fast.data.shards.index import INDEX, ROWS, read_index
from slap_fast.data.sources.shards import ShardClips

KINDS = {
    "E_MISSING": "missing",
    "E_TRUNCATED": "truncated",
    "W_TRUNCATED": "truncated",
    "W_SILENT": "silent",
    "E_TOO_SHORT": "too short",
    "E_DUPLICATE": "duplicate",
    "E_CAPTION": "mis-captioned",
    "E_PAIR": "mis-captioned",
    "E_MANIFEST": "bad row",
    "E_DURATION": "bad row",
    "E_SHARD": "bad shard",
}
"""Kind of a problem by the start of its code; any other is "corrupt"."""
DURATION = 1.5
"""A duration_s that is wrong by more than this factor is a problem."""
NOTES = ("W_CROPPED", "W_EXT_MISMATCH")
"""Warnings that need no repair."""


class Problem(NamedTuple):
    """One fault."""

    kind: str
    """A value of KINDS, or "corrupt"."""
    code: str
    """E_... or W_..., as in :mod:`slap_fast.data.audio.decode`; here also E_DUPLICATE,
    E_DURATION and E_CAPTION_FILENAME."""
    name: str
    """The file, the shard, or the clip in a shard."""
    line: int
    """In the manifest; 0: none."""
    message: str
    """One line."""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a validation."""

    clips: int
    """Number of clips."""
    seconds: float
    """Seconds of audio that decodes."""
    problems: list[Problem]
    notes: Counter[str]
    """Warnings that need no repair, by code."""

    def counts(self) -> dict[str, int]:
        """Problems of each kind, "corrupt" last."""
        counts = Counter(problem.kind for problem in self.problems)
        return {kind: counts[kind] for kind in dict.fromkeys([*KINDS.values(), "corrupt"])}


class _Clip(NamedTuple):
    name: str
    row: Row | None
    """None where it cannot be read from its shard."""
    result: Inspection | AudioError


def validate(
    data: str | Path,
    split: str | None = None,
    *,
    root: str | Path | None = None,
    workers: int = 2,
    progress: bool = False,
) -> Report:
    """Decodes every clip, in ``workers`` processes of their own, and validates the captions.

    Relative paths of a manifest count from ``root``, by default from its folder.

    Raises ManifestError or ShardError where the manifest or the index as a whole cannot be read.
    """
    data = Path(data)
    problems: list[Problem] = []
    if (data / INDEX).exists():
        problems += _bad_shards(data, progress)
        clips = _in_order(ShardClips(data, split), workers, progress)
    else:
        bad: list[ManifestError] = []
        rows = read_manifest(data, split, root=root, bad=bad)
        problems += [_problem(error.code, str(data), error.line, str(error)) for error in bad]
        clips = _in_order(rows, workers, progress)
    firsts: dict[str, _Clip] = {}
    count, seconds, notes = 0, 0.0, Counter[str]()
    for clip in clips:
        count, line = count + 1, 0
        if clip.row is not None:
            line = clip.row.line
            problems += _bad_captions(clip.name, clip.row)
        if isinstance(clip.result, AudioError):
            problems.append(_problem(clip.result.code, clip.name, line, str(clip.result)))
            continue
        seconds += clip.result.seconds
        problems += _bad_duration(clip.name, clip.row, clip.result)
        for code in clip.result.warnings:
            if code in NOTES:
                notes[code] += 1
            else:
                problems.append(_problem(code, clip.name, line, f"{clip.name}: {_MESSAGES[code]}"))
        first = firsts.setdefault(clip.result.digest, clip)
        if first is not clip and "W_SILENT" not in clip.result.warnings:
            message = f"{_name_and_split(clip)}: has the same audio as {_name_and_split(first)}"
            problems.append(_problem("E_DUPLICATE", clip.name, line, message))
    return Report(count, seconds, problems, notes)


_MESSAGES = {
    "W_SILENT": "all samples are equal",
    "W_CORRUPT": "parts of the file are damaged, the decoder leaves them out",
    "W_TRUNCATED": "the file has no last page",
    "W_UNREAD": "more is joined to the audio, of another rate or channel count: it is not read",
}


def _name_and_split(clip: _Clip) -> str:
    has_split = clip.row is not None and clip.row.split is not None
    return f"{clip.name} (split {clip.row.split})" if has_split else clip.name


def _problem(code: str, name: str, line: int, message: str) -> Problem:
    kind = next((kind for start, kind in KINDS.items() if code.startswith(start)), "corrupt")
    return Problem(kind, code, name, line, message)


def _bad_captions(name: str, row: Row) -> Iterator[Problem]:
    stem = Path(name).stem.casefold()
    for caption in row.captions:
        if caption.casefold() in (stem, Path(name).name.casefold()):
            message = f"{name}: the caption is the file's name, {caption!r}"
            yield _problem("E_CAPTION_FILENAME", name, row.line, message)
    for caption, times in Counter(row.captions).items():
        if times > 1:
            message = f"{name}: is listed {times} times with the caption {caption[:80]!r}"
            yield _problem("E_DUPLICATE", name, row.line, message)


def _bad_duration(name: str, row: Row | None, result: Inspection) -> Iterator[Problem]:
    if row is None or row.seconds is None or row.end is not None:
        return
    seconds = row.start + result.seconds
    if not seconds / DURATION <= row.seconds <= seconds * DURATION:
        message = f"{name}: duration_s: found {row.seconds:g}, expected {seconds:g} seconds"
        yield _problem("E_DURATION", name, row.line, message)


class _Reader(threading.local):
    """Per thread a decoder's process, and a copy of the source, which keeps its last clip."""

    def __init__(self, clips: list[Row] | ShardClips, at_end: ExitStack) -> None:
        self.clips, self.decoder = copy.copy(clips), IsolatedDecoder()
        at_end.callback(self.decoder.close)

    def read(self, index: int) -> _Clip:
        row = None if isinstance(self.clips, ShardClips) else self.clips[index]
        name = self.clips.name(index) if row is None else str(row.path)
        try:
            audio, row = self.clips.clip(index) if row is None else (row.path, row)
            return _Clip(name, row, self.decoder.inspect(audio, start=row.start, end=row.end))
        except AudioError as error:
            return _Clip(name, row, error.named(name))


def _in_order(clips: list[Row] | ShardClips, workers: int, progress: bool) -> Iterator[_Clip]:
    """Yields the clips, read by ``workers`` threads."""
    with ExitStack() as at_end, ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(_Reader(clips, at_end).read, range(len(clips)))
        yield from Progress(results, desc="checking", total=len(clips), unit="clip", show=progress)


def _bad_shards(folder: Path, progress: bool) -> Iterator[Problem]:
    """Files whose size or hash differs from the index."""
    index = read_index(folder)
    expected = [(ROWS, None, index.rows_sha256)]
    expected += [(shard.name, shard.bytes, shard.sha256) for shard in index.shards]
    for name, size, digest in Progress(expected, desc="hashing", unit="file", show=progress):
        path = folder / name
        if not path.is_file():
            code, fault = "E_SHARD_MISSING", "no such file"
        elif size is not None and os.stat(path).st_size < size:
            code, fault = "E_SHARD_TRUNCATED", f"{os.stat(path).st_size} bytes of {size}"
        elif file_sha256(path) != digest:
            code, fault = "E_SHARD_CORRUPT", "not the bytes that were packed"
        else:
            continue
        yield _problem(code, str(path), 0, f"{path}: {code}: {fault}")


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "clips": report.clips,
        "seconds": round(report.seconds, 3),
        "counts": report.counts(),
        "notes": dict(report.notes),
        "problems": [problem._asdict() for problem in report.problems],
    }
