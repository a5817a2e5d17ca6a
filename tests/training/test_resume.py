"""A stopped run resumes to exactly the losses of an uninterrupted one."""

import contextlib
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from slap_fast import atomic_files
from slap_fast.checkpoint.format import verify, write_files
from slap_fast.training import loop
from slap_fast.training.state import begin, restore, snapshot
from tests.helpers import runs

BRIEF = runs.override(runs.TINY, {"steps": 5, "batch_size": 2, "data.cache_gb": 0.0})
"""One epoch of 10 clips, decoded by workers where there are any."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes of runs.start: sums over another number of threads round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder, state) of BRIEF, never stopped."""
    out = tmp_path_factory.mktemp("whole")
    return out, runs.start_or_resume(out, BRIEF, evaluate=lambda _: {"score": 0.0})


@contextlib.contextmanager
def patched(owner, name, make):
    """``owner.name`` replaced by ``make(what it was)``."""
    real = getattr(owner, name)
    setattr(owner, name, make(real))
    try:
        yield
    finally:
        setattr(owner, name, real)


def sigterm(times=2):
    """To this process and to the loader's workers, from others: torchrun, then SLURM."""
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    for _ in range(times):
        subprocess.run(["kill", "-TERM", *workers, str(os.getpid())], check=True)


def after(real):
    def call(*args, **kwargs):
        result = real(*args, **kwargs)
        sigterm()
        return result

    return call


def assert_same_run(out, state, uninterrupted):
    assert runs.loss_rows(out) == runs.loss_rows(uninterrupted[0])
    assert runs.same_weights(state, uninterrupted[1])
    assert (state.clip_counts, state.best) == (uninterrupted[1].clip_counts, uninterrupted[1].best)


@pytest.mark.parametrize("workers", [0, 4])
def test_a_run_stopped_at_every_step_equals_an_uninterrupted_one(tmp_path, figure, workers):
    """C4: a chain of as many resumes as there are steps, and a trial for each."""
    steps = 15 if figure.soak else {0: 10, 4: 5}[workers]
    config = runs.override(BRIEF, {"steps": steps})
    uninterrupted = tmp_path / "whole", runs.start_or_resume(tmp_path / "whole", config)
    for seed in figure("C4", ci=steps, soak=2 * steps, batch=steps):
        out = tmp_path / str(seed)
        for step in range(1, steps + 1):
            with patched(loop, "train_step", after):
                state = runs.start_or_resume(out, config, workers=workers)
            assert state.step == step
            assert json.loads((out / "last" / "training.json").read_text())["step"] == step
        state = runs.start_or_resume(out, workers=workers)
        assert_same_run(out, state, uninterrupted)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_stopped_once_with_workers_equals_an_uninterrupted_one(
    uninterrupted, tmp_path, figure, workers
):
    """C4."""
    for seed in figure("C4", ci=1, soak=5):
        out = tmp_path / str(seed)
        with patched(loop, "train_step", after):
            runs.start_or_resume(out, BRIEF, workers=workers)
        state = runs.start_or_resume(out, workers=workers, evaluate=lambda _: {"score": 0.0})
        assert_same_run(out, state, uninterrupted)


class Slow:
    """A source whose fourth clip, of those that a process reads, takes 3 s."""

    def __init__(self, source):
        self.source, self.read = source, 0

    def __len__(self):
        return len(self.source)

    def __getattr__(self, name):
        return getattr(self.source, name)

    def audio(self, *args):
        self.read += 1
        if self.read == 4:
            for _ in range(30):  # the signal may wake another thread than the one that sleeps
                time.sleep(0.1)
        return self.source.audio(*args)


def in_training(out, workers):
    with patched(loop, "train_step", after):
        return runs.start_or_resume(out, BRIEF, workers=workers)


def in_evaluation(out, workers):
    def evaluate(_):
        sigterm()
        time.sleep(60)

    config = runs.override(BRIEF, {"eval_every": 2})
    return runs.start_or_resume(out, config, workers=workers, evaluate=evaluate)


