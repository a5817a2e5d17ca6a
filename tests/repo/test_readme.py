"""The README's figures: stale ones are detected, missing ones are "not run"."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import plots, readme, tables, targets
from tests.helpers.paths import ROOT


def render(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.report.readme", "--root", str(root), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs" / "images", tmp_path / "docs" / "images")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    return tmp_path


def test_a_changed_record_makes_the_number_and_the_picture_stale(checkout):
    assert render(checkout, "--check").returncode == 0
    path = checkout / "benchmarks" / "results" / "mel_cpu.json"
    record = json.loads(path.read_text())
    record["rows"][0]["audio_s_per_s"] = 12_345.0
    path.write_text(json.dumps(record))
    done = render(checkout, "--check")
    assert done.returncode == 1
    assert "README.md: not what" in done.stdout and "docs/images/mel-*: not what" in done.stdout
    assert render(checkout).returncode == 0
    assert render(checkout, "--check").returncode == 0
    assert "12,345" in (checkout / "README.md").read_text()
    assert "12,345" in (checkout / "docs" / "images" / "mel-dark.svg").read_text()


def test_a_typed_number_is_detected(checkout):
    text = (checkout / "README.md").read_text()
    (checkout / "README.md").write_text(text.replace("not run", "met", 1))
    assert render(checkout, "--check").stdout.startswith("README.md: not what")


def test_a_lost_picture_is_detected(checkout):
    (checkout / "docs" / "images" / "mel-dark.svg").unlink()
    assert render(checkout, "--check").stdout.startswith("docs/images/mel-*: not what")


def test_what_is_not_recorded_is_not_run():
    text = readme.section({})
    assert text.count(": not run") == len(readme.FIGURES)
    assert text.count("| not run |") == len(targets.TARGETS)
    assert "<img" not in text


RECORDS = {
    "packing": [
        {"what": "packing", "variant": "packed", "useful": 1.0, "times_packed": 1.0},
        {"what": "packing", "variant": "padded", "useful": 0.25, "times_packed": 3.5},
    ],
    "loading": [{"what": "loading", "variant": "0 workers", "files/s": 55.5, "audio s/s": 433.0}],
    "attention-gpu": [
        {"case": "C1", "layer": layer, "variant": "slap-fast", "direction": "both", "ms": 1.25}
        for layer in ("local", "global")
    ]
    + [{"case": "C1", "layer": "local", "variant": "FA4", "note": "not installed"}],
}
WORDS = {
    "packing": ("packed", "padded", "4.00", "3.50"),
    "loading": ("0 workers", "56", "433"),
    "attention-gpu": ("slap-fast", "1.25", "not installed", "ms, forward and backward"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_picture_shows_its_record_in_both_themes(tmp_path, name):
    record = {"rows": RECORDS[name]}
    plots.draw(name, record, tmp_path)
    assert plots.is_fresh(name, record, tmp_path)
    assert not plots.is_fresh(name, {"rows": []}, tmp_path)
    light, dark = ((tmp_path / f"{name}-{theme}.svg").read_text() for theme in plots.THEMES)
    assert light != dark
    for text in (light, dark):
        assert all(f">{word}</text>" in text for word in WORDS[name])


def test_a_target_is_met_or_missed_by_a_ratio_or_not_run():
    row = {"case": "C1", "layer": "local", "variant": "slap-fast", "direction": "forward"}
    peer = row | {"direction": "both", "times_ours": 2.5, "variant": "FA2 in torch"}
    records = {"attention_gpu": {"rows": [row | {"ms": 0.55}, peer]}}
    verdicts = {line[0]: line for line in targets.verdicts(records)}
    forward = verdicts["local attention, forward, C1"]
    assert forward[1:] == ["at most 0.5 ms", "0.55", "missed by 10.0%"]
    beside = "local attention, forward and backward, C1, beside"
    assert verdicts[f"{beside} FA2 and rotary"][1:] == ["at least 2 x", "2.5", "met"]
    assert verdicts[f"{beside} FA3 and FA4"][-1] == "not run"
    assert verdicts["global attention, forward, C1"][-1] == "not run"


def test_faster_padding_is_reported():
    row = {"case": "C4", "variant": "PyTorch, padded", "direction": "both", "ms": 2.0}
    record = {"cases": {"C4": {"what": "1 s clips"}}, "rows": [row | {"times_ours": 0.664}]}
    assert tables.encoder(record).endswith("Padded is faster on C4 (1 s clips, 0.66 x).")
    record["rows"][0]["times_ours"] = 1.5
    assert "faster" not in tables.encoder(record)
