"""Checkpoint folders: whole or not at all, refused by name when wrong, old ones load."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from slap_fast.atomic_files import find_folder, write_folder
from slap_fast.checkpoint.format import CheckpointError, write_files
from slap_fast.checkpoint.training import read_training
from slap_fast.data.loader import TrainSteps
from slap_fast.inference.slap import Slap
from slap_fast.training.optimizer import make_optimizer
from slap_fast.training.state import begin, snapshot
from slap_fast.training.step import train_step
from tests.helpers import runs

VERSION_1 = Path(__file__).parent / "v1"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(VERSION_1, tmp_path / "model"))


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_the_committed_version_1_checkpoint_still_loads_and_means_the_same(folder):
    slap = Slap.from_pretrained(folder)
    expected = load_file(VERSION_1 / "expected.safetensors")
    tone = np.sin(np.arange(16_000) * 0.2).astype(np.float32)
    np.testing.assert_allclose(slap.embed_audio(tone)[0], expected["audio"].numpy(), atol=1e-5)
    np.testing.assert_allclose(slap.embed_text("a tone")[0], expected["text"].numpy(), atol=1e-5)


def test_all_of_the_optimizer_goes_where_its_parameters_are(tmp_path):
    """The count of steps too: AdamW's fused kernel on a GPU takes it from nowhere else."""
    state, words = begin(runs.TINY, None, None, runs.CPU)
    train_step(state, TrainSteps(runs.clips(), words, state.config)[0].batches)
    write_files(tmp_path, snapshot(state, words, {}, {}))
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
    with pytest.raises(ValueError, match=r"model\.audio\.num_layer: unknown.*'num_layers'"):
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


def test_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="found no such folder"):
        Slap.from_pretrained(tmp_path / "nothing here")


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    target = tmp_path / "last"
    write_folder(target, lambda path: (path / "a").write_text("old"))

    def fails(path):
        (path / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(target, fails)
    assert (target / "a").read_text() == "old"
    write_folder(target, lambda path: (path / "a").write_text("new"))
    assert (target / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_rename_that_was_cut_short_is_found(tmp_path):
    target = tmp_path / "last"
    write_folder(target, lambda path: (path / "a").write_text("good"))
    target.rename(tmp_path / "last.old")
    assert (find_folder(target) / "a").read_text() == "good"
