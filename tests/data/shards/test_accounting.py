"""Clips of damaged shards in training: seen is trained plus bad, also after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from slap_fast.config import override, slap_tiny
from slap_fast.data.loader import TrainSteps
from slap_fast.data.open import open_source
from slap_fast.data.sources.shards import ShardClips
from slap_fast.data.splits import training_data
from tests.helpers.shards import spans, tokenizer, trained

CONFIG = override(slap_tiny(), {"batch_size": 8, "steps": 15, "data.max_bad_share": 1.0})


def damage(folder, shard) -> dict[int, str]:
    """Breaks one clip and cuts off three; {index: code}."""
    with shard.open("r+b") as file:
        file.seek(spans(folder)[4][0] + 700)
        file.write(b"x")
    os.truncate(shard, spans(folder)[37][0] + 100)
    return {4: "E_SHARD_CORRUPT"} | dict.fromkeys((37, 38, 39), "E_SHARD_TRUNCATED")


def test_seen_is_trained_plus_skipped_by_code(damaged):
    """Three epochs over a set with planted faults."""
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
def test_seen_is_trained_plus_skipped_after_a_kill(damaged, tmp_path, figure):
    """A run killed at some step and resumed counts what one that never stopped does."""
    faults = damage(*damaged)
    every = ShardClips(damaged[0])
    numbers = {every.name(i): i for i in faults}
    source = training_data(damaged[0], None).train  # without the clips that are held out
    data = TrainSteps(source, tokenizer(), CONFIG)
    names = [source.name(i) for step in range(25) for _, i in data.clips_of(step)]
    drawn = [numbers[name] for name in names if name in numbers]
    assert drawn
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
        metrics = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        last = [row for row in metrics if "seen" in row][-1]  # rows of validations have no counts
        assert (last["seen"], last["bad"]) == (200, len(drawn))
        records = map(json.loads, (out / "bad_clips.jsonl").read_text().splitlines())
        logged = [(int(r["key"]), r["code"]) for r in records]
        assert sorted(logged) == sorted((i, faults[i]) for i in drawn)


def lines(path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
