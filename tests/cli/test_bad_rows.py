"""Rows of a manifest that cannot be used: left out and named by train and eval."""

import json

import numpy as np
import pytest
import soundfile

from slap_fast.cli import main

SIZES = [
    f"model.{tower}.{name}"
    for tower in ("audio", "text", "caption")
    for name in ("hidden_size=32", "num_heads=2")
]
SETTINGS = [*SIZES, "model.audio.intermediate_size=32", "model.text.num_layers=1"]
SETTINGS += ["model.ssl.prototypes=16", "steps=2", "batch_size=4", "log_every=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight good clips, and rows with an empty caption, with no path and with a wrong span."""
    path = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    rows = ["path,caption,label,start,end"]
    for i in range(8):
        soundfile.write(path / f"{i}.wav", 0.1 * rng.standard_normal(8_000), 16_000)
        rows.append(f"{i}.wav,a sound number {i},{'ab'[i % 2]},,")
    bad = ["0.wav,,a,,", ",no path,a,,", "1.wav,wrong span,a,3,2"]
    (path / "m.csv").write_text("\n".join([*rows, *bad]) + "\n")
    labels = [line.split(",") for line in rows[1:]]
    text = "path,label\n" + "\n".join(f"{line[0]},{line[2]}" for line in labels)
    (path / "labels.csv").write_text(text + "\n")
    (path / "all_bad.csv").write_text("\n".join([rows[0], *bad]) + "\n")
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ["train", "--data", str(folder / "m.csv"), "--out", str(out), "--workers", "0"]
    for setting in SETTINGS:
        words += ["--set", setting]
    assert main(words) == 0
    return out


def test_train_leaves_them_out_and_names_them(folder, run, capsys):
    words = ["train", "--data", str(folder / "m.csv"), "--out", str(run), "--resume"]
    assert main([*words, "--set", "steps=3"]) == 0
    out = capsys.readouterr().out
    assert out.count("left out: ") == 3 and "line 10" in " ".join(out.split())


def test_eval_leaves_them_out_and_counts_them(folder, run, capsys):
    words = ["eval", "--model", str(run), "--data", str(folder / "m.csv"), "--no-captions"]
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    card = json.loads(captured.out)
    assert (card["n"], card["n_expected"]) == (8, 11)
    assert sum(card["failures"].values()) == 3 and captured.err.count("left out: ") == 3


def test_labels_alone_give_zero_shot_figures(folder, run, capsys):
    words = ["eval", "--model", str(run), "--data", str(folder / "labels.csv"), "--json"]
    assert main(words) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["retrieval"] is None and card["caption"] is None
    assert card["zero_shot"]["n"] == card["n"] == 8


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_manifest_of_bad_rows_alone_is_a_mistake(folder, run, command, capsys, tmp_path):
    words = [command, "--data", str(folder / "all_bad.csv")]
    words += ["--model", str(run)] if command == "eval" else ["--out", str(tmp_path / "x")]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "all_bad.csv" in line
