"""What a run trains on and is validated on, and whether the data is still the same."""

import shutil

import pytest

from slap_fast.data.fingerprint import fingerprint
from slap_fast.data.manifest import read_manifest
from slap_fast.data.shards.writer import write_shards
from slap_fast.data.splits import AllBut, training_data
from tests.helpers.train_command import write_sounds


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    write_sounds(folder, 40)
    return folder


def manifest(folder, split_of, name="m.csv", durations=True):
    """40 rows, each of the split that ``split_of`` gives its number."""
    rows = [f"{i}.wav,sound {i},{split_of(i)},0.5" for i in range(40)]
    (folder / name).write_text("\n".join(["path,caption,split,duration_s", *rows]) + "\n")
    return folder / name


def captions(source):
    return [source.captions(i) for i in range(len(source))]


def parts(data, split=None, **options):
    """(training clips, validation clips, what it is called) by their captions."""
    data = training_data(data, split, **options)
    return captions(data.train), captions(data.validation), data.validated_on


def test_without_a_split_every_tenth_file_is_held_out(sounds):
    path = manifest(sounds, lambda i: "")
    train, validation, name = parts(path)
    assert (len(train), len(validation), name) == (36, 4, "held-out clips")
    assert not {*train} & {*validation} and parts(path)[1] == validation
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], *reversed(rows[1:])]))
    assert {*parts(path)[1]} == {*validation}
    assert parts(path, hold_out=False) == (
        *2 * (captions(training_data(path, None, hold_out=False).train),),
        "training clips",
    )


@pytest.mark.parametrize(
    "split_of, split, sizes, name",
    [
        (lambda i: "val" if i < 8 else "train", None, (32, 8), "validation split"),
        (lambda i: "dev" if i < 8 else "train", None, (32, 8), "validation split"),
        (lambda i: "test" if i < 10 else "train", None, (27, 3), "held-out clips"),
        (lambda i: "test" if i < 10 else "", None, (27, 3), "held-out clips"),
        (lambda i: "val" if i < 8 else "a", "a", (32, 8), "validation split"),
        (lambda i: "val" if i < 30 else "train", "val", (27, 3), "held-out clips"),
        (lambda i: "test" if i < 30 else "train", None, (10, 10), "training clips"),
    ],
)  # fmt: skip
def test_no_clip_is_trained_on_and_validates_in_silence(sounds, split_of, split, sizes, name):
    train, validation, validated_on = parts(manifest(sounds, split_of), split)
    assert (len(train), len(validation), validated_on) == (*sizes, name)
    assert bool({*train} & {*validation}) == (name == "training clips")
    assert not any("test" == split_of(int(c[0].split()[1])) for c in (*train, *validation))


def test_splits_without_a_training_split_are_an_error(sounds):
    path = manifest(sounds, lambda i: "test" if i < 30 else "eval")
    with pytest.raises(ValueError, match="found splits eval, test, expected one called train"):
        training_data(path, None)


def test_parts_of_a_file_are_on_one_side(sounds):
    rows = [f"{i}.wav,part {k} of {i},{k / 10},{k / 10 + 0.1}" for i in range(20) for k in range(4)]
    (sounds / "m.csv").write_text("\n".join(["path,caption,start,end", *rows]) + "\n")
    train, validation, _ = parts(sounds / "m.csv")
    assert (len(train), len(validation)) == (72, 8)
    files = [{text.split()[-1] for (text,) in side} for side in (train, validation)]
    assert not files[0] & files[1]


def test_a_file_that_is_missing_is_not_held_out(sounds, tmp_path):
    shutil.copytree(sounds, tmp_path / "copy")
    write_sounds(tmp_path / "copy", 40)
    held_out = parts(tmp_path / "copy" / "m.csv")[1]
    number = held_out[0][0].split()[1]
    (tmp_path / "copy" / f"{number}.wav").unlink()
    train, again, _ = parts(tmp_path / "copy" / "m.csv")
    assert (f"sound {number}",) in train and (f"sound {number}",) not in again


def test_shards_and_mixes_hold_out_too(sounds, tmp_path):
    write_sounds(tmp_path / "a", 40)
    write_shards(read_manifest(tmp_path / "a" / "m.csv"), tmp_path / "set")
    train, validation, name = parts(tmp_path / "set")
    assert (len(train), len(validation), name) == (36, 4, "held-out clips")
    assert not {*train} & {*validation}
    write_sounds(tmp_path / "b", 5)
    (tmp_path / "mix.yaml").write_text("- data: set\n- data: b/m.csv\n  weight: 3\n")
    data = training_data(tmp_path / "mix.yaml", None)
    assert (len(data.train), len(data.validation)) == (41, 9)
    assert data.validated_on == "held-out clips, training clips"
    assert data.train.parts == [(36, 1.0), (5, 3.0)]


@pytest.mark.parametrize("left_out", [[], [0], [39], [3, 4, 5], [0, 7, 39], [*range(40)]])
def test_all_but_is_the_others_in_their_order(sounds, left_out):
    write_sounds(sounds, 40)
    source = training_data(sounds / "m.csv", None, hold_out=False).train
    kept = [i for i in range(40) if i not in left_out]
    others = AllBut(source, left_out)
    assert captions(others) == [source.captions(i) for i in kept]
    assert others.total_seconds() == pytest.approx(0.5 * len(kept))


def test_a_fingerprint_is_of_the_clips_not_of_their_place(sounds, tmp_path):
    write_sounds(sounds, 40)
    before = fingerprint(training_data(sounds / "m.csv", None).train)
    moved = shutil.copytree(sounds, tmp_path / "moved")
    assert fingerprint(training_data(moved / "m.csv", None).train) == before
    assert (before["clips"], before["seconds"]) == (36, 18.0)


@pytest.mark.parametrize(
    "old, new", [("sound 1\n", "sound one\n"), ("1.wav", "2.wav"), ("0.wav,sound 0\n", "")]
)
def test_a_fingerprint_shows_a_change(sounds, tmp_path, old, new):
    write_sounds(tmp_path, 40)
    before = fingerprint(training_data(tmp_path / "m.csv", None, hold_out=False).train)
    path = tmp_path / "m.csv"
    path.write_text(path.read_text().replace(old, new))
    assert fingerprint(training_data(path, None, hold_out=False).train) != before
