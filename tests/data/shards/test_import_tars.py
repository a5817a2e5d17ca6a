"""Tars of other tools: what they hold comes out, and nothing is lost without being told."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from slap_fast.cli import main
from slap_fast.data.audio.track import AudioError
from slap_fast.data.open import open_source
from slap_fast.data.shards.import_tars import find_tars, read_tars
from slap_fast.data.shards.index import BLOCK, ShardError, padded
from slap_fast.data.shards.writer import write_clips

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = {"flac": "FLAC", "wav": "WAV", "ogg": "OGG", "aiff": "AIFF"}


def audio(seed: int, kind: str = "flac") -> bytes:
    file = io.BytesIO()
    noise = 0.1 * np.random.default_rng(seed).standard_normal(600 + 7 * seed)
    soundfile.write(file, noise, 16_000, format=KINDS[kind])
    return file.getvalue()


def archive(members, kind: str = "pax") -> bytes:
    """A tar of (name, contents), or of ready TarInfos without contents."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind]) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def pair(key: str, seed: int = 0, caption: str = "a dog"):
    return [(f"{key}.flac", audio(seed)), (f"{key}.txt", caption.encode())]


def read(*tars):
    """(clips as (path in the tar, captions, bytes), errors, ignored)"""
    ignored = Counter()
    clips, errors = [], []
    for found in read_tars(tars, ignored):
        if isinstance(found, AudioError):
            errors.append(found)
            continue
        row, data = found
        tar = next(tar for tar in tars if str(row.path).startswith(f"{tar}/"))
        clips.append((str(row.path.relative_to(tar)), row.captions, data))
    return clips, errors, ignored


def codes(errors) -> dict[str, int]:
    return dict(Counter(error.code for error in errors))


def written(folder, content: bytes, name: str = "a.tar"):
    (folder / name).write_bytes(content)
    return folder / name


# What is right


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
            suffix = str(rng.choice(list(KINDS)))
            name = f"{key}.{suffix.upper() if rng.random() < 0.3 else suffix}"
            said = [f"caption \u00e9 {number}", "two"]
            sound = audio(number, suffix)
            texts = [("txt", "\n".join(said).encode()), ("json", json.dumps({"caption": said}))]
            chosen = texts[: int(rng.integers(1, 3))] if rng.random() < 0.7 else texts[1:]
            group = [(name, sound)]
            group += [(f"{key}.{k}", t if isinstance(t, bytes) else t.encode()) for k, t in chosen]
            if rng.random() < 0.5:
                group.append((f"{key}.cls", b"3"))
                ignored[".cls"] += 1
            members += [group[i] for i in rng.permutation(len(group))]
            expected.append((name.removeprefix("./"), tuple(said), sound))
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
            sound = audio(12 * number + i, list(KINDS)[i % 4])
            split = "test" if i % 3 == 0 else "train"
            said = f"sound {number} {i}"
            notes = {"caption": said, "split": split, "label": "x"}
            members += [(f"{number}-{i}.json", json.dumps(notes).encode())]
            members += [(f"{number}-{i}.{list(KINDS)[i % 4]}", sound), (f"{number}-{i}.npy", b"")]
            expected[split][(said,)] = sound
        written(tars, archive(members), f"{number}.tar")
    with (tars / "1.tar").open("r+b") as file:  # the last pair has no header that is right
        file.seek((tars / "1.tar").read_bytes().index(b"1-11.json"))
        file.write(b"2")
    del expected["train"]["sound 1 11",]
    out = tmp_path / "out"
    result = pack(capsys, "--data", tmp_path / "tars", "--out", out, "--shard-mb", 0)
    assert result == {
        "clips": 24, "packed": 23, "skipped": {"E_SHARD_CORRUPT": 1}, "ignored": {".npy": 23}
    }  # fmt: skip
    (line,) = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    assert (line["code"], line["path"]) == ("E_SHARD_CORRUPT", str(tars / "1.tar"))
    assert "behind 11 pairs" in line["message"]
    for split, clips in expected.items():
        source = open_source(out, split, fallback="train")
        assert {source.captions(i): source.item(i)[0] for i in range(len(source))} == clips
        assert all(source.seconds(i) > 0.03 and source.label(i) == "x" for i in range(len(source)))
    assert main(["data", "check", str(out)]) == 0


