"""Every command that takes --model, with other people's models."""

import json
import shutil

import numpy as np
import pytest
import soundfile

import slap_fast
from slap_fast.cli import main
from tests.helpers.public_models import save_clap, save_pe_audio

KINDS = {"CLAP": save_clap, "PE-AV": save_pe_audio}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six short files of two kinds, one that is longer than 10 s, and one that is no audio."""
    path = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    lines = ["path,caption,label"]
    for i in range(7):
        kind, seconds = ("dog", "rain")[i % 2], 12.0 if i == 6 else 0.5
        soundfile.write(path / f"{i}.wav", 0.1 * rng.standard_normal(int(8_000 * seconds)), 8_000)
        lines.append(f"{i}.wav,the sound of a {kind},{kind}")
    (path / "bad.wav").write_bytes(b"<html>")
    (path / "m.csv").write_text("\n".join([*lines, "bad.wav,rain,rain"]) + "\n")
    return path


def test_embed(model, folder, tmp_path, capsys):
    out = tmp_path / "vectors"
    assert main(["embed", str(folder), "--model", str(model), "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["n"] == 7 and "bad.wav: E_FORMAT" in captured.err
    vectors = np.load(out / "vectors.npy")
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    seconds = {item["path"].rsplit("/")[-1]: item["seconds"] for item in items}
    assert seconds["6.wav"] == 12.0 and seconds["bad.wav"] == 0.0
    loaded = slap_fast.load(model)
    good = [item["path"] for item in items if item["status"] == "ok"]
    expected = loaded.embed_audio(good)
    np.testing.assert_allclose(vectors[~np.isnan(vectors).any(1)], expected, atol=1e-5)
    stored = json.loads((out / "model.json").read_text())
    assert stored == {"model": str(model), **loaded.facts()}


def test_classify(model, folder, capsys):
    words = ["classify", str(folder / "0.wav"), "--model", str(model), "--labels", "dog,rain"]
    assert main([*words, "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out).values()
    expected = slap_fast.load(model).classify(folder / "0.wav", ["dog", "rain"])
    assert answer == pytest.approx(expected, abs=1e-5)


def test_eval_says_what_was_heard(model, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["eval", "--model", str(model), "--data", str(folder / "m.csv")]
    before = sorted(path.name for path in model.iterdir())
    assert main(words) == 0
    assert f"captions: not scored, a {model.name} model writes none" in capsys.readouterr().out
    card = json.loads((tmp_path / "eval_m.json").read_text())
    assert (card["n"], card["n_expected"], card["failures"]) == (7, 8, {"E_FORMAT": 1})
    assert card["seconds_heard"] == 6 * 0.5 + 12.0 and card["caption"] is None
    assert card["zero_shot"]["n"] == 7
    assert card["template"] == [slap_fast.load(model).default_template]
    assert card["facts"]["kind"] == model.name and card["facts"]["parameters"] > 0
    assert sorted(path.name for path in model.iterdir()) == before
    assert main([*words, "--out", "other.json", "--template", "a {}"]) == 0
    assert json.loads((tmp_path / "other.json").read_text())["template"] == ["a {}"]


def test_caption_says_what_the_model_cannot_do(model, folder, capsys):
    assert main(["caption", str(folder / "0.wav"), "--model", str(model)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{model} is a {model.name} model, which writes no captions: expected" in line


def test_a_mistake_is_one_line_and_exit_code_2(model, folder, capsys, tmp_path):
    copied = shutil.copytree(model, tmp_path / "copied")
    (copied / "model.safetensors").unlink()
    for words in ([str(copied)], ["nobody/nothing", "--local-files-only", "--revision", "v2"]):
        assert main(["embed", str(folder), "--model", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words[0] in line and "expected" in line or "found no such folder" in line
