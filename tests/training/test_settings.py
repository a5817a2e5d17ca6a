"""Options beside --resume and --init: each acts or is refused by name, and changes are said."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from slap_fast.config import override
from slap_fast.models.slap import SlapModel
from slap_fast.training.settings import flat, resumed, with_settings
from slap_fast.training.stored_run import is_sealed, seal
from tests.helpers import runs
from tests.helpers.train_command import start, train, write_sounds


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of 8 sounds with a finished run of 2 steps."""
    folder = tmp_path_factory.mktemp("settings")
    write_sounds(folder, 8)
    assert start(folder, 2, "--set", "warmup_steps=0") == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it, in another place."""
    return shutil.copytree(finished, tmp_path / "copy")


def output(capsys):
    """One line of all that was printed."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def stored_config(folder, name="run"):
    return json.loads((folder / name / "run.json").read_text())["config"]


@pytest.mark.parametrize(
    "key, value",
    [("ssl.mask_ratio", 0.3), ("ssl.student_temperature", 0.2), ("logit_scale_max", 50.0),
     ("ssl.mask_clips", 0.9), ("mel.f_max", 7_000.0), ("text.max_tokens", 40)],
)  # fmt: skip
def test_settings_that_keep_the_shapes_act_on_an_initial_model(key, value):
    model = SlapModel(runs.TINY.model)
    changed = with_settings(model, {key: value})
    assert flat(changed.config)[key] == value
    for name, tensor in model.state_dict().items():
        assert torch.equal(changed.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"audio.hidden_size": 32}, r"model\.audio\.hidden_size: cannot be changed .* 32"),
        ({"text.intermediate_size": 32}, "model.text.intermediate_size: found 32, .* has shape"),
        ({"ssl.prototypes": 32}, r"prototype_head\.weight has shape \[16, 8\], not \[32, 8\]"),
        ({"audio.num_layers": 3}, r"weights have no audio_encoder\.layers\.2"),
        ({"audio.num_layers": 1}, r"audio_encoder\.layers\.1.* has shape .*, not None"),
        ({"embed_dim": 24}, r"model\.embed_dim: .* no audio_projection\.weight"),
        ({"logit_scale": 20.0}, r"model\.logit_scale: found 20.0, .* in the weights of --init"),
        ({"audio.hidden_size": 30}, "audio.hidden_size: cannot be changed .* multiple of 4"),
        ({"audio.hidden_size": 32, "text.hidden_size": 32}, "expected those of --init, whose"),
    ],
)
def test_settings_that_change_a_shape_are_refused_with_it(settings, message):
    with pytest.raises(ValueError, match=message):
        with_settings(SlapModel(runs.TINY.model), settings)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tokenizer", "nothing.json"], "tokenizer: cannot read nothing.json"),
        (["--config", "base"], "of --init, whose"),
        (["--set", "model.ssl.prototypes=32"], "prototype_head.weight has shape"),
        (["--set", "model.ssl.mask_rate=0.3"], "did you mean ssl.mask_ratio"),
    ],
)
def test_init_refuses_what_does_not_fit_its_weights(folder, words, message, capsys):
    new = ["--data", str(folder / "m.csv"), "--init", str(folder / "run")]
    assert train(folder / "new", *new, *words) == 2
    assert message in output(capsys)
    assert not (folder / "new" / "run" / "run.json").exists()


def test_init_takes_settings_that_fit(folder):
    words = ["--data", str(folder / "m.csv"), "--init", str(folder / "run"), "--set", "steps=1"]
    words += ["--set", "model.ssl.mask_ratio=0.3", "--set", "model.logit_scale_max=50"]
    (folder / "new").mkdir()
    assert train(folder / "new", *words, "--set", "batch_size=4", "--set", "lr=1e-9") == 0
    config = stored_config(folder / "new")
    assert (config["model"]["ssl"]["mask_ratio"], config["model"]["logit_scale_max"]) == (0.3, 50)
    assert config["model"]["audio"]["hidden_size"] == 16
    before, after = (
        load_file(path / "run" / "last" / "model.safetensors") for path in (folder, folder / "new")
    )
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "key, value",
    [("batch_size", 5), ("seed", 3), ("model.ssl.mask_ratio", 0.3), ("data.max_seconds", 5.0),
     ("loss.ssl", 0.5), ("steps", 3)],
)  # fmt: skip
def test_settings_that_a_resumed_run_cannot_change_are_refused(key, value):
    with pytest.raises(ValueError, match=f"^{key}: found {value}, expected"):
        resumed(runs.TINY, {key: value}, step=4)


@pytest.mark.parametrize(
    "key, value",
    [("max_tokens", 5_000), ("precision", "bf16"), ("steps", 20), ("lr", 1e-5),
     ("data.max_bad_share", 0.5), ("save_every", 7), ("batch_size", 4)],
)  # fmt: skip
def test_settings_that_a_resumed_run_can_change_act(key, value):
    assert resumed(runs.TINY, {key: value}, step=4) == override(runs.TINY, {key: value})


def test_a_pretrained_text_tower_keeps_the_sizes_of_the_checkpoint():
    named = override(runs.TINY, {"model.text.pretrained": "some/model"})
    resolved = override(named, {"model.text.num_layers": 7, "model.text.hidden_size": 16})
    assert resumed(resolved, flat(named), step=4) == resolved


