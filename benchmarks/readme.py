"""Renders the README's figures from the recorded runs in benchmarks/results: `make figures`.

A run is a card as `slap-fast demo --json` or `slap-fast eval --json` prints it, beside what it ran
on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = (
    "<!-- figures: made by `make figures` from benchmarks/results -->",
    "<!-- end of figures -->",
)
RUNS = {
    "demo_cpu.json": "Built-in sounds, `make demo`: combinations of attributes never trained on",
    "animals_cpu.json": "Real recordings (animals, instruments), `slap-fast train --config tiny`",
}


def table(run: dict[str, Any]) -> str:
    """One card as a Markdown table, chance levels beside the figures."""
    card = run["card"]
    retrieval, chance = card["retrieval"], card["retrieval"]["chance"]
    rows = [
        (f"{name}, {key}", f"{retrieval[side][key]:.1%}", f"{chance[side][key]:.1%}")
        for side, name in (("t2a", "text to audio"), ("a2t", "audio to text"))
        for key in ("R@1", "R@10")
    ]
    zero_shot, caption = card["zero_shot"], card["caption"]
    labels = f"zero-shot, {len(zero_shot['labels'])} labels"
    majority = f"{zero_shot['majority']:.1%} (majority)"
    rows.append((f"{labels}, accuracy", f"{zero_shot['accuracy']:.1%}", majority))
    balanced = f"{zero_shot['balanced_accuracy']:.1%}"
    rows.append((f"{labels}, balanced accuracy", balanced, f"{zero_shot['chance']:.1%}"))
    shuffled = f"{caption['CIDEr-D_shuffled']:.3f} (shuffled captions)"
    rows.append(("captions, CIDEr-D", f"{caption['CIDEr-D']:.3f}", shuffled))
    lines = [
        "| | figure | chance |",
        "|---|---|---|",
        *(f"| {a} | {b} | {c} |" for a, b, c in rows),
    ]
    facts = ", ".join(f"{key} {value}" for key, value in run["facts"].items())
    lines += ["", f"{card['n']} of {card['n_expected']} clips evaluated; {facts}."]
    return "\n".join(lines)


def section() -> str:
    """The README's figures; a run that is not recorded says so."""
    parts = []
    for name, title in RUNS.items():
        path = ROOT / "benchmarks" / "results" / name
        body = table(json.loads(path.read_text())) if path.exists() else "not run"
        parts.append(f"**{title}**\n\n{body}")
    return "\n\n".join([BEGIN, *parts, END])


def main() -> int:
    """Rewrites README.md; with ``--check`` only says whether it is up to date."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    fresh = before + section() + rest.split(END)[1]
    if "--check" in sys.argv:
        return 0 if fresh == text else 1
    readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
