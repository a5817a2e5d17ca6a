"""``slap-fast data``: check a collection, pack it into shards."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional
from tyro.extras import SubcommandApp

from slap_fast.console import console, emit, progress

app = SubcommandApp()

SHOWN = 20
"""Problems that are listed; all of them are in the JSON."""


@app.command
def check(
    data: Positional[str],
    split: str | None = None,
    workers: int = 2,
    json: bool = False,
) -> int:
    """List what is missing, corrupt, truncated, silent, too short, duplicate or mis-captioned.

    Everything is decoded. The exit code is 1 when something is bad.

    Example: slap-fast data check sounds/manifest.csv

    Args:
        data: A manifest, a folder of files, or a folder of shards.
        split: Only this split.
        workers: Processes that decode.
        json: Print the report, with every problem, as JSON on stdout.
    """
    from rich.table import Table

    from slap_fast.data import check as checks

    report = checks.check(data, split, workers=workers, progress=progress(json))
    table = Table("", "clips", title=f"{report.clips} clips, {report.seconds / 3600:.2f} h")
    for kind, count in report.counts().items():
        table.add_row(kind, str(count), style="red" if count else "dim")
    out = console(json)
    out.print(table)
    for problem in report.problems[:SHOWN]:
        place = f"line {problem.line}: " if problem.line else ""
        out.print(f"{problem.kind}: {place}{problem.message}", highlight=False)
    if len(report.problems) > SHOWN:
        out.print(f"and {len(report.problems) - SHOWN} more; --json lists them all")
    emit(checks.to_json(report), json)
    return 1 if report.problems else 0


@app.command
def pack(
    data: str,
    out: Path,
    split: str | None = None,
    shard_mb: int = 256,
    json: bool = False,
) -> int:
    """Write tar shards that train, eval and WebDataset read, with an index beside them.

    Files that cannot be opened are left out and listed in skipped.jsonl.

    Example: slap-fast data pack --data sounds/manifest.csv --out shards

    Args:
        data: A manifest or a folder of files.
        out: Folder for the shards.
        split: Only this split.
        shard_mb: Size of a shard, MB.
        json: Print the counts as JSON on stdout.
    """
    from slap_fast.data.manifest import read_manifest
    from slap_fast.data.shard_writer import write_shards
    from slap_fast.data.shards import read_index

    rows = read_manifest(data, split)
    skipped = write_shards(rows, out, shard_mb=shard_mb, progress=progress(json))
    index = read_index(out)
    shown = console(json)
    shown.print(f"{index.rows} of {len(rows)} clips in {len(index.shards)} shards: {out}")
    for code, count in skipped.items():
        shown.print(f"{count} left out: {code}; see {out / 'skipped.jsonl'}")
    emit({"clips": len(rows), "packed": index.rows, "skipped": dict(skipped)}, json)
    return 0
