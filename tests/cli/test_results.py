"""Results: tried before the work, written whole, by one writer, and printed whatever happens."""

import errno
import json
import os
from contextlib import nullcontext

import numpy as np
import pytest

from slap_fast import atomic_files
from slap_fast.atomic_files import only_writer
from slap_fast.cli import main
from slap_fast.inference.embedder import Embedder
from tests.helpers.folders import names

pytestmark = pytest.mark.usefixtures("loaded_once")


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def words(untrained, sounds, monkeypatch):
    """``eval`` in the folder above the sounds."""
    monkeypatch.chdir(sounds.parent)
    return ["eval", "--model", str(untrained), "--data", "sounds/m.csv", "--no-captions", "--json"]


@pytest.fixture
def cards(untrained):
    """Deletes the cards in the model's folder."""
    yield untrained
    for card in untrained.glob("eval_*.json"):
        card.unlink()


def test_cards_of_several_evaluations_do_not_overwrite_each_other(words, cards):
    assert (
        main(words) == main([*words, "--split", "train"]) == main([*words, "--split", "test"]) == 0
    )
    assert main([*words, "--template", "{}"]) == 0
    assert main(words) == 0  # the same again: its own card
    names = sorted(path.name for path in cards.glob("eval_*"))
    assert names == ["eval_m.json", "eval_m_2.json", "eval_m_test.json", "eval_m_train.json"]


def read_only(monkeypatch, folder):
    """What a user other than root sees of a folder that belongs to root."""
    real = atomic_files.try_folder

    def refuse(tried, path):
        if tried == folder:
            raise OSError(f"{path}: cannot be written: Permission denied")
        real(tried, path)

    monkeypatch.setattr(atomic_files, "try_folder", refuse)


def test_a_card_of_a_read_only_model_is_written_here(words, cards, monkeypatch, sounds):
    read_only(monkeypatch, cards)
    assert main(words) == 0
    assert (sounds.parent / "eval_m.json").exists() and not list(cards.glob("eval*"))


def test_a_card_that_cannot_be_written_is_refused_before_the_work(
    words, sounds, monkeypatch, capsys
):
    def work(*_, **__):
        raise AssertionError("it worked first")

    monkeypatch.setattr("slap_fast.evaluation.card.evaluate", work)
    (sounds.parent / "file").touch()
    assert main([*words, "--out", "file/card.json"]) == 2
    assert "file/card.json: cannot be written" in capsys.readouterr().err


def test_results_are_printed_where_the_card_cannot_be_written(words, cards, monkeypatch, capsys):
    monkeypatch.setattr("slap_fast.atomic_files.sync", full_disk)
    assert main([*words, "--out", "card.json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["n"] == 3
    assert "card.json: cannot be written" in captured.err and "No space left" in captured.err
    assert not os.path.exists("card.json") and not os.path.exists("card.json.tmp")


def embed(untrained, sounds, *more):
    return main(["embed", str(sounds), "--model", str(untrained), "--out", "v", "--json", *more])


def stops_after(number, error):
    """``embed_each`` that is cut off after some items."""
    real = Embedder.embed_each

    def cut_off(self, items, **options):
        for i, each in enumerate(real(self, items, **options)):
            if i == number:
                raise error
            yield each

    return cut_off


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [(0, KeyboardInterrupt(), 130), (3, OSError(errno.ENOSPC, "full"), 1), (5, SystemExit(3), 3)],
    ids=["ctrl-c", "full disk", "end"],
)
def test_embed_goes_on_where_it_was_cut_off(
    number, error, code, untrained, sounds, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert embed(untrained, sounds) == 0
    items, vectors = (tmp_path / "v" / "items.jsonl").read_text(), np.load("v/vectors.npy")
    (tmp_path / "v" / "notes.txt").write_text("the user's own")
    for name in ("vectors.npy", "items.jsonl"):
        (tmp_path / "v" / name).write_text("earlier")
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "embed_each", stops_after(number, error))
        with pytest.raises(SystemExit) if code == 3 else nullcontext():
            assert embed(untrained, sounds) == code
    assert (tmp_path / "v" / "vectors.npy").read_text() == "earlier"
    capsys.readouterr()
    asked = []
    real = Embedder.embed_each
    monkeypatch.setattr(
        Embedder,
        "embed_each",
        lambda self, items, **o: asked.append(len(items)) or real(self, items, **o),
    )
    assert embed(untrained, sounds) == 0
    assert asked == [6 - number]
    assert json.loads(capsys.readouterr().out)["n_expected"] == 6
    np.testing.assert_allclose(np.load("v/vectors.npy"), vectors, atol=1e-6)
    assert (tmp_path / "v" / "items.jsonl").read_text() == items
    assert names(tmp_path / "v") == ["items.jsonl", "model.json", "notes.txt", "vectors.npy"]


def test_embed_starts_again_where_files_changed(untrained, sounds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "embed_each", stops_after(4, KeyboardInterrupt()))
        assert embed(untrained, sounds) == 130
    (sounds / "0.wav").write_bytes((sounds / "1.wav").read_bytes())
    os.utime(sounds / "0.wav", (1, 1))
    assert embed(untrained, sounds) == 0
    vectors = np.load("v/vectors.npy")
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    assert names(tmp_path / "v") == ["items.jsonl", "model.json", "vectors.npy"]


@pytest.mark.parametrize(
    ("command", "out", "replaced"),
    [
        (["embed", "sounds", "--model", "MODEL", "--out", "v"], "v", False),
        (["data", "pack", "--data", "sounds/m.csv", "--out", "s"], "s", False),
        (["eval", "--model", "MODEL", "--data", "sounds/m.csv", "--out", "c.json"], "c.json", True),
        (["export", "--model", "MODEL", "--out", "x.pt2"], "x.pt2", True),
        (["export-weights", "--model", "MODEL", "--out", "w"], "w", True),
        (["bench", "mel", "--out", "b", "--minutes", "1e-9"], "b", False),
        (["demo", "--out", "d"], "d", True),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_the_second_writer_is_refused(
    command, out, replaced, untrained, sounds, monkeypatch, capsys
):
    monkeypatch.chdir(sounds.parent)
    words = [str(untrained) if word == "MODEL" else word for word in command]
    with only_writer(sounds.parent / out, replaced=replaced):
        assert main(words) == 2
    assert f"{out}: this process is already writing there" in capsys.readouterr().err


def test_exported_weights_do_not_replace_other_files(untrained, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years")
    assert main(["export-weights", "--model", str(untrained), "--out", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert names(tmp_path) == ["thesis.txt"]


def test_half_an_exported_file_is_never_left(untrained, tmp_path, monkeypatch):
    (tmp_path / "x.pt2").write_text("earlier")
    monkeypatch.setattr("slap_fast.interop.export._as_program", lambda _: (b"new", None))
    monkeypatch.setattr("slap_fast.interop.export._difference", lambda *_: 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "sync", full_disk)
        assert main(["export", "--model", str(untrained), "--out", str(tmp_path / "x.pt2")]) == 1
    assert names(tmp_path) == ["x.pt2"] and (tmp_path / "x.pt2").read_text() == "earlier"
    assert main(["export", "--model", str(untrained), "--out", str(tmp_path / "x.pt2")]) == 0
    assert (tmp_path / "x.pt2").read_bytes() == b"new"
