"""Attacks through audio files and folders of shards."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from slap_fast.atomic_files import file_sha256
from slap_fast.data.audio.decode import decode
from slap_fast.data.audio.track import AudioError
from slap_fast.data.open import open_source
from slap_fast.data.shards.index import INDEX, ROWS, checksum
from tests.helpers.attacks.place import (
    CANARY,
    Place,
    deep_json,
    gzip_bomb,
    object_array,
    pickled,
    zip_bomb,
)


def audio(name: str, content: Callable[[Place], bytes]) -> Callable[[Place], None]:
    def attack(place: Place) -> None:
        decode(place.file(name, content(place)), end=30.0)

    return attack


def flac_bomb(place: Place) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(10 * 60 * 16_000, 0.1), 16_000, format="FLAC")
    return file.getvalue()


def in_shards(name: str, content: Callable[[Place], bytes]) -> Callable[[Place], None]:
    """Replaces one file of intact shards and reads them."""

    def attack(place: Place) -> None:
        folder = place.shards()
        target = next(folder.glob("*.tar")) if name == "shard" else folder / name
        target.write_bytes(content(place))
        read_all(folder)

    return attack


def read_all(folder: Path) -> None:
    source = open_source(folder, None, fallback="train")
    for i in range(len(source)):
        try:
            source.audio(i)
        except AudioError:
            pass


def index_says(**fields: object) -> Callable[[Place], None]:
    def attack(place: Place) -> None:
        folder = place.shards()
        index = json.loads((folder / INDEX).read_text())
        index["shards"][0] |= fields
        (folder / INDEX).write_text(json.dumps(index).replace(CANARY, str(place.canary)))
        read_all(folder)

    return attack


def tar_of(kind: bytes, name: str, target: str = "") -> Callable[[Place], bytes]:
    def content(place: Place) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for number in range(30):
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.size = kind, target, 0
                member.devmajor, member.devminor = 1, number
                tar.addfile(member)
        return file.getvalue()

    return content


def headers_with_an_index_that_agrees(place: Place) -> None:
    """Tar members with climbing names, links and devices, under matching checksums."""
    folder = place.shards()
    shard, rows = next(folder.glob("*.tar")), np.load(folder / ROWS)
    data = bytearray(shard.read_bytes())
    for row, kind in zip(rows, (tarfile.SYMTYPE, tarfile.CHRTYPE), strict=True):
        member = tarfile.TarInfo(f"../../{CANARY}")
        member.type, member.linkname, member.size = kind, "/etc/passwd", int(row["audio_bytes"])
        at = int(row["offset"])
        data[at : at + 512] = member.tobuf(tarfile.USTAR_FORMAT)
    shard.write_bytes(data)
    ends = [*rows["offset"][1:].astype(int), len(data) - 1024]
    for row, end in zip(rows, ends, strict=True):
        row["checksum"] = checksum(row, bytes(data[int(row["offset"]) : end]))
    np.save(folder / ROWS, rows)
    index = json.loads((folder / INDEX).read_text())
    index["rows_sha256"] = file_sha256(folder / ROWS)
    (folder / INDEX).write_text(json.dumps(index))
    source = open_source(folder, None, fallback="train")
    assert [len(source.audio(i).waveform) for i in range(2)] == [8_000, 8_000]


def npy_header(place: Place) -> bytes:
    text = f"{{'descr': __import__('os').system('touch {place.canary}'), 'shape': (2,)}}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


ATTACKS: dict[str, Callable[[Place], None]] = {
    "audio_pickle": audio("a.wav", pickled),
    "audio_gzip_bomb": audio("a.wav", gzip_bomb),
    "audio_zip_bomb": audio("a.flac", zip_bomb),
    "audio_flac_bomb": audio("a.flac", flac_bomb),
    "audio_playlist": audio("a.mp4", lambda p: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
    "audio_concat": audio("a.webm", lambda p: b"ffconcat version 1.0\nfile '/etc/passwd'\n"),
    "shard_pickle": in_shards("shard", pickled),
    "shard_gzip_bomb": in_shards("shard", gzip_bomb),
    "shard_climbs": in_shards("shard", tar_of(tarfile.REGTYPE, f"../../{CANARY}")),
    "shard_absolute": in_shards("shard", tar_of(tarfile.REGTYPE, f"/tmp/{CANARY}")),
    "shard_symlink": in_shards("shard", tar_of(tarfile.SYMTYPE, "a.wav", "/etc/passwd")),
    "shard_hardlink": in_shards("shard", tar_of(tarfile.LNKTYPE, "a.wav", "/etc/passwd")),
    "shard_device": in_shards("shard", tar_of(tarfile.CHRTYPE, "a.wav")),
    "shard_fifo": in_shards("shard", tar_of(tarfile.FIFOTYPE, "a.wav")),
    "shard_headers_and_index": headers_with_an_index_that_agrees,
    "index_pickle": in_shards(INDEX, pickled),
    "index_deep": in_shards(INDEX, deep_json),
    "index_climbs": index_says(name="../../x.tar"),
    "index_absolute": index_says(name="/etc/passwd.tar"),
    "index_pipe": index_says(name=f"pipe:touch {CANARY}.tar"),
    "rows_pickle": in_shards(ROWS, pickled),
    "rows_object_array": in_shards(ROWS, object_array),
    "rows_header_code": in_shards(ROWS, npy_header),
}  # fmt: skip
