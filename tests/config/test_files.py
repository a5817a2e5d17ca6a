"""YAML files of settings: what they start from, and what --print-config prints of them."""

from __future__ import annotations

import pytest

from slap_fast.cli import main
from slap_fast.cli.options import config_text, load_recipe
from slap_fast.config import RECIPES, TrainConfig, override, slap_base, slap_tiny


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_file_names_its_base(tmp_path, capsys):
    tiny = write(tmp_path, "tiny.yaml", "base: tiny\nsteps: 300\n")
    assert load_recipe(tiny) == override(slap_tiny(), {"steps": 300})
    base = write(tmp_path, "base.yaml", "base: base\nmodel:\n  ssl: {mask_ratio: 0.3}\n")
    assert load_recipe(base) == override(slap_base(), {"model.ssl.mask_ratio": 0.3})
    assert capsys.readouterr().err == ""
    other = write(tmp_path, "other.yaml", "base: tiny.yaml\nloss.ssl: 0\n")
    assert load_recipe(other) == override(slap_tiny(), {"steps": 300, "loss.ssl": 0})


def test_without_a_base_it_is_the_paper_s_and_says_so(tmp_path, capsys):
    path = write(tmp_path, "a.yaml", "steps: 3_000\n")
    assert load_recipe(path) == override(TrainConfig(), {"steps": 3_000})
    assert "names no base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: huge", "base: found 'huge', expected one of base, tiny or a YAML file"),
        ("base: a.yaml", "base: found 'a.yaml', which starts from this file itself"),
        ("- 3", "expected settings"),
        ("", "expected settings"),
        ("base: tiny\nssl: {mask_ratio: 0.5}", "did you mean model.ssl or loss.ssl?"),
        ("base: tiny\nsteps: 0", "steps: found 0, expected a whole number at least 1"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(text, message, tmp_path, capsys):
    path = write(tmp_path, "a.yaml", text)
    assert main(["train", "--config", path, "--print-config"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and "a.yaml" in error


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_printed_is_a_file_that_gives_the_same(recipe, tmp_path, capsys):
    asked = {"model.mel.sample_rate": "32000", "lr": "1e-5", "betas": "0.8,0.9"}
    words = [word for item in asked.items() for word in ("--set", "=".join(item))]
    out = tmp_path / "run"
    assert main(["train", "--config", recipe, *words, "--print-config", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "follow" in printed.err and not out.exists()
    config = override(RECIPES[recipe](), asked)
    assert load_recipe(write(tmp_path, "again.yaml", printed.out)) == config
    assert printed.out == config_text(config)
