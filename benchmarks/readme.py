"""Renders the README's figures from the recorded runs in benchmarks/results: `make figures`.

A record is what a benchmark wrote there: what was measured, beside the machine, versions and commit
it was measured on. A run that is not recorded is "not run".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
BEGIN, END = (
    "<!-- figures: made by `make figures` from benchmarks/results -->",
    "<!-- end of figures -->",
)
Record = dict[str, Any]


class Figure(NamedTuple):
    """One record as the README shows it."""

    name: str
    """Its file in benchmarks/results, without .json."""
    title: str
    render: Callable[[Record], str]
    """The record as Markdown."""


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is words, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def columns(*names: str, where: dict[str, Any] | None = None) -> Callable[[Record], str]:
    """The rows of a benchmark that have the values ``where``, as a table of these columns."""

    def render(record: Record) -> str:
        wanted = (where or {}).items()
        rows = [row for row in record["rows"] if all(row.get(k) == v for k, v in wanted)]
        return markdown(list(names), [[cell(row.get(name)) for name in names] for row in rows])

    return render


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
"""What each reliability figure of ``tests/figures.py`` counts the failures of."""


def reliability(record: Record) -> str:
    """A row per figure and kind of device; a figure that nobody tried says so."""
    rows = []
    for name, promise in PROMISES.items():
        tests = [test for test in record["figures"] if test["figure"] == name]
        if not tests:
            rows.append([f"{name}: {promise}", "not run", "", ""])
        for place in sorted({test["runs_on"] for test in tests}):
            here = [test for test in tests if test["runs_on"] == place]
            tried, wanted, failures = (
                sum(test[key] for test in here) for key in ("n", "wanted", "failures")
            )
            trials = f"{tried:,}" if tried == wanted else f"{tried:,} of {wanted:,}"
            rows.append([f"{name}: {promise}", trials, f"{failures:,}", place])
    return markdown(["", "trials", "failures", "ran on"], rows)


def cell(value: Any) -> str:
    """A figure to three digits, never in powers of ten."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


FIGURES = [
    Figure("demo_cpu", "Built-in sounds, `make demo`: combinations never trained on", card),
    Figure("animals_cpu", "Real recordings (animals, instruments), `train --config tiny`", card),
    Figure(
        "loading_cpu",
        "Packed beside padded: one pass of the tiny encoder, clips of 1 to 30 s",
        columns("variant", "tokens", "useful", "ms", "times_packed", where={"what": "packing"}),
    ),
    Figure(
        "map_pool_cpu",
        "MAP pooling head, forward and backward, beside a padded SigLIP-style head",
        columns("case", "variant", "ms", "times_ours", where={"direction": "both"}),
    ),
    Figure(
        "reliability", "Reliability: how often each promise was tried, `make soak`", reliability
    ),
]


def ran_on(machine: dict[str, Any]) -> str:
    """One line about a record's machine."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['device']}, {machine['threads']} threads; Python {machine['python']}, "
        f"{versions}; commit {machine['commit']}, {machine['date']}."
    )


def section() -> str:
    """The README's figures."""
    parts = []
    for figure in FIGURES:
        path = ROOT / "benchmarks" / "results" / f"{figure.name}.json"
        if not path.exists():
            parts.append(f"**{figure.title}**: not run")
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        body = f"{figure.render(record)}\n\n<sub>{ran_on(record['machine'])}</sub>"
        parts.append(f"**{figure.title}**\n\n{body}")
    return "\n\n".join([BEGIN, *parts, END])


def main() -> int:
    """Rewrites README.md; with ``--check`` only says whether it is up to date."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    fresh = before + section() + rest.split(END)[1]
    if "--check" in sys.argv:
        if fresh != text:
            print("README.md: its figures are not those of benchmarks/results; run: make figures")
        return int(fresh != text)
    readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
