"""Shards: what was packed comes back, WebDataset reads it, and each fault costs what it touched."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import soundfile

from slap_fast.config import override, slap_tiny
from slap_fast.data.audio.track import AudioError
from slap_fast.data.loader import TrainSteps
from slap_fast.data.manifest import read_manifest
from slap_fast.data.open import open_source
from slap_fast.data.shards.index import (
    INDEX,
    ROW,
    ROWS,
    Shard,
    ShardError,
    Split,
    padded,
)
from slap_fast.data.shards.writer import write_index_json, write_shards
from slap_fast.data.sources.files import ManifestClips
from slap_fast.data.sources.mixture import MixedClips, read_mix
from slap_fast.data.sources.shards import ShardClips
from slap_fast.models.tokenizer import CaptionTokenizer

RATE = 16_000


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """40 clips of 3 formats in two splits, one a part of a file."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(40):
        kind = ("wav", "flac", "ogg")[i % 3]
        soundfile.write(folder / f"{i}.{kind}", 0.1 * rng.standard_normal(800 + 37 * i), RATE)
        row = {
            "path": f"{i}.{kind}",
            "caption": [f"noise \u00e9 {i}", f"hiss {i}"],
            "label": "noise",
        }
        row |= {"split": "test" if i % 4 == 3 else "train"}
        lines.append(row | ({"start": 0.02, "end": 0.05} if i == 5 else {}))
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def packed(manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "set"
    assert not write_shards(read_manifest(manifest), out, shard_mb=0)
    return out


@pytest.fixture(scope="module")
def one(manifest, tmp_path_factory):
    """All 40 clips in one shard without splits."""
    rows = [dataclasses.replace(row, split=None) for row in read_manifest(manifest)]
    out = tmp_path_factory.mktemp("one") / "set"
    write_shards(rows, out)
    return out


def everything(source):
    return {
        source.captions(i): (source.audio(i).waveform.tobytes(), source.seconds(i), source.label(i))
        for i in range(len(source))
    }


def test_what_was_packed_comes_back(manifest, packed):
    for split in ("train", "test"):
        files = ManifestClips(read_manifest(manifest, split))
        shards = open_source(packed, split, fallback="train")
        assert isinstance(shards, ShardClips) and len(shards) == len(files)
        assert everything(shards) == everything(files)
        assert shards.total_seconds() == pytest.approx(files.total_seconds(), abs=1e-9)
        assert shards.longest_seconds() == files.longest_seconds()
    whole = open_source(packed, None, fallback="other")
    assert len(whole) == 40 and len(open_source(packed, None, fallback="test")) == 10
    with pytest.raises(ShardError, match="no split 'val', there are: train, test"):
        open_source(packed, "val", fallback="train")


def test_the_items_are_what_inference_takes(packed):
    source = open_source(packed, "train", fallback="train")
    spans = [source.item(i) for i in range(len(source))]
    assert sum(span[1:] == (0.02, 0.05) for span in spans) == 1
    assert all(isinstance(span[0], bytes) for span in spans)


def test_a_split_is_shuffled_and_the_same_input_gives_the_same_bytes(manifest, packed, tmp_path):
    write_shards(read_manifest(manifest), tmp_path / "again", shard_mb=0)
    for file in packed.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    source = open_source(packed, "train", fallback="train")
    numbers = [int(source.captions(i)[1].split()[1]) for i in range(len(source))]
    assert numbers != sorted(numbers)


def test_shards_are_plain_tars_and_unpack_to_a_folder_with_captions(packed, tmp_path):
    for tar in packed.glob("*.tar"):
        with tarfile.open(tar) as file:
            file.extractall(tmp_path, filter="data")
    rows = read_manifest(tmp_path)
    assert len(rows) == 40 and {row.split for row in rows} == {"train", "test"}
    assert everything(ManifestClips(rows)) == everything(ShardClips(packed))


def test_webdataset_reads_them(packed):
    wds = pytest.importorskip("webdataset")
    shards = sorted(str(path) for path in packed.glob("*.tar"))
    samples = list(wds.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len(samples) == 40
    for sample in samples:
        audio = next(sample[kind] for kind in ("wav", "flac", "ogg") if kind in sample)
        assert len(soundfile.read(io.BytesIO(audio))[0]) >= 800
        assert json.loads(sample["json"])["label"] == "noise"


def test_a_shard_is_closed_at_its_size(one, packed):
    assert len(list(one.glob("*.tar"))) == 1
    assert len(list(packed.glob("*.tar"))) == 40  # a clip each
    assert sorted(path.name for path in packed.glob("t*"))[0] == "test-000030.tar"


def test_a_split_name_does_not_leave_the_folder(manifest, tmp_path):
    row = dataclasses.replace(read_manifest(manifest)[0], split="../../x/\0y")
    write_shards([row], tmp_path / "a" / "set")
    names = {path.name for path in (tmp_path / "a" / "set").iterdir()}
    assert names == {"______x__y-000000.tar", INDEX, ROWS, "skipped.jsonl"}
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_bad_files_are_left_out_and_listed(manifest, tmp_path):
    rows = read_manifest(manifest)[:3]
    (tmp_path / "bad.wav").write_bytes(b"<html>")
    lines = '{"path": "bad.wav", "caption": "a"}\n{"path": "no.wav", "caption": "b"}\n'
    (tmp_path / "m.jsonl").write_text(lines)
    out = tmp_path / "set"
    skipped = write_shards([*rows, *read_manifest(tmp_path / "m.jsonl")], out)
    assert skipped == {"E_FORMAT": 1, "E_MISSING": 1}
    listed = [json.loads(line)["code"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert listed == ["E_FORMAT", "E_MISSING"] or listed == ["E_MISSING", "E_FORMAT"]
    assert len(ShardClips(out)) == 3
    with pytest.raises(ShardError, match="already holds shards"):
        write_shards(rows, out)
    with pytest.raises(ShardError, match="no clip could be packed"):
        write_shards(read_manifest(tmp_path / "m.jsonl"), tmp_path / "none")
    assert not (tmp_path / "none" / INDEX).exists()


def test_a_copy_for_a_worker_is_small(packed):
    source = ShardClips(packed, "test")
    copy = pickle.dumps(source)
    assert len(copy) < 1_000
    assert everything(pickle.loads(copy)) == everything(source)


# Faults


def losses(source) -> dict[int, str]:
    """Which clips cannot be read, and why."""
    lost = {}
    for i in range(len(source)):
        try:
            source.item(i)
        except AudioError as error:
            lost[i] = error.code
    return lost


def spans(folder):
    """[first byte, end) of each clip of a one-shard folder, in index order."""
    rows = np.load(folder / ROWS)
    first = rows["offset"].astype(int)
    ends = [padded(int(r["audio_bytes"])) + padded(int(r["notes_bytes"])) for r in rows]
    return list(zip(first, first + np.array(ends), strict=True))


@pytest.fixture
def damaged(one, tmp_path):
    """A copy of ``one`` to break: (its shard, what it read)."""
    folder = shutil.copytree(one, tmp_path / "copy")
    return folder, next(folder.glob("*.tar"))


def fault(shard, whole: bytes, seed: int) -> tuple[str, int, int]:
    """Breaks a shard; (code, first byte, end) of what a reader has to notice."""
    rng = np.random.default_rng(seed)
    kind, at = seed % 4, int(rng.integers(len(whole)))
    if kind == 0:  # cut anywhere
        os.truncate(shard, at)
        return "E_SHARD_TRUNCATED", at, len(whole)
    if kind == 1:  # cut at a block
        at = int(rng.integers(len(whole) // 512)) * 512
        os.truncate(shard, at)
        return "E_SHARD_TRUNCATED", at, len(whole)
    end = at + 1
    if kind == 2:  # one bit
        broken = bytes([whole[at] ^ 1 << int(rng.integers(8))])
    else:  # a run of other bytes
        end = min(len(whole), at + int(rng.integers(1, 2_000)))
        broken = bytes(byte ^ 0x5A for byte in whole[at:end])
    with shard.open("r+b") as file:
        file.seek(at)
        file.write(broken)
    return "E_SHARD_CORRUPT", at, end


def check_fault(folder, shard, whole, seed) -> None:
    code, first, end = fault(shard, whole, seed)
    found = losses(ShardClips(folder))
    expected = {i: code for i, (a, b) in enumerate(spans(folder)) if a < end and first < b}
    shard.write_bytes(whole)
    assert found == expected, seed


def test_every_fault_costs_exactly_the_clips_it_touches(damaged):
    folder, shard = damaged
    whole = shard.read_bytes()
    for seed in range(60):
        check_fault(folder, shard, whole, seed)
    assert losses(ShardClips(folder)) == {}


@pytest.mark.slow
def test_faults_of_shards(damaged, figure):
    folder, shard = damaged
    whole = shard.read_bytes()
    for seed in figure("A3", ci=2_000, soak=50_000):
        check_fault(folder, shard, whole, seed)


def test_every_bit_of_a_header_is_covered(damaged):
    folder, shard = damaged
    whole = shard.read_bytes()
    source, (first, _) = ShardClips(folder), spans(folder)[3]
    with shard.open("r+b") as file:
        for bit in range(512 * 8):
            file.seek(first + bit // 8)
            file.write(bytes([whole[first + bit // 8] ^ 1 << bit % 8]))
            file.flush()
            with pytest.raises(AudioError, match="E_SHARD_CORRUPT"):
                source._read(3)
            file.seek(first + bit // 8)
            file.write(whole[first + bit // 8 :][:1])


def replaced(shard, kind: str) -> None:
    """The whole shard is something else."""
    whole = shard.read_bytes()
    shard.unlink()
    if kind == "empty":
        shard.touch()
    elif kind == "folder":
        shard.mkdir()
    elif kind == "pipe":
        os.mkfifo(shard)
    elif kind == "gzip_bomb":
        shard.write_bytes(gzip.compress(bytes(10_000_000)) + bytes(len(whole)))
    elif kind == "symlinks":
        with tarfile.open(shard, "w") as tar:
            for i in range(400):
                link = tarfile.TarInfo(f"{i:09d}.wav")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("gone", "E_SHARD_MISSING"),
        ("folder", "E_SHARD_MISSING"),
        ("pipe", "E_SHARD_MISSING"),
        ("empty", "E_SHARD_TRUNCATED"),
        ("gzip_bomb", "E_SHARD_CORRUPT"),
        ("symlinks", "E_SHARD_CORRUPT"),
    ],
)
def test_a_shard_that_is_something_else_is_lost_whole(damaged, kind, code):
    folder, shard = damaged
    replaced(shard, kind)
    assert losses(ShardClips(folder)) == dict.fromkeys(range(40), code)


@pytest.mark.parametrize("field", ROW.names)
def test_a_wrong_row_of_the_index_is_seen(damaged, field):
    folder, _ = damaged
    rows = np.load(folder / ROWS)
    rows[7:8].view(np.uint8)[ROW.fields[field][1]] ^= 1
    np.save(folder / ROWS, rows)
    lost = losses(ShardClips(folder))
    assert list(lost) == [7] and lost[7] in ("E_SHARD_INDEX", "E_SHARD_CORRUPT")


def test_a_row_that_points_out_of_the_shard_is_not_read(damaged):
    folder, _ = damaged
    rows = np.load(folder / ROWS)
    rows["audio_bytes"][2] = 2**32 - 1
    rows["offset"][3] = 2**63
    np.save(folder / ROWS, rows)
    assert losses(ShardClips(folder)) == {2: "E_SHARD_INDEX", 3: "E_SHARD_INDEX"}


def changed(folder, **fields):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | fields))


BAD_INDEX = {
    "newer": ({"format_version": 2}, "format_version 2, expected 1"),
    "more_rows": ({"rows": 41}, "fill 41 rows"),
    "overlap": (
        {"splits": {"a": dict(first=5, last=40, total_seconds=1, longest_seconds=1)}},
        "expected them to fill",
    ),
    "no_splits": ({"rows": 0, "splits": {}}, "expected them to fill 0 rows"),
    "endless": (
        {"splits": {"": dict(first=0, last=40, total_seconds=1e999, longest_seconds=1)}},
        "expected finite seconds",
    ),
    "not_a_number": ({"rows": "many"}, "ValueError"),
    "shard_elsewhere": (
        {"shards": [dict(name="../x.tar", bytes=1, clips=1, sha256="")]},
        "found '../x.tar', expected the name of a .tar beside it",
    ),
    "no_shards": ({"shards": None}, "TypeError"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_an_index_that_is_wrong_is_refused(damaged, name):
    fields, message = BAD_INDEX[name]
    changed(damaged[0], **fields)
    with pytest.raises(ShardError, match=message):
        ShardClips(damaged[0])


def test_an_index_that_is_cut_is_refused(damaged):
    folder, _ = damaged
    for name in (ROWS, INDEX):
        whole = (folder / name).read_bytes()
        for cut in (0, 10, 200, len(whole) - 40, len(whole) - 3):
            (folder / name).write_bytes(whole[:cut])
            with pytest.raises(ShardError, match=name):
                ShardClips(folder)
        (folder / name).write_bytes(whole)
    np.save(folder / ROWS, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError, match="expected 40 rows of a shard index"):
        ShardClips(folder)


# Accounting

CONFIG = override(slap_tiny(), {"batch_size": 8, "steps": 15, "data.max_bad_share": 1.0})


def tokenizer():
    return CaptionTokenizer.load(None, 96)


def trained(step) -> int:
    return sum(len(batch.groups) for batch in step.batches)


def damage(folder, shard) -> dict[int, str]:
    """Breaks one clip and cuts off three; {index: code}."""
    with shard.open("r+b") as file:
        file.seek(spans(folder)[4][0] + 700)
        file.write(b"x")
    os.truncate(shard, spans(folder)[37][0] + 100)
    return {4: "E_SHARD_CORRUPT"} | dict.fromkeys((37, 38, 39), "E_SHARD_TRUNCATED")


def test_seen_is_trained_and_skipped_by_code(damaged):
    """Three epochs over a set with known faults."""
    faults = damage(*damaged)
    data = TrainSteps(open_source(damaged[0], None, fallback="train"), tokenizer(), CONFIG)
    steps = [data[i] for i in range(15)]
    for step, item in enumerate(steps):
        drawn = [index for _, index in data.clips_of(step)]
        assert item.seen == 8 == trained(item) + len(item.bad)
        assert [bad.code for bad in item.bad] == [faults[i] for i in drawn if i in faults]
    bad = [bad for item in steps[:5] for bad in item.bad]
    assert {(b.shard, b.key) for b in bad} == {(str(damaged[1]), f"{i:09d}") for i in faults}
    assert sum(len(item.bad) for item in steps) == 3 * len(faults)


RUN = {
    "model.audio.hidden_size": 32, "model.audio.num_heads": 2, "model.audio.intermediate_size": 32,
    "model.text.hidden_size": 32, "model.text.num_heads": 2, "model.text.num_layers": 1,
    "model.caption.hidden_size": 32, "model.caption.num_heads": 2, "model.ssl.prototypes": 16,
    "steps": 25, "batch_size": 8, "log_every": 1, "save_every": 4, "data.max_bad_share": 1.0,
    "data.cache_gb": 0.0,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_seen_is_trained_and_skipped_after_a_kill(damaged, tmp_path, figure):
    """A run killed at some step and resumed counts what one that never stopped does."""
    faults = damage(*damaged)
    data = TrainSteps(ShardClips(damaged[0]), tokenizer(), override(CONFIG, {"batch_size": 8}))
    drawn = [i for step in range(25) for _, i in data.clips_of(step) if i in faults]
    settings = [word for k, v in RUN.items() for word in ("--set", f"{k}={v}")]
    for seed in figure("A4", ci=2, soak=50):
        out = tmp_path / str(seed)
        words = [sys.executable, "-m", "slap_fast.cli", "train", "--out", str(out), "--workers"]
        first = [*words, str(seed % 3), "--data", str(damaged[0]), *settings]
        killed = subprocess.Popen(first, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        until = int(np.random.default_rng(seed).integers(5, 25))
        while lines(out / "metrics.jsonl") < until and killed.poll() is None:
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        subprocess.run([*words, "0", "--resume"], check=True, capture_output=True)
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        assert (last["seen"], last["bad"]) == (200, len(drawn))
        records = map(json.loads, (out / "bad_clips.jsonl").read_text().splitlines())
        told = [(int(r["key"]), r["code"]) for r in records]
        assert sorted(told) == sorted((i, faults[i]) for i in drawn)


def lines(path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


# Mixing


def test_a_mix_draws_by_weight_and_reads_from_both(manifest, packed, tmp_path):
    entries = [{"data": str(manifest), "weight": 3}, {"data": str(packed)}]
    (tmp_path / "mix.yaml").write_text(json.dumps(entries))
    mix = open_source(tmp_path / "mix.yaml", "train", fallback="train")
    assert isinstance(mix, MixedClips) and len(mix) == 60
    assert everything(mix) == everything(mix.sources[0]) == everything(mix.sources[1])
    assert mix.total_seconds() == pytest.approx(2 * mix.sources[0].total_seconds())
    assert mix.name(30).endswith("/000000000") and mix.seconds(30) == mix.sources[1].seconds(0)
    data = TrainSteps(mix, tokenizer(), override(CONFIG, {"batch_size": 16}))
    for step in range(15):
        assert sum(index < 30 for _, index in data.clips_of(step)) == 12
    assert trained(data[0]) == 16


def test_a_mix_counts_paths_from_its_own_folder(manifest):
    mix = manifest.parent / "mix.yml"
    mix.write_text("- data: m.jsonl\n- data: builtin\n  weight: 0.5\n")
    assert [(p.data, p.weight) for p in read_mix(mix)] == [(str(manifest), 1), ("builtin", 0.5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no list"),
        ("data: a.csv", "found no list"),
        ("- a.csv", "expected data and weight"),
        ("- data: a.csv\n  wieght: 1", "expected data and weight"),
        ("- data: 3", "found data 3"),
        ("- data: other.yaml", "found data 'other.yaml'"),
        ("- {data: a.csv, weight: 0}", "found weight 0, expected a number > 0"),
        ("- {data: a.csv, weight: .nan}", "found weight nan"),
        ("- {data: a.csv, weight: heavy}", "found weight 'heavy'"),
        ("- !!python/object/apply:os.system [id]", "cannot be read"),
        ("- {", "cannot be read"),
    ],
)
def test_a_mix_that_is_wrong_is_refused(text, message, tmp_path):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mix(tmp_path / "mix.yaml")


# Size


PROGRAM = """
import sys, time
from slap_fast.config import override, slap_tiny
from slap_fast.data.open import open_source
from slap_fast.data.loader import TrainSteps
from slap_fast.data.patch_cache import PatchCache
from slap_fast.models.tokenizer import CaptionTokenizer
words = CaptionTokenizer.load(None, 96)
config = override(slap_tiny(), {"steps": 10**9, "batch_size": 2048})
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))
before, start = peak(), time.perf_counter()
source = open_source(sys.argv[1], None, fallback="train")
assert PatchCache.build(source, config, 0, False) is None
data = TrainSteps(source, words, config)
drawn = data.clips_of(len(source) * 5 // 3 // 2048)
assert {epoch for epoch, _ in drawn} == {1} and all(source.seconds(i) == 9.5 for _, i in drawn)
print(len(source), time.perf_counter() - start, peak() - before, peak())
"""


def open_synthetic(folder, rows: int) -> tuple[float, int, int]:
    """(seconds to open an index and to draw from its middle, MB that took, peak RSS in MB)."""
    per_shard = 5_000
    folder.mkdir()
    index = np.lib.format.open_memmap(folder / "index.npy", "w+", ROW, (rows,))
    for first in range(0, rows, 1_000_000):
        part = index[first : first + 1_000_000]
        number = np.arange(first, first + len(part))
        part["shard"], part["offset"] = number // per_shard, (number % per_shard) * 102_400
        part["audio_bytes"], part["notes_bytes"], part["seconds"] = 100_000, 300, 9.5
    index.flush()
    names = [f"train-{i:06d}.tar" for i in range(-(-rows // per_shard))]
    shards = [Shard(name, per_shard * 102_400, per_shard, "0" * 64) for name in names]
    write_index_json(folder, rows, {"train": Split(0, rows, 9.5 * rows, 9.5)}, shards)
    words = [sys.executable, "-c", PROGRAM, str(folder)]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    found, seconds, grown, peak = run.stdout.split()
    assert int(found) == rows
    return float(seconds), int(grown), int(peak)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_index_opens_at_once(tmp_path, figure):
    rows = 109_000_000 if figure.soak else 1_000_000
    for _ in figure("A8", ci=1, soak=1):
        seconds, _, peak = open_synthetic(tmp_path / "set", rows)
        assert seconds < 2 and peak < 1_000
