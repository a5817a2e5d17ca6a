"""What is not audio in a folder of audio, and names that are written otherwise than the file's."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter

import pytest

from slap_fast.data.audio.decode import probe
from slap_fast.data.audio.folder import audio_files, local_path
from slap_fast.data.audio.track import AudioError
from slap_fast.data.manifest import read_manifest

NAME = "Caf\u00e9.wav"


def test_what_is_left_out_is_counted(tmp_path, caplog):
    (tmp_path / "x.wav").mkdir()
    for name in ("a.wav", "._a.wav", ".hidden.flac", "x.wav/b.MP3", "notes.txt"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.wav")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.wav", "wb"):
        pass
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere")
    ignored = Counter()
    names = [str(path.relative_to(tmp_path)) for path in audio_files(tmp_path, ignored)]
    assert names == ["a.wav", "gone.wav", "x.wav/b.MP3"]
    assert ignored == {
        "hidden": 2,
        "folder named as a file": 1,
        "no regular file": 1,
        "name that is not Unicode": 1,
    }
    assert not caplog.messages and audio_files(tmp_path)
    assert "not read as audio: 2 hidden" in caplog.text or "2 hidden" in caplog.text


def test_linked_folders_are_followed_once_and_loops_end(tmp_path):
    (tmp_path / "set" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.wav").touch()
    (tmp_path / "set" / "sub" / "a.wav").touch()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "other")
    (tmp_path / "set" / "sub" / "loop").symlink_to(tmp_path / "set")
    assert sorted(path.name for path in audio_files(tmp_path / "set")) == ["a.wav", "b.wav"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_of_another_normal_form_is_the_files(form, tmp_path):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    file = tmp_path / unicodedata.normalize(form, NAME)
    file.touch()
    assert local_path(str(tmp_path), unicodedata.normalize(other, NAME)) == file
    text = unicodedata.normalize(other, NAME).replace(".wav", ".txt")
    (tmp_path / text).write_text("a")
    (row,) = read_manifest(tmp_path)
    assert row.captions == ("a",) and row.path == file


def test_the_slashes_of_windows_are_read(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.wav").touch()
    assert local_path(str(tmp_path), "sub\\x.wav") == tmp_path / "sub" / "x.wav"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("https://example.org/x.wav", "a URL"),
        ("s3://bucket/x.wav", "a URL"),
        ("C:\\sounds\\x.wav", "a path of Windows"),
        ("\\\\server\\x.wav", "a path of Windows"),
        ("x.wav", "No such file"),
    ],
)
def test_what_is_no_path_here_is_named(name, found, tmp_path):
    for path in (name, local_path(str(tmp_path), name)):
        with pytest.raises(AudioError, match=f"E_MISSING: found {found}"):
            probe(path)
