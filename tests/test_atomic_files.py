"""Files and folders on disk: complete or absent, by one writer."""

import pytest

from slap_fast import atomic_files
from slap_fast.atomic_files import find_folder, write_folder
from tests.helpers import runs
from tests.helpers.folders import names, write


def test_the_manifest_is_what_sha256sum_reads(tmp_path):
    atomic_files.write_folder(tmp_path / "x", write("abc"))
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (tmp_path / "x" / atomic_files.MANIFEST).read_text() == f"{digest}  a\n"


def test_the_previous_checkpoint_is_kept_by_option(tmp_path):
    for text in "123":
        atomic_files.write_folder(tmp_path / "last", write(text), keep_old=True)
        atomic_files.write_folder(tmp_path / "best", write(text))
    assert (tmp_path / "last.old" / "a").read_text() == "2"
    assert names(tmp_path) == ["best", "last", "last.old"]


def test_a_failed_write_leaves_the_old_files(tmp_path):
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


def test_an_interrupted_rename_is_recovered(tmp_path):
    target = tmp_path / "last"
    write_folder(target, lambda path: (path / "a").write_text("good"))
    target.rename(tmp_path / "last.old")
    assert (find_folder(target) / "a").read_text() == "good"


def test_a_write_in_the_background_raises_when_it_is_waited_for(tmp_path):
    def fails():
        raise OSError("disk full")

    with atomic_files.BackgroundWriter(background=True) as writer:
        writer.submit(fails)
        with pytest.raises(OSError, match="disk full"):
            writer.submit(lambda: None)
        writer.submit(lambda: atomic_files.write_folder(tmp_path / "x", write("1")))
    assert (tmp_path / "x" / "a").exists()


def hold(folder, ready, done):
    with atomic_files.only_writer(folder):
        ready.set()
        done.wait(30)


def test_concurrent_writers_do_not_collide(tmp_path, figure):
    """C3. The second is refused; a lock ends with its process, however that ends."""
    for _ in figure("C3", ci=1, soak=1):
        ready, done = runs.server().Event(), runs.server().Event()
        other = runs.start(hold, tmp_path, ready, done)
        assert ready.wait(60)
        holder = rf"another process is writing there: '.*', process {other.pid} on .*, since 2"
        for _ in range(2):  # who asks in vain does not end the lock
            with pytest.raises(ValueError, match=holder):
                with atomic_files.only_writer(tmp_path):
                    pass
        other.kill()
        other.join()
        with atomic_files.only_writer(tmp_path):
            pass


@pytest.mark.parametrize("replaced", [False, True], ids=["filled", "replaced"])
def test_a_lock_leaves_nothing_behind(tmp_path, replaced):
    target = tmp_path / "new" / "x"
    with atomic_files.only_writer(target, replaced=replaced):
        with pytest.raises(ValueError, match="x: this process is already writing there"):
            with atomic_files.only_writer(target, replaced=replaced):
                pass
        assert target.is_dir() != replaced
    assert not target.exists()
    with atomic_files.only_writer(target, replaced=replaced):
        target.mkdir(exist_ok=True)
        (target / "a").touch()
    assert names(target) == ["a"] and names(target.parent) == ["x"]


def test_a_place_that_cannot_be_written_is_tried_first(tmp_path):
    (tmp_path / "file").touch()
    for replaced in (False, True):
        with pytest.raises(OSError, match="file/x: cannot be written: "):
            with atomic_files.only_writer(tmp_path / "file" / "x", replaced=replaced):
                pass


def test_a_failed_replacement_keeps_the_old_file(tmp_path, monkeypatch):
    atomic_files.replace_file(tmp_path / "x", "old")

    def full(path):
        raise OSError("disk full")

    monkeypatch.setattr(atomic_files, "sync", full)
    for content in ("new", b"new"):
        with pytest.raises(OSError, match="x: cannot be written: disk full"):
            atomic_files.replace_file(tmp_path / "x", content)
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"
