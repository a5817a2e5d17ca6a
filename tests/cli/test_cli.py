"""Commands as a user types them: the main job on files, exit codes, one-line errors."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import slap_fast
from slap_fast.cli import machine, main
from tests.helpers.paths import ROOT
from tests.helpers.runs import loss_rows

TINY = [
    "model.audio.hidden_size=32", "model.audio.num_heads=2", "model.audio.intermediate_size=32",
    "model.text.hidden_size=32", "model.text.num_heads=2", "model.text.num_layers=2",
    "model.caption.hidden_size=32", "model.caption.num_heads=2", "model.ssl.prototypes=16",
    "steps=3", "batch_size=4", "log_every=1",
]  # fmt: skip
SETTINGS = [word for setting in TINY for word in ("--set", setting)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve files of two kinds in two splits, and one that is no audio."""
    path = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    lines = ["path,caption,label,split"]
    for i in range(12):
        kind = ("tone", "noise")[i % 2]
        time = np.arange(8_000) / 16_000
        wave = np.sin(time * 3_000 * (1 + i / 20)) if i % 2 == 0 else rng.standard_normal(8_000)
        soundfile.write(path / f"{i}.wav", 0.2 * wave, 16_000)
        lines.append(f"{i}.wav,a {kind} number {i},{kind},{'train' if i < 6 else 'test'}")
    (path / "m.csv").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    words = [
        "train",
        "--data",
        str(folder / "m.csv"),
        "--out",
        str(out),
        "--workers",
        "0",
        *SETTINGS,
    ]
    assert main(words) == 0
    return out


def stdout_json(capsys):
    return json.loads(capsys.readouterr().out)


def test_train_writes_a_run(run):
    names = {path.name for path in run.iterdir()}
    assert {"run.json", "metrics.jsonl", "last", "best"} <= names
    files = {path.name for path in (run / "best").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "card.json"} <= files
    assert [step for step, _ in loss_rows(run)] == [1, 2, 3]


def test_eval_prints_the_documented_json(run, folder, capsys):
    words = ["eval", "--model", str(run / "best"), "--data", str(folder / "m.csv"), "--json"]
    assert main(words) == 0
    card = stdout_json(capsys)
    assert {"accuracy", "balanced_accuracy", "chance", "majority"} <= card["zero_shot"].keys()
    for side in ("t2a", "a2t"):
        assert {"R@1", "R@5", "R@10", "mAP@10"} <= card["retrieval"][side].keys()
    assert (card["n"], card["n_expected"]) == (6, 6)
    assert main([*words, "--split", "train"]) == 0
    assert main([*words, "--split", "other"]) == 2
    assert "train" in capsys.readouterr().err


def test_a_run_folder_is_its_best_checkpoint(run, folder, capsys):
    words = ["eval", "--data", str(folder / "m.csv"), "--no-captions", "--json", "--model"]
    assert main([*words, str(run)]) == 0
    of_run = stdout_json(capsys)
    assert main([*words, str(run / "best")]) == 0
    assert stdout_json(capsys)["retrieval"] == of_run["retrieval"]
    assert (run / "eval_m.json").exists()


def test_embed_writes_vectors_and_the_status_of_each_file(run, folder, tmp_path, capsys):
    bad = tmp_path / "bad.wav"
    bad.write_text("nothing")
    words = ["embed", str(folder), str(bad), "--model", str(run / "best"), "--out", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    assert stdout_json(capsys)["n"] == 12
    vectors = np.load(tmp_path / "vectors.npy")
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert vectors.shape == (13, 32) and len(items) == 13
    status = [(item["status"], item["code"]) for item in items]
    assert status == [("ok", None)] * 12 + [("bad", "E_FORMAT")]
    assert np.isnan(vectors[12]).all() and not np.isnan(vectors[:12]).any()


def test_brackets_of_paths_and_captions_are_printed(run, folder, capsys):
    first = sorted(folder.glob("*.wav"))[0]
    assert main(["classify", "--model", str(run), "--labels", "a [red] dog", str(first)]) == 0
    assert "a [red] dog" in capsys.readouterr().out


def test_classify_and_caption_answer_per_file(run, folder, capsys):
    files = [str(folder / "0.wav"), str(folder / "1.wav")]
    model = ["--model", str(run / "best"), "--json"]
    assert main(["classify", *files, "--labels", "a tone, a noise", *model]) == 0
    answer = stdout_json(capsys)
    assert list(answer) == files and set(answer[files[0]]) == {"a tone", "a noise"}
    assert main(["caption", *files, "--num-beams", "2", *model]) == 0
    assert list(stdout_json(capsys)) == files


def test_fine_tuning_starts_from_the_weights_and_a_new_schedule(run, folder, tmp_path):
    words = [
        "train",
        "--data",
        str(folder / "m.csv"),
        "--init",
        str(run / "best"),
        "--workers",
        "0",
    ]
    words += ["--out", str(tmp_path / "fine"), "--set", "steps=1", "--set", "lr=1e-9"]
    assert main(words) == 0
    from safetensors.torch import load_file

    before, after = (
        load_file(path / "model.safetensors") for path in (run / "best", tmp_path / "fine" / "last")
    )
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=1e-6, err_msg=name)


