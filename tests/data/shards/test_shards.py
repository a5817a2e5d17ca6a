"""Shards: packed clips equal their files, and WebDataset reads them."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import tarfile

import pytest
import soundfile

from slap_fast.data.manifest import read_manifest
from slap_fast.data.open import open_source
from slap_fast.data.shards.index import INDEX, ROWS, ShardError
from slap_fast.data.shards.writer import write_shards
from slap_fast.data.sources.files import ManifestClips
from slap_fast.data.sources.shards import ShardClips
from tests.helpers.shards import contents_by_captions


def test_packed_clips_equal_their_files(manifest, packed):
    for split in ("train", "test"):
        files = ManifestClips(read_manifest(manifest, split))
        shards = open_source(packed, split, fallback="train")
        assert isinstance(shards, ShardClips) and len(shards) == len(files)
        assert contents_by_captions(shards) == contents_by_captions(files)
        assert shards.total_seconds() == pytest.approx(files.total_seconds(), abs=1e-9)
        assert shards.longest_seconds() == files.longest_seconds()
    clips = open_source(packed, None, fallback="other")
    assert len(clips) == 40 and len(open_source(packed, None, fallback="test")) == 10
    with pytest.raises(ShardError, match="no split 'val', there are: train, test"):
        open_source(packed, "val", fallback="train")


def test_items_are_bytes_and_spans(packed):
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
    assert contents_by_captions(ManifestClips(rows)) == contents_by_captions(ShardClips(packed))


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
    assert contents_by_captions(pickle.loads(copy)) == contents_by_captions(source)
