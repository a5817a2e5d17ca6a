"""The benchmark suite: a dry run, its records, and that a step that is done is not run again."""

from __future__ import annotations

import argparse
import functools
import json
import runpy
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import harness, machine, suite
from benchmarks.report import tables
from tests.helpers import runs
from tests.helpers.paths import ROOT

RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.suite", "--dry-run", "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def outcomes(out: Path) -> dict[str, dict[str, object]]:
    return json.loads((out / f"suite_{suite.KIND}.json").read_text())["steps"]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_committed_record_fits_the_schema(path):
    assert not list(machine.complaints(json.loads(path.read_text(encoding="utf-8"))))


def test_a_record_that_does_not_fit_is_rejected():
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


@pytest.mark.slow
def test_a_dry_run_records_and_resumes(tmp_path):
    done = run(tmp_path, "map_pool", "memcheck", "--minutes", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = outcomes(tmp_path)
    assert steps["map_pool"]["status"] == "done"
    if suite.KIND == "cpu":
        assert steps["memcheck"]["status"] == "not run: needs a GPU"
    result = json.loads((tmp_path / f"map_pool_{suite.KIND}.json").read_text())
    assert not list(machine.complaints(result))
    assert {row["case"] for row in result["rows"]} == {"C1", "C2", "C3", "C4"}
    assert all(row["ms"] > 0 for row in result["rows"])
    assert "MAP pooling" in done.stdout and "MAP pooling" in (tmp_path / "suite.log").read_text()

    again = run(tmp_path, "map_pool")
    assert "map_pool: done before" in again.stdout and "MAP pooling" not in again.stdout
    assert outcomes(tmp_path) == steps


def test_what_comes_before_a_call_is_not_timed():
    seen = []
    slow = harness.Prepared(lambda number: time.sleep(0.05) or number, seen.append)
    taken = harness.seconds({"slow": slow}, runs.CPU, rounds=2)
    assert seen == [0, 0, 0, 0, 1] and max(taken["slow"]) < 0.05


def test_an_interrupted_run_resumes_after_its_last_complete_part(tmp_path):
    ran = []

    def part(name: str, cut_off: bool = False):
        ran.append(name)
        yield {"variant": name, "ms": 1.0}
        if cut_off:
            raise KeyboardInterrupt
        yield {"variant": name, "ms": 2.0}

    def finish(title: str = "t", resume: bool = True, **parts: bool) -> list[tuple[str, float]]:
        ran.clear()
        options = argparse.Namespace(rounds=2, json=tmp_path / "r.json", resume=resume)
        calls = {name: functools.partial(part, name, cut_off) for name, cut_off in parts.items()}
        return [tuple(row.values()) for row in harness.finish(calls, title, options)]

    with pytest.raises(KeyboardInterrupt):
        finish(a=False, b=True)
    left = json.loads((tmp_path / "r.json").read_text())
    assert not list(machine.complaints(left)) and len(left["rows"]) == 3
    every = [("a", 1.0), ("a", 2.0), ("b", 1.0), ("b", 2.0)]
    assert finish(a=False, b=False) == every and ran == ["b"]
    assert finish(a=False, b=False) == every and ran == []
    assert finish(a=False, b=False, resume=False) == every and ran == ["a", "b"]
    assert finish("other", a=False) == every[:2] and ran == ["a"]


def test_a_variant_that_ran_nowhere_is_named_once_below_the_table():
    def row(case: str, variant: str, **figures: object) -> dict[str, object]:
        return {"case": case, "variant": variant, **figures}

    rows = [row(case, "Liger", note="not installed: no module") for case in ("C1", "C2")]
    rows += [row("C1", "ours", ms=1.5), row("C2", "ours", ms=2.5)]
    rows += [row("C1", "compiled", ms=1.0), row("C2", "compiled", note="not compiled")]
    render = tables.columns({"case": "", "variant": "", "MFU": "MFU", "ms": "ms"})
    assert render({"rows": rows}).splitlines()[2:] == [
        "| C1 | ours | 1.5 |",
        "| C2 | ours | 2.5 |",
        "| C1 | compiled | 1 |",
        "| C2 | compiled | not compiled |",
        "",
        "Not run: `Liger`: not installed.",
    ]
    assert "Not run" not in render({"rows": rows[2:]})


def step(*code: str, **environment: str) -> suite.Step:
    return suite.Step("toy", [sys.executable, "-c", *code], environment=environment)


def test_the_outcome_of_a_step(tmp_path):
    with (tmp_path / "log").open("w") as log:
        done = suite.run(step("import os; print(os.environ['WORD'])", WORD="a word"), log, 60)
        failed = suite.run(step("raise SystemExit(3)"), log, 60)
        stopped = suite.run(step("import time; time.sleep(60)"), log, 0.2)
        absent = suite.run(suite.Step("x", ["no-such-program"]), log, 60)
    assert (tmp_path / "log").read_text() == "a word\n"
    statuses = [outcome["status"] for outcome in (done, failed, stopped, absent)]
    assert statuses == [
        "done",
        "failed with exit code 3",
        "stopped: no time was left",
        "not run: no no-such-program here",
    ]
    assert stopped["seconds"] < 30


def test_a_step_done_at_another_commit_is_run_again(tmp_path, monkeypatch, capsys):
    def main(*words: str, commit: str) -> str:
        monkeypatch.setenv("SLAP_FAST_COMMIT", commit)
        monkeypatch.setattr(sys, "argv", ["suite.py", "--out", str(tmp_path), *words])
        suite.main()
        return capsys.readouterr().out

    ran = {"status": "done", "seconds": 1.0}
    monkeypatch.setattr(suite, "run", lambda *_: ran)
    assert "== mel" in main("mel", commit="a")
    assert "done before" in main("mel", commit="a")
    assert "== mel" in main("mel", "--again", commit="a")
    assert "== mel" in main("mel", commit="b")
    assert "no time was left" in main("loading", "--minutes", "0", commit="b")
    assert "not finished" in main("loading", "--minutes", "0", commit="b")
    main("map_pool", "--again", commit="b")
    assert outcomes(tmp_path)["mel"] == ran  # what an earlier call did stays on record

    (tmp_path / "a.whl").touch()
    main("peers", "--again", "--wheels", str(tmp_path), commit="b")
    assert outcomes(tmp_path) == {"peers": ran}  # what was timed without them is timed again


def test_a_mistake_is_exit_code_2(tmp_path):
    unknown = run(tmp_path, "speed")
    assert unknown.returncode == 2 and "found step speed, expected some of" in unknown.stderr
    empty = run(tmp_path, "--wheels", str(tmp_path))
    assert empty.returncode == 2 and "--wheels: found no .whl in" in empty.stderr


def test_a_record_makes_no_commit_dirty_and_a_change_does(tmp_path, monkeypatch):
    def git(*words):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    module, kept = tmp_path / "benchmarks" / "machine.py", tmp_path / "benchmarks" / "results"
    kept.mkdir(parents=True)
    module.write_text((ROOT / "benchmarks" / "machine.py").read_text())
    (kept / "a.json").write_text("{}")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    monkeypatch.delenv("SLAP_FAST_COMMIT", raising=False)
    facts = runpy.run_path(str(module))["facts"]
    clean = facts()["commit"]
    (kept / "a.json").write_text("[]")
    assert facts()["commit"] == clean and "dirty" not in clean
    module.write_text("")
    assert facts()["commit"] == f"{clean}-dirty"


def test_a_benchmark_resumes_unless_asked_to_run_again(tmp_path):
    for again in (False, True):
        planned = suite.steps(tmp_path, None, dry_run=False, again=again)
        resumes = {step.name: "--resume" in step.command for step in planned}
        assert resumes["mel"] is resumes["encoder"] is resumes["loading"] is not again
        assert not resumes["numerics"]  # a figure over its bound is measured again


def missing(planned: suite.Step) -> list[str]:
    """Modules and test files that a step names and that do not exist."""
    words = planned.command
    modules = [name for flag, name in zip(words, words[1:], strict=False) if flag == "-m"]
    files = [word for word in words if word.startswith("tests/")]
    return [
        *(name for name in modules if name.startswith("benchmarks.") and not find_spec(name)),
        *(file for file in files if not (ROOT / file).exists()),
    ]


def test_every_step_has_a_file(tmp_path):
    (tmp_path / "a.whl").touch()
    planned = suite.steps(tmp_path, tmp_path, dry_run=False)
    assert not [name for one in planned for name in missing(one)]
    assert sum("benchmarks." in word for one in planned for word in one.command) >= 9
    for module in ("ops.speed", "model.speed"):
        assert missing(suite.benchmark(module, tmp_path, dry_run=False)) == [f"benchmarks.{module}"]
    assert missing(suite.Step("x", ["pytest", "tests/no.py"])) == ["tests/no.py"]
    (peers,) = (s for s in suite.steps(tmp_path, tmp_path, dry_run=True) if s.name == "peers")
    assert peers.command[-1].endswith("a.whl") and "--dry-run" in peers.command


@pytest.mark.slow(minutes=6)
def test_every_step_runs_dry(tmp_path):
    done = run(tmp_path, "--minutes", "40")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    steps = outcomes(tmp_path)
    names = {s.name for s in suite.steps(tmp_path, None, dry_run=True)}
    if suite.KIND == "cpu":
        names -= {"memcheck", "racecheck"}
    assert {name for name, row in steps.items() if row["status"] == "done"} >= names
    for path in tmp_path.glob("*.json"):
        assert not list(machine.complaints(json.loads(path.read_text()))), path
