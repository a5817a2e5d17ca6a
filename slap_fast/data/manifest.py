"""Manifests: the clips of a collection and their captions, in JSONL, CSV or a folder.

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
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slap_fast.data.audio.formats import BY_SUFFIX

MAX_CAPTION = 10_000
"""Characters; longer text is no caption."""


class ManifestError(ValueError):
    """A manifest that cannot be used; names the file, the line, what was found and expected."""

    def __init__(self, message: str, code: str = "E_MANIFEST", line: int = 0) -> None:
        super().__init__(message)
        self.code = code
        """E_CAPTION_EMPTY, _TYPE, _LONG or _TEXT (not Unicode); E_PAIR; E_MANIFEST: all else."""
        self.line = line
        """0: no single line."""


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
    """train, val, test, or any other name."""
    start: float
    """Where the clip starts in the file, seconds."""
    end: float | None
    """Where it ends; None: the end of the file."""
    seconds: float | None
    """Duration of the file (``duration_s``), where the manifest gives it."""
    line: int
    """In the manifest."""


def read_manifest(
    path: str | os.PathLike, split: str | None = None, *, bad: list[ManifestError] | None = None
) -> list[Row]:
    """The clips of ``split``, in the manifest's order; of all splits for None.

    ``path`` is a .jsonl or .csv file, or a folder of audio. A manifest that has no splits gives all
    its rows. A row that cannot be used is added to ``bad``, where that is given. Raises
    ManifestError; audio that is missing is no error here.
    """
    path = Path(path)
    readers, suffix = {".csv": _csv_fields, ".jsonl": _jsonl_fields}, path.suffix.lower()
    if path.is_dir():
        rows = _merge(str(path), _folder_fields(path), bad)
    elif suffix in readers:
        rows = _merge(str(path.parent), readers[suffix](path), bad)
    else:
        raise ManifestError(f"{path}: expected a folder, or a file that ends in .jsonl or .csv")
    if not rows and not bad:
        raise ManifestError(f"{path}: found no rows, expected at least one")
    splits = {row.split for row in rows}
    if split is None or splits <= {None}:
        return rows
    if split not in splits:
        names = ", ".join(sorted(splits - {None}))
        raise ManifestError(f"{path}: found no rows of split {split!r}, there are: {names}")
    return [row for row in rows if row.split == split]


Entries = Iterator[tuple[Path, int, dict[str, Any] | ManifestError]]
"""(manifest, line, the fields of the line or its error)"""


def _lines(path: Path) -> Iterator[str]:
    """Yields lines; bytes that are not UTF-8 become lone surrogates."""
    try:
        file = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    with file:
        yield from file


def _not_utf8(text: str) -> str:
    """The first byte that was not UTF-8, or JSON's half of a surrogate pair; empty for none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"byte {ord(text[error.start]) & 0xFF:#04x}"
    return ""


def _jsonl_fields(path: Path) -> Entries:
    for number, text in enumerate(_lines(path), 1):
        if not text.isspace():
            yield path, number, _object(path, number, text)


def _object(path: Path, line: int, text: str) -> dict[str, Any] | ManifestError:
    if byte := _not_utf8(text):
        return _error(path, line, byte, "UTF-8")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _error(path, line, f"invalid JSON ({error})", "one object per line")
    if not isinstance(fields, dict):
        return _error(path, line, f"a JSON {type(fields).__name__}", "an object")
    return fields


def _csv_fields(path: Path) -> Entries:
    reader = csv.reader(_lines(path), strict=True)
    header = None
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            line, expected = reader.line_num, "quotes and commas that match"
            yield path, line, _error(path, line, f"invalid CSV ({error})", expected)
            continue
        line = reader.line_num
        if header is None:
            header = [name.strip() for name in values]
        elif byte := _not_utf8("".join(values)):
            yield path, line, _error(path, line, byte, "UTF-8")
        elif values and len(values) != len(header):
            expected = f"the {len(header)} of the header"
            yield path, line, _error(path, line, f"{len(values)} fields", expected)
        elif values:
            yield path, line, dict(zip(header, values, strict=True))


def _folder_fields(folder: Path) -> Entries:
    for audio in audio_files(folder):
        json_file, text_file = audio.with_suffix(".json"), audio.with_suffix(".txt")
        sidecar = json_file if json_file.exists() else text_file
        if sidecar.exists():
            fields = fields_of(sidecar, "".join(_lines(sidecar)))
            if not isinstance(fields, ManifestError):
                fields["path"] = str(audio.relative_to(folder))
            yield sidecar, 1, fields
        else:
            expected = f"expected {text_file.name} or {json_file.name}"
            yield audio, 0, ManifestError(f"{audio}: found no captions, {expected}", "E_PAIR")


