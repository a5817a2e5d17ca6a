"""A9: a run holds no more memory, files, threads and processes late than early."""

import ctypes
import gc
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from slap_fast.config import override
from slap_fast.data.loader import TrainSteps
from slap_fast.training import loop
from tests.helpers import runs

EVERY = 5
"""Steps between two samples."""


def give_back() -> None:
    """Memory that is free, to the system: it comes and goes by megabytes."""
    ctypes.CDLL(None).malloc_trim(0)


def holdings(out: Path) -> dict[str, int]:
    """What this process and its run's folder hold now."""
    gc.collect()
    give_back()
    (worker,) = multiprocessing.active_children()
    pids = {"rank": os.getpid(), "worker": worker.pid}
    shared = [f for f in os.listdir("/dev/shm") if any(str(pid) in f for pid in pids.values())]
    counts = {"shared memory": len(shared), "files": len(os.listdir(out))}
    for name, pid in pids.items():
        process = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        counts[f"{name}'s kB"] = int(status["VmRSS"].split()[0])
        counts[f"{name}'s threads"] = int(status["Threads"])
        counts[f"{name}'s descriptors"] = len(os.listdir(process / "fd"))
    return counts


def watched_run(out: Path, steps: int) -> list[dict[str, int]]:
    """What this rank holds every few steps of a run."""
    real, read, samples = loop.train_step, TrainSteps.__getitem__, []

    def step(state, batches):
        if state.step % EVERY == 0:
            samples.append(holdings(out))
        return real(state, batches)

    def clips(self: TrainSteps, index: int):
        give_back()
        return read(self, index)

    loop.train_step = step
    TrainSteps.__getitem__ = clips  # the worker is a fork of this process
    changes = {"steps": steps, "save_every": 25, "saving": "background", "data.cache_gb": 0.0}
    runs.start_or_resume(
        out, override(runs.TINY, changes), workers=1, evaluate=lambda _: {"score": 0.0}
    )
    return samples


def slope(counts: np.ndarray) -> float:
    """In 1,000 steps: the median over pairs of samples (Theil-Sen), which no few of them move."""
    i, j = np.triu_indices(len(counts), 1)
    return float(np.median((counts[j] - counts[i]) / (j - i))) * 1_000 / EVERY


def grows(samples: list[dict[str, int]], most_kb: float) -> list[str]:
    """What grows in the second half of a run; the first half has allocations of first use."""
    late, growing = samples[len(samples) // 2 :], []
    for name in late[0]:
        counts = np.array([sample[name] for sample in late], dtype=float)
        if name.endswith("kB"):
            rate = slope(counts)
            if rate >= most_kb:
                growing.append(f"{name}: {rate:+,.0f} in 1,000 steps")
        else:  # files and tensors of a write or a batch in flight come and go
            first, _, last = map(np.median, np.array_split(counts, 3))
            if last > first + 2:
                growing.append(f"{name}: {first:g} to {last:g}")
    return growing


def test_a_leak_is_detected_despite_noise():
    noise, step = np.random.default_rng(0).exponential(200.0, 60).round(), np.arange(60) * EVERY
    noise[::7] += 1_200  # a checkpoint being written
    for rate, names in ((1.0, []), (3.0, ["rank's kB"])):
        samples = [{"rank's kB": kb, "files": 5} for kb in 350_000 + noise + rate * step]
        assert [word.split(":")[0] for word in grows(samples, 2_000)] == names
    files = [{"files": int(n)} for n in 5 + step / 25]
    assert grows(files, 2_000) and not grows([{"files": 5 + n % 2} for n in range(60)], 2_000)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_run_leaks_nothing(tmp_path, figure):
    """A trial is a step. Over 300, what is still made on first use is 1 MB in 1,000."""
    steps, most_kb = (3_000, 1_000) if figure.soak else (300, 2_000)
    for seed in figure("A9", ci=steps, soak=48_000, batch=steps):
        out = tmp_path / str(seed)
        for samples in runs.ranks(2, watched_run, out, steps, patience=3_600.0):
            assert not grows(samples, most_kb), samples[::10]
