"""Third-party tars that are damaged: one error covers everything after the damage."""

from __future__ import annotations

import errno
import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from slap_fast.data.shards.index import BLOCK, padded
from tests.helpers.tars import archive, codes, pair, read, written


@pytest.fixture(scope="module")
def twelve():
    """A ustar archive, its pairs, and where the contents of each pair end."""
    members = [member for i in range(12) for member in pair(f"{i:02d}", i, f"sound {i}")]
    ends, at = [], 0
    for _, content in members:
        ends.append(at + BLOCK + len(content))
        at += padded(len(content))
    return archive(members, "ustar"), members[::2], ends[1::2], at


def test_a_truncated_tar_loses_what_follows(twelve, tmp_path):
    intact, sounds, ends, last = twelve
    rng = np.random.default_rng(0)
    for cut in [*range(0, len(intact) + 1, BLOCK), *rng.integers(len(intact), size=60).tolist()]:
        clips, errors, _ = read(written(tmp_path, intact[:cut]))
        kept = sum(end <= cut for end in ends)
        assert [(name, data) for name, _, data in clips] == sounds[:kept], cut
        assert codes(errors) == ({} if cut >= last + BLOCK else {"E_SHARD_TRUNCATED": 1}), cut
        assert all(f"after {kept} pairs" in str(error) for error in errors)


def test_a_pair_is_lost_with_a_member_that_breaks_off(tmp_path):
    """Its captions may be in the part that is lost."""
    intact = archive([*pair("a"), *pair("k"), ("k.json", b'{"split": "test"}')])
    clips, errors, _ = read(written(tmp_path, intact[: intact.index(b"test")]))
    assert [name for name, *_ in clips] == ["a.flac"]
    assert codes(errors) == {"E_SHARD_TRUNCATED": 1} and "after 1 pairs" in str(errors[0])


def test_a_flipped_bit_in_a_header_loses_what_follows(twelve, tmp_path):
    """Every bit, except those that do not change the value of a number."""
    intact, sounds, ends, _ = twelve
    noticed = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        broken = bytearray(intact)
        header = int(rng.integers(12))
        at = (ends[header - 1] + BLOCK - 1) // BLOCK * BLOCK if header else 0
        broken[at + int(rng.integers(BLOCK))] ^= 1 << int(rng.integers(8))
        clips, errors, _ = read(written(tmp_path, broken))
        pairs = [(name, data) for name, _, data in clips]
        noticed += bool(errors)
        assert codes(errors) == ({"E_SHARD_CORRUPT": 1} if errors else {}), seed
        assert pairs == (sounds[:header] if errors else sounds), seed
    assert noticed >= 390


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_flipped_bit_in_a_long_name_loses_nothing_silently(kind, tmp_path):
    """No checksum covers a long name, but a pair of two names falls apart."""
    key = "\u00e9" + "x" * 150
    members = [*pair("a"), *pair(key), *pair("z")]
    intact, good = archive(members, kind), {"a.flac", f"{key}.flac", "z.flac"}
    first = len(archive([members[0]], kind)[: -tarfile.RECORDSIZE]) or 0
    places = [i for i in range(first, len(intact)) if intact[i : i + 10] == b"x" * 10]
    for at in {place + extra for place in places[:: len(places) // 40] for extra in range(-9, 9)}:
        broken = bytearray(intact)
        broken[at] ^= 1 << at % 8
        clips, errors, _ = read(written(tmp_path, broken))
        assert errors or {name for name, *_ in clips} == good, at
        assert len(clips) + len(errors) >= 2


def zeroed(intact: bytes) -> bytes:
    """A header that reads as the end."""
    at = intact.index(b"01.flac")
    return intact[:at] + bytes(BLOCK) + intact[at + BLOCK :]


BROKEN = {
    "empty": (lambda intact: b"", "E_SHARD_TRUNCATED", 0),
    "gzip": (gzip.compress, "E_SHARD_CORRUPT", 0),
    "html": (lambda intact: b"<html>" * 999, "E_SHARD_CORRUPT", 0),
    "a_few_bytes": (lambda intact: b"<html>", "E_SHARD_TRUNCATED", 0),
    "zeros_and_more": (lambda intact: bytes(1024) + intact, "E_SHARD_CORRUPT", 0),
    "two_in_a_row": (lambda intact: intact + intact, "E_SHARD_CORRUPT", 12),
    "a_header_of_zeros": (zeroed, "E_SHARD_CORRUPT", 1),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_tar_is_reported_once(fault, twelve, tmp_path):
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
def test_a_tar_that_cannot_be_opened(kind, tmp_path):
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
def test_a_failing_disk_loses_what_follows(contents, twelve, tmp_path, monkeypatch):
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
