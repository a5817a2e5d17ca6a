"""The reliability figures: how often a promise was tried, and how often it was broken.

A test draws its seeds from the ``figure`` fixture::

    def test_resume_after_kill(figure):
        for seed in figure("C1", ci=60, soak=1000):
            ...

Every run of the tests makes ``ci`` trials. ``make soak`` makes ``soak`` of them, or as many as fit
in ``--soak-minutes`` for each figure, and writes what came of it to ``reliability.json``. A figure
that was not tried is "not run" there; a trial that raises is a failure, and ends its test.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

IDS = (
    *(f"K{i}" for i in range(1, 13)),
    *(f"D{i}" for i in range(1, 9)),
    *(f"C{i}" for i in range(1, 8)),
    *(f"A{i}" for i in range(1, 10)),
)
"""Kernels, distributed and training, checkpoints, data and security."""

RECORDS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()


class Figure:
    """Counts the trials of one test; called with a figure's id, it yields their seeds."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.config, self.test = request.config, request.node.nodeid
        self.soak = self.config.getoption("--soak")
        self.records: list[dict[str, Any]] = []

    def __call__(self, name: str, *, ci: int, soak: int, batch: int = 1) -> Iterator[int]:
        """Seeds 0, 1, ... of the trials; a trial counts once the next one is asked for.

        A test that makes ``batch`` trials at a time gets the first seed of each batch.
        """
        assert name in IDS, name
        wanted, budget = ci, float("inf")
        if self.soak:
            wanted, budget = soak, 60 * self.config.getoption("--soak-minutes")
        started = time.perf_counter()
        record = {"test": self.test, "n": 0, "wanted": wanted, "failures": 0, "seconds": 0.0}
        self.records.append({"figure": name, **record})
        for seed in range(0, wanted, batch):
            self.records[-1]["failures"] = 1  # until the trial has come to its end
            yield seed
            seconds = time.perf_counter() - started
            self.records[-1] |= {"n": seed + batch, "failures": 0, "seconds": round(seconds, 1)}
            if seconds > budget:
                return


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Iterator[Figure]:
    """Seeds of a reliability figure's trials; see the module."""
    counter = Figure(request)
    yield counter
    for record in counter.records:
        request.config.stash[RECORDS].setdefault(record.pop("figure"), []).append(record)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="the long forms; writes reliability.json")
    parser.addoption("--soak-minutes", type=float, default=5.0, help="at most, for each figure")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--soak"):
        return
    records = session.config.stash[RECORDS]
    has_gpu = torch.cuda.is_available()
    report = {
        "device": torch.cuda.get_device_name() if has_gpu else "CPU, kernels interpreted",
        "versions": {"python": platform.python_version(), "torch": version("torch")}
        | ({"triton": version("triton")} if sys.platform == "linux" else {}),
        "figures": {name: records.get(name, "not run") for name in IDS},
    }
    path = Path(session.config.rootpath) / "reliability.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
