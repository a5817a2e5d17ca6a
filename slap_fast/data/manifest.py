"""Which clips there are and what is said of them: JSONL, CSV, or a folder with captions in it.

A row needs ``path`` and ``caption`` (in JSONL also a list of captions); ``label``, ``split``,
``start``, ``end`` and ``duration_s`` (seconds) are optional, other columns are ignored. Rows of the
same path, start and end are one clip with several captions. In a folder ``x.wav`` has its captions
in ``x.txt``, one per line, or the same fields in ``x.json``.
"""

from __future__ import annotations

import csv
import json
import math
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

AUDIO_SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .mp3 .aif .aiff .caf .m4a .mp4 .webm".split()
)


class ManifestError(ValueError):
    """A manifest that cannot be used; says the file, the line, what was found and expected."""


@dataclass(frozen=True, slots=True)
class Row:
    """One clip: a file or a part of it."""

    path: Path
    """The audio file; a relative one counts from the manifest's folder. It may not exist."""
    captions: tuple[str, ...]
    """One or more, none empty; NFC, stripped."""
    label: str | None
    """Class, where there is one."""
    split: str | None
    """train, val, test, or whatever the manifest says."""
    start: float
    """Where the clip starts in the file, seconds."""
    end: float | None
    """Where it ends; None: the end of the file."""
    seconds: float | None
    """Duration of the file (``duration_s``), where the manifest gives it."""
    line: int
    """Where in the manifest."""


def read_manifest(path: str | os.PathLike, split: str | None = None) -> list[Row]:
    """The clips of ``split``, in the manifest's order; of all splits for None.

    ``path`` is a .jsonl or .csv file, or a folder of audio. A manifest that has no splits gives all
    its rows. Raises ManifestError; audio that is missing is no error here.
    """
    path = Path(path)
    if path.is_dir():
        rows = list(_folder_rows(path))
    elif path.suffix.lower() in (".jsonl", ".csv"):
        fields = _csv_fields(path) if path.suffix.lower() == ".csv" else _jsonl_fields(path)
        rows = _merged(path, fields)
    else:
        raise ManifestError(f"{path}: expected a folder, or a file that ends in .jsonl or .csv")
    if not rows:
        raise ManifestError(f"{path}: found no rows, expected at least one")
    splits = {row.split for row in rows}
    if split is None or splits == {None}:
        return rows
    if split not in splits:
        there = ", ".join(sorted(name for name in splits if name is not None))
        raise ManifestError(f"{path}: found no rows of split {split!r}, there are: {there}")
    return [row for row in rows if row.split == split]


def _lines(path: Path) -> Iterator[str]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    with file:
        for number, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                _fail(path, number, f"byte {raw[error.start]:#04x}", "UTF-8")


def _jsonl_fields(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(_lines(path), 1):
        if text.isspace():
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            _fail(path, number, f"invalid JSON ({error})", "one object per line")
        if not isinstance(fields, dict):
            _fail(path, number, f"a JSON {type(fields).__name__}", "an object")
        yield number, fields


def _csv_fields(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(_lines(path), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                found = f"{len(values)} fields"
                _fail(path, reader.line_num, found, f"the {len(header)} of the header")
            yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        _fail(path, reader.line_num, f"invalid CSV ({error})", "quotes and commas that match")


def _folder_rows(folder: Path) -> Iterator[Row]:
    for audio in audio_files(folder):
        notes, text = audio.with_suffix(".json"), audio.with_suffix(".txt")
        if notes.exists():
            try:
                fields = json.loads("".join(_lines(notes)))
            except (ValueError, RecursionError) as error:
                if isinstance(error, ManifestError):
                    raise
                raise ManifestError(f"{notes}: invalid JSON ({error})") from None
            if not isinstance(fields, dict):
                raise ManifestError(f"{notes}: found {type(fields).__name__}, expected an object")
            yield _row(notes, str(audio.parent), 1, {**fields, "path": audio.name})
        elif text.exists():
            captions = [line.strip() for line in _lines(text) if not line.isspace()]
            yield _row(text, str(audio.parent), 1, {"path": audio.name, "caption": captions})
        else:
            raise ManifestError(f"{audio}: found no captions, expected {text.name} or {notes.name}")


def _row(manifest: Path, folder: str, line: int, fields: dict[str, Any]) -> Row:
    for column in ("path", "caption"):
        if column not in fields:
            _fail(manifest, line, f"no {column!r}", f"it among the columns: {', '.join(fields)}")
    path, captions = fields["path"], fields["caption"]
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        _fail(manifest, line, f"path {path!r}", "the name of a file")
    captions = captions if isinstance(captions, list) else [captions]
    if not captions:
        _fail(manifest, line, "no captions", "at least one")
    start = _number(manifest, line, fields, "start") or 0.0
    end = _number(manifest, line, fields, "end")
    if end is not None and end <= start:
        _fail(manifest, line, f"end {end:g}", f"more than start {start:g}")
    return Row(
        path=Path(os.path.join(folder, path.strip())),
        captions=tuple([_caption(manifest, line, caption) for caption in captions]),
        label=_name(manifest, line, fields, "label"),
        split=_name(manifest, line, fields, "split"),
        start=start,
        end=end,
        seconds=_number(manifest, line, fields, "duration_s"),
        line=line,
    )


def _caption(manifest: Path, line: int, caption: Any) -> str:
    if not isinstance(caption, str) or not (caption := caption.strip()):
        _fail(manifest, line, f"caption {caption!r}", "text that is not empty")
    return caption if caption.isascii() else unicodedata.normalize("NFC", caption)


def _name(manifest: Path, line: int, fields: dict[str, Any], column: str) -> str | None:
    value = fields.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        _fail(manifest, line, f"{column} {value!r}", "text")
    return str(value).strip() or None


def _number(manifest: Path, line: int, fields: dict[str, Any], column: str) -> float | None:
    value = fields.get(column)
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        _fail(manifest, line, f"{column} {value!r}", "a number of seconds")
    return number


def _merged(manifest: Path, found: Iterator[tuple[int, dict[str, Any]]]) -> list[Row]:
    folder = str(manifest.parent)
    clips: dict[tuple, Row] = {}
    for line, fields in found:
        row = _row(manifest, folder, line, fields)
        key = fields["path"].strip(), row.start, row.end  # hashing a Path costs ten times more
        first = clips.setdefault(key, row)
        if first is row:
            continue
        for column in ("split", "label"):
            here, there = getattr(row, column), getattr(first, column)
            if here != there:
                expected = f"{there!r}, as line {first.line} says of {row.path.name}"
                _fail(manifest, row.line, f"{column} {here!r}", expected)
        clips[key] = replace(first, captions=first.captions + row.captions)
    return list(clips.values())


def _fail(manifest: Path, line: int, found: str, expected: str) -> NoReturn:
    raise ManifestError(f"{manifest}, line {line}: found {found}, expected {expected}")


def audio_files(path: str | os.PathLike) -> list[Path]:
    """The file itself, or every audio file below a folder, sorted."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
