"""A checkpoint that cannot be written: the message, and what is kept."""

import ctypes
import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from slap_fast import atomic_files
from slap_fast.checkpoint.format import write_files
from slap_fast.training.stored_run import stored_run
from tests.helpers import runs
from tests.helpers.folders import write


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
    """A system call that fails from its ``after``-th time on."""

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
def test_a_failed_write_names_the_cause_and_keeps_the_checkpoints(
    finished, tmp_path, monkeypatch, figure, name
):
    """C3, with the two tests below and the lock of :mod:`tests.test_atomic_files`."""
    apply, message = FAULTS[name]
    for _ in figure("C3", ci=1, soak=1):
        out = Path(shutil.copytree(finished, tmp_path / "run"))
        weights = load_file(out / "last" / "model.safetensors")

        def again(folder, weights=weights):
            write("new")(folder)
            write_files(folder, {"model.safetensors": weights})

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
    """Mounts a 3 MB disk on the folder, for this process alone; exits with 77 if forbidden."""
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
        runs.start_or_resume(folder, runs.override(runs.TINY, {"save_every": 1}))
    _, checkpoint = stored_run(folder)
    assert json.loads((checkpoint / "training.json").read_text())["step"] == 2


def test_a_run_on_a_full_disk_keeps_its_checkpoints(tmp_path, figure):
    """C3."""
    for _ in figure("C3", ci=1, soak=1):
        process = runs.start(train_on_a_small_disk, tmp_path)
        process.join()
        if process.exitcode == 77:
            pytest.skip("no right to mount a file system here")
        assert process.exitcode == 0


def test_the_newest_checkpoint_is_the_last_written_whatever_the_clock(finished, tmp_path, figure):
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
