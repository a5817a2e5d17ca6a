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

from benchmarks.report import plots, tables, targets
from benchmarks.report.tables import MS, Record, columns

ROOT = Path(__file__).parents[2]
BEGIN, END = (
    "<!-- figures: made by `make figures` from benchmarks/results -->",
    "<!-- end of figures -->",
)


class Figure(NamedTuple):
    """One record as the README shows it."""

    name: str
    """Its file in benchmarks/results, without .json."""
    title: str
    render: Callable[[Record], str]
    """The record as a table."""
    picture: str | None = None
    """Its name in ``plots.PLOTS``."""


LONG = 12
"""Lines of a table that is folded away; one beside a picture always is."""
WORK = {"GB/s": "GB/s", "of_floor": "of the floor", "peak_MiB": "peak, MiB"}
FIGURES = [
    Figure("demo_cpu", "Unseen built-in sounds, `make demo`", tables.card, "demo"),
    Figure(
        "animals_cpu", "Real recordings (animals, instruments), `train --config tiny`", tables.card
    ),
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
        "encoder_cpu",
        "The tiny encoder packed and padded to the longest, CPU, forward and backward",
        tables.encoder,
    ),
    Figure(
        "caption_loss_cpu",
        "The caption loss with its gradients, CPU",
        columns({"variant": "", **MS, "times_ours": "x ours", "peak_MiB": "peak, MiB"}),
    ),
    Figure(
        "step_cpu",
        "A training step of the tiny model, CPU, forward to EMA",
        columns(
            {"way": "", **MS, "times_fused": "x fused", "peak MB": "peak, MB"}
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
        "caption_loss_gpu",
        "The caption loss with its gradients, GPU",
        columns(
            {"variant": "", **MS, "TFLOP/s": "TFLOP/s", "times_ours": "x ours"}
            | {"peak_MiB": "peak, MiB"}
        ),
    ),
    Figure(
        "step_gpu",
        "A training step of the base model, GPU, forward to EMA",
        columns(
            {"way": "", **MS, "times_fused": "x fused", "peak MB": "peak, MB"}
            | {"audio s/s": "s of audio per s", "MFU": "MFU", "device days": "days of pretraining"}
        ),
    ),
    Figure(
        "reliability",
        "Reliability: how often each promise was tried, `make soak`",
        tables.reliability,
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
    table = tables.markdown(["target", "wanted", "reached", ""], targets.verdicts(records))
    parts += ["\n".join(absent), "**Targets** (GPU times: one H200)", folded("table", table)]
    machines: dict[str, list[str]] = {}
    for name, record in records.items():
        machines.setdefault(ran_on(record["machine"]), []).append(name)
    notes = "<br>".join(f"{', '.join(names)}: {line}" for line, names in machines.items())
    return "\n\n".join([BEGIN, *filter(None, parts), f"<sub>{notes}</sub>", END])


def folded(summary: str, body: str) -> str:
    """Text that GitHub shows on a click."""
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def main() -> int:
    """Rewrites README.md and docs/images; with ``--check`` only reports what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it would")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    options = parser.parse_args()
    readme, images = options.root / "README.md", options.root / "docs" / "images"
    paths = sorted((options.root / "benchmarks" / "results").glob("*.json"))
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    text = readme.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)
    fresh = before + section(records) + after.split(END)[1]
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
