"""A9: a run holds no more memory, files, threads and processes late than early."""

import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import runs

from slap_fast import train as training
from slap_fast.config import override


def holdings(out: Path) -> dict[str, int]:
    """What this process and its run's folder hold now."""
    (worker,) = multiprocessing.active_children()
    pids = {"rank": os.getpid(), "worker": worker.pid}
    shared = [f for f in os.listdir("/dev/shm") if any(str(pid) in f for pid in pids.values())]
    found = {"shared memory": len(shared), "files": len(os.listdir(out))}
    for name, pid in pids.items():
        process = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        found[f"{name}'s kB"] = int(status["VmRSS"].split()[0])
        found[f"{name}'s threads"] = int(status["Threads"])
        found[f"{name}'s descriptors"] = len(os.listdir(process / "fd"))
    return found


def watched_run(out: Path, steps: int) -> list[dict[str, int]]:
    """What this rank holds every 10 steps of a run."""
    real, found = training.train_step, []

    def step(state, batches):
        if state.step % 10 == 0:
            found.append(holdings(out))
        return real(state, batches)

    training.train_step = step
    changes = {"steps": steps, "save_every": 25, "saving": "background", "data.cache_gb": 0.0}
    runs.go(out, override(runs.TINY, changes), workers=1, evaluate=lambda _: {"score": 0.0})
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_run_grows_nothing(tmp_path, figure):
    """A trial is a step. Over 300, what fills on first use hides a slope of 1 MB in 1,000."""
    steps, most_kb = (3_000, 1_024) if figure.soak else (300, 12_000)
    for seed in figure("A9", ci=steps, soak=48_000, batch=steps):
        out = tmp_path / str(seed)
        for found in runs.ranks(2, watched_run, out, steps, patience=3_600.0):
            late = found[len(found) // 3 :]
            for name in late[0]:
                counts = np.array([each[name] for each in late])
                slope = np.polyfit(np.arange(len(late)) / 100, counts, 1)[0]  # in 1,000 steps
                print(f"{name}: {counts[0]} to {counts[-1]}, {slope:+.1f} in 1,000 steps")
                if name.endswith("kB"):
                    assert slope < most_kb, name
                else:  # those of a write, or of a batch on its way, come and go
                    first, _, last = map(np.median, np.array_split(counts, 3))
                    assert last <= first + 2, name
