"""Third-party tars: their pairs are read, each bad pair is left out with its code."""

from __future__ import annotations

import json
import tarfile
from collections import Counter

import numpy as np
import pytest

from slap_fast.cli import main
from slap_fast.data.open import open_source
from slap_fast.data.shards.import_tars import find_tars, read_tars
from slap_fast.data.shards.index import ShardError
from slap_fast.data.shards.writer import write_clips
from tests.helpers.tars import FORMATS, SUFFIXES, archive, audio, codes, pair, read, written


def long_name(rng, kind: str) -> str:
    """A folder and a stem; of what a ustar header has room for, or longer."""
    letters = np.array(list("abcXYZ012 -_\u00e9\u0416\u732b\U0001f415"))
    most = 12 if kind == "ustar" else 60
    parts = ["".join(rng.choice(letters, rng.integers(1, most))) for _ in range(3)]
    return "/".join(part.strip() or "x" for part in parts)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_tarfile_writes_is_read_back(kind, tmp_path):
    for seed in range(40):
        rng = np.random.default_rng([seed, *kind.encode()])
        members, expected, ignored = [], [], Counter()
        for number in range(int(rng.integers(1, 6))):
            key = ("./" if rng.random() < 0.3 else "") + f"{long_name(rng, kind)}{number}"
            suffix = str(rng.choice(SUFFIXES))
            name = f"{key}.{suffix.upper() if rng.random() < 0.3 else suffix}"
            captions = [f"caption \u00e9 {number}", "two"]
            sound = audio(number, suffix)
            texts = [
                ("txt", "\n".join(captions).encode()),
                ("json", json.dumps({"caption": captions})),
            ]
            chosen = texts[: int(rng.integers(1, 3))] if rng.random() < 0.7 else texts[1:]
            group = [(name, sound)]
            group += [(f"{key}.{k}", t if isinstance(t, bytes) else t.encode()) for k, t in chosen]
            if rng.random() < 0.5:
                group.append((f"{key}.cls", b"3"))
                ignored[".cls"] += 1
            members += [group[i] for i in rng.permutation(len(group))]
            expected.append((name.removeprefix("./"), tuple(captions), sound))
        folder = tarfile.TarInfo("some/folder")
        folder.type = tarfile.DIRTYPE
        tar = written(tmp_path, archive([folder, *members], kind))
        assert read(tar) == (expected, [], ignored), seed


def test_pairs_are_grouped_as_webdataset_does(tmp_path):
    members = [*pair("a.b/c"), *pair("./d e"), *pair("f"), ("f.seg.txt", b"x"), ("README", b"x")]
    tar = written(tmp_path, archive([*members, ("._f.flac", b"x")]))
    clips, errors, ignored = read(tar)
    assert [name for name, *_ in clips] == ["a.b/c.flac", "d e.flac", "f.flac"]
    assert not errors and ignored == {".seg.txt": 1, "without suffix": 2}
    wds = pytest.importorskip("webdataset")
    theirs = [s["__key__"] for s in wds.WebDataset(str(tar), shardshuffle=False, empty_check=False)]
    assert [name for name, *_ in clips] == [f"{key.removeprefix('./')}.flac" for key in theirs]


@pytest.mark.parametrize(
    ("texts", "captions"),
    [
        ({"txt": "\ufeffone\r\n\n two \n"}, ("one", "two")),
        ({"json": '{"text": ["rain", "wind"], "tag": [], "original_data": {}}'}, ("rain", "wind")),
        ({"json": '{"caption": "rain", "text": "no"}'}, ("rain",)),
        ({"txt": "rain", "json": '{"status": "success", "sha256": "0"}'}, ("rain",)),
        ({"json": '{"caption": "rain"}', "txt": "no"}, ("rain",)),
    ],
    ids=["lines", "laion_clap", "caption_before_text", "metadata_beside", "json_before_txt"],
)
def test_captions_as_other_tools_write_them(texts, captions, tmp_path):
    members = [("k.flac", audio(0)), *((f"k.{kind}", t.encode()) for kind, t in texts.items())]
    clips, errors, _ = read(written(tmp_path, archive(members)))
    assert [clip[1] for clip in clips] == [captions] and not errors