def test_resume_continues_and_keeps_the_settings(run, capsys):
    words = ["train", "--out", str(run), "--resume", "--workers", "0"]
    assert main(words) == 0
    assert [step for step, _ in loss_rows(run)] == [1, 2, 3]
    assert main([*words, "--set", "batch_size=5"]) == 2
    assert "batch_size: found 5, expected 4" in capsys.readouterr().err


def test_the_teacher_can_be_exported(run, tmp_path):
    words = ["--model", str(run / "last"), "--out", str(tmp_path / "x"), "--weights", "teacher"]
    assert main(["export-weights", *words]) == 0
    assert json.loads((tmp_path / "x" / "card.json").read_text())["weights"] == "teacher"


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--config", "huge"], "--config: found 'huge'"),
        (["train", "--set", "loss.sls=0"], "loss.sls: unknown setting; did you mean loss.ssl?"),
        (["train", "--set", "lr"], "--set: found 'lr', expected KEY=VALUE"),
        (["train", "--set", "lr=nan"], "lr: found 'nan', expected a finite number"),
        (["train", "--set", "steps=ten"], "steps: found 'ten', expected int"),
        (["train", "--data", "nothing.csv"], "nothing.csv"),
        (["train", "--workers", "-1"], "--workers: found -1, expected a whole number at least 0"),
        (["train", "--rank-timeout", "nan"], "--rank-timeout: found nan, expected a number above"),
        (["caption", "a.wav", "--model", "x", "--num-beams", "0"], "--num-beams: found 0"),
        (["data", "pack", "--data", "x", "--out", "y", "--shard-mb", "0"], "--shard-mb: found 0"),
        (["data", "check", "x", "--workers", "0"], "--workers: found 0, expected a whole number"),
        (["eval", "--model", "nowhere/at all"], "found no such folder"),
        (["classify", "a.wav", "--model", "no/where else", "--labels", "a"], "no such folder"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("slap-fast: error: ") and "\n" not in error and message in error


def test_a_run_is_not_overwritten(run, capsys):
    assert main(["train", "--out", str(run), *SETTINGS]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "demo", "train", "eval", "embed", "classify", "caption", "export", "export-weights",
        "plan", "doctor", "bench", "data check", "data pack",
    ],
)  # fmt: skip
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert f"slap-fast {command}" in capsys.readouterr().out.replace("\n", " ")


def python(*words, cwd):
    """Runs the interpreter in another folder, on this checkout."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_the_module_runs_as_a_program(tmp_path):
    """As torchrun starts it."""
    shown = python("-m", "slap_fast.cli", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "slap-fast" in shown.stdout, shown.stderr
    assert python("-m", "slap_fast.cli", "fly", cwd=tmp_path).returncode == 2


def test_the_version_is_one_line(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"slap-fast {slap_fast.__version__}\n"


def test_importing_the_command_line_imports_no_torch(tmp_path):
    program = "import sys, slap_fast.cli; print(sorted(sys.modules.keys() & {'torch', 'numpy'}))"
    assert python("-c", program, cwd=tmp_path).stdout == "[]\n"


def test_bench_runs_the_suite_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "mel", "--out", "records", "--minutes", "1e-9"]) == 0
    (record,) = (tmp_path / "records").glob("suite_*.json")
    assert json.loads(record.read_text())["steps"]["mel"]["status"].startswith("not run")


def test_bench_without_a_checkout_is_a_mistake(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    assert main(["bench"]) == 2
    assert "expected a checkout of the repository" in capsys.readouterr().err


def test_out_of_memory_names_the_setting(monkeypatch, capsys, folder, tmp_path):
    from slap_fast.training import loop

    def out_of_memory(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(loop, "train_step", out_of_memory)
    words = [
        "train",
        "--data",
        str(folder / "m.csv"),
        "--out",
        str(tmp_path / "x"),
        "--workers",
        "0",
    ]
    assert main([*words, *SETTINGS]) == 1
    assert "--max-tokens" in capsys.readouterr().err
