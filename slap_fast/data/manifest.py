"""Manifests: the clips of a collection and their captions, in JSONL, CSV, TSV or a folder.

A row needs ``path`` (or ``file_name``) and ``caption`` (in JSONL also a list of captions) or
``caption_1`` to ``caption_5``, or a ``label``; ``split``, ``start``, ``end`` and ``duration_s``
(seconds) are optional, other columns are ignored. Fields of a CSV are separated by commas,
semicolons, tabs or bars, as its first line shows. Rows of the
same path, start and end are one clip with several captions. In a folder ``x.wav`` has its captions
in ``x.txt``, one per line, or the same fields in ``x.json``.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from slap_fast.data.audio.folder import audio_files, local_path

MAX_CAPTION = 10_000
"""Characters; longer text is no caption."""

PATHS = ("path", "file_name")
CAPTIONS = ("caption", *(f"caption_{i}" for i in range(1, 6)))
OPTIONAL = ("label", "split", "start", "end", "duration_s")
DELIMITERS = (",", "\t", ";", "|")
NO_TEXT = ("nan", "none", "null", "n/a", "<na>")
"""What tools write where a cell is empty."""


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
    """None empty; NFC, stripped. No caption only where there is a label."""
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
    path: str | os.PathLike,
    split: str | None = None,
    *,
    root: str | os.PathLike | None = None,
    bad: list[ManifestError] | None = None,
) -> list[Row]:
    """The clips of ``split``, in the manifest's order; of all splits for None.

    ``path`` is a .jsonl, .csv or .tsv file, or a folder of audio; relative paths in it count from
    ``root``, by default the folder of the manifest. A manifest that has no splits gives all
    its rows. A row that cannot be used is added to ``bad``, where that is given. Raises
    ManifestError; audio that is missing is no error here.
    """
    path = Path(path)
    if path.is_dir():
        entries, folder = _folder_fields(path), str(path)
    elif path.suffix.lower() in (".jsonl", ".csv", ".tsv"):
        entries = _jsonl_fields(path) if path.suffix.lower() == ".jsonl" else _csv_fields(path)
        folder = str(path.parent if root is None else root)
    else:
        expected = "a folder, or a file that ends in .jsonl, .csv or .tsv"
        raise ManifestError(f"{path}: found {path.suffix or 'no suffix'}, expected {expected}")
    rows = _merge(folder, entries, bad)
    if not rows and not bad:
        raise ManifestError(f"{path}: found no rows, expected at least one")
    splits = {row.split for row in rows}
    if split is None or splits <= {None}:
        return rows
    if split not in splits:
        names = ", ".join(sorted(name for name in splits if name is not None))
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
    """The first byte of a text from :func:`_lines` that was not UTF-8; empty where all was."""
    if text.isascii():
        return ""
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
        fields = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return _error(path, line, f"invalid JSON ({error})", "one object per line")
    if not isinstance(fields, dict):
        return _error(path, line, f"a JSON {type(fields).__name__}", "an object")
    return fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where it has a name twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"twice {next(name for name in names if names.count(name) > 1)!r}")
    return fields


def _delimiter(header: str) -> str:
    """The one of DELIMITERS that gives the columns of a path and of captions or labels."""
    for delimiter in DELIMITERS:
        names = {name.strip(' "\r\n') for name in header.split(delimiter)}
        if names & set(PATHS) and names & {*CAPTIONS, "label"}:
            return delimiter
    return max(DELIMITERS, key=header.count)


def _check_header(path: Path, header: list[str]) -> None:
    """Raises ManifestError, once for the file."""
    known = [name for name in header if name in (*PATHS, *CAPTIONS, *OPTIONAL)]
    twice = next((name for name in known if known.count(name) > 1), None)
    if twice is not None:
        _fail(path, 1, f"{known.count(twice)} columns {twice!r}", "each name once")
    for column, names in (("path", PATHS), ("caption", (*CAPTIONS, "label"))):
        if not set(names) & set(known):
            shown = (name if name.isprintable() else repr(name) for name in header)
            expected = f"it among the columns: {', '.join(shown)}"
            _fail(path, 1, f"no {column!r}", expected)


def _csv_fields(path: Path) -> Entries:
    delimiter = _delimiter(next(iter(_lines(path)), ""))
    reader = csv.reader(_lines(path), strict=True, delimiter=delimiter)
    header, fits = None, False
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            expected = "quotes and commas that match"
            yield (
                path,
                reader.line_num,
                _error(path, reader.line_num, f"invalid CSV ({error})", expected),
            )
            continue
        line = reader.line_num
        if header is None:
            header = [name.strip() for name in values]
            if header:
                _check_header(path, header)
            else:
                header = None
        elif byte := _not_utf8("".join(values)):
            yield path, line, _error(path, line, byte, "UTF-8")
        elif values and len(values) != len(header):
            others = [d for d in DELIMITERS if values[0].count(d) >= len(header) - 1 > 0]
            if not fits and len(values) == 1 and others:
                found = f"fields separated by {others[0]!r}"
                _fail(path, line, found, f"{delimiter!r}, as in the header")
            expected = f"the {len(header)} of the header"
            yield path, line, _error(path, line, f"{len(values)} fields", expected)
        elif values:
            fits = True
            yield path, line, dict(zip(header, values, strict=True))


def _folder_fields(folder: Path) -> Entries:
    for audio in audio_files(folder):
        json_file, text_file = (
            local_path(str(audio.parent), audio.stem + suffix) for suffix in (".json", ".txt")
        )
        name = str(audio.relative_to(folder))
        if json_file.exists() or text_file.exists():
            sidecar = json_file if json_file.exists() else text_file
            fields = fields_of(sidecar, "".join(_lines(sidecar)))
            if not isinstance(fields, ManifestError):
                fields["path"] = name
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
    names = [name for name in PATHS if name in fields]
    if len(names) != 1:
        found = "no 'path'" if not names else "both 'path' and 'file_name'"
        _fail(manifest, line, found, f"one of them among the columns: {', '.join(fields)}")
    path = fields[names[0]]
    if not isinstance(path, str) or not path.strip() or "\0" in path or not _is_unicode(path):
        _fail(manifest, line, f"path {path!r}", "the name of a file")
    label = _name(manifest, line, fields, "label")
    start = _number(manifest, line, fields, "start") or 0.0
    end = _number(manifest, line, fields, "end")
    if end is not None and end <= start:
        _fail(manifest, line, f"end {end:g}", f"more than start {start:g}")
    return Row(
        path=local_path(folder, path.strip()),
        captions=_captions(manifest, line, fields, label),
        label=label,
        split=_name(manifest, line, fields, "split"),
        start=start,
        end=end,
        seconds=_number(manifest, line, fields, "duration_s"),
        line=line,
    )


def _captions(
    manifest: Path, line: int, fields: dict[str, Any], label: str | None
) -> tuple[str, ...]:
    """Those of all caption columns; of numbered ones, some may be empty."""
    captions = []
    for column in CAPTIONS:
        values = fields.get(column, [])
        values = values if isinstance(values, list) else [values]
        if column != "caption":
            values = [value for value in values if value is not None and value != ""]
        elif column in fields and not values:
            _fail(manifest, line, "no captions", "at least one", "E_CAPTION_EMPTY")
        captions += [_caption(manifest, line, value) for value in values]
    if not captions and label is None:
        if any(column in fields for column in CAPTIONS):
            _fail(manifest, line, "no captions", "at least one, or a label", "E_CAPTION_EMPTY")
        _fail(manifest, line, "no 'caption'", f"it among the columns: {', '.join(fields)}")
    return tuple(captions)


def _is_list(text: str) -> bool:
    """Whether the text is a list as JSON or Python write it."""
    if not (text.startswith("[") and text.endswith("]")):
        return False
    try:
        return isinstance(ast.literal_eval(text), list)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def _is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False


def _caption(manifest: Path, line: int, caption: Any) -> str:
    if not isinstance(caption, str):
        _fail(manifest, line, f"caption {caption!r}", "text", "E_CAPTION_TYPE")
    caption = caption.strip()
    if not caption:
        _fail(manifest, line, "caption ''", "text that is not empty", "E_CAPTION_EMPTY")
    if len(caption) > MAX_CAPTION:
        expected = f"at most {MAX_CAPTION:,}"
        _fail(manifest, line, f"a caption of {len(caption):,} characters", expected,
              "E_CAPTION_LONG")  # fmt: skip
    if caption.casefold() in NO_TEXT:
        _fail(manifest, line, f"caption {caption!r}", "text", "E_CAPTION_EMPTY")
    if _is_number(caption) or _is_list(caption):
        expected = "text; several captions go into rows of their own, or caption_1, caption_2, ..."
        _fail(manifest, line, f"caption {caption[:80]!r}", expected, "E_CAPTION_TYPE")
    if "\0" in caption or not _is_unicode(caption):
        _fail(manifest, line, f"caption {caption[:80]!r}", "Unicode text", "E_CAPTION_TEXT")
    return caption if caption.isascii() else unicodedata.normalize("NFC", caption)


def _is_unicode(text: str) -> bool:
    """False where JSON escapes made half a surrogate pair."""
    return not _not_utf8(text)


def _name(manifest: Path, line: int, fields: dict[str, Any], column: str) -> str | None:
    value = fields.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not _is_unicode(str(value)):
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


def _merge(folder: str, entries: Entries, bad: list[ManifestError] | None) -> list[Row]:
    clips: dict[tuple, Row] = {}
    for manifest, line, fields in entries:
        try:
            if isinstance(fields, ManifestError):
                raise fields
            row = row_of(manifest, line, folder, fields)
            key = str(row.path), row.start, row.end  # hashing a Path costs ten times more
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
            _fail(manifest, row.line, f"{column} {value!r}", expected)
    return replace(first, captions=first.captions + row.captions)


def _error(
    manifest: Path, line: int, found: str, expected: str, code: str = "E_MANIFEST"
) -> ManifestError:
    message = " ".join(f"found {found}, expected {expected}".split())  # values may hold newlines
    return ManifestError(f"{manifest}, line {line}: {message}", code, line)


def _fail(
    manifest: Path, line: int, found: str, expected: str, code: str = "E_MANIFEST"
) -> NoReturn:
    raise _error(manifest, line, found, expected, code)
