"""What the PATHs of a command mean: files, folders, lists of files, manifests and shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

LISTED = 20
"""Bad files that are named on stderr; of more, the number."""


class Clip(NamedTuple):
    """One audio item and its name."""

    path: str
    """The file, or the clip's place in its shard."""
    start: float = 0.0
    """Seconds; of a part of a file."""
    end: float | None = None
    """None: the end of the file."""

    @property
    def name(self) -> str:
        """The file, and the part of it."""
        if not self.start and self.end is None:
            return self.path
        return f"{self.path} {self.start:g}-{'' if self.end is None else f'{self.end:g}'} s"


class Inputs(NamedTuple):
    """The audio that a command works on."""

    clips: list[Clip]
    """What each item is called."""
    items: Sequence[Any]
    """As :meth:`slap_fast.Slap.embed_audio` takes them; one of shards is read when it is taken,
    and may raise AudioError."""
    bad_rows: list[str]
    """One line for each row of a manifest that cannot be used."""


class _Items(Sequence):
    def __init__(self, clips: Sequence[Clip], sources: Sequence[tuple[Any, int] | None]) -> None:
        self.clips, self.sources = clips, sources

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return _Items(self.clips[position], self.sources[position])
        if (place := self.sources[position]) is not None:
            source, index = place
            return source.item(index)
        clip = self.clips[position]
        return (clip.path, clip.start, clip.end) if clip.start or clip.end else clip.path


def open_inputs(paths: Sequence[Path], split: str | None = None) -> Inputs:
    """Lists the audio in PATHs.

    Args:
        paths: audio files; folders of them; folders of shards; manifests (.csv, .jsonl, ...); .txt
            lists of a path per line, or "-" for one on standard input.
        split: of manifests and shards, only the clips of this split.

    Raises:
        ValueError: nothing, or one of the paths holds nothing; names it.
    """
    from slap_fast.data.manifest import audio_files, read_manifest
    from slap_fast.data.shards.index import INDEX
    from slap_fast.data.sources.shards import ShardClips

    clips: list[Clip] = []
    sources: list[tuple[Any, int] | None] = []
    bad_rows: list[str] = []
    for path in map(Path, paths):
        before = len(clips) + len(bad_rows)
        if path.is_dir() and (path / INDEX).exists():
            shards = ShardClips(path, split)
            clips += [Clip(shards.name(i)) for i in range(len(shards))]
            sources += [(shards, i) for i in range(len(shards))]
        elif path.suffix.lower() in MANIFESTS:
            errors: list[Any] = []
            rows = read_manifest(path, split, bad=errors)
            clips += [Clip(str(row.path), row.start, row.end) for row in rows]
            bad_rows += map(str, errors)
        elif str(path) == "-" or path.suffix.lower() == ".txt":
            clips += map(Clip, _listed(path))
        else:
            clips += [Clip(str(file)) for file in audio_files(path)]
        if len(clips) + len(bad_rows) == before:
            raise ValueError(f"{path}: found no audio file, expected at least one")
        sources += [None] * (len(clips) - len(sources))
    if not clips:
        raise ValueError(bad_rows[0] if bad_rows else "paths: found none, expected at least one")
    return Inputs(clips, _Items(clips, sources), bad_rows)


MANIFESTS = (".csv", ".jsonl", ".tsv")


def _listed(path: Path) -> list[str]:
    """The paths in a list; relative ones count from its folder, as in a manifest."""
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    lines = [line.strip() for line in data.splitlines()]
    return [str(path.parent / os.fsdecode(line)) for line in lines if line]


def name_bad(messages: Sequence[str], total: int, *, where: str = "") -> None:
    """Says on stderr how many of the clips were left out, and which.

    Args:
        messages: a line for each of them.
        total: number of clips.
        where: what lists all of them.
    """
    for message in messages[:LISTED]:
        print(message, file=sys.stderr)
    if len(messages) > LISTED:
        rest = f"and {len(messages) - LISTED} more" + (f", see {where}" if where else "")
        print(rest, file=sys.stderr)
    if messages:
        print(f"{len(messages)} of {total} left out", file=sys.stderr)


def bad_row_lines(bad: Sequence[Exception]) -> list[str]:
    """Lines that name the rows of a manifest that cannot be used, the first LISTED of them."""
    lines = [f"left out: {error}" for error in bad[:LISTED]]
    more = len(bad) - len(lines)
    return [*lines, f"and {more} more rows"] if more else lines
