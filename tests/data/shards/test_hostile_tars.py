"""Third-party tars that are hostile: nothing outside is read, no declared size is trusted."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import soundfile

from slap_fast.data.shards.import_tars import read_tars
from slap_fast.data.shards.index import BLOCK
from slap_fast.data.shards.writer import write_clips
from tests.helpers.tars import archive, audio, codes, pair, read, written


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
    """A line of a pax header, which holds its own length."""
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
    # (contents up to a hole, its size, the error, pairs left)
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
def test_no_declared_size_is_trusted(name, tmp_path):
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
        assert sum(len(data) for _, data in read_tars([tar], Counter())) > 20 << 19
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