def fields_of(path: Path, text: str) -> dict[str, Any] | ManifestError:
    """The fields in the text of a .json, or of a .txt with a caption per line.

    Lone surrogates in it stand for bytes that are not UTF-8.
    """
    if path.suffix.lower() == ".json":
        return _object(path, 1, text)
    captions = [line.strip() for line in text.split("\n")]
    return {"caption": [caption for caption in captions if caption]}


def row_of(manifest: Path, line: int, folder: str, fields: dict[str, Any]) -> Row:
    """Makes a row of a manifest's fields. Raises ManifestError."""
    for column in ("path", "caption"):
        if column not in fields:
            expected = f"it among the columns: {', '.join(fields)}"
            raise _error(manifest, line, f"no {column!r}", expected)
    path, captions = fields["path"], fields["caption"]
    if not isinstance(path, str) or not path.strip() or "\0" in path or _not_utf8(path):
        raise _error(manifest, line, f"path {path!r}", "the name of a file")
    captions = captions if isinstance(captions, list) else [captions]
    if not captions:
        raise _error(manifest, line, "no captions", "at least one", "E_CAPTION_EMPTY")
    start = _number(manifest, line, fields, "start") or 0.0
    end = _number(manifest, line, fields, "end")
    if end is not None and end <= start:
        raise _error(manifest, line, f"end {end:g}", f"more than start {start:g}")
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
    if not isinstance(caption, str):
        raise _error(manifest, line, f"caption {caption!r}", "text", "E_CAPTION_TYPE")
    caption = caption.strip()
    if not caption:
        raise _error(manifest, line, "caption ''", "text that is not empty", "E_CAPTION_EMPTY")
    if len(caption) > MAX_CAPTION:
        length, longest = f"a caption of {len(caption):,} characters", f"at most {MAX_CAPTION:,}"
        raise _error(manifest, line, length, longest, "E_CAPTION_LONG")
    if "\0" in caption or _not_utf8(caption):
        raise _error(manifest, line, f"caption {caption[:80]!r}", "Unicode text", "E_CAPTION_TEXT")
    return caption if caption.isascii() else unicodedata.normalize("NFC", caption)


def _name(manifest: Path, line: int, fields: dict[str, Any], column: str) -> str | None:
    value = fields.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or _not_utf8(str(value)):
        raise _error(manifest, line, f"{column} {value!r}", "text")
    return str(value).strip() or None


def _number(manifest: Path, line: int, fields: dict[str, Any], column: str) -> float | None:
    value = fields.get(column)
    if value is None or value == "":
        return None
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and 0 <= float(value) < math.inf:
            return float(value)
    raise _error(manifest, line, f"{column} {value!r}", "a number of seconds")


def _merge(folder: str, entries: Entries, bad: list[ManifestError] | None) -> list[Row]:
    clips: dict[tuple, Row] = {}
    for manifest, line, fields in entries:
        try:
            if isinstance(fields, ManifestError):
                raise fields
            row = row_of(manifest, line, folder, fields)
            key = fields["path"].strip(), row.start, row.end  # hashing a Path costs ten times more
            clips[key] = _add_captions(manifest, clips[key], row) if key in clips else row
        except ManifestError as error:
            if bad is None:
                raise
            bad.append(error)
    return list(clips.values())


def _add_captions(manifest: Path, first: Row, row: Row) -> Row:
    """The first row of a clip with the captions of another one added."""
    for column in ("split", "label"):
        value, expected = getattr(row, column), getattr(first, column)
        if value != expected:
            expected = f"{expected!r}, as line {first.line} says of {row.path.name}"
            raise _error(manifest, row.line, f"{column} {value!r}", expected)
    return replace(first, captions=first.captions + row.captions)


def _error(
    manifest: Path, line: int, found: str, expected: str, code: str = "E_MANIFEST"
) -> ManifestError:
    message = " ".join(f"found {found}, expected {expected}".split())  # values may hold newlines
    return ManifestError(f"{manifest}, line {line}: {message}", code, line)


def audio_files(path: str | os.PathLike) -> list[Path]:
    """The file itself, or every audio file below a folder, sorted."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in BY_SUFFIX)
