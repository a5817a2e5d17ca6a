"""Folders on disk: whole or not at all, one writer, every kind of damage found."""

import ctypes
import errno
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
from slap_fast.checkpoint.weights import export_weights
from slap_fast.training.state import begin, snapshot, stored_run
from tests.helpers import runs


def write(text):
    return lambda folder: (folder / "a").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest_is_what_sha256sum_reads(tmp_path):
    atomic_files.write_folder(tmp_path / "x", write("abc"))
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (tmp_path / "x" / atomic_files.MANIFEST).read_text() == f"{known}  a\n"


def test_the_one_before_is_kept_by_option(tmp_path):
    for text in "123":
        atomic_files.write_folder(tmp_path / "last", write(text), keep_old=True)
        atomic_files.write_folder(tmp_path / "best", write(text))
    assert (tmp_path / "last.old" / "a").read_text() == "2"
    assert names(tmp_path) == ["best", "last", "last.old"]


def test_a_damaged_folder_gives_way_to_the_one_before_and_is_not_kept_instead_of_it(tmp_path):
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


def test_a_write_in_the_background_raises_when_it_is_waited_for(tmp_path):
    def fails():
        raise OSError("disk full")

    with atomic_files.BackgroundWriter(background=True) as writer:
        writer.submit(fails)
        with pytest.raises(OSError, match="disk full"):
            writer.submit(lambda: None)
        writer.submit(lambda: atomic_files.write_folder(tmp_path / "x", write("1")))
    assert (tmp_path / "x" / "a").exists()


