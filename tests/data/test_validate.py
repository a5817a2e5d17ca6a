"""`slap-fast data check`: the problems of each fault, and none of a good collection."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
import soundfile

from slap_fast.cli import main
from slap_fast.data.manifest import ManifestError, read_manifest
from slap_fast.data.open import open_source
from slap_fast.data.shards.writer import write_shards
from slap_fast.data.validate import KINDS, validate

RATE = 16_000


@pytest.fixture
def folder(tmp_path):
    """Four good clips, in a manifest that is good."""
    rng = np.random.default_rng(0)
    for name in ("a.wav", "b.flac", "c.ogg", "d.wav"):
        soundfile.write(tmp_path / name, 0.1 * rng.standard_normal(8_000), RATE)
    rows = [("a.wav", "rain"), ("b.flac", "wind"), ("c.ogg", "a dog"), ("d.wav", "a dog")]
    write(tmp_path, rows)
    return tmp_path


def write(folder, rows, mode="w") -> None:
    with (folder / "m.jsonl").open(mode) as file:
        for path, caption in rows:
            file.write(json.dumps({"path": path, "caption": caption}) + "\n")


def problems(folder) -> list[tuple[str, str]]:
    report = validate(folder / "m.jsonl", workers=1)
    return [(problem.kind, problem.code) for problem in report.problems]


def test_a_good_collection_has_no_problem(folder):
    report = validate(folder / "m.jsonl")
    assert report.problems == [] and report.clips == 4 and report.seconds == 2.0
    assert set(report.counts()) == {*KINDS.values(), "corrupt"} and not any(
        report.counts().values()
    )


def good(folder, name: str) -> bytes:
    return (folder / name).read_bytes()


def damaged_ogg(folder) -> bytes:
    """One page of many has another bit."""
    file = io.BytesIO()
    noise = np.random.default_rng(1).normal(0, 0.1, 40 * RATE)
    soundfile.write(file, noise, RATE, format="OGG")
    data = bytearray(file.getvalue())
    data[len(data) // 2] ^= 1
    return bytes(data)


FILES = {
    "missing": (lambda d: None, "missing", "E_MISSING"),
    "html": (lambda d: b"<html>404</html>", "corrupt", "E_FORMAT"),
    "truncated": (lambda d: good(d, "a.wav")[:-4_000], "truncated", "E_TRUNCATED"),
    "flac_cut": (lambda d: good(d, "b.flac")[:-4_000], "corrupt", "E_DECODE"),
    "ogg_bit": (damaged_ogg, "corrupt", "W_CORRUPT"),
    "silent": (lambda d: np.zeros(8_000), "silent", "W_SILENT"),
    "too_short": (lambda d: np.ones(300), "too short", "E_TOO_SHORT"),
    "duplicate": (lambda d: good(d, "b.flac"), "duplicate", "E_DUPLICATE"),
    "nan": (lambda d: np.full(8_000, np.nan), "corrupt", "E_NONFINITE"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_reported(name, folder):
    make, kind, code = FILES[name]
    content = make(folder)
    if isinstance(content, bytes):
        (folder / "x.wav").write_bytes(content)
    elif content is not None:
        soundfile.write(folder / "x.wav", content, RATE, subtype="FLOAT")
    write(folder, [("x.wav", "a thing")], "a")
    assert problems(folder) == [(kind, code)]


CAPTIONS = {
    "empty": ("", "E_CAPTION_EMPTY"),
    "whitespace": (" \t ", "E_CAPTION_EMPTY"),
    "none": ([], "E_CAPTION_EMPTY"),
    "number": (3, "E_CAPTION_TYPE"),
    "long": ("very " * 3_000, "E_CAPTION_LONG"),
    "nul": ("a\0b", "E_CAPTION_TEXT"),
    "half_a_pair": ("\ud800", "E_CAPTION_TEXT"),
    "file_name": ("D.WAV", "E_CAPTION_FILENAME"),
    "stem": ("d", "E_CAPTION_FILENAME"),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_bad_caption_is_reported(name, folder):
    caption, code = CAPTIONS[name]
    write(folder, [("a.wav", "rain"), ("d.wav", caption), ("b.flac", "wind")])
    assert problems(folder) == [("mis-captioned", code)]


def test_equal_rows_are_duplicates(folder):
    write(folder, [("a.wav", "rain"), ("a.wav", "heavy rain")], "a")
    assert problems(folder) == [("duplicate", "E_DUPLICATE")]


def test_bad_lines_are_reported_and_the_others_validated(folder):
    with (folder / "m.jsonl").open("ab") as file:
        file.write(b'{"path": "a.wav"}\nnot json\n{"path": "a.wav", "caption": "caf\xe9"}\n')
    report = validate(folder / "m.jsonl")
    assert [(p.kind, p.line) for p in report.problems] == [("bad row", n) for n in (5, 6, 7)]
    assert report.clips == 4
    (folder / "m.csv").write_bytes(
        b'path,caption\na.wav,rain\nb.flac,"wi"nd\nb.flac,caf\xe9\nd.wav\n'
    )
    report = validate(folder / "m.csv")
    assert [(p.kind, p.line) for p in report.problems] == [("bad row", n) for n in (3, 4, 5)]
    assert report.clips == 1


def test_a_file_without_captions_in_a_folder_is_reported(folder):
    for name in "abc":
        (folder / f"{name}.txt").write_text("something")
    report = validate(folder)
    assert [(p.kind, p.code) for p in report.problems] == [("mis-captioned", "E_PAIR")]
    assert report.clips == 3


def test_duplicates_name_the_splits(folder):
    soundfile.write(folder / "e.flac", *soundfile.read(folder / "a.wav"))
    lines = [{"path": "a.wav", "split": "train"}, {"path": "e.flac", "split": "test"}]
    text = "".join(json.dumps(line | {"caption": "rain"}) + "\n" for line in lines)
    (folder / "m.jsonl").write_text(text)
    (problem,) = validate(folder / "m.jsonl").problems
    assert "e.flac (split test): has the same audio as" in problem.message
    assert problem.message.endswith("a.wav (split train)")


def test_shards_are_validated_to_the_last_byte(folder):
    out = folder / "shards"
    write_shards(read_manifest(folder / "m.jsonl"), out)
    assert validate(out).problems == [] and validate(out).clips == 4
    shard = next(out.glob("*.tar"))
    intact = shard.read_bytes()
    os.truncate(shard, len(intact) - 1)  # in the tar's end: no clip is lost
    assert [p.code for p in validate(out).problems] == ["E_SHARD_TRUNCATED"]
    shard.write_bytes(intact[:-1] + b"x")
    assert [p.code for p in validate(out).problems] == ["E_SHARD_CORRUPT"]
    shard.write_bytes(intact[:600] + b"x" + intact[601:])
    report = validate(out)
    assert [p.code for p in report.problems] == ["E_SHARD_CORRUPT"] * 2
    assert report.problems[1].name == str(shard / "000000000") and report.clips == 4
    shard.unlink()
    assert [p.code for p in validate(out).problems] == ["E_SHARD_MISSING"] * 5


def test_the_check_command(folder, capsys):
    words = ["data", "check", str(folder / "m.jsonl")]
    assert main(words) == 0
    write(folder, [("gone.wav", "nothing")], "a")
    assert main(words) == 1
    assert "missing: line 5: " in capsys.readouterr().out.replace("\n", " ")
    assert main([*words, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["missing"] == 1 and report["clips"] == 5
    assert report["problems"][0]["code"] == "E_MISSING"
    assert main(["data", "check", str(folder / "no.csv")]) == 2


def test_the_pack_command(folder, capsys):
    write(folder, [("gone.wav", "nothing")], "a")
    words = ["data", "pack", "--data", str(folder / "m.jsonl"), "--out", str(folder / "set")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "clips": 5, "packed": 4, "skipped": {"E_MISSING": 1},
    }  # fmt: skip
    assert main(words) == 2
    assert "already holds shards" in capsys.readouterr().err


def test_the_real_collection_has_only_duplicates(shared_data):
    """Eight pairs of equal recordings, in files that differ in nothing but a serial number."""
    report = validate(shared_data / "manifest.csv")
    assert report.clips == 984 and report.seconds == pytest.approx(3_802, abs=1)
    assert {kind: n for kind, n in report.counts().items() if n} == {"duplicate": 8}


@pytest.mark.parametrize(("unit", "bad"), [(1, 0), (1_000, 4), (1 / 60, 4), (16_000, 4)])
def test_a_duration_in_another_unit_is_reported(unit, bad, folder):
    rows = read_manifest(folder / "m.jsonl")
    lines = [
        {"path": row.path.name, "caption": row.captions[0], "duration_s": 0.5 * unit}
        for row in rows
    ]
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert problems(folder) == [("bad row", "E_DURATION")] * bad
    if unit > 100:
        with pytest.raises(ManifestError, match=r"duration_s: found .*, expected 0.5 seconds"):
            open_source(folder / "m.jsonl", None, fallback="train")
