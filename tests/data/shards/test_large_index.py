"""An index of very many clips: quick to open, small in memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from slap_fast.data.shards.index import ROW, Shard, Split
from slap_fast.data.shards.writer import write_index_json

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
    clips, seconds, grown, peak = run.stdout.split()
    assert int(clips) == rows
    return float(seconds), int(grown), int(peak)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_index_opens_at_once(tmp_path, figure):
    rows = 109_000_000 if figure.soak else 1_000_000
    for _ in figure("A8", ci=1, soak=1):
        seconds, _, peak = open_synthetic(tmp_path / "set", rows)
        assert seconds < 2 and peak < 1_000