def test_what_people_read(tmp_path, capsys):
    good, bad = (written(tmp_path, c, f"{i}.tar") for i, c in enumerate((archive(pair("a")), b"")))
    assert main(["data", "pack", "--data", str(good), str(bad), "--out", str(tmp_path / "o")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 clips in 1 shards" in said and "1 left out: E_SHARD_TRUNCATED" in said
    assert "other members" not in said


# What is wrong with a pair

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
    "again_behind_a_bad_one": (
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
def test_a_bad_pair_costs_itself(fault, tmp_path, capsys):
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


def test_of_two_tars_with_a_key_the_first_has_it(tmp_path):
    first = written(tmp_path, archive(pair("k", 1)), "a.tar")
    second = written(tmp_path, archive([*pair("k", 2), *pair("l")]), "b.tar")
    clips, errors, _ = read(first, second)
    assert [clip[2] for clip in clips] == [audio(1), audio(0)]
    assert codes(errors) == {"E_DUP_KEY": 1} and str(first) in str(errors[0])


def test_a_key_whose_tar_broke_off_may_come_from_another(tmp_path):
    whole = archive(pair("k"))
    cut = written(tmp_path, whole[: whole.index(b"k.txt")], "a.tar")
    clips, errors, _ = read(cut, written(tmp_path, whole, "b.tar"))
    assert len(clips) == 1 and codes(errors) == {"E_SHARD_TRUNCATED": 1}


# What is wrong with a tar


@pytest.fixture(scope="module")
def twelve():
    """A ustar archive, its pairs, and where the contents of each pair end."""
    members = [member for i in range(12) for member in pair(f"{i:02d}", i, f"sound {i}")]
    ends, at = [], 0
    for _, content in members:
        ends.append(at + BLOCK + len(content))
        at += padded(len(content))
    return archive(members, "ustar"), members[::2], ends[1::2], at


def test_a_cut_costs_what_is_behind_it(twelve, tmp_path):
    whole, sounds, ends, last = twelve
    rng = np.random.default_rng(0)
    for cut in [*range(0, len(whole) + 1, BLOCK), *rng.integers(len(whole), size=60).tolist()]:
        clips, errors, _ = read(written(tmp_path, whole[:cut]))
        kept = sum(end <= cut for end in ends)
        assert [(name, data) for name, _, data in clips] == sounds[:kept], cut
        assert codes(errors) == ({} if cut >= last + BLOCK else {"E_SHARD_TRUNCATED": 1}), cut
        assert all(f"behind {kept} pairs" in str(error) for error in errors)


def test_a_pair_is_lost_with_a_member_that_breaks_off(tmp_path):
    """What the JSON would have said is not guessed."""
    whole = archive([*pair("a"), *pair("k"), ("k.json", b'{"split": "test"}')])
    clips, errors, _ = read(written(tmp_path, whole[: whole.index(b"test")]))
    assert [name for name, *_ in clips] == ["a.flac"]
    assert codes(errors) == {"E_SHARD_TRUNCATED": 1} and "behind 1 pairs" in str(errors[0])


def test_a_bit_of_a_header_costs_what_is_behind_it(twelve, tmp_path):
    """All of them but such as leave the number that they are in as it is."""
    whole, sounds, ends, _ = twelve
    told = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        broken = bytearray(whole)
        header = int(rng.integers(12))
        at = (ends[header - 1] + BLOCK - 1) // BLOCK * BLOCK if header else 0
        broken[at + int(rng.integers(BLOCK))] ^= 1 << int(rng.integers(8))
        clips, errors, _ = read(written(tmp_path, broken))
        found = [(name, data) for name, _, data in clips]
        told += bool(errors)
        assert codes(errors) == ({"E_SHARD_CORRUPT": 1} if errors else {}), seed
        assert found == (sounds[:header] if errors else sounds), seed
    assert told >= 390


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_bit_of_a_long_name_loses_nothing_unseen(kind, tmp_path):
    """No checksum covers a long name, but a pair of two names falls apart."""
    key = "\u00e9" + "x" * 150
    members = [*pair("a"), *pair(key), *pair("z")]
    whole, good = archive(members, kind), {"a.flac", f"{key}.flac", "z.flac"}
    first = len(archive([members[0]], kind)[: -tarfile.RECORDSIZE]) or 0
    places = [i for i in range(first, len(whole)) if whole[i : i + 10] == b"x" * 10]
    for at in {place + extra for place in places[:: len(places) // 40] for extra in range(-9, 9)}:
        broken = bytearray(whole)
        broken[at] ^= 1 << at % 8
        clips, errors, _ = read(written(tmp_path, broken))
        assert errors or {name for name, *_ in clips} == good, at
        assert len(clips) + len(errors) >= 2


def zeroed(whole: bytes) -> bytes:
    """A header that reads as the end."""
    at = whole.index(b"01.flac")
    return whole[:at] + bytes(BLOCK) + whole[at + BLOCK :]


BROKEN = {
    "empty": (lambda whole: b"", "E_SHARD_TRUNCATED", 0),
    "gzip": (gzip.compress, "E_SHARD_CORRUPT", 0),
    "html": (lambda whole: b"<html>" * 999, "E_SHARD_CORRUPT", 0),
    "a_few_bytes": (lambda whole: b"<html>", "E_SHARD_TRUNCATED", 0),
    "zeros_and_more": (lambda whole: bytes(1024) + whole, "E_SHARD_CORRUPT", 0),
    "two_in_a_row": (lambda whole: whole + whole, "E_SHARD_CORRUPT", 12),
    "a_header_of_zeros": (zeroed, "E_SHARD_CORRUPT", 1),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_tar_is_told_once(fault, twelve, tmp_path):
    change, code, kept = BROKEN[fault]
    tar, other = (
        written(tmp_path, change(twelve[0])),
        written(tmp_path, archive(pair("o")), "b.tar"),
    )
    clips, errors, _ = read(tar, other)
    assert codes(errors) == {code: 1} and len(clips) == kept + 1
    assert errors[0].path == str(tar)


def test_no_members_at_all_is_no_fault(tmp_path):
    assert read(written(tmp_path, bytes(10_240))) == ([], [], {})


@pytest.mark.parametrize("kind", ["gone", "folder", "pipe", "dangling"])
def test_a_tar_that_is_not_there(kind, tmp_path):
    tar = tmp_path / "x.tar"
    {
        "gone": lambda: None,
        "folder": tar.mkdir,
        "pipe": lambda: os.mkfifo(tar),
        "dangling": lambda: tar.symlink_to("nowhere"),
    }[kind]()
    clips, errors, _ = read(tar, written(tmp_path, archive(pair("a"))))
    assert len(clips) == 1 and codes(errors) == {"E_SHARD_MISSING": 1}


@pytest.mark.parametrize("contents", [False, True], ids=["a_header", "contents"])
def test_a_disk_that_fails_costs_what_is_behind(contents, twelve, tmp_path, monkeypatch):
    tar, fails = written(tmp_path, twelve[0]), twelve[0].index(b"03.flac") + BLOCK * contents

    class Failing(io.FileIO):
        def read(self, size=-1):
            if self.tell() >= fails:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(Path, "open", lambda path, mode: Failing(path, mode))
    clips, errors, _ = read(tar)
    assert len(clips) == 3 and codes(errors) == {"E_SHARD_MISSING": 1}
    assert "Input/output error" in str(errors[0])


# What is evil


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


EVIL = {
    "symlink": member("k.flac", tarfile.SYMTYPE, "OUTSIDE/secret.flac"),
    "symlink_up": member("k.flac", tarfile.SYMTYPE, "../secret.flac"),
    "hard_link": member("k.flac", tarfile.LNKTYPE, "OUTSIDE/secret.flac"),
    "link_to_a_member": member("k.flac", tarfile.LNKTYPE, "a.flac"),
    "link_with_a_size": member("k.flac", tarfile.LNKTYPE, "a.flac", 9_999),
    "caption_link": member("k.txt", tarfile.SYMTYPE, "OUTSIDE/secret.txt"),
    "device": member("k.flac", tarfile.CHRTYPE),
    "block_device": member("k.flac", tarfile.BLKTYPE),
    "pipe": member("k.flac", tarfile.FIFOTYPE),
    "unknown": member("k.flac", b"Z"),
    "sparse": member("k.flac", tarfile.GNUTYPE_SPARSE),
    "absolute": member("OUTSIDE/k.flac"),
    "up": member("../k.flac"),
    "up_within": member("b/../../k.flac"),
    "link_without_suffix": member("folder", tarfile.SYMTYPE, "OUTSIDE"),
}


@pytest.mark.parametrize("name", EVIL)
def test_nothing_outside_is_read_or_written(name, tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret.flac").write_bytes(audio(9))
    (outside / "secret.txt").write_text("secret")
    evil = tarfile.TarInfo.frombuf(EVIL[name].tobuf(), "utf-8", "strict")
    evil.name = evil.name.replace("OUTSIDE", str(outside))
    evil.linkname = evil.linkname.replace("OUTSIDE", str(outside))
    tar = written(inside, archive([*pair("a"), evil, *pair("z")]))
    clips, errors, _ = read(tar)
    assert [clip[0] for clip in clips] == ["a.flac", "z.flac"]
    assert codes(errors) == {"E_SHARD_MEMBER": 1}
    assert write_clips(read_tars([tar], Counter()), inside / "out") == {"E_SHARD_MEMBER": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "outside"]
    assert sorted(path.name for path in outside.iterdir()) == ["secret.flac", "secret.txt"]
    assert sorted(path.name for path in inside.iterdir()) == ["a.tar", "out"]
    assert b"secret" not in b"".join(path.read_bytes() for path in (inside / "out").glob("*.tar"))


def test_a_sparse_file_of_pax_is_refused(tmp_path):
    evil = member("k.flac")
    evil.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(1 << 50)}
    assert codes(read(written(tmp_path, archive([evil])))[1]) == {"E_SHARD_MEMBER": 1}


def header(name: str, kind: bytes, size: int) -> bytes:
    return member(name, kind, size=size).tobuf(tarfile.GNU_FORMAT)


def padding(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    """A line of a pax header, which tells its own length."""
    length = 0
    while (line := b"%d %s=%s\n" % (length, key, value)) and len(line) != length:
        length = len(line)
    return line


def records(*pairs: tuple[bytes, bytes]) -> bytes:
    content = b"".join(record(*pair) for pair in pairs)
    return header("x", tarfile.XHDTYPE, len(content)) + padding(content)


HUGE = 10 << 30
PAIR = archive(pair("z"))
BOMBS = {
    # (contents up to a hole, its size, what it costs, pairs left)
    "a_member_of_10_gb": (header("k.flac", b"0", HUGE), HUGE, {"E_TOO_LONG": 1}, 1),
    "captions_of_10_gb": (header("k.txt", b"0", HUGE), HUGE, {"E_CAPTION_LONG": 1}, 1),
    "another_kind_of_10_gb": (header("k.bin", b"0", HUGE), HUGE, {}, 1),
    "pax_of_10_gb": (header("k", tarfile.XHDTYPE, HUGE), HUGE, {"E_SHARD_CORRUPT": 1}, 0),
    "name_of_10_gb": (header("k", tarfile.GNUTYPE_LONGNAME, HUGE), HUGE, {"E_SHARD_CORRUPT": 1}, 0),
    "claims_1_gb": (header("k.flac", b"0", 1 << 30), 0, {"E_SHARD_TRUNCATED": 1}, 0),
    "claims_2_87": (header("k.bin", b"0", 1 << 87), 0, {"E_SHARD_TRUNCATED": 1}, 0),
    "goes_back": (header("k.flac", b"0", -1536), 0, {"E_SHARD_CORRUPT": 1}, 0),
    "pax_size_goes_back": (
        records((b"size", b"-1536")) + header("k.flac", b"0", 0), 0, {"E_SHARD_CORRUPT": 1}, 0,
    ),
    "pax_size_of_many_digits": (
        records((b"size", b"9" * 80)) + header("k.flac", b"0", 0), 0, {"E_SHARD_CORRUPT": 1}, 0,
    ),
    "5000_headers_of_a_member": (records((b"a", b"b")) * 5_000, 0, {}, 1),
    "a_record_of_no_length": (
        header("x", tarfile.XHDTYPE, 6) + padding(b"0 a=b\n"), 0, {"E_SHARD_CORRUPT": 1}, 0,
    ),
    "a_record_without_value": (
        header("x", tarfile.XHDTYPE, 12) + padding(b"6 abc\n6 d=e\n"), 0,
        {"E_SHARD_CORRUPT": 1}, 0,
    ),
    "a_record_without_end": (
        header("x", tarfile.XHDTYPE, 6) + padding(b"9 a=bc"), 0, {"E_SHARD_CORRUPT": 1}, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_no_size_is_believed(name, tmp_path):
    start, hole, cost, kept = BOMBS[name]
    tar = written(tmp_path, start)
    os.truncate(tar, len(start) + hole)
    with tar.open("ab") as file:
        file.write(PAIR)
    tracemalloc.start()
    try:
        clips, errors, _ = read(tar)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert codes(errors) == cost and len(clips) == kept


def test_memory_holds_one_pair(tmp_path):
    big = io.BytesIO()
    noise = np.random.default_rng(0).integers(-9_000, 9_000, 500_000).astype(np.int16)
    soundfile.write(big, noise, 16_000, format="WAV")
    members = [m for i in range(20) for m in ((f"{i}.wav", big.getvalue()), (f"{i}.txt", b"x"))]
    tar = written(tmp_path, archive(members))
    tracemalloc.start()
    try:
        assert sum(len(found[1]) for found in read_tars([tar], Counter())) > 20 << 19
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# Which paths are tars


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
def test_what_pack_is_not_given(words, message, tmp_path, capsys):
    assert main(["data", "pack", "--out", str(tmp_path / "out"), "--data", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_splits_than_open_files(tmp_path):
    """Each shard is of one split, whatever order they come in."""
    said = [json.dumps({"caption": str(i), "split": f"s{i % 40}"}).encode() for i in range(120)]
    members = [m for i in range(120) for m in ((f"{i}.flac", audio(0)), (f"{i}.json", said[i]))]
    tar = written(tmp_path, archive(members))
    assert not write_clips(read_tars([tar], Counter()), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.tar"))) == 120  # closed before their split is back
    for number in range(40):
        source = open_source(tmp_path / "out", f"s{number}", fallback="train")
        found = [source.captions(i)[0] for i in range(len(source))]
        assert found == [str(number), str(number + 40), str(number + 80)]
    assert len(open_source(tmp_path / "out", None, fallback="s3")) == 3
