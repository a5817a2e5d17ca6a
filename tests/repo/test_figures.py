"""`make soak` runs the figures and records each."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.report import tables
from tests.helpers.figures import IDS, has_test
from tests.helpers.paths import ROOT

PLUGIN = "tests.helpers.figures"
ENVIRONMENT = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
TESTS = """
import time

def test_without():
    raise AssertionError("not a figure")

def test_good(figure):
    assert figure.soak
    for seed in figure("A1", ci=1, soak=40, batch=10):
        pass

def test_slow(figure):
    for seed in figure("A2", ci=1, soak=10**6):
        time.sleep(0.01)

def test_least(figure):
    for seed in figure("A4", ci=3, soak=9):
        time.sleep(0.3)

def test_bad(figure):
    for seed in figure("A3", ci=1, soak=9):
        assert seed < 3
"""


def test_a_soak_runs_the_figures_and_records_each(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\n")
    earlier = {"figure": "K1", "test": "test_some.py::test_slow[1]", "runs_on": "an H100", "n": 7}
    gone = [earlier | {"test": test} for test in ("test_some.py::test_ba", "test_any.py::test_bad")]
    (tmp_path / "out.json").write_text(json.dumps({"figures": [earlier, *gone]}))
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "--soak", "--soak-to", "out.json"]
    command += ["--soak-minutes", "0.005", "-q"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert "1 failed, 3 passed, 1 deselected" in done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    records = {record["figure"]: record for record in report["figures"]}
    assert sorted([*records, *report["not_run"]]) == sorted(IDS)
    good, slow, bad, least = (records[name] for name in ("A1", "A2", "A3", "A4"))
    assert (least["n"], least["seeds"]) == (3, [0, 2])
    assert (good["n"], good["wanted"], good["failures"]) == (40, 40, 0)
    assert 0 < slow["n"] < 100 and slow["wanted"] == 10**6 and slow["failures"] == 0
    assert (bad["n"], bad["failures"], bad["failed_seed"]) == (3, 1, 3)
    assert {"runs_on", "commit", "test", "seconds"} <= bad.keys()
    assert records["K1"]["n"] == 7  # records of other devices stay
    assert len(records) == len(report["figures"]) == 5  # those of removed tests go
    several = subprocess.run(
        [*command, "-p", "xdist.plugin", "-n", "2"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert several.returncode == 4 and "--soak: found -n 2" in several.stderr


def test_a_trial_that_ends_the_process_is_a_failure(tmp_path):
    dies = "import os\n\ndef test_dies(figure):\n    for _ in figure('A1', ci=2, soak=2):\n"
    (tmp_path / "test_some.py").write_text(dies + "        os.abort()\n")
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\n")
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "--soak", "--soak-to", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
    assert done.returncode < 0
    (record,) = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert (record["n"], record["failures"], record["failed_seed"]) == (0, 1, 0)


def test_every_record_is_of_a_test_that_exists():
    report = json.loads((ROOT / "benchmarks" / "results" / "reliability.json").read_text())
    assert not [test["test"] for test in report["figures"] if not has_test(test["test"], ROOT)]


def test_the_readme_shows_every_figure():
    assert tuple(tables.PROMISES) == IDS
    record = {"figure": "A1", "test": "t", "n": 5, "wanted": 9, "failures": 0, "runs_on": "a CPU"}
    other = record | {"test": "u", "n": 1_000, "wanted": 1_000, "failures": 2}
    table = tables.reliability({"figures": [record, other]}).splitlines()
    assert len(table) == 2 + len(IDS)
    assert any(line.endswith("| 1,005 of 1,009 | 2 | a CPU |") for line in table)
    assert sum("| not run |" in line for line in table) == len(IDS) - 1
