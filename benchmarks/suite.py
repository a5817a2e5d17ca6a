"""All benchmarks and checks of a machine in one command: `make bench`, `slap-fast bench`.

    python -m benchmarks.suite [STEP ...] [--out DIR] [--minutes 9.5] [--again] [--wheels DIR]

With a GPU: builds the extension, compares every kernel with the reference in each dtype, runs the
kernels' tests, the sanitizer, and the benchmarks. Without one: what a CPU can run. No network is
needed; --wheels adds a step that installs peers, and whatever else is missing, from a folder.

DIR gets a JSON record for each benchmark, suite_gpu.json (or suite_cpu.json) with the outcome
of each step, and suite.log with all that was printed. A step that is done at this commit is not run
again, and a benchmark resumes after its last complete part: an interrupted run resumes where
it stopped. Once peers were installed, everything is run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from benchmarks import machine

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
KIND = "gpu" if torch.cuda.is_available() else "cpu"
PIP = [PYTHON, "-m", "pip", "install", "--no-index", "--no-deps"]
SANITIZER = "compute-sanitizer"
PROCESSES = str(min(8, os.cpu_count() or 1))
KERNEL_TESTS = sorted(path.stem for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
MODEL_TEST = "tests/models/test_slap_triton.py"


class Step(NamedTuple):
    """One command of the suite."""

    name: str
    command: list[str]
    needs: str | None = None
    """"gpu" or "cpu", where the step has no meaning on the other."""
    environment: dict[str, str] = {}


def benchmark(
    module: str, out: Path, dry_run: bool, options: Sequence[str] = (), needs: str | None = None
) -> Step:
    """A module below benchmarks, such as ``ops.mel``, which writes its record."""
    name = module.partition(".")[2]
    command = [
        PYTHON,
        "-m",
        f"benchmarks.{module}",
        "--json",
        str(out / f"{name}_{KIND}.json"),
        *options,
    ]
    return Step(name, command + ["--rounds", "2", "--scale", "0.002"] * dry_run, needs)


def steps(out: Path, wheels: Path | None, dry_run: bool, again: bool = False) -> list[Step]:
    """All steps in order: errors show before anything is timed.

    A dry run takes tiny shapes, collects tests, lets pip pretend, and interprets the kernels where
    there is no GPU, so that it goes through every step on any machine.
    """
    gpu = None if dry_run else "gpu"
    pretend = ["--dry-run"] * dry_run
    # Side by side, as compiling a kernel takes a processor up to a minute.
    parallel = ["-n", PROCESSES] if find_spec("xdist") and not dry_run else []
    tests = [PYTHON, "-m", "pytest", "-q", *parallel, *["--collect-only"] * dry_run]
    interpret = {"TRITON_INTERPRET": "1"} if dry_run and KIND == "cpu" else {}
    numerics = benchmark("ops.numerics", out, dry_run=False)
    resume = [] if again else ["--resume"]
    one_compiled = ["--beside", "reference"] * dry_run  # compiling a step takes two minutes
    peers = [] if wheels is None else [Step("peers", [*PIP, *pretend, *_wheel_files(wheels)])]
    return [
        *peers,
        Step("build", [*PIP, *pretend, "--no-build-isolation", "-e", "."], gpu),
        numerics._replace(environment=interpret),
        *(
            Step(name, [*tests, "-m", "not slow", f"tests/kernels/{name}.py"], gpu)
            for name in KERNEL_TESTS
        ),
        *(
            Step(
                tool,
                [SANITIZER, "--tool", tool, "--error-exitcode", "9", *numerics.command[:3]],
                "gpu",
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in ("memcheck", "racecheck")
        ),
        benchmark("ops.mel", out, dry_run, resume),
        benchmark("ops.map_pool", out, dry_run, resume),
        benchmark("ops.attention", out, dry_run, resume),
        benchmark("model.encoder", out, dry_run, resume),
        benchmark("model.unpadding", out, dry_run, resume),
        benchmark("ops.caption_loss", out, dry_run, resume),
        benchmark("model.step", out, dry_run, one_compiled),
        benchmark("model.loading", out, dry_run, resume),
        benchmark("model.loop", out, dry_run, resume, needs="cpu"),
        Step("slow_kernel_tests", [*tests, "-m", "slow", "tests/kernels", MODEL_TEST], gpu),
    ]


def _wheel_files(wheels: Path) -> list[str]:
    return sorted(str(path.resolve()) for path in wheels.glob("*.whl"))


def run(step: Step, log: IO[str], seconds: float) -> dict[str, Any]:
    """Runs a step, prints and logs its output, and returns its outcome."""
    started = time.perf_counter()
    if shutil.which(step.command[0]) is None:
        return {"status": f"not run: no {step.command[0]} here"}
    columns = shutil.get_terminal_size((160, 24)).columns
    environment = {"PYTHONUNBUFFERED": "1", "COLUMNS": str(columns), **step.environment}
    environment.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line of slap-fast
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    expired = threading.Event()
    timer = threading.Timer(seconds, lambda: (expired.set(), _kill(process)))
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
        code = process.wait()
    except BaseException:  # Ctrl-C, or another signal that ends this process
        _kill(process)
        raise
    finally:
        timer.cancel()
    status = "done" if code == 0 else f"failed with exit code {code}"
    status = "stopped: no time was left" if expired.is_set() else status
    return {"status": status, "seconds": round(time.perf_counter() - started, 1)}


def _kill(process: subprocess.Popen[str]) -> None:
    """Kills a step and, where there are process groups, all that it started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def chosen_steps(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Step]:
    """The steps that were asked for; refuses an unknown one, and a folder with no wheels."""
    if options.wheels is not None and not _wheel_files(options.wheels):
        parser.error(f"--wheels: found no .whl in {options.wheels}")
    every = steps(options.out.resolve(), options.wheels, options.dry_run, options.again)
    names = [step.name for step in every]
    if unknown := [name for name in options.steps if name not in names]:
        parser.error(f"found step {', '.join(unknown)}, expected some of {', '.join(names)}")
    return [step for step in every if not options.steps or step.name in options.steps]