def pack(capsys, *words) -> dict:
    assert main(["data", "pack", "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_from_tars_to_training(tmp_path, capsys):
    """Splits that alternate, over two tars in a folder."""
    tars = tmp_path / "tars" / "deep"
    tars.mkdir(parents=True)
    expected = {"train": {}, "test": {}}
    for number in range(2):
        members = []
        for i in range(12):
            sound = audio(12 * number + i, SUFFIXES[i % 4])
            split = "test" if i % 3 == 0 else "train"
            caption = f"sound {number} {i}"
            fields = {"caption": caption, "split": split, "label": "x"}
            members += [(f"{number}-{i}.json", json.dumps(fields).encode())]
            members += [(f"{number}-{i}.{SUFFIXES[i % 4]}", sound), (f"{number}-{i}.npy", b"")]
            expected[split][(caption,)] = sound
        written(tars, archive(members), f"{number}.tar")
    with (tars / "1.tar").open("r+b") as file:  # the last pair has no header that is right
        file.seek((tars / "1.tar").read_bytes().index(b"1-11.json"))
        file.write(b"2")
    del expected["train"]["sound 1 11",]
    out = tmp_path / "out"
    result = pack(capsys, "--data", tmp_path / "tars", "--out", out, "--shard-mb", 1)
    assert result == {
        "clips": 24, "packed": 23, "skipped": {"E_SHARD_CORRUPT": 1}, "ignored": {".npy": 23}
    }  # fmt: skip
    (line,) = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    assert (line["code"], line["path"]) == ("E_SHARD_CORRUPT", str(tars / "1.tar"))
    assert "after 11 pairs" in line["message"]
    for split, clips in expected.items():
        source = open_source(out, split, fallback="train")
        assert {source.captions(i): source.item(i)[0] for i in range(len(source))} == clips
        assert all(source.seconds(i) > 0.03 and source.label(i) == "x" for i in range(len(source)))
    assert main(["data", "check", str(out)]) == 0


def test_the_output_of_pack(tmp_path, capsys):
    good, bad = (written(tmp_path, c, f"{i}.tar") for i, c in enumerate((archive(pair("a")), b"")))
    assert main(["data", "pack", "--data", str(good), str(bad), "--out", str(tmp_path / "o")]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 clips in 1 shards" in output and "1 left out: E_SHARD_TRUNCATED" in output
    assert "other members" not in output


LINK = tarfile.TarInfo("k.flac")
LINK.type, LINK.linkname = tarfile.SYMTYPE, "a.flac"
FAULTS = {
    "no_captions": ([("k.flac", b"x")], {"E_PAIR": 1}),
    "no_audio": ([("k.txt", b"x")], {"E_PAIR": 1}),
    "two_audios": ([*pair("k"), ("k.wav", b"x")], {"E_PAIR": 1}),
    "the_same_twice": ([("k.txt", b"x"), *pair("k")], {"E_PAIR": 1}),
    "interleaved": (
        [("k.flac", b"x"), ("l.flac", b"x"), ("k.txt", b"x"), ("l.txt", b"x")],
        {"E_PAIR": 2, "E_DUP_KEY": 2},
    ),
    "again": ([*pair("k", 1), *pair("l"), *pair("k", 2)], {"E_DUP_KEY": 1}, 2),
    "again_as_other_audio": ([*pair("k"), *pair("l"), ("k.wav", b"x")], {"E_DUP_KEY": 1}, 2),
    "again_from_here": ([*pair("k"), *pair("l"), *pair("./k")], {"E_DUP_KEY": 1}, 2),
    "again_after_a_bad_one": (
        [("k.flac", b"x"), ("k.wav", b"x"), *pair("l"), *pair("k")],
        {"E_PAIR": 1, "E_DUP_KEY": 1},
        1,
    ),
    "empty": ([("k.flac", audio(0)), ("k.txt", b" \n")], {"E_CAPTION_EMPTY": 1}),
    "not_text": ([("k.flac", audio(0)), ("k.txt", b"caf\xe9")], {"E_CAPTION_TEXT": 1}),
    "long": ([("k.flac", audio(0)), ("k.txt", b"a" * 10_001)], {"E_CAPTION_LONG": 1}),
    "very_long": ([("k.flac", audio(0)), ("k.txt", bytes(2 << 20))], {"E_CAPTION_LONG": 1}),
    "number": ([("k.flac", audio(0)), ("k.json", b'{"caption": 3}')], {"E_CAPTION_TYPE": 1}),
    "no_field": ([("k.flac", audio(0)), ("k.json", b"{}")], {"E_MANIFEST": 1}),
    "no_json": ([("k.flac", audio(0)), ("k.json", b'{"a":' * 99_999)], {"E_MANIFEST": 1}),
    "no_sound": ([("k.flac", b"<html>"), ("k.txt", b"x")], {"E_FORMAT": 1}),
    "no_bytes": ([("k.flac", b""), ("k.txt", b"x")], {"E_FORMAT": 1}),
    "link": ([LINK, ("k.txt", b"x")], {"E_SHARD_MEMBER": 1}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_pair_loses_only_itself(fault, tmp_path, capsys):
    members, skipped, *good = FAULTS[fault]
    good = good[0] if good else 0
    tar = written(tmp_path, archive([*pair("a"), *members, *pair("z")]))
    out = tmp_path / "out"
    result = pack(capsys, "--data", tar, "--out", out)
    assert result["skipped"] == skipped and result["packed"] == 2 + good
    assert result["clips"] == 2 + good + sum(skipped.values())
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert Counter(line["code"] for line in lines) == skipped
    assert all(line["path"].startswith(f"{tar}/") for line in lines)


def test_a_key_in_two_tars_belongs_to_the_first(tmp_path):
    first = written(tmp_path, archive(pair("k", 1)), "a.tar")
    second = written(tmp_path, archive([*pair("k", 2), *pair("l")]), "b.tar")
    clips, errors, _ = read(first, second)
    assert [clip[2] for clip in clips] == [audio(1), audio(0)]
    assert codes(errors) == {"E_DUP_KEY": 1} and str(first) in str(errors[0])


def test_a_key_whose_tar_broke_off_may_come_from_another(tmp_path):
    intact = archive(pair("k"))
    cut = written(tmp_path, intact[: intact.index(b"k.txt")], "a.tar")
    clips, errors, _ = read(cut, written(tmp_path, intact, "b.tar"))
    assert len(clips) == 1 and codes(errors) == {"E_SHARD_TRUNCATED": 1}


def test_which_paths_are_tars(tmp_path):
    for name in ("b/2.tar", "b/c/1.tar", "a.tar", "sounds/x.wav", "sounds/old.tar", "none/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    tars = [tmp_path / name for name in ("a.tar", "b/2.tar", "b/c/1.tar")]
    assert find_tars([tars[0], tmp_path / "b"]) == tars
    assert find_tars([str(tmp_path / "sounds")]) == find_tars([tmp_path / "none"]) == []
    assert find_tars([tmp_path / "m.csv"]) == []
    with pytest.raises(ShardError, match=r"none: found no tars, expected some beside .*a\.tar"):
        find_tars([tars[0], tmp_path / "none"])
    (tmp_path / "b" / "index.json").touch()
    with pytest.raises(
        ShardError, match=r"b: found index\.json, expected tars that are not packed"
    ):
        find_tars([tmp_path / "b"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.tar", "--split", "train"], "--split: found 'train', expected none"),
        (["m.csv", "n.csv"], "--data: found 2 paths, expected one, or tars"),
        ([], "--data: found 0 paths"),
    ],
)
def test_paths_that_pack_refuses(words, message, tmp_path, capsys):
    assert main(["data", "pack", "--out", str(tmp_path / "out"), "--data", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_splits_than_open_files(tmp_path):
    """Each shard is of one split, in whatever order the clips come."""
    fields = [
        json.dumps({"caption": f"no. {i}", "split": f"s{i % 40}"}).encode() for i in range(120)
    ]
    members = [m for i in range(120) for m in ((f"{i}.flac", audio(0)), (f"{i}.json", fields[i]))]
    tar = written(tmp_path, archive(members))
    assert not write_clips(read_tars([tar], Counter()), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.tar"))) == 120  # closed before the next of the split
    for number in range(40):
        source = open_source(tmp_path / "out", f"s{number}", fallback="train")
        captions = [source.captions(i)[0] for i in range(len(source))]
        assert captions == [f"no. {number + i}" for i in (0, 40, 80)]
    assert len(open_source(tmp_path / "out", None, fallback="s3")) == 3