def test_a_checkpoint_shares_no_memory_with_the_model_that_trains_on():
    state, words = begin(runs.TINY, None, None, runs.CPU)
    files = snapshot(state, words, {}, {})
    before = files["model.safetensors"]["audio_head.probe"].clone()
    state.model.audio_head.probe.data.zero_()
    assert torch.equal(files["model.safetensors"]["audio_head.probe"], before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps with the checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("run")
    runs.go(out, runs.override(runs.TINY, {"steps": 4}))
    return out


def damage(path: Path, other: Path, rng: random.Random) -> str:
    """Harms a file in one of six ways; the content always differs afterwards."""
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


def test_damage_to_any_file_is_found_and_the_older_checkpoint_used(finished, tmp_path, figure):
    """C2. A model alone loads where it is what was written, whatever its manifest says of others:
    seed 229 harms the manifest's line of a training file."""
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


def test_a_run_goes_on_from_the_older_checkpoint_to_the_same_end(finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    path = out / "last" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    runs.go(out)
    assert runs.loss_rows(out) == runs.loss_rows(finished)
    same = "model.safetensors"
    assert (out / "last" / same).read_bytes() == (finished / "last" / same).read_bytes()


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


def raising(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def full_disk(monkeypatch, folder):
    """A limit on the size of files: the kernel refuses the write in the middle of a tensor file."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    def undo():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)

    return undo


def patched(name, number, after=0):
    """A call of the operating system that fails from its ``after``-th time on."""

    def apply(monkeypatch, folder):
        real, calls = getattr(os, name), []

        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) > after:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)
        return monkeypatch.undo

    return apply


def stale(make):
    def apply(monkeypatch, folder):
        make(folder / "last.tmp")
        return None

    return apply


def stale_folder(path):
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"half")


FAULTS = {
    "a file grows too large": (full_disk, "File too large"),
    "disk full at flush": (patched("fsync", errno.ENOSPC), "No space left"),
    "disk full at the last flush": (patched("fsync", errno.ENOSPC, 3), "No space left"),
    "disk full at mkdir": (patched("mkdir", errno.ENOSPC), "No space left"),
    "I/O error at flush": (patched("fsync", errno.EIO), "Input/output error"),
    "I/O error at the first rename": (patched("rename", errno.EIO), "Input/output error"),
    "I/O error at the second rename": (patched("rename", errno.EIO, 1), "Input/output error"),
    "read-only": (patched("mkdir", errno.EROFS), "Read-only file system"),
    "not allowed": (patched("mkdir", errno.EACCES), "Permission denied"),
    "a stale folder": (stale(stale_folder), None),
    "a stale file": (stale(Path.touch), None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_write_that_fails_says_why_and_keeps_what_was_saved(
    finished, tmp_path, monkeypatch, figure, name
):
    """C3, with the three tests below."""
    apply, message = FAULTS[name]
    for _ in figure("C3", ci=1, soak=1):
        out = Path(shutil.copytree(finished, tmp_path / "run"))
        weights = load_file(out / "last" / "model.safetensors")

        def again(folder, weights=weights):
            write("new")(folder)
            save_file(weights, folder / "model.safetensors")

        undo = apply(monkeypatch, out)
        if message is None:
            atomic_files.write_folder(out / "last", again, keep_old=True)
            assert (out / "last" / "a").read_text() == "new"
        else:
            with pytest.raises(OSError, match=f"last: cannot be written.*kept: .*{message}"):
                atomic_files.write_folder(out / "last", again, keep_old=True)
            undo()
            _, folder = stored_run(out)
            assert json.loads((folder / "training.json").read_text())["step"] == 4
        assert not (out / "last.tmp").exists()


def mount_small_disk(folder):
    """Puts 3 MB of disk on the folder, for this process alone; exits with 77 where it may not."""
    library, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    new_user_and_mounts = 0x10000000 | 0x00020000
    if library.unshare(new_user_and_mounts):
        os._exit(77)
    maps = {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}
    for name, text in maps.items():
        Path(f"/proc/self/{name}").write_text(text)
    if library.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=3m"):
        os._exit(77)


def train_on_a_small_disk(folder):
    """In another process: there is room for two checkpoints and not for three."""
    mount_small_disk(folder)
    with pytest.raises(OSError, match="last: cannot be written.*kept: .*No space left"):
        runs.go(folder, runs.override(runs.TINY, {"save_every": 1}))
    _, found = stored_run(folder)
    assert json.loads((found / "training.json").read_text())["step"] == 2


def test_a_run_on_a_disk_that_is_full_keeps_what_it_saved(tmp_path, figure):
    """C3."""
    for _ in figure("C3", ci=1, soak=1):
        process = runs.start(train_on_a_small_disk, tmp_path)
        process.join()
        if process.exitcode == 77:
            pytest.skip("no right to mount a file system here")
        assert process.exitcode == 0


def test_the_newest_is_the_one_written_last_whatever_the_clock_says(finished, tmp_path, figure):
    """C3: the clock jumps back between two checkpoints, and another by years."""
    for _ in figure("C3", ci=1, soak=1):
        out = Path(shutil.copytree(finished, tmp_path / "run"))
        for name, seconds in (("last", 0), ("last.old", 4_000_000_000)):
            for path in (out / name, *(out / name).iterdir()):
                os.utime(path, (seconds, seconds))
        _, folder = stored_run(out)
        assert folder == out / "last"
        atomic_files.write_folder(out / "last", write("new"), keep_old=True)
        assert (out / "last" / "a").read_text() == "new"
        assert json.loads((out / "last.old" / "training.json").read_text())["step"] == 4


def hold(folder, ready, done):
    with atomic_files.only_writer(folder):
        ready.set()
        done.wait(30)


def test_two_writers_do_not_meet(tmp_path, figure):
    """C3. The second is refused; a lock ends with its process, whatever ended that."""
    for _ in figure("C3", ci=1, soak=1):
        ready, done = runs.server().Event(), runs.server().Event()
        other = runs.start(hold, tmp_path, ready, done)
        assert ready.wait(60)
        with pytest.raises(ValueError, match="another process is writing there"):
            with atomic_files.only_writer(tmp_path):
                pass
        other.kill()
        other.join()
        with atomic_files.only_writer(tmp_path):
            pass