def main() -> int:
    """Runs the steps that are not done yet; returns 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", help="by default all of them")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--minutes", type=float, default=9.5, help="a step past it is stopped")
    parser.add_argument("--wheels", type=Path, help="install the wheels of this folder first")
    parser.add_argument("--again", action="store_true", help="also run what is done")
    parser.add_argument("--dry-run", action="store_true", help="every step, tiny, on any machine")
    options = parser.parse_args()
    deadline = time.perf_counter() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = chosen_steps(options, parser)
    path = options.out / f"suite_{KIND}.json"
    record = machine.record(steps={})
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["machine"]["commit"] == record["machine"]["commit"]:
            record["steps"] = earlier["steps"]
    outcomes = record["steps"]
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "suite.log").open("a", encoding="utf-8") as log:
        for step in chosen:
            left = deadline - time.perf_counter()
            if not options.again and outcomes.get(step.name, {}).get("status") == "done":
                print(f"{step.name}: done before; --again runs it again", flush=True)
                continue
            if step.needs not in (None, KIND):
                outcomes[step.name] = {"status": f"not run: needs a {step.needs.upper()}"}
            elif left <= 0:
                outcomes[step.name] = {"status": "not run: no time was left"}
            else:
                for target in (sys.stdout, log):
                    print(f"== {step.name}: {' '.join(step.command)}", file=target, flush=True)
                if step.name == "peers":
                    outcomes.clear()  # what was timed without them is timed again
                outcomes[step.name] = run(step, log, left)
            machine.write(path, record)
    return summarise({step.name: outcomes[step.name] for step in chosen}, options.out)


def summarise(outcomes: dict[str, dict[str, Any]], out: Path) -> int:
    """Prints the outcome of each step and what to do next; returns 1 when one failed."""
    print()
    for name, outcome in outcomes.items():
        seconds = f"{outcome['seconds']:6.1f} s" if "seconds" in outcome else " " * 8
        print(f"{name:24}{seconds}  {outcome['status']}")
    print(f"\nrecords and suite.log: {out}")
    if any("no time" in outcome["status"] for outcome in outcomes.values()):
        print("not finished: the same command continues")
    return int(any(outcome["status"].startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
