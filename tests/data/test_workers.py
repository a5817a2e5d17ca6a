"""Workers and the patch cache where shared memory is small, as in a Docker container."""

from __future__ import annotations

import copy
import multiprocessing
import shutil
import subprocess
import sys

import pytest
import torch

from slap_fast.config import override, slap_tiny
from slap_fast.data import workers
from slap_fast.data.loader import TrainSteps, steps_from
from slap_fast.data.patch_cache import PatchCache
from slap_fast.models.tokenizer import CaptionTokenizer
from tests.helpers import runs
from tests.helpers.paths import ROOT

CONFIG = override(slap_tiny(), {"steps": 2, "batch_size": 4})
IN_A_CONTAINER = """
import sys
import torch
from slap_fast.data.workers import shared_memory_bytes
from tests.data.test_workers import CONFIG, steps
free = shared_memory_bytes()
batches = [batch for step in steps(CONFIG, with_cache=True, workers=2) for batch in step.batches]
print(free, len(batches), float(sum(b.audio.patches.sum() for b in batches)))
"""


def steps(config=CONFIG, *, with_cache=False, workers=2):
    source, tokenizer = runs.clips(6), CaptionTokenizer.load(None, max_tokens=64)
    cache = PatchCache.build(source, config, workers, False) if with_cache else None
    if cache is not None:
        cache.is_complete = False  # else this process makes the steps
    return list(steps_from(TrainSteps(source, tokenizer, config, cache), 0, workers))


def patches(data):
    return torch.cat([batch.audio.patches for step in data for batch in step.batches])


@pytest.fixture
def small(monkeypatch):
    """Shared memory of 64 MB, of which steps and the cache would need more."""
    monkeypatch.setattr(workers, "shared_memory_bytes", lambda: 64e6)
    monkeypatch.setattr(TrainSteps, "most_bytes", lambda self: 20_000_000)
    workers.note_once.cache_clear()


@pytest.mark.parametrize("with_cache", [False, True])
def test_batches_come_through_pipes_and_are_the_same(with_cache, small, capfd):
    through_pipes = steps(with_cache=with_cache)
    assert "/dev/shm has 64 MB free: batches come through pipes" in capfd.readouterr().err
    here = steps(workers=0)
    assert torch.equal(patches(through_pipes), patches(here))
    assert [type(step) for step in through_pipes] == [type(step) for step in here]
    assert not through_pipes[0].batches[0].audio.patches.is_shared()
    assert through_pipes[0].batches[0].masked_clips == here[0].batches[0].masked_clips


def test_with_room_tensors_are_shared_and_nothing_is_said(capfd):
    workers.note_once.cache_clear()
    assert steps()[0].batches[0].audio.patches.is_shared()
    assert capfd.readouterr().err == ""


def test_the_cache_is_kept_in_this_process_and_a_sent_one_is_empty(monkeypatch):
    for free, shared in ((0.0, False), (1e12, True)):
        monkeypatch.setattr(workers, "shared_memory_bytes", lambda free=free: free)
        cache = PatchCache(8, 4, is_complete=True)
        cache.add(0, torch.ones(2, 4), ())
        assert cache._patches.is_shared() == shared and torch.equal(
            cache.get(0)[0], torch.ones(2, 4)
        )
        sent = copy.copy(cache)  # by __getstate__, as a pickled one
        assert (sent.get(0) is not None) == shared


def test_without_semaphores_this_process_loads(monkeypatch, capfd):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing, "Semaphore", no_room)
    workers.note_once.cache_clear()
    assert len(steps()) == 2
    assert "holds no semaphore: loading without workers" in capfd.readouterr().err


def test_in_a_mount_namespace_with_a_small_shared_memory():
    enter = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*enter, "true"]).returncode:
        pytest.skip("needs the right to make a mount namespace")
    mount = 'mount -t tmpfs -o size=512k tmpfs /dev/shm && exec "$@"'
    command = [*enter, "sh", "-c", mount, "sh", sys.executable, "-c", IN_A_CONTAINER]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    free, batches, total = map(float, done.stdout.split())
    assert free < 525_000 and batches == 2
    assert total == pytest.approx(float(patches(steps(workers=0)).double().sum()), rel=1e-3)
    assert "batches come through pipes" in done.stderr
