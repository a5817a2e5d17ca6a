"""A manifest of small files, and shards packed from it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import soundfile

from slap_fast.data.manifest import read_manifest
from slap_fast.data.shards.writer import write_shards


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """40 clips of 3 formats in two splits, one a part of a file."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(40):
        kind = ("wav", "flac", "ogg")[i % 3]
        soundfile.write(folder / f"{i}.{kind}", 0.1 * rng.standard_normal(800 + 37 * i), 16_000)
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


@pytest.fixture(scope="session")
def packed(manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "set"
    assert not write_shards(read_manifest(manifest), out, shard_mb=0)
    return out


@pytest.fixture(scope="session")
def one(manifest, tmp_path_factory):
    """All 40 clips in one shard without splits."""
    rows = [dataclasses.replace(row, split=None) for row in read_manifest(manifest)]
    out = tmp_path_factory.mktemp("one") / "set"
    write_shards(rows, out)
    return out


@pytest.fixture
def damaged(one, tmp_path):
    """A copy of ``one`` to break: (its shard, what it read)."""
    folder = shutil.copytree(one, tmp_path / "copy")
    return folder, next(folder.glob("*.tar"))