@pytest.mark.parametrize(
    "words, message",
    [
        (["--split", "test"], "--split: found test, expected None"),
        (["--init", "some/model"], "--init: found some/model, expected None"),
        (["--config", "base"], ", which the run was started with"),
        (["--seed", "3"], "seed: found 3, expected 0"),
        (["--tokenizer", "nothing.json"], "tokenizer: cannot read nothing.json"),
        (["--data", "nothing.csv"], "nothing.csv"),
        (["--set", "steps=1"], "steps: found 1, expected at least 2"),
        (["--max-tokens", "3"], "max_tokens: found 3, expected at least"),
    ],
)
def test_resume_refuses_by_name_what_it_cannot_change(folder, words, message, capsys):
    before = (folder / "run" / "run.json").read_bytes()
    assert train(folder, "--resume", *words) == 2
    assert message in output(capsys)
    assert (folder / "run" / "run.json").read_bytes() == before


def test_more_steps_extend_a_finished_run_and_the_schedule_is_said(folder, capsys):
    assert train(folder, "--resume", "--set", "steps=4") == 0
    text = output(capsys)
    assert "steps: 2 before, 4 from here on" in text
    assert "at step 2 the learning rate goes from 0 to 0.0006" in text
    assert [step for step, _ in runs.loss_rows(folder / "run")] == [1, 2, 3, 4]
    assert train(folder, "--resume") == 0
    assert "before" not in output(capsys)


def test_a_changed_setting_stays_changed_though_no_checkpoint_was_saved_since(folder, capsys):
    assert train(folder, "--resume", "--max-tokens", "5000", "--precision", "bf16") == 0
    assert "max_tokens: 65536 before, 5000 from here on" in output(capsys)
    assert json.loads((folder / "run/last/run.json").read_text())["config"]["max_tokens"] == 65536
    assert train(folder, "--resume") == 0
    assert stored_config(folder)["max_tokens"] == 5_000
    assert stored_config(folder)["precision"] == "bf16"


def test_data_that_moved_is_no_change(folder, capsys):
    """The run was made in another folder."""
    assert train(folder, "--resume", "--data", str(folder / "m.csv")) == 0
    assert "data: changed" not in output(capsys)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda text: text.replace("sound 3", "another sound"), "8 clips, 0.00 h, other names"),
        (lambda text: text.replace("3.wav,sound 3\n", ""), "8 clips, 0.00 h before, 7 clips"),
        (lambda text: text + "1.wav,a second caption\n", "8 clips, 0.00 h, other names, captions"),
        (lambda text: text.replace("3.wav", "9.wav"), "8 clips, 0.00 h, other names"),
    ],
    ids=["caption", "clip", "caption added", "name"],
)
def test_data_that_changed_is_said(folder, capsys, edit, message):
    shutil.copy(folder / "3.wav", folder / "9.wav")
    manifest = folder / "m.csv"
    manifest.write_text(edit(manifest.read_text()))
    assert train(folder, "--resume", "--data", str(manifest)) == 0
    assert f"data: changed since the run was started or last resumed: {message}" in output(capsys)


def edit_run(folder, **changes):
    path = folder / "run" / "run.json"
    run = json.loads(path.read_text())
    run["config"] |= changes
    path.write_text(json.dumps(run))


def test_an_edited_run_json_is_said_and_not_used(folder, capsys):
    edit_run(folder, steps=9, lr=0.5)
    assert train(folder, "--resume") == 0
    text = output(capsys)
    assert "edited since slap-fast wrote it (steps 2 to 9, lr 0.0012 to 0.5)" in text
    assert len(runs.loss_rows(folder / "run")) == 2


def test_an_edited_run_json_without_a_checkpoint_is_used_and_said(folder, capsys):
    shutil.rmtree(folder / "run" / "last")
    edit_run(folder, steps=1)
    assert train(folder, "--resume") == 0
    assert "edited since slap-fast wrote it; used as it is" in output(capsys)
    assert len(runs.loss_rows(folder / "run")) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": 3}'])
def test_a_damaged_run_json_is_said_and_the_checkpoints_used(folder, capsys, content):
    (folder / "run" / "run.json").write_text(content)
    assert train(folder, "--resume") == 0
    assert "run.json: " in output(capsys)
    assert is_sealed(json.loads((folder / "run" / "run.json").read_text()))


def test_a_seal_breaks_where_anything_changes():
    run = seal({"format_version": 3, "plan": {"data": "x"}, "config": {"lr": 0.1}})
    again = json.loads(json.dumps(run))
    assert is_sealed(again) and seal(again) == run
    for change in ({"plan": {"data": "y"}}, {"more": 1}, {"config": {"lr": 0.2}}):
        assert not is_sealed({**run, **change})
    assert not is_sealed({"config": {}})


def test_resume_auto_starts_a_run_then_goes_on_with_the_same_words(tmp_path, capsys):
    write_sounds(tmp_path, 8)
    assert train(tmp_path, "--resume") == 2
    assert "found no run" in output(capsys)
    for _ in range(2):
        assert start(tmp_path, 2, "--resume", "auto") == 0
        assert len(runs.loss_rows(tmp_path / "run")) == 2
    assert start(tmp_path, 3, "--resume", "auto") == 0
    assert len(runs.loss_rows(tmp_path / "run")) == 3
    assert start(tmp_path, 3, "--resume", "auto", "--seed", "9") == 2
    assert "seed: found 9" in output(capsys)


def test_a_run_that_cannot_start_leaves_no_run(tmp_path, capsys, monkeypatch):
    write_sounds(tmp_path, 8)
    assert start(tmp_path, 1, "--max-tokens", "3") == 2
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert start(tmp_path, 1, "--tensorboard") == 2
    assert "pip install tensorboard" in output(capsys)
    assert start(tmp_path, 1, "--tokenizer", "nothing.json") == 2
    assert start(tmp_path, 1) == 0


def test_a_checkpoint_can_be_read_by_others_as_far_as_the_umask_allows(finished):
    run = finished / "run"
    modes = {path.stat().st_mode & 0o777 for path in (run / "last").iterdir()}
    assert modes == {(run / "metrics.jsonl").stat().st_mode & 0o777}
