"""Commands over files: what a PATH may be, bad files, labels."""

import io
import json
import types

import numpy as np
import pytest

from slap_fast.cli import main
from slap_fast.cli.infer import parse_labels
from slap_fast.cli.inputs import open_inputs

pytestmark = pytest.mark.usefixtures("loaded_once")
COMMANDS = {"embed": [], "classify": ["--labels", "a,b"], "caption": ["--num-beams", "1"]}


def run(command, paths, model, tmp_path):
    words = [command, *map(str, paths), "--model", str(model), *COMMANDS[command], "--json"]
    return main([*words, "--out", str(tmp_path / "out")] if command == "embed" else words)


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_files_are_left_out_named_and_counted(command, untrained, sounds, tmp_path, capsys):
    files = [sounds / name for name in ("4.wav", "0.wav", "missing.wav", "1.wav")]
    assert run(command, files, untrained, tmp_path) == 0
    captured = capsys.readouterr()
    assert "4.wav: E_FORMAT" in captured.err and "missing.wav: E_MISSING" in captured.err
    assert "2 of 4 left out" in captured.err
    answer = json.loads(captured.out)
    if command == "embed":
        assert answer["failures"] == {"E_FORMAT": 1, "E_MISSING": 1} and answer["n"] == 2
    else:
        assert list(answer) == [str(files[1]), str(files[3])]


@pytest.mark.parametrize("command", COMMANDS)
def test_none_good_is_exit_code_1_and_no_file_is_a_mistake(
    command, untrained, sounds, tmp_path, capsys
):
    assert run(command, [sounds / "4.wav", sounds / "5.wav"], untrained, tmp_path) == 1
    (tmp_path / "empty").mkdir()
    assert run(command, [sounds, tmp_path / "empty"], untrained, tmp_path) == 2
    assert "empty: found no audio file, expected at least one" in capsys.readouterr().err


@pytest.mark.parametrize("words", (["data", "check"], ["data", "pack", "--out", "o", "--data"],
                                   ["eval", "--model", "MODEL", "--data"]))  # fmt: skip
def test_an_empty_folder_is_a_mistake_everywhere(words, untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words = [str(untrained) if word == "MODEL" else word for word in words]
    assert main([*words, "empty"]) == 2
    assert "empty: found no" in capsys.readouterr().err


def test_pack_leaves_out_files_and_rows_that_cannot_be_used(sounds, tmp_path, capsys):
    with (sounds / "m.csv").open("a") as file:
        file.write("1.wav,,a,test\nnone.wav,x,b,test\ntoo,few\n")
    words = ["data", "pack", "--data", str(sounds / "m.csv"), "--json", "--out"]
    assert main([*words, str(tmp_path / "shards")]) == 0
    captured = capsys.readouterr()
    skipped = {"E_FORMAT": 2, "E_MISSING": 1, "E_CAPTION_EMPTY": 1, "E_MANIFEST": 1}
    result = json.loads(captured.out)
    assert (result["packed"], result["skipped"]) == (4, skipped)
    assert "line 8" in captured.err and "5 of 9 left out" in captured.err
    (sounds / "0.txt").write_text("a sound")  # a folder: five files have no captions
    assert main(["data", "pack", "--data", str(sounds), "--out", str(tmp_path / "more")]) == 0
    (sounds / "0.txt").unlink()
    assert main(["data", "pack", "--data", str(sounds), "--out", str(tmp_path / "none")]) == 1


def test_eval_without_a_good_clip_is_exit_code_1(untrained, sounds, capsys):
    (sounds / "n.csv").write_text("path,caption\n4.wav,a\n5.wav,b\nno.wav,c\n")
    words = ["eval", "--model", str(untrained), "--data", str(sounds / "n.csv"), "--json"]
    assert main(words) == 1
    card = json.loads(capsys.readouterr().out)
    assert (card["n"], card["n_expected"]) == (0, 3)
    assert card["failures"] == {"E_FORMAT": 2, "E_MISSING": 1}
    assert not (untrained / "eval_n.json").exists()


def pack(data, out):
    assert main(["data", "pack", "--data", str(data), "--out", str(out)]) == 0


def names(inputs):
    return [clip.path.rsplit("/")[-1] for clip in inputs.clips]


def test_a_path_may_be_files_a_folder_a_list_a_manifest_or_shards(sounds, tmp_path, monkeypatch):
    files = [f"{i}.wav" for i in range(6)]
    assert names(open_inputs([sounds])) == files
    assert names(open_inputs([sounds / "0.wav", sounds / "x.flac"])) == ["0.wav", "x.flac"]
    assert names(open_inputs([sounds / "m.csv"])) == files
    assert names(open_inputs([sounds / "m.csv"], split="train")) == ["0.wav", "4.wav"]
    (sounds / "list.txt").write_text("3.wav\n\n1.wav\r\n")
    inputs = open_inputs([sounds / "list.txt"])
    assert list(inputs.items) == [str(sounds / "3.wav"), str(sounds / "1.wav")]
    stdin = types.SimpleNamespace(buffer=io.BytesIO(b"a.wav\nb\xff.wav\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    assert names(open_inputs(["-"])) == ["a.wav", "b\udcff.wav"]
    assert (
        main(["data", "pack", "--data", str(sounds / "m.csv"), "--out", str(tmp_path / "s")]) == 0
    )
    assert len(open_inputs([tmp_path / "s"]).clips) == 4
    assert len(open_inputs([tmp_path / "s"], split="test").clips) == 3


def test_embed_reads_shards_and_manifests_as_it_reads_files(untrained, sounds, tmp_path, capsys):
    with (sounds / "m.csv").open("a") as file:
        file.write(",no path,a,test\n")
    assert (
        main(["data", "pack", "--data", str(sounds / "m.csv"), "--out", str(tmp_path / "s")]) == 0
    )
    vectors = {}
    for name, path in (("files", sounds), ("rows", sounds / "m.csv"), ("shards", tmp_path / "s")):
        words = ["embed", str(path), "--model", str(untrained), "--out", str(tmp_path / name)]
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        if name == "rows":
            assert json.loads(capsys.readouterr().out)["n_expected"] == 7
        vectors[name] = np.load(tmp_path / name / "vectors.npy")
    np.testing.assert_allclose(vectors["rows"], vectors["files"], atol=1e-6)
    good = vectors["files"][:4]
    for vector in vectors["shards"]:  # in another order
        assert np.abs(good - vector).max(1).min() < 1e-6


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("dog, cat,", ["dog", "cat"]),
        ("dog,cat,dog", ["dog", "cat"]),
        ('["rain, on a roof", "cat", "cat"]', ["rain, on a roof", "cat"]),
        ("FILE.txt", ["rain, on a roof", "cat"]),
        ("FILE.json", ["a, b"]),
    ],
)
def test_labels_come_with_commas_as_json_or_in_a_file(text, labels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE.txt").write_text("rain, on a roof\n\ncat\ncat\n")
    (tmp_path / "FILE.json").write_text('["a, b"]')
    assert parse_labels(text) == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found none"),
        ("[1, 2]", "expected a list of texts"),
        ("[", "invalid JSON"),
        ("no.txt", "no.txt: No such file"),
    ],
)
def test_labels_that_cannot_be_used_are_named(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        parse_labels(text)
