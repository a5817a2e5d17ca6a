"""Small training runs for the tests of resuming and of many ranks, in this process or in others."""

from __future__ import annotations

import json
import multiprocessing
import threading
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from slap_fast import train as training
from slap_fast.config import TrainConfig, override, slap_tiny
from slap_fast.data.clips import BuiltinClips, ClipSource
from slap_fast.data.sounds import SoundSet

TINY = override(
    slap_tiny(),
    {
        "model.audio.hidden_size": 16,
        "model.audio.num_layers": 2,
        "model.audio.global_every": 2,
        "model.audio.num_heads": 2,
        "model.audio.intermediate_size": 16,
        "model.text.hidden_size": 16,
        "model.text.num_layers": 1,
        "model.text.num_heads": 2,
        "model.text.intermediate_size": 16,
        "model.caption.hidden_size": 16,
        "model.caption.num_layers": 1,
        "model.caption.num_heads": 2,
        "model.caption.intermediate_size": 16,
        "model.ssl.prototypes": 16,
        "model.ssl.head_hidden_size": 16,
        "model.ssl.bottleneck_size": 8,
        "model.ssl.mask_clips": 0.5,
        "steps": 10,
        "batch_size": 4,
        "warmup_steps": 2,
        "log_every": 1,
        "save_every": 2,
    },
)
CPU = torch.device("cpu")


def clips(size: int = 10) -> ClipSource:
    """Clips of at most 2 s."""
    return BuiltinClips(SoundSet("train", size, max_seconds=2.0))


def go(
    out: Path, config: TrainConfig = TINY, source: ClipSource | None = None, **options: Any
) -> training.TrainState:
    """Starts the run in ``out``, or goes on with it, as ``slap-fast train [--resume]`` does."""
    folder = None
    if (out / "run.json").exists():
        stored, folder = training.stored_run(out)
        config = training.stored_config(stored)
    state, words = training.begin(config, None, None, CPU)
    if folder:
        training.restore(state, folder)
    training.train(state, source or clips(), words, out, progress=False, **options)
    return state


def loss_rows(out: Path) -> list[tuple[int, str]]:
    """(step, exact loss) of each line of the run's metrics."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["step"], row["loss"].hex()) for row in map(json.loads, lines)]


def same_weights(a: training.TrainState, b: training.TrainState) -> bool:
    """Bit for bit: model, teacher and optimiser."""
    ours, theirs = (_tensors(state) for state in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[k]) for k, x in ours.items())


def _tensors(state: training.TrainState) -> dict[str, torch.Tensor]:
    moments = state.optimizer.state_dict()["state"].items()
    return {
        **{f"model.{name}": x for name, x in state.model.state_dict().items()},
        **{f"teacher.{name}": x for name, x in state.teacher.state_dict().items()},
        **{f"optimizer.{i}.{name}": x for i, entry in moments for name, x in entry.items()},
    }


def server() -> ForkServerContext:
    """Starts processes as copies of one that has imported torch and used no thread of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", "transformers.models.modernbert.modeling_modernbert"])
    return context


def start(function: Any, *args: Any) -> ForkServerProcess:
    """``function(*args)`` in another process, on one thread."""
    process = server().Process(target=_single, args=(function, args), daemon=False)
    process.start()
    return process


def _single(function: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process leaves behind
    function(*args)
