"""``slap-fast data``: check a collection, pack it into shards."""

from __future__ import annotations

import json as json_module
import sys
from collections import Counter
from pathlib import Path

from tyro.conf import Positional
from tyro.extras import SubcommandApp

from slap_fast.cli.inputs import name_bad
from slap_fast.cli.options import within_bounds
from slap_fast.config.bounds import Count
from slap_fast.console import emit, make_console, show_progress

app = SubcommandApp()

MAX_LISTED = 20
"""Problems that are printed; all of them are in the JSON."""


@app.command
@within_bounds
def check(
    data: Positional[str],
    split: str | None = None,
    root: Path | None = None,
    workers: Count = 2,
    json: bool = False,
) -> int:
    """List what is missing, corrupt, truncated, silent, too short, duplicate or mis-captioned.

    Everything is decoded. The exit code is 1 when something is bad.

    Example: slap-fast data check sounds/manifest.csv

    Args:
        data: A manifest, a folder of files, or a folder of shards.
        split: Only this split.
        root: Folder that a manifest's relative paths count from; by default its own.
        workers: Processes that decode.
        json: Print the report, with every problem, as JSON on stdout.
    """
    from rich.table import Table

    from slap_fast.data.validate import to_json, validate

    report = validate(data, split, root=root, workers=workers, progress=show_progress(json))
    table = Table("", "clips", title=f"{report.clips} clips, {report.seconds / 3600:.2f} h")
    for kind, count in report.counts().items():
        table.add_row(kind, str(count), style="red" if count else "dim")
    console = make_console(json)
    console.print(table)
    for problem in report.problems[:MAX_LISTED]:
        place = f"line {problem.line}: " if problem.line else ""
        console.print(f"{problem.kind}: {place}{problem.message}", highlight=False)
    if len(report.problems) > MAX_LISTED:
        console.print(f"and {len(report.problems) - MAX_LISTED} more; --json lists them all")
    emit(to_json(report), json)
    return 1 if report.problems else 0


@app.command
@within_bounds
def pack(
    data: tuple[str, ...],
    out: Path,
    split: str | None = None,
    root: Path | None = None,
    shard_mb: Count = 256,
    json: bool = False,
) -> int:
    """Write tar shards that train, eval and WebDataset read, with an index beside them.

    Clips that cannot be used are left out and listed in skipped.jsonl. WebDataset tars of other
    tools are read in one pass: KEY.flac (or wav, mp3, ...) and KEY.txt or KEY.json, one after the
    other, as tar --sort=name puts them. A tar that breaks off is listed once, for all after it.

    Example: slap-fast data pack --data sounds/manifest.csv --out shards

    Args:
        data: A manifest, a folder of files, or WebDataset tars and folders of them.
        out: Folder for the shards.
        split: Only this split; tars are packed whole, by the split that KEY.json names.
        root: Folder that a manifest's relative paths count from; by default its own.
        shard_mb: Size of a shard, MB.
        json: Print the counts as JSON on stdout.
    """
    from slap_fast.atomic_files import only_writer
    from slap_fast.data.manifest import ManifestError, read_manifest
    from slap_fast.data.shards.import_tars import find_tars, read_tars
    from slap_fast.data.shards.index import read_index
    from slap_fast.data.shards.writer import NothingPackedError, write_clips, write_shards

    tars, ignored, bad = find_tars(data), Counter[str](), list[ManifestError]()
    options = {"shard_mb": shard_mb, "progress": show_progress(json)}
    if tars and split is not None:
        raise ValueError(f"--split: found {split!r}, expected none: tars are packed whole")
    if not tars and len(data) != 1:
        raise ValueError(f"--data: found {len(data)} paths, expected one, or tars")
    rows = [] if tars else read_manifest(data[0], split, root=root, bad=bad)
    with only_writer(out):
        try:
            if tars:
                skipped = write_clips(read_tars(tars, ignored), out, **options)
            else:
                skipped = write_shards(rows, out, bad=bad, **options)
        except NothingPackedError as error:
            print(f"slap-fast: error: {error}; see {out / 'skipped.jsonl'}", file=sys.stderr)
            return 1
    index = read_index(out)
    clips = index.rows + skipped.total()
    console = make_console(json)
    console.print(f"{index.rows} of {clips} clips in {len(index.shards)} shards: {out}")
    for code, count in skipped.items():
        console.print(f"{count} left out: {code}")
    if skipped:
        lines = (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
        messages = [json_module.loads(line)["message"] for line in lines]
        name_bad(messages, clips, where=str(out / "skipped.jsonl"))
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(MAX_LISTED))
        console.print(f"{ignored.total()} other members in the tars: {kinds}", highlight=False)
    result = {"clips": clips, "packed": index.rows, "skipped": dict(skipped)}
    emit(result | ({"ignored": dict(ignored)} if tars else {}), json)
    return 0
