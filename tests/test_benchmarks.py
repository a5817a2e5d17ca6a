"""The benchmark suite: a dry run, what it records, and that what is done is not run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import machine
import pytest
import torch

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def suite(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/suite.py", "--dry-run", "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_committed_record_fits_the_schema(path):
    assert not list(machine.complaints(json.loads(path.read_text(encoding="utf-8"))))


def test_a_record_that_does_not_fit_is_seen():
    row = {"case": "C1", "variant": "ours", "ms": 1.5, "GB/s": None}
    good = machine.record(title="t", rows=[row], cases={"C1": {}})
    assert not list(machine.complaints(good))
    wrong = [
        {**good, "schema": 0},
        {**good, "machine": {**good["machine"], "commit": None}},
        {**good, "machine": {**good["machine"], "versions": {}}},
        {**good, "card": {}},
        {**good, "rows": [{**row, "ms": float("nan")}]},
        {**good, "rows": [{**row, "ms": [1.5]}]},
        {**good, "rows": [{**row, "case": "C9"}]},
    ]
    for record in wrong:
        assert len(list(machine.complaints(record))) == 1, record


def test_a_dry_run_records_and_goes_on(tmp_path):
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    done = suite(tmp_path, "--only", "map_pool,sanitizer", "--minutes", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "suite.json").read_text())
    assert record["steps"]["map_pool"]["status"] == "done"
    assert {"device", "versions", "commit", "date"} <= set(record["machine"])
    if kind == "cpu":
        assert record["steps"]["sanitizer"]["status"] == "not run: needs a GPU"
    result = json.loads((tmp_path / f"map_pool_{kind}.json").read_text())
    assert {row["case"] for row in result["rows"]} == {"C1", "C2", "C3", "C4"}
    assert all(row["ms"] > 0 for row in result["rows"])

    seconds = record["steps"]["map_pool"]["seconds"]
    again = suite(tmp_path, "--only", "map_pool")
    assert "map_pool ..." not in again.stdout
    assert (
        json.loads((tmp_path / "suite.json").read_text())["steps"]["map_pool"]["seconds"] == seconds
    )


def test_no_time_left_is_said_and_an_unknown_step_refused(tmp_path):
    assert suite(tmp_path, "--only", "loading", "--minutes", "0").returncode == 0
    steps = json.loads((tmp_path / "suite.json").read_text())["steps"]
    assert steps["loading"]["status"] == "not run: no time was left"
    unknown = suite(tmp_path, "--only", "speed")
    assert unknown.returncode == 2 and "--only: found speed, expected some of" in unknown.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "loading"])
def test_every_benchmark_runs_dry(tmp_path, name):
    done = suite(tmp_path, "--only", name)
    assert done.returncode == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
