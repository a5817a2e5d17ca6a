"""Commands about this machine: ``slap-fast plan``, ``doctor`` and ``bench``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tyro.conf import Positional

from slap_fast.cli.options import Config, Settings, load_recipe, parse_setting
from slap_fast.config.bounds import Positive
from slap_fast.console import emit, make_console

CHECKOUT = Path(__file__).parents[2]
"""The repository, where it was installed by ``pip install -e .``; else site-packages."""


def plan(gpu: str, config: Config = "base", settings: Settings = (), json: bool = False) -> int:
    """How much of a GPU's memory a run would take, and the largest batch that fits: an estimate.

    Example: slap-fast plan --gpu 24GB --config base

    Args:
        gpu: Its memory, such as 24GB or 80GiB.
        json: Print the plan as JSON on stdout.
    """
    from slap_fast.diagnostics import memory

    size = memory.memory_of(gpu)
    run = load_recipe(config, dict(map(parse_setting, settings)))
    estimate = memory.estimate_memory(run, size)
    memory.render(estimate, make_console(json))
    emit(estimate, json)
    return 0


def doctor(parity: bool = False, json: bool = False) -> int:
    """What is installed, what runs where, and what to do about the rest.

    Example: slap-fast doctor --parity

    Args:
        parity: Also run the kernels against the reference on this device, error beside tolerance.
        json: Print the report as JSON on stdout.
    """
    from slap_fast.diagnostics import doctor

    report = doctor.parity(doctor.report()) if parity else doctor.report()
    if not json:
        doctor.render(report)
    emit(report, json)
    return doctor.exit_code(report)


def bench(
    steps: Positional[tuple[str, ...]] = (),
    out: Path = Path("runs/bench"),
    minutes: Positive = 9.5,
    wheels: Path | None = None,
    again: bool = False,
    dry_run: bool = False,
) -> int:
    """Time what this machine runs beside its peers; in a checkout of the repository.

    The same as make bench. Checks everything before it is timed; goes on where it was cut off.

    Example: slap-fast bench mel attention

    Args:
        steps: Which; by default all. A name that is not one shows them.
        out: Folder for the JSON records and suite.log.
        minutes: A step that would pass this is stopped.
        wheels: A folder of peers to install first, with no network.
        again: Also run what is done.
        dry_run: Every step, tiny, on any machine.
    """
    suite = CHECKOUT / "benchmarks" / "suite.py"
    if not suite.is_file():
        raise ValueError(
            f"bench: found no {suite}, expected a checkout of the repository, installed by "
            "pip install -e . (a wheel holds no benchmarks)"
        )
    # Relative to the user's folder; the suite is a module of the checkout and runs there.
    from slap_fast.atomic_files import only_writer

    command = [sys.executable, "-m", "benchmarks.suite", *steps]
    command += ["--out", str(out.resolve()), "--minutes", str(minutes)]
    command += ["--wheels", str(wheels.resolve())] if wheels else []
    command += ["--again"] * again + ["--dry-run"] * dry_run
    with only_writer(out):
        return subprocess.run(command, cwd=CHECKOUT).returncode
