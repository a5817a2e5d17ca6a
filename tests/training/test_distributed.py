"""Many ranks equal one: losses, gradients, steps, checkpoints, stops. All on gloo."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from slap_fast import distributed, losses
from slap_fast.config import override
from slap_fast.data.loader import TrainSteps
from slap_fast.training import checkpoints, loop
from slap_fast.training.state import begin
from slap_fast.training.step import LOSSES, train_step
from tests.helpers import runs
from tests.helpers.gradients import NO_LOSS, gradients_of
from tests.helpers.paths import ROOT

CASES = {
    "softmax": {**NO_LOSS, "loss.contrastive": 1.0},
    "sigmoid": {**NO_LOSS, "loss.contrastive": 1.0, "loss.contrastive_kind": "sigmoid"},
    "sinkhorn": {**NO_LOSS, "loss.ssl": 1.0},
    "centering": {**NO_LOSS, "loss.ssl": 1.0, "model.ssl.targets": "centering"},
    "caption": {**NO_LOSS, "loss.caption": 1.0},
    "caption in several forwards": {**NO_LOSS, "loss.caption": 1.0, "max_tokens": 60},
    "sum": {},
    "sum, separate pass": {"model.ssl.student_pass": "separate"},
}
SIZES = (8, 5)
TRIALS = len(CASES) * len(SIZES)


@pytest.mark.slow
def test_ranks_start_beside_a_folder_of_runs(tmp_path):
    """`make demo` makes one where `make test` starts."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    program = f"import os, sys\nsys.path.append({str(ROOT)!r})\nfrom tests.helpers import runs\n"
    program += "print(runs.ranks(1, os.getcwd))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == f"{[str(tmp_path)]}\n", done.stderr


def test_more_ranks_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_RANK: found 1, expected below 1.*per-node=1"):
        with distributed.process_group(1.0, torch.device("cuda")):
            pass


def test_a_rank_that_fails_does_not_wait_for_the_others(monkeypatch):
    """NCCL destroys a group on all ranks at once; a rank that fails must not wait for that."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    left = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(1))
    with distributed.process_group(1.0, runs.CPU):
        pass
    with pytest.raises(KeyError), distributed.process_group(1.0, runs.CPU):
        raise KeyError
    assert left == [1]


def saves(out):
    """How often this rank collected a checkpoint's files."""
    made, snapshot = [], checkpoints.snapshot
    checkpoints.snapshot = lambda *arguments: made.append(1) or snapshot(*arguments)
    runs.start_or_resume(out, override(runs.TINY, {"save_every": 5}))
    return len(made)


def test_under_ddp_one_rank_makes_the_checkpoints(tmp_path):
    first, second = runs.ranks(2, saves, tmp_path / "run")
    assert first > 0 == second


def all_gradients(seed):
    """Even and uneven batches; for seeds above 0 two sizes at random."""
    runs.in_fp64()
    sizes = random.Random(seed).sample(range(1, 11), 2) if seed else SIZES
    gradients = {}
    for case, changes in CASES.items():
        for size in sizes:
            sized = {"seed": seed, "batch_size": size, "clip_grad_norm": 1e9, **changes}
            gradients[case, size] = gradients_of(override(runs.TINY, sized))
    return gradients


def assert_equals_one_rank(world_size, seed):
    (expected,) = runs.ranks(1, all_gradients, seed)
    for gradients in runs.ranks(world_size, all_gradients, seed):
        for case, values in expected.items():
            assert gradients[case].keys() == values.keys()
            for name, value in values.items():
                worst = abs(gradients[case][name] - value).max()
                assert worst <= 1e-12, (world_size, case, name, worst)


WORLDS = [2, *(pytest.param(w, marks=pytest.mark.slow) for w in (3, 4, 8))]