def waiting_for_data(out, workers):
    """The signal comes 0.7 s after the first step; by then the loader is at the slow clip."""
    timer, waited = threading.Timer(0.7, sigterm, [1]), []

    def make(real):
        def step(*args):
            if not waited:
                timer.start()
                waited.append(time.monotonic())
            return real(*args)

        return step

    with patched(loop, "train_step", make):
        state = runs.start_or_resume(out, BRIEF, Slow(runs.clips()), workers=workers)
    assert workers or time.monotonic() - waited[0] < 2.5
    return state


def in_a_save(out, workers):
    def make(real):
        def write(*args, **kwargs):
            sigterm()
            real(*args, **kwargs)

        return write

    with patched(atomic_files, "write_folder", make):
        return runs.start_or_resume(out, BRIEF, workers=workers)


PHASES = (in_training, in_evaluation, waiting_for_data, in_a_save)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_sigterm_saves_and_stops_in_every_phase(uninterrupted, tmp_path, figure, phase, workers):
    """C6."""
    for seed in figure("C6", ci=1, soak=13):
        out = tmp_path / str(seed)
        state = phase(out, workers)
        assert state.step < 5
        saved = json.loads((out / "last" / "training.json").read_text())["step"]
        assert saved == state.step
        state = runs.start_or_resume(out, workers=workers, evaluate=lambda _: {"score": 0.0})
        assert_same_run(out, state, uninterrupted)


def test_an_interrupted_evaluation_is_repeated(tmp_path):
    in_evaluation(tmp_path, 0)
    seen = []
    runs.start_or_resume(tmp_path, evaluate=lambda _: seen.append(0) or {"score": 0.0})
    assert len(seen) == 3  # of steps 2, 4 and 5


def test_an_evaluation_that_is_done_is_not_repeated(tmp_path):
    seen = []

    def evaluate(_):
        seen.append(0)
        return {"score": 0.0}

    with patched(loop, "_evaluate", after):
        state = runs.start_or_resume(
            tmp_path, runs.override(BRIEF, {"eval_every": 2}), evaluate=evaluate
        )
    assert (state.step, state.evaluated) == (2, 2)
    runs.start_or_resume(tmp_path, evaluate=evaluate)
    assert len(seen) == 3  # of steps 2, 4 and 5


def test_a_partial_line_after_a_kill_does_not_corrupt_the_metrics(uninterrupted, tmp_path):
    with patched(loop, "train_step", after):
        runs.start_or_resume(tmp_path, BRIEF)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    state = runs.start_or_resume(tmp_path, evaluate=lambda _: {"score": 0.0})
    assert_same_run(tmp_path, state, uninterrupted)


@pytest.mark.parametrize("best", [0.25, -math.inf])
def test_a_checkpoint_keeps_every_counter_and_the_random_numbers(tmp_path, best):
    counters = {"step": 7, "skipped": 5, "evaluated": 6, "best": best}
    state, tokenizer = begin(runs.TINY, None, None, runs.CPU)
    for name, value in counters.items():
        setattr(state, name, value)
    torch.rand(3)
    files = snapshot(state, tokenizer, {}, {})
    drawn = torch.rand(3)
    atomic_files.write_folder(tmp_path / "last", lambda path: write_files(path, files=files))
    again, _ = begin(runs.TINY, None, None, runs.CPU)
    again.best = 0.5
    restore(again, tmp_path / "last")
    assert {name: getattr(again, name) for name in counters} == counters
    assert torch.equal(torch.rand(3), drawn)


CHAIN = runs.override(runs.TINY, {"steps": 40, "save_every": 1})


def train_chain(out, begins):
    """In another process: resumes the run, and reports when it begins to train."""

    def make(real):
        def write(*args, **kwargs):
            begins.send(None)
            return real(*args, **kwargs)

        return write

    with patched(atomic_files, "replace_file", make):
        runs.start_or_resume(out, CHAIN)


