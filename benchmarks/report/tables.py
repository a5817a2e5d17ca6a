"""The README's tables: each makes markdown of one record of benchmarks/results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
MS = {"ms": "ms", "ms_p10": "10 %", "ms_p90": "90 %"}
"""Columns of a time, and their headings."""


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is words, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A figure to three digits, never in powers of ten."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def columns(names: dict[str, str], **where: Any) -> Callable[[Record], str]:
    """The rows of a benchmark that have the values ``where``: its columns under their headings,
    save a column that none of them has.

    A row with a note instead of figures shows the note; a variant that has nothing else is in a
    line below.
    """

    def render(record: Record) -> str:
        rows = [row for row in record["rows"] if all(row.get(k, v) == v for k, v in where.items())]
        ran = {row.get("variant") for row in rows if "note" not in row}
        shown = [row for row in rows if row.get("variant") in ran]
        kept = [name for name in names if any(row.get(name) is not None for row in shown)]
        cells = [[cell(row.get(name)) for name in kept] for row in shown]
        for line, row in zip(cells, shown, strict=True):
            line[-1] = row.get("note", line[-1]).partition(":")[0]
        table = markdown([names[name] for name in kept], cells)
        absent: dict[str, dict[str, None]] = {}
        for row in rows:
            if row.get("variant") not in ran:
                absent.setdefault(row["note"].partition(":")[0], {})[row["variant"]] = None
        not_run = "; ".join(
            f"{', '.join(f'`{name}`' for name in variants)}: {why}"
            for why, variants in absent.items()
        )
        return f"{table}\n\nNot run: {not_run}." if not_run else table

    return render


def encoder(record: Record) -> str:
    """Packed beside padded, and a line that names the cases where padded is faster."""
    table = columns(
        {"case": "", "variant": "", **MS, "audio_s_per_s": "s of audio per s"}
        | {"times_ours": "x ours"},
        direction="both",
    )(record)
    cases = {row["case"]: row for row in record["rows"] if row.get("direction") == "both"}
    slower = [
        f"{name} ({record['cases'][name]['what']}, {row['times_ours']:.2f} x)"
        for name, row in cases.items()
        if row["variant"] == "PyTorch, padded" and row["times_ours"] < 1
    ]
    note = "\n\nPadded is faster on "
    return table + (f"{note}{' and '.join(slower)}." if slower else "")


def card(record: Record) -> str:
    """An evaluation card, chance levels beside the figures."""
    card = record["card"]
    retrieval, chance = card["retrieval"], card["retrieval"]["chance"]
    rows = [
        [f"{name}, {key}", f"{retrieval[side][key]:.1%}", f"{chance[side][key]:.1%}"]
        for side, name in (("t2a", "text to audio"), ("a2t", "audio to text"))
        for key in ("R@1", "R@10")
    ]
    zero_shot, caption = card["zero_shot"], card["caption"]
    labels = f"zero-shot, {len(zero_shot['labels'])} labels"
    majority = f"{zero_shot['majority']:.1%} (majority)"
    rows.append([f"{labels}, accuracy", f"{zero_shot['accuracy']:.1%}", majority])
    balanced = f"{zero_shot['balanced_accuracy']:.1%}"
    rows.append([f"{labels}, balanced accuracy", balanced, f"{zero_shot['chance']:.1%}"])
    shuffled = f"{caption['CIDEr-D_shuffled']:.2f} (shuffled captions)"
    rows.append(["captions, CIDEr-D", f"{caption['CIDEr-D']:.2f}", shuffled])
    took = ", ".join(
        f"{name.removesuffix('_seconds')} {seconds:.0f} s"
        for name, seconds in record["took"].items()
    )
    table = markdown(["", "figure", "chance"], rows)
    return f"{table}\n\n{card['n']} of {card['n_expected']} clips evaluated; {took}."


PROMISES = {
    "K1": "packed attention, forward and backward, against fp64",
    "K2": "within the tolerance rule of the tests",
    "K3": "a clip's bits do not depend on its neighbours",
    "K4": "nothing is read or written out of bounds",
    "K5": "addresses past 2^31 and 2^32",
    "K6": "opcheck and gradcheck of every operation",
    "K7": "every launch setting against the reference",
    "K8": "repeats give the same bits",
    "K9": "compute-sanitizer",
    "K10": "torch.compile: no graph break, few recompilations",
    "K11": "planted bugs are caught",
    "K12": "C++ under sanitizers, fuzzed calls",
    "D1": "gradients on many ranks equal those on one",
    "D2": "DDP and FSDP2 after 20 steps equal one rank",
    "D3": "a step that is not finite: one decision, state unchanged",
    "D4": "a dead or stuck rank ends the others",
    "D5": "uneven data: no hang",
    "D6": "losses of kernels equal those of the reference",
    "D7": "golden losses, to the bit",
    "D8": "collapse is noticed",
    "C1": "kill -9: resumed to the bit",
    "C2": "damaged checkpoints are noticed, an older one is taken",
    "C3": "disk full, read-only, two writers, clock jumps",
    "C4": "resumed at any step: the same samples",
    "C5": "another number of ranks: the same order",
    "C6": "SIGTERM in any phase saves",
    "C7": "no reader sees half a checkpoint",
    "A1": "damaged audio: no crash, hang or 512 MB",
    "A2": "labelled files have their code",
    "A3": "damaged shards: each lost clip is noticed, and no other",
    "A4": "seen = trained + skipped by code, after kill -9 too",
    "A5": "text of any kind: an answer or a typed error",
    "A6": "malicious files run nothing, write nothing outside",
    "A7": "no unsafe call in the source",
    "A8": "a 109 M-row index: open and seek in 2 s and 1 GB",
    "A9": "memory, files and threads over a long run",
}
"""What each reliability figure of ``tests/helpers/figures.py`` counts the failures of."""


def reliability(record: Record) -> str:
    """A row per figure and kind of device, also for a figure that was not run."""
    rows = []
    for name, promise in PROMISES.items():
        tests = [test for test in record["figures"] if test["figure"] == name]
        if not tests:
            rows.append([f"{name}: {promise}", "not run", "", ""])
        for place in sorted({test["runs_on"] for test in tests}):
            on_device = [test for test in tests if test["runs_on"] == place]
            tried, planned, failures = (
                sum(test[key] for test in on_device) for key in ("n", "wanted", "failures")
            )
            trials = f"{tried:,}" if tried == planned else f"{tried:,} of {planned:,}"
            rows.append([f"{name}: {promise}", trials, f"{failures:,}", place])
    return markdown(["", "trials", "failures", "ran on"], rows)