@pytest.mark.parametrize("world_size", WORLDS)
def test_losses_and_gradients_equal_those_of_one_rank(world_size, figure):
    """D1: each loss and their sum, even and uneven batches; on 8 ranks three have no clip."""
    for seed in figure("D1", ci=TRIALS, soak=5 * TRIALS, batch=TRIALS):
        assert_equals_one_rank(world_size, seed // TRIALS)


@pytest.mark.slow
def test_losses_and_gradients_equal_those_of_one_rank_with_an_uneven_split(figure):
    """D1."""
    for seed in figure("D1", ci=TRIALS, soak=8 * TRIALS, batch=TRIALS):
        assert_equals_one_rank((5, 6, 7, 16)[seed // TRIALS % 4], seed // TRIALS)


def trained(kind, steps):
    runs.in_fp64()
    config = override(runs.TINY, {"ranks": kind, "batch_size": 6})
    state, tokenizer = begin(config, None, None, runs.CPU)
    data = TrainSteps(
        runs.clips(), tokenizer, config, None, distributed.rank(), distributed.world_size()
    )
    for state.step in range(steps):
        train_step(state, data[state.step % len(data)].batches)
    tensors = {**state.model.state_dict(), **state.teacher.state_dict(prefix="teacher.")}
    return {name: distributed.full(value).numpy() for name, value in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_twenty_steps_equal_those_of_one_rank(kind, figure):
    """D2."""
    for seed in figure("D2", ci=1, soak=2):
        (expected,) = runs.ranks(1, trained, kind, 20)
        for tensors in runs.ranks(2 * (seed + 1), trained, kind, 20):
            for name, value in expected.items():
                worst = abs(tensors[name] - value).max()
                assert worst <= 1e-12, (name, worst)


def go_on(out, kind, stop_at):
    """Resumes a run up to ``stop_at``, where this rank alone requests a stop."""
    runs.in_fp64()
    config = override(runs.TINY, {"ranks": kind, "batch_size": 5})
    real = loop.train_step

    def step(state, batches):
        metrics = real(state, batches)
        if state.step + 1 == stop_at and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    loop.train_step = step
    return runs.start_or_resume(out, config).step


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_resumes_with_another_number_of_ranks(kind, tmp_path, figure):
    """C5. And a signal to one rank stops all of them after the same step."""
    assert runs.ranks(1, go_on, tmp_path / "whole", kind, None) == [10]
    expected = metrics(tmp_path / "whole")
    for seed in figure("C5", ci=4, soak=52, batch=4):
        out, sizes = tmp_path / str(seed), random.Random(seed).sample((1, 2, 3, 4), 4)
        for world_size, stop_at in zip(sizes, (3, 7, 9, 10), strict=True):
            steps = runs.ranks(world_size, go_on, out, kind, stop_at)
            assert steps == [stop_at] * world_size
        resumed = metrics(out)
        assert [row["step"] for row in resumed] == list(range(1, 11))
        for a, b in zip(expected, resumed, strict=True):
            for name in (*LOSSES, "grad_norm", "logit_scale", "seen"):
                assert b[name] == pytest.approx(a[name], abs=1e-11, rel=1e-12), (a["step"], name)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


PHASES = ("patches", "teacher", "loss", "gradient")


def spoil(state, batches, phase, value):
    """Makes one value of this rank's next step not finite; returns a function that undoes it."""
    if phase == "patches":
        batches[0].audio.patches[0, 0] = value
        return lambda: None
    if phase == "gradient":
        return state.model.audio_head.probe.register_hook(lambda grad: grad * value).remove
    owner, name = {"teacher": (state, "teacher"), "loss": (losses, "caption_loss")}[phase]
    real = getattr(owner, name)
    if phase == "loss":
        losses.caption_loss = lambda *args, **options: real(*args, **options) + value
        return lambda: setattr(losses, name, real)
    return real.register_forward_hook(lambda module, args, out: (out[0] * value, out[1])).remove


def skipped_steps(world_size):
    """A step for each phase, value and rank: their number, and the failures."""
    config = override(runs.TINY, {"model.ssl.targets": "centering", "model.ssl.mask_clips": 1.0})
    state, tokenizer = begin(config, None, None, runs.CPU)
    data = TrainSteps(runs.clips(), tokenizer, config, None, distributed.rank(), world_size)
    train_step(state, data[0].batches)
    before = {name: value.clone() for name, value in runs.tensors(state).items()}
    wrong, count = [], 0
    for phase in PHASES:
        for value in (float("nan"), float("inf")):
            for rank in range(world_size):
                case, batches = (phase, value, rank), data[1].batches
                undo = spoil(state, batches, phase, value) if distributed.rank() == rank else None
                train_step(state, batches)
                if undo:
                    undo()
                count += 1
                after = runs.tensors(state)
                wrong += [(case, n) for n, x in before.items() if not torch.equal(x, after[n])]
                if (state.skipped, state.skipped_in_a_row) != (count, count):
                    wrong.append((case, "was not skipped"))
    train_step(state, data[1].batches)
    if state.skipped_in_a_row or state.skipped != count:
        wrong.append("a good step was skipped")
    return count, wrong


def test_all_ranks_skip_a_step_that_is_not_finite_on_one(figure):
    """D3: 24 cases, of which every rank has the same state, bit for bit, as before."""
    for _ in figure("D3", ci=24, soak=216, batch=24):
        assert runs.ranks(3, skipped_steps, 3) == [(24, [])] * 3


def train_and_lose_a_rank(out, failure):
    """Trains on several ranks, of which the last one is lost in the third step."""
    real = loop.train_step

    def step(state, batches):
        if state.step == 2 and distributed.rank() == distributed.world_size() - 1:
            if failure == "raises":
                raise RuntimeError("this rank has a fault")
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[failure])
        return real(state, batches)

    loop.train_step = step
    runs.start_or_resume(out)


@pytest.mark.parametrize(
    "failure", ["raises", "killed", pytest.param("stopped", marks=pytest.mark.slow)]
)
def test_a_lost_rank_ends_the_others_which_name_the_step(failure, tmp_path, figure):
    """D4: with a timeout of 3 s, within 13 s of it."""
    for seed in figure("D4", ci=1, soak=17):
        started = time.monotonic()
        # The lost one answers last, and a stopped one never: it is not waited for.
        pipes = runs.ranks(
            3, train_and_lose_a_rank, tmp_path / str(seed), failure, timeout=3.0, wait_for=2
        )
        assert time.monotonic() - started < 13.0
        for rank, error in enumerate(pipes):
            assert f"rank {rank}, step 3: " in str(error)


def random_runs(world_size, seeds):
    """The last metrics of runs of random sizes."""
    last_metrics = []
    for seed in seeds:
        rng = random.Random(seed)
        changes = {
            "seed": seed,
            "steps": 2,
            "batch_size": rng.randint(1, 9),
            "max_tokens": rng.choice([60, 120, 65_536]),
            "model.ssl.mask_clips": rng.choice([0.2, 1.0]),
            "ranks": rng.choice(["ddp", "fsdp"]),
        }
        if changes["batch_size"] == 1:  # a pair alone has no contrastive loss
            changes["loss.contrastive"] = 0.0
        config = override(runs.TINY, changes)
        state, tokenizer = begin(config, None, None, runs.CPU)
        source = runs.clips(rng.randint(1, 12))
        data = TrainSteps(source, tokenizer, config, None, distributed.rank(), world_size)
        for state.step in range(2):
            metrics = train_step(state, data[state.step].batches)
        last_metrics.append({name: float(value) for name, value in metrics.items()})
    return last_metrics


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_uneven_data_hangs_no_rank(world_size, figure):
    """D5: also batches smaller than the number of ranks, and forwards that only one rank has."""
    for seed in figure("D5", ci=10, soak=250, batch=10):
        seeds = range(seed, seed + 10)
        first, *others = runs.ranks(world_size, random_runs, world_size, seeds, timeout=30.0)
        assert len(first) == len(seeds)
        for other in others:
            assert repr(other) == repr(first)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12])
def test_the_order_of_the_clips_does_not_depend_on_the_number_of_ranks(world_size, figure):
    """C5: the ranks' shares of a step are its clips, and about as long as each other."""
    for seed in figure("C5", ci=10, soak=100):
        config = override(runs.TINY, {"seed": seed, "batch_size": 24, "steps": 9})
        source = runs.clips(40)
        one = TrainSteps(source, None, config)
        shares = [TrainSteps(source, None, config, None, r, world_size) for r in range(world_size)]
        for step in range(9):
            parts = [data.share_of(step) for data in shares]
            assert sorted(clip for part in parts for clip in part) == sorted(one.clips_of(step))
            places = [[one.clips_of(step).index(clip) for clip in part] for part in parts]
            assert all(place == sorted(place) for place in places)
            seconds = [[source.seconds(i) for _, i in part] for part in parts]
            # The longest clip left goes to the rank with the fewest seconds.
            assert max(sum(s) - min(s) for s in seconds) <= min(map(sum, seconds)) + 1e-9


@pytest.mark.slow
def test_torchrun_trains_as_the_documentation_says(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    train = ["--nproc-per-node", "2", "-m", "slap_fast.cli", "train", "--data", "m.csv"]
    settings = ["steps=3", "batch_size=4", "model.audio.num_layers=1", "ranks=fsdp"]
    command = [*torchrun, *train, "--out", "run", "--workers", "0"]
    command += [word for setting in settings for word in ("--set", setting)]
    manifest(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps 0 to 3") == 1, "rank 0 alone speaks"
    saved = json.loads((tmp_path / "run" / "last" / "training.json").read_text())
    assert (saved["step"], saved["clips"]["seen"]) == (3, 12)


def manifest(folder):
    import soundfile

    rows = ["path,caption"]
    for i in range(6):
        soundfile.write(folder / f"{i}.wav", runs.clips().audio(i).waveform, 16_000)
        rows.append(f"{i}.wav,sound number {i}")
    (folder / "m.csv").write_text("\n".join(rows) + "\n")
