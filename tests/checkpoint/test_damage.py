"""Every kind of damage to a checkpoint is detected, and the older one used."""

import json
import random
import shutil
from pathlib import Path

import pytest

from slap_fast import atomic_files
from slap_fast.checkpoint.format import (
    MODEL_FILES,
    TRAINING_FILES,
    CheckpointError,
    recover,
    verify,
    verify_manifest,
)
from slap_fast.checkpoint.model import read_model
from slap_fast.training.stored_run import stored_run
from tests.helpers import runs
from tests.helpers.folders import names, write


def test_a_damaged_checkpoint_falls_back_to_the_previous_one_and_never_replaces_it(tmp_path):
    path = tmp_path / "last"
    for text in "12":
        atomic_files.write_folder(path, write(text), keep_old=True)
    (path / "a").write_text("?")

    def verify(folder):
        verify_manifest(folder, ["a"])

    with pytest.raises(CheckpointError, match=r"last/a: damaged, or edited"):
        verify(path)
    assert recover(path, verify) == tmp_path / "last.old"
    assert (tmp_path / "last.damaged" / "a").read_text() == "?"
    atomic_files.write_folder(path, write("3"), keep_old=True)
    assert (tmp_path / "last.old" / "a").read_text() == "1"
    for folder in (path, tmp_path / "last.old"):
        (folder / "a").write_text("?")
    with pytest.raises(CheckpointError, match=r"last/a: damaged"):
        recover(path, verify)


def damage(path: Path, other: Path, rng: random.Random) -> str:
    """Damages a file by one of six kinds of change; the content always differs afterwards."""
    data, kind = bytearray(path.read_bytes()), rng.randrange(6)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        start = rng.randrange(len(data))
        data[start : start + 512] = bytes(b ^ 0xFF for b in data[start : start + 512])
    elif kind == 3:
        data += b"\0" * rng.randrange(1, 512)
    elif kind == 4:
        path.unlink()
        return "missing"
    elif other.read_bytes() != data:
        data = other.read_bytes()
    else:
        data[0] ^= 1
    path.write_bytes(data)
    return ("cut", "bit flip", "block", "longer", "", "of another step")[kind]


def test_damage_to_any_file_is_detected_and_the_older_checkpoint_used(finished, tmp_path, figure):
    """C2. A model alone loads if its own files are intact, whatever the manifest lists for others:
    seed 229 damages the manifest's line of a training file."""
    files = names(finished / "last")
    assert files == sorted([*MODEL_FILES, *TRAINING_FILES, atomic_files.MANIFEST])
    for seed in figure("C2", ci=230, soak=5_000):
        rng = random.Random(seed)
        out = Path(shutil.copytree(finished, tmp_path / "run"))
        name = rng.choice(files)
        kind = damage(out / "last" / name, out / "last.old" / name, rng)
        with pytest.raises(ValueError):
            verify(out / "last")
        run, folder = stored_run(out)
        assert folder == out / "last.old", (name, kind)
        assert run["config"]["steps"] == 4
        assert json.loads((folder / "training.json").read_text())["step"] == 2
        if name in MODEL_FILES:
            with pytest.raises(CheckpointError):
                read_model(out / "last.damaged")
        shutil.rmtree(out)


def test_a_run_resumes_from_the_older_checkpoint_to_the_same_end(finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    path = out / "last" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    runs.start_or_resume(out)
    assert runs.loss_rows(out) == runs.loss_rows(finished)
    same = "model.safetensors"
    assert (out / "last" / same).read_bytes() == (finished / "last" / same).read_bytes()
