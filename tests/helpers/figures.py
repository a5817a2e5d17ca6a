"""Reliability figures: how often each promise was tested, and how often it was broken.

A test draws its seeds from the ``figure`` fixture::

    def test_resume_after_kill(figure):
        for seed in figure("C1", ci=60, soak=1000):
            ...

Every run of the tests makes ``ci`` trials. ``make soak`` runs only the tests that have a figure;
each makes ``soak`` trials, or as many as fit in ``--soak-minutes`` but no fewer than ``ci``, and
its record is written to ``benchmarks/results/reliability.json`` at once, beside those of earlier
soaks on other devices. A figure without a record is listed there as not run. A trial that raises,
or ends the process, is a failure and ends its test.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine
from tests.helpers.paths import ROOT

IDS = (
    *(f"K{i}" for i in range(1, 13)),
    *(f"D{i}" for i in range(1, 9)),
    *(f"C{i}" for i in range(1, 8)),
    *(f"A{i}" for i in range(1, 10)),
)
"""Kernels, distributed and training, checkpoints, data and security."""


class Figure:
    """Counts the trials of one test; called with a figure's id, it yields their seeds."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.config, self.test = request.config, request.node.nodeid
        self.soak: bool = self.config.getoption("--soak")
        """Whether this is `make soak`."""
        self.records: list[dict[str, Any]] = []

    def __call__(self, name: str, *, ci: int, soak: int, batch: int = 1) -> Iterator[int]:
        """Yields seeds 0, 1, ... of the trials; a trial counts when the next seed is requested.

        A test that makes ``batch`` trials at a time gets the first seed of each batch.
        """
        assert name in IDS, name
        trials, budget = ci, float("inf")
        if self.soak:
            trials, budget = soak, 60 * self.config.getoption("--soak-minutes")
        started = time.perf_counter()
        record = {"figure": name, "test": self.test, "wanted": trials, "n": 0, "seconds": 0.0}
        self.records.append(record)
        for seed in range(0, trials, batch):
            record |= {"failures": 1, "failed_seed": seed}  # until the trial has ended
            if self.soak and seed == 0:
                self.write()  # stays if the trial ends this process
            yield seed
            seconds = time.perf_counter() - started
            record |= {"n": seed + batch, "failures": 0, "seconds": round(seconds, 1)}
            record["seeds"] = [0, seed + batch - 1]
            del record["failed_seed"]
            if seconds > budget and seed + batch >= ci:
                return

    def write(self) -> None:
        """Writes the records so far into the report."""
        write(self.config.getoption("--soak-to"), self.records, self.config.rootpath)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Iterator[Figure]:
    """Yields the seeds of a reliability figure's trials; see the module."""
    counter = Figure(request)
    yield counter
    if counter.soak:
        counter.write()


def write(path: Path, records: list[dict[str, Any]], root: Path) -> None:
    """Replaces records of the same tests on the same kind of device; drops those of tests that
    ``root`` no longer has."""
    report = machine.record()
    ran_on = report["machine"]
    has_gpu = torch.cuda.is_available()
    where = {
        "runs_on": ran_on["device"] if has_gpu else "CPU, kernels interpreted",
        "commit": ran_on["commit"],
    }
    fresh = [record | where for record in records]
    replaced = {(record["test"], record["figure"], record["runs_on"]) for record in fresh}
    kept = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else []
    kept = [r for r in kept if (r["test"], r["figure"], r["runs_on"]) not in replaced]
    kept = [r for r in kept if has_test(r["test"], root)]
    report["figures"] = sorted(kept + fresh, key=lambda r: (IDS.index(r["figure"]), r["test"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    tried = {record["figure"] for record in report["figures"]}
    report["not_run"] = [name for name in IDS if name not in tried]
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def has_test(test: str, root: Path) -> bool:
    """Whether a test of this id is defined below ``root``."""
    path, *_, name = test.split("::")
    text = (root / path).read_text(encoding="utf-8") if (root / path).is_file() else ""
    return f"def {name.partition('[')[0]}(" in text


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="only the figures, in long form")
    parser.addoption("--soak-minutes", type=float, default=5.0, help="at most, per figure")
    parser.addoption(
        "--soak-to",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "reliability.json",
        help="JSON file of the records",
    )


def pytest_configure(config: pytest.Config) -> None:
    processes = config.getoption("numprocesses", None)  # of xdist, which may be missing
    if config.getoption("--soak") and processes:
        raise pytest.UsageError(f"--soak: found -n {processes}, expected none: one file is written")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--soak"):
        return
    chosen = [item for item in items if "figure" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
