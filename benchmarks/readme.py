"""Renders the README's figures from the recorded runs in benchmarks/results: `make figures`.

A record is what a benchmark wrote there: what was measured, beside the machine, versions and commit
it was measured on. A run that is not recorded is "not run". `make lint` runs it with --check, which
writes nothing and fails where a number or a picture is not that of its record.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import plots
import targets

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
    """The record as a table."""
    picture: str | None = None
    """Its name in ``plots.PLOTS``."""


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


def columns(names: dict[str, str], **where: Any) -> Callable[[Record], str]:
    """The rows of a benchmark that have the values ``where``: its columns under their headings.

    A row with a note instead of figures shows the note.
    """

    def render(record: Record) -> str:
        rows = [row for row in record["rows"] if all(row.get(k, v) == v for k, v in where.items())]
        cells = [[cell(row.get(name)) for name in names] for row in rows]
        noted = [
            [*shown[:-1], row.get("note", shown[-1]).partition(":")[0]]
            for shown, row in zip(cells, rows, strict=True)
        ]
        return markdown(list(names.values()), noted)

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


LONG = 12
"""Lines of a table that is folded away; one beside a picture always is."""
MS = {"ms": "ms", "ms_p10": "10 %", "ms_p90": "90 %"}
WORK = {"GB/s": "GB/s", "of_floor": "of the floor", "peak_MiB": "peak, MiB"}
FIGURES = [
    Figure("demo_cpu", "Unseen built-in sounds, `make demo`", card, "demo"),
    Figure("animals_cpu", "Real recordings (animals, instruments), `train --config tiny`", card),
    Figure(
        "mel_cpu",
        "Log-mel front ends on one CPU thread, clips of 10 s",
        columns(
            {
                "variant": "",
                **MS,
                "audio_s_per_s": "s of audio per s",
                "times_stft": "x torch.stft",
            },
            case="C1",
            threads=1,
        ),
        "mel",
    ),
    Figure(
        "loading_cpu",
        "Packed beside padded, clips of 1 to 30 s through the tiny encoder",
        columns(
            {
                "variant": "",
                "tokens": "tokens",
                "useful": "useful",
                **MS,
                "times_packed": "x packed",
            },
            what="packing",
        ),
        "packing",
    ),
    Figure(
        "loading_cpu",
        "Loading: FLAC at 44.1 kHz to patches",
        columns(
            {"variant": "", "files/s": "files per s", "audio s/s": "s of audio per s"},
            what="loading",
        ),
        "loading",
    ),
    Figure(
        "loop_cpu",
        "A CLAP training loop, padded and packed",
        columns(
            {"variant": "", "clips": "", **MS, "audio s/s": "s of audio per s"}
            | {"times_packed": "x packed"}
        ),
    ),
    Figure(
        "map_pool_cpu",
        "MAP pooling head beside a padded SigLIP-style head, CPU, forward and backward",
        columns(
            {"case": "", "variant": "", **MS, "times_ours": "x ours"},
            direction="both",
        ),
    ),
    Figure(
        "step_cpu",
        "A training step of the tiny model, CPU, forward to EMA",
        columns(
            {"way": "", "ms": "ms", "times_fused": "x fused", "peak MB": "peak, MB"}
            | {"audio s/s": "s of audio per s", "MFU": "of a measured product's peak"}
        ),
    ),
    Figure(
        "attention_gpu",
        "Attention with rotary embedding beside its peers, GPU, C1",
        columns(
            {"layer": "", "variant": "", "direction": "", **MS, "TFLOP/s": "TFLOP/s", **WORK}
            | {"times_ours": "x ours"},
            case="C1",
        ),
        "attention-gpu",
    ),
    Figure(
        "map_pool_gpu",
        "MAP pooling, GPU",
        columns({"case": "", "variant": "", "direction": "", **MS, **WORK, "times_ours": "x ours"}),
    ),
    Figure(
        "mel_gpu",
        "Log-mel front ends, GPU",
        columns(
            {"case": "", "variant": "", **MS, "GB/s": "GB/s", "of_floor": "of the floor"}
            | {"times_stft": "x torch.stft"}
        ),
        "mel-gpu",
    ),
    Figure(
        "encoder_gpu",
        "Audio encoder, GPU",
        columns(
            {"case": "", "variant": "", "direction": "", **MS, "mfu": "of 989 TFLOP/s"}
            | {"audio_s_per_s": "s of audio per s", "peak_MiB": "peak, MiB"}
        ),
    ),
    Figure(
        "reliability", "Reliability: how often each promise was tried, `make soak`", reliability
    ),
]


def ran_on(machine: dict[str, Any]) -> str:
    """One line about a record's machine."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    return (
        f"{machine['device']}{driver}, threads: {machine['threads']}; Python {machine['python']}, "
        f"{versions}; commit {machine['commit']}, {machine['date']}."
    )


def section(records: dict[str, Record]) -> str:
    """The README's figures."""
    parts, absent = [], []
    for figure in FIGURES:
        record = records.get(figure.name)
        if record is None:
            absent.append(f"- {figure.title}: not run")
            continue
        parts.append(f"**{figure.title}**")
        table = figure.render(record)
        if figure.picture:
            parts.append(plots.markdown(figure.picture, figure.title.replace("`", "")))
        long = table.count("\n") > LONG
        parts.append(folded("table", table) if figure.picture or long else table)
    table = markdown(["target", "wanted", "reached", ""], targets.verdicts(records))
    parts += ["\n".join(absent), "**Targets** (times: one H200)", folded("table", table)]
    machines: dict[str, list[str]] = {}
    for name, record in records.items():
        machines.setdefault(ran_on(record["machine"]), []).append(name)
    notes = "<br>".join(f"{', '.join(names)}: {line}" for line, names in machines.items())
    return "\n\n".join([BEGIN, *filter(None, parts), f"<sub>{notes}</sub>", END])


def folded(summary: str, body: str) -> str:
    """Text that GitHub shows on a click."""
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def main() -> int:
    """Rewrites README.md and docs/images; with ``--check`` only says what is not as recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it would")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    options = parser.parse_args()
    readme, images = options.root / "README.md", options.root / "docs" / "images"
    paths = sorted((options.root / "benchmarks" / "results").glob("*.json"))
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    fresh = before + section(records) + rest.split(END)[1]
    pictures = {figure.picture: records.get(figure.name) for figure in FIGURES if figure.picture}
    drawn = {name: record for name, record in pictures.items() if record is not None}
    stale = [name for name, record in drawn.items() if not plots.is_fresh(name, record, images)]
    if options.check:
        for what in ["README.md"] * (fresh != text) + [f"docs/images/{name}-*" for name in stale]:
            print(f"{what}: not what benchmarks/results has; run: make figures")
        return int(fresh != text or bool(stale))
    for name in stale:
        plots.draw(name, drawn[name], images)
    readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