def kill(out, seconds, in_a_write):
    """Kills the run that many seconds after it begins; False when it was complete before that.

    ``in_a_write``: and not before the next write has begun.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = runs.start(train_chain, out, writer)
    assert reader.poll(60)
    time.sleep(seconds)
    while in_a_write and process.is_alive() and not (out / "last.tmp").exists():
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.slow
def test_kill_9_loses_nothing(tmp_path, figure):
    """C1: one run after the other, each killed at random instants until it is complete."""
    expected = runs.start_or_resume(tmp_path / "whole", CHAIN)
    rows, rng = runs.loss_rows(tmp_path / "whole"), random.Random(0)
    out, complete, in_a_write, kills = tmp_path / "0", 0, 0, 0
    for seed in figure("C1", ci=60, soak=1_000):
        while not kill(out, rng.uniform(0.0, 0.4), in_a_write=seed % 2):
            resumed = runs.start_or_resume(out)
            assert runs.loss_rows(out) == rows
            assert runs.same_weights(resumed, expected)
            complete += 1
            out = tmp_path / str(complete)
        kills += 1
        in_a_write += any(out.glob("*.tmp"))
        folder = atomic_files.find_folder(out / "last")
        if folder.exists():
            verify(folder)
        if (out / "metrics.jsonl").exists():
            complete_lines = (out / "metrics.jsonl").read_text().count("\n")
            assert runs.loss_rows(out)[:complete_lines] == rows[:complete_lines]
    print(f"{kills} kills, {in_a_write} of them inside a write; {complete} runs completed")
    assert complete and in_a_write >= 0.3 * kills


def train_and_name_the_workers(out, pipe):
    """In another process: in its first step reports its loader's processes, and waits."""

    def make(real):
        def step(*args):
            pipe.send([process.pid for process in multiprocessing.active_children()])
            time.sleep(60)

        return step

    with patched(loop, "train_step", make):
        runs.start_or_resume(out, BRIEF, workers=2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_workers_of_a_run_that_is_killed_end_too(tmp_path):
    """They come from a server here, which outlives the run for as long as they live."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = runs.start(train_and_name_the_workers, tmp_path, writer)
    assert reader.poll(60)
    workers = reader.recv()
    process.kill()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "the workers outlive the run"
        time.sleep(0.05)
    assert len(workers) == 2


def train_in_the_background(out):
    runs.start_or_resume(
        out, runs.override(runs.TINY, {"steps": 100_000, "save_every": 1, "saving": "background"})
    )


@pytest.mark.slow
def test_last_never_names_an_incomplete_step(tmp_path, figure):
    """C7: polled 1,000 times a second while a thread writes; each trial is a second of it."""
    process = runs.start(train_in_the_background, tmp_path)
    last, seen, polls = tmp_path / "last", {}, 0
    try:
        while not last.exists():
            time.sleep(0.01)
            assert process.is_alive()
        for _ in figure("C7", ci=60, soak=1_800):
            end = time.monotonic() + 1.0
            while (now := time.monotonic()) < end:
                look(last, seen)
                polls += 1
                time.sleep(max(0.0, now + 0.001 - time.monotonic()))
    finally:
        process.kill()
        process.join()
    print(f"{polls} polls, {len(seen)} checkpoints seen")
    assert len(seen) > 20


def look(last: Path, seen: dict[tuple[int, int], int]) -> None:
    """Verifies every file of a new folder, and notes its step.

    The folder is held open, so that it stays the same one under another name.
    """
    try:
        handle = os.open(last, os.O_RDONLY)
    except FileNotFoundError:  # between two renames; find_folder finds the one before
        return
    held, status = Path(f"/proc/self/fd/{handle}"), os.fstat(handle)
    try:
        if (key := (status.st_ino, status.st_mtime_ns)) not in seen:
            verify(held)
            seen[key] = json.loads((held / "training.json").read_text())["step"]
    except (ValueError, OSError):  # fine if it was deleted meanwhile
        with contextlib.suppress(FileNotFoundError):
            assert os.stat(last).st_ino != status.st_ino, "last is incomplete"
    finally:
        os.close(handle)
