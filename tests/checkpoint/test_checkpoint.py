"""Checkpoint folders: refused by name when wrong, old versions load, weights are exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slap_fast import atomic_files
from slap_fast.checkpoint.format import (
    MODEL_FILES,
    CheckpointError,
    write_files,
)
from slap_fast.checkpoint.model import read_model
from slap_fast.checkpoint.training import read_training
from slap_fast.checkpoint.weights import export_weights
from slap_fast.data.loader import TrainSteps
from slap_fast.inference.slap import Slap
from slap_fast.training.optimizer import make_optimizer
from slap_fast.training.state import begin, snapshot
from slap_fast.training.step import train_step
from tests.helpers import runs
from tests.helpers.folders import names

VERSION_1 = Path(__file__).parent / "v1"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(VERSION_1, tmp_path / "model"))


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_the_committed_version_1_checkpoint_still_loads_with_the_same_embeddings(folder):
    slap = Slap.from_pretrained(folder)
    expected = load_file(VERSION_1 / "expected.safetensors")
    tone = np.sin(np.arange(16_000) * 0.2).astype(np.float32)
    np.testing.assert_allclose(slap.embed_audio(tone)[0], expected["audio"].numpy(), atol=1e-5)
    np.testing.assert_allclose(slap.embed_text("a tone")[0], expected["text"].numpy(), atol=1e-5)


def test_optimizer_state_is_on_the_device_of_its_parameters(tmp_path):
    """The step counter too: AdamW's fused kernel on a GPU reads it on its parameter's device."""
    state, tokenizer = begin(runs.TINY, None, None, runs.CPU)
    train_step(state, TrainSteps(runs.clips(), tokenizer, state.config)[0].batches)
    write_files(tmp_path, snapshot(state, tokenizer, {}, {}))
    elsewhere = state.model.to("meta")
    optimizer = make_optimizer(elsewhere, state.config)
    read_training(tmp_path, elsewhere, None, optimizer)
    kept = [x for held in optimizer.state.values() for x in held.values()]
    assert len(kept) == 3 * len(optimizer.state) > 0
    assert {x.device.type for x in kept} == {"meta"}


def test_a_newer_format_is_refused(folder):
    edit(folder / "config.json", lambda c: c.update(format_version=99))
    with pytest.raises(CheckpointError, match=r"config\.json: has format_version 99.*upgrade"):
        Slap.from_pretrained(folder)


def test_settings_that_an_older_version_lacks_keep_their_defaults(folder):
    edit(folder / "config.json", lambda c: c["model"].pop("logit_scale_max"))
    assert Slap.from_pretrained(folder).model.config.logit_scale_max == 100.0


def test_an_unknown_setting_is_named(folder):
    edit(folder / "config.json", lambda c: c["model"]["audio"].update(num_layer=3))
    with pytest.raises(ValueError, match=r"model\.audio\.num_layer: unknown.*num_layers"):
        Slap.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "card.json"]
)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        Slap.from_pretrained(folder)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        Slap.from_pretrained(folder)


@pytest.mark.parametrize("fault", ["missing", "shape", "unknown"])
def test_a_wrong_tensor_is_named(folder, fault):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "audio_head.probe"
    if fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][..., :3].contiguous()
    else:
        name = "audio_head.other"
        tensors[name] = tensors["audio_head.probe"].clone()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=name):
        Slap.from_pretrained(folder)


def test_another_tokenizer_is_refused(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"ab"', '"ba"').replace('"NFC"', '"NFKC"'))
    edit(folder / "tokenizer.json", lambda t: t.update(normalizer={"type": "NFKC"}))
    with pytest.raises(CheckpointError, match="is not the one the model was saved with"):
        Slap.from_pretrained(folder)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="found no such folder"):
        Slap.from_pretrained(tmp_path / "nothing here")


def test_a_checkpoint_shares_no_memory_with_the_model_that_trains_on():
    state, tokenizer = begin(runs.TINY, None, None, runs.CPU)
    files = snapshot(state, tokenizer, {}, {})
    before = files["model.safetensors"]["audio_head.probe"].clone()
    state.model.audio_head.probe.data.zero_()
    assert torch.equal(files["model.safetensors"]["audio_head.probe"], before)


def test_student_and_teacher_are_exported_alone(finished, tmp_path):
    stored = load_file(finished / "last" / "training.safetensors")
    for weights in ("student", "teacher"):
        export_weights(finished / "last", tmp_path / weights, weights)
        assert names(tmp_path / weights) == sorted([*MODEL_FILES, atomic_files.MANIFEST])
    student, teacher = (
        read_model(tmp_path / weights)[0].state_dict() for weights in ("student", "teacher")
    )
    name = "audio_encoder.patch_embedding.weight"
    assert torch.equal(teacher[name], stored[f"teacher.{name}"])
    assert not torch.equal(teacher[name], student[name])
    assert torch.equal(teacher["audio_head.probe"], student["audio_head.probe"])
    with pytest.raises(ValueError, match="weights: found 'both', expected student or teacher"):
        export_weights(finished / "last", tmp_path / "x", "both")
