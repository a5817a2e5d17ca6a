"""Damaged shards and indices: a fault loses exactly the clips that it touches."""

from __future__ import annotations

import gzip
import json
import os
import tarfile

import numpy as np
import pytest

from slap_fast.data.audio.track import AudioError
from slap_fast.data.shards.index import INDEX, ROW, ROWS, ShardError
from slap_fast.data.sources.shards import ShardClips
from tests.helpers.shards import error_codes, spans


def fault(shard, intact: bytes, seed: int) -> tuple[str, int, int]:
    """Breaks a shard; (code, first byte, end) of the damage."""
    rng = np.random.default_rng(seed)
    kind, at = seed % 4, int(rng.integers(len(intact)))
    if kind == 0:  # cut anywhere
        os.truncate(shard, at)
        return "E_SHARD_TRUNCATED", at, len(intact)
    if kind == 1:  # cut at a block
        at = int(rng.integers(len(intact) // 512)) * 512
        os.truncate(shard, at)
        return "E_SHARD_TRUNCATED", at, len(intact)
    end = at + 1
    if kind == 2:  # one bit
        broken = bytes([intact[at] ^ 1 << int(rng.integers(8))])
    else:  # a run of other bytes
        end = min(len(intact), at + int(rng.integers(1, 2_000)))
        broken = bytes(byte ^ 0x5A for byte in intact[at:end])
    with shard.open("r+b") as file:
        file.seek(at)
        file.write(broken)
    return "E_SHARD_CORRUPT", at, end


def assert_fault(folder, shard, intact, seed) -> None:
    code, first, end = fault(shard, intact, seed)
    lost = error_codes(ShardClips(folder))
    expected = {i: code for i, (a, b) in enumerate(spans(folder)) if a < end and first < b}
    shard.write_bytes(intact)
    assert lost == expected, seed


def test_every_fault_loses_exactly_the_clips_it_touches(damaged):
    folder, shard = damaged
    intact = shard.read_bytes()
    for seed in range(60):
        assert_fault(folder, shard, intact, seed)
    assert error_codes(ShardClips(folder)) == {}


@pytest.mark.slow
def test_faults_of_shards(damaged, figure):
    folder, shard = damaged
    intact = shard.read_bytes()
    for seed in figure("A3", ci=2_000, soak=50_000):
        assert_fault(folder, shard, intact, seed)


def test_every_bit_of_a_header_is_covered(damaged):
    folder, shard = damaged
    intact = shard.read_bytes()
    source, (first, _) = ShardClips(folder), spans(folder)[3]
    with shard.open("r+b") as file:
        for bit in range(512 * 8):
            file.seek(first + bit // 8)
            file.write(bytes([intact[first + bit // 8] ^ 1 << bit % 8]))
            file.flush()
            with pytest.raises(AudioError, match="E_SHARD_CORRUPT"):
                source._read(3)
            file.seek(first + bit // 8)
            file.write(intact[first + bit // 8 :][:1])


def replaced(shard, kind: str) -> None:
    """Replaces the shard."""
    intact = shard.read_bytes()
    shard.unlink()
    if kind == "empty":
        shard.touch()
    elif kind == "folder":
        shard.mkdir()
    elif kind == "pipe":
        os.mkfifo(shard)
    elif kind == "gzip_bomb":
        shard.write_bytes(gzip.compress(bytes(10_000_000)) + bytes(len(intact)))
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
def test_a_shard_that_is_replaced_is_lost_completely(damaged, kind, code):
    folder, shard = damaged
    replaced(shard, kind)
    assert error_codes(ShardClips(folder)) == dict.fromkeys(range(40), code)


@pytest.mark.parametrize("field", ROW.names)
def test_a_wrong_row_of_the_index_is_noticed(damaged, field):
    folder, _ = damaged
    rows = np.load(folder / ROWS)
    rows[7:8].view(np.uint8)[ROW.fields[field][1]] ^= 1
    np.save(folder / ROWS, rows)
    lost = error_codes(ShardClips(folder))
    assert list(lost) == [7] and lost[7] in ("E_SHARD_INDEX", "E_SHARD_CORRUPT")


def test_a_row_out_of_range_is_not_read(damaged):
    folder, _ = damaged
    rows = np.load(folder / ROWS)
    rows["audio_bytes"][2] = 2**32 - 1
    rows["offset"][3] = 2**63
    np.save(folder / ROWS, rows)
    assert error_codes(ShardClips(folder)) == {2: "E_SHARD_INDEX", 3: "E_SHARD_INDEX"}


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


def test_a_truncated_index_is_refused(damaged):
    folder, _ = damaged
    for name in (ROWS, INDEX):
        intact = (folder / name).read_bytes()
        for cut in (0, 10, 200, len(intact) - 40, len(intact) - 3):
            (folder / name).write_bytes(intact[:cut])
            with pytest.raises(ShardError, match=name):
                ShardClips(folder)
        (folder / name).write_bytes(intact)
    np.save(folder / ROWS, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError, match="expected 40 rows of a shard index"):
        ShardClips(folder)
