"""A4: seen is trained plus left out, by code, over faults, kills, ranks and workers."""

import json
import os
import random
import signal
from collections import Counter

import numpy as np
import pytest
import soundfile

from slap_fast import distributed
from slap_fast.config import override
from slap_fast.data.loader import TrainSteps
from slap_fast.data.manifest import read_manifest
from slap_fast.data.open import open_source
from slap_fast.data.shards.index import ROWS
from slap_fast.data.shards.writer import write_shards
from slap_fast.training import loop
from tests.helpers import runs

CONFIG = override(
    runs.TINY,
    {
        "steps": 12,
        "batch_size": 7,
        "save_every": 2,
        "data.max_bad_share": 1.0,
        "data.cache_gb": 0.0,
    },
)


@pytest.fixture
def shards(tmp_path):
    """Shards of 20 clips, some with a fault, and the error code of each faulty clip by its key."""
    rows = ["path,caption,end"]
    for i in range(20):
        wave = runs.clips(20).audio(i).waveform * (i % 5 != 2)
        soundfile.write(tmp_path / f"{i}.wav", wave, 16_000)
        rows.append(f"{i}.wav,sound {i},{0.4 if i % 7 == 3 else ''}")
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    folder = tmp_path / "set"
    write_shards(read_manifest(tmp_path / "m.csv"), folder, shard_mb=0)
    tars = sorted(folder.glob("*.tar"))
    tars[4].unlink()
    os.truncate(tars[9], 700)
    content = bytearray(tars[13].read_bytes())
    content[600] ^= 1
    tars[13].write_bytes(content)
    table = np.load(folder / ROWS)
    table["offset"][17] = 1 << 40
    np.save(folder / ROWS, table)
    codes = {
        4: "E_SHARD_MISSING",
        9: "E_SHARD_TRUNCATED",
        13: "E_SHARD_CORRUPT",
        17: "E_SHARD_INDEX",
    }
    return folder, codes


def train_until(out, folder, workers, dies_at):
    """On each rank: resumes the run, whose last rank is killed before a step."""
    real = loop.train_step

    def step(state, batches):
        if state.step == dies_at and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(state, batches)

    loop.train_step = step
    runs.start_or_resume(out, CONFIG, open_source(folder, None, fallback="train"), workers=workers)


@pytest.mark.slow
def test_seen_is_trained_plus_left_out_under_every_fault(shards, tmp_path, figure):
    """A4: two kills, each time another number of ranks and of workers."""
    folder, codes = shards
    source = open_source(folder, None, fallback="train")
    data = TrainSteps(source, None, CONFIG)
    drawn = [(step + 1, clip) for step in range(12) for _, clip in data.clips_of(step)]
    warned = Counter(
        code for _, clip in drawn if clip not in codes for code in source.audio(clip).warnings
    )
    assert len(warned) == 2
    expected = {
        "seen": 84,
        "bad": Counter(codes[clip] for _, clip in drawn if clip in codes),
        "warned": warned,
    }
    for seed in figure("A4", ci=2, soak=50):
        rng, out = random.Random(seed), tmp_path / str(seed)
        for dies_at in (*sorted(rng.sample(range(1, 12), 2)), None):
            ranks, workers = rng.choice((1, 2, 3)), rng.choice((0, 1, 2, 4))
            runs.ranks(ranks, train_until, out, folder, workers, dies_at)
        saved = json.loads((out / "last" / "training.json").read_text())
        assert saved["step"] == 12 and {k: saved["clips"][k] for k in expected} == expected
        lines = map(json.loads, (out / "bad_clips.jsonl").read_text().splitlines())
        listed = [(line["step"], int(line["key"]), line["code"]) for line in lines]
        assert sorted(listed) == sorted((n, i, codes[i]) for n, i in drawn if i in codes)
