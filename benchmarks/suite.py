"""Everything that is recorded of a machine, in one command: `make bench`.

    python benchmarks/suite.py [--out DIR] [--minutes 10] [--only NAME,...] [--wheels DIR]

With a GPU: installs the peers from a folder of wheels where one is given, runs the kernels' tests
compiled, then under compute-sanitizer, then the benchmarks. Without one: what a CPU can say, and
"needs a GPU" for the rest. Each step has a log and a line in DIR/suite.json; a step that is done is
not run again, so a run that was cut off goes on where it stopped. A step that would pass the limit
of time is stopped and says so. No network is needed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import machine
import torch

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable


class Step(NamedTuple):
    """One command of the suite."""

    name: str
    command: list[str]
    needs_gpu: bool = False


def steps(out: Path, wheels: Path | None, dry_run: bool) -> list[Step]:
    """All there is, in order: what is wrong shows before anything is timed."""
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    quick = ["--rounds", "2", "--scale", "0.002"] if dry_run else []
    tests = [PYTHON, "-m", "pytest", "-q", "-x", "tests/kernels"]
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    peers = [] if wheels is None else [Step("peers", _install(wheels), needs_gpu=True)]
    return [
        *peers,
        Step("kernel-tests", [*tests, "-m", "not slow"], needs_gpu=True),
        Step("kernel-tests-long", [*tests, "-m", "slow"], needs_gpu=True),
        Step(
            "sanitizer",
            [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *tests, "-m", "gpu"],
            needs_gpu=True,
        ),
        *(
            Step(
                name,
                [
                    PYTHON,
                    f"benchmarks/{name}.py",
                    "--json",
                    str(out / f"{name}_{kind}.json"),
                    *quick,
                ],
            )
            for name in ("mel", "loading", "attention", "map_pool")
        ),
    ]


def _install(wheels: Path) -> list[str]:
    # --no-deps: nothing may replace the torch and the triton that are there.
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    return [PYTHON, "-m", "pip", "install", "--no-index", "--no-deps", *files]


def run(step: Step, out: Path, seconds: float) -> dict[str, object]:
    """Runs a step, its output in ``out``/NAME.log; what became of it."""
    started = time.perf_counter()
    with (out / f"{step.name}.log").open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                step.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
            status = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = "stopped: no time was left"
        except OSError as error:
            status = f"not run: {error}"
    return {"status": status, "seconds": round(time.perf_counter() - started, 1)}


def main() -> int:
    """Runs what is not done yet; 1 when a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", help="names of steps with commas between")
    parser.add_argument("--wheels", type=Path, help="a folder of peers' wheels to install")
    parser.add_argument("--again", action="store_true", help="also run what is done")
    parser.add_argument("--dry-run", action="store_true", help="two rounds of tiny shapes")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record = out / "suite.json"
    known = {} if options.again or not record.exists() else json.loads(record.read_text())["steps"]
    chosen = steps(out, options.wheels, options.dry_run)
    if options.only:
        wanted = options.only.split(",")
        unknown = set(wanted) - {step.name for step in chosen}
        if unknown:
            names = ", ".join(step.name for step in chosen)
            parser.error(f"--only: found {', '.join(unknown)}, expected some of {names}")
        chosen = [step for step in chosen if step.name in wanted]
    deadline = time.perf_counter() + 60 * options.minutes
    for step in chosen:
        left = deadline - time.perf_counter()
        if known.get(step.name, {}).get("status") == "done":
            pass
        elif step.needs_gpu and not torch.cuda.is_available():
            known[step.name] = {"status": "not run: needs a GPU"}
        elif left <= 0:
            known[step.name] = {"status": "not run: no time was left"}
        else:
            print(f"{step.name} ...", flush=True)
            known[step.name] = run(step, out, left)
        print(f"{step.name}: {known[step.name]['status']}", flush=True)
        machine.write(record, machine.record(steps=known))
    failed = [name for name, row in known.items() if str(row["status"]).startswith("failed")]
    for name in failed:
        print(f"{name} failed; its output is in {out / name}.log", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
