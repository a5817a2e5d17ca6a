"""Small training runs for the tests of resuming and of many ranks, in this process or in others."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from slap_fast import distributed
from slap_fast.config import TrainConfig, override, slap_tiny
from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.data.source import ClipSource
from slap_fast.data.sources.builtin import BuiltinClips
from slap_fast.packed import PackedBatch
from slap_fast.training.loop import train
from slap_fast.training.state import TrainState, begin, go_on
from slap_fast.training.stored_run import stored_config, stored_run

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
SMALL = override(
    slap_tiny(),
    {
        "model.audio.hidden_size": 32,
        "model.audio.num_heads": 2,
        "model.audio.intermediate_size": 48,
        "model.text.hidden_size": 32,
        "model.text.num_heads": 2,
        "model.text.num_layers": 2,
        "model.text.intermediate_size": 48,
        "model.caption.hidden_size": 32,
        "model.caption.num_heads": 2,
        "model.ssl.prototypes": 32,
        "model.ssl.mask_clips": 1.0,
        "steps": 6,
        "batch_size": 4,
        "warmup_steps": 2,
        "log_every": 1,
        "save_every": 3,
    },
)
CPU = torch.device("cpu")


def clips(size: int = 10) -> ClipSource:
    """Clips of at most 2 s."""
    return BuiltinClips(SoundSet("train", size, max_seconds=2.0))


def start_or_resume(
    out: Path, config: TrainConfig = TINY, source: ClipSource | None = None, **options: Any
) -> TrainState:
    """Starts the run in ``out``, or resumes it, as ``slap-fast train [--resume]`` does."""
    folder = None
    if (out / "run.json").exists():
        stored, folder = stored_run(out)
        config = stored_config(stored)
    state, tokenizer = go_on(config, folder, CPU) if folder else begin(config, None, None, CPU)
    train(state, source or clips(), tokenizer, out, progress=False, **options)
    return state


def loss_rows(out: Path) -> list[tuple[int, str]]:
    """(step, exact loss) of each line of the run's metrics that is not of a validation."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [(row["step"], row["loss"].hex()) for row in rows if "loss" in row]


def same_weights(a: TrainState, b: TrainState) -> bool:
    """Bit for bit: model, teacher and optimiser."""
    ours, theirs = (tensors(state) for state in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[k]) for k, x in ours.items())


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Of model, teacher and optimiser, by name."""
    moments = state.optimizer.state_dict()["state"].items()
    return {
        **{f"model.{name}": x for name, x in state.model.state_dict().items()},
        **{f"teacher.{name}": x for name, x in state.teacher.state_dict().items()},
        **{f"optimizer.{i}.{name}": x for i, entry in moments for name, x in entry.items()},
    }


def server() -> ForkServerContext:
    """Starts processes as copies of one that has imported torch and used no thread of it."""
    context = multiprocessing.get_context("forkserver")
    # No module of this project: without this process's sys.path, the server would import the demo's
    # folder ``runs`` for this file, or the installed package for the one under test.
    context.set_forkserver_preload(["transformers.models.modernbert.modeling_modernbert"])
    return context


def start(function: Any, *args: Any) -> ForkServerProcess:
    """``function(*args)`` in another process, on one thread."""
    process = server().Process(target=_single, args=(function, args), daemon=False)
    process.start()
    return process


def _single(function: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # the default barrier is a semaphore that a killed process leaves behind
    function(*args)


def ranks(
    world_size: int,
    function: Any,
    *args: Any,
    timeout: float = 60.0,
    wait_for: int | None = None,
    patience: float = 120.0,
) -> list[Any]:
    """``function(*args)`` on gloo ranks, each a process: what each returned, or raised, by rank.

    Of the first ``wait_for`` ranks, or of all; None for one that ended without either, or sent
    nothing for ``patience`` seconds.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(world_size)]
    processes = []
    for rank, (_, writer) in enumerate(pipes):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
        processes.append(start(_on_rank, names, timeout, writer, function, args))
        writer.close()
    try:
        return [_received(reader, patience) for reader, _ in pipes[:wait_for]]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _on_rank(
    names: dict[str, Any], timeout: float, writer: Any, function: Any, args: tuple[Any, ...]
) -> None:
    os.environ.update({name: str(value) for name, value in names.items()})
    multiprocessing.set_start_method("fork", force=True)  # a server would load torch again
    try:
        with distributed.process_group(timeout, CPU):
            result = function(*args)
    except Exception as error:
        result = error
    writer.send(result)


def _received(reader: Any, patience: float) -> Any:
    try:
        return reader.recv() if reader.poll(patience) else None
    except EOFError:
        return None


def in_fp64() -> None:
    """Models and batches of this process are fp64 from now on.

    ModernBERT's rotary embedding too: it rounds to fp32, where the last bit of an fp64 number,
    which depends on how rows are spread over ranks, may become the last bit of an fp32 one.
    """
    from transformers.models.modernbert import modeling_modernbert

    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(x * cos + modeling_modernbert.rotate_half(x) * sin for x in (q, k))

    modeling_modernbert.apply_rotary_pos_emb = rotate
    torch.set_default_dtype(torch.float64)
    to = PackedBatch.to

    def doubled(batch: PackedBatch, device: Any) -> PackedBatch:
        batch = to(batch, device)
        return batch._replace(audio=batch.audio._replace(patches=batch.audio.patches.double()))

    PackedBatch.to = doubled
