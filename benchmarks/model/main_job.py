"""Records the main job as a user runs it: the demo, and a model of one's own recordings.

    python -m benchmarks.model.main_job demo
    python -m benchmarks.model.main_job files MANIFEST NAME

Writes benchmarks/results/demo_cpu.json and NAME_cpu.json: the card, the losses as they fell, the
seconds that each command took, and what it ran on.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import machine

RESULTS = Path(__file__).parents[1] / "results"
CURVE = ("step", "contrastive", "ssl", "caption")
"""What the record keeps of each line of metrics.jsonl."""


def run(*words: str) -> tuple[str, float]:
    """(stdout, seconds) of a slap-fast command; what it shows a person goes to stderr."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "slap_fast.cli", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, round(time.perf_counter() - started, 1)


def main() -> int:
    """Runs one job and records it."""
    job, *arguments = sys.argv[1:] or ["demo"]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        if job == "demo":
            name = "demo"
            card, seconds = run("demo", "--out", out, "--json")
            took = {"demo_seconds": seconds}
        else:
            manifest, name = arguments
            _, train = run("train", "--data", manifest, "--config", "tiny", "--out", out)
            card, evaluate = run("eval", "--model", out, "--data", manifest, "--json")
            took = {"train_seconds": train, "eval_seconds": evaluate}
        lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [row for row in map(json.loads, lines) if "loss" in row]
        curve = [{key: row.get(key, math.nan) for key in CURVE} for row in steps]
    path = RESULTS / f"{name}_cpu.json"
    machine.write(path, machine.record(card=json.loads(card), took=took, curve=curve))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
