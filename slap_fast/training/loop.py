"""The training loop: steps, evaluations, checkpoints and stops."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from slap_fast import atomic_files, distributed
from slap_fast.checkpoint.format import FORMAT_VERSION
from slap_fast.config import to_dict
from slap_fast.console import Progress
from slap_fast.data.loader import StepData, TrainSteps, steps_from
from slap_fast.data.patch_cache import PatchCache
from slap_fast.data.source import ClipSource
from slap_fast.losses import self_distillation
from slap_fast.models.slap import SlapModel
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.training.checkpoints import Checkpoints
from slap_fast.training.interrupts import Stop
from slap_fast.training.run_log import RunLog
from slap_fast.training.schedules import learning_rate
from slap_fast.training.state import TrainState
from slap_fast.training.step import LOSSES, train_step

Evaluate = Callable[[SlapModel], dict[str, Any]]


def train(
    state: TrainState,
    source: ClipSource,
    tokenizer: CaptionTokenizer,
    out: Path,
    *,
    invocation: dict[str, Any] | None = None,
    workers: int = 0,
    evaluate: Evaluate | None = None,
    score: str = "score",
    progress: bool = True,
    tensorboard: bool = False,
) -> bool:
    """Trains from ``state.step`` to the end; False when a signal stopped it, after it was saved.

    All ranks call it; rank 0 evaluates and writes.

    Args:
        state: a new or restored run.
        source: training clips.
        tokenizer: the captions' tokenizer.
        out: the run's folder: ``run.json``, ``metrics.jsonl``, ``bad_clips.jsonl``, ``last/`` and
            the checkpoint before it, ``last.old/``, and ``best/``.
        invocation: kept in ``run.json`` as its "plan": where the data is, for resuming.
        workers: loader processes of each rank.
        evaluate: called every ``eval_every`` steps and at the end; its ``score`` picks ``best/``.
        score: the key in the card of the figure that is maximised.
        progress: show bars.
        tensorboard: also write TensorBoard events.

    Raises:
        RuntimeError: too many steps in a row are not finite; too many clips are bad, or shards
            missing, after the run was saved; or another rank stopped answering, and at which step.
        OSError: a checkpoint cannot be written; the ones before it are kept.
        ValueError: another process is writing to ``out``.
    """
    config, is_lead = state.config, distributed.rank() == 0
    run = {"format_version": FORMAT_VERSION, "plan": invocation, "config": to_dict(config)}
    distributed.barrier()  # until no rank looks for an older run.json
    with atomic_files.only_writer(out) if is_lead else contextlib.nullcontext():
        if is_lead:
            atomic_files.write_json(out / "run.json", run)
        cache = PatchCache.build(source, config, workers, progress)
        ranks = distributed.rank(), distributed.world_size()
        data = TrainSteps(source, tokenizer, config, cache, *ranks)
        steps = steps_from(data, state.step, workers, state.device)
        with (
            Checkpoints(state, tokenizer, out, run) as checkpoints,
            RunLog(out, state.step, writes=is_lead, tensorboard=tensorboard) as log,
            Progress(total=config.steps, initial=state.step, desc="training", show=progress) as bar,
            Stop() as stop,
            distributed.located_errors(lambda: f"step {state.step + 1}"),
        ):
            return _loop(state, steps, checkpoints, log, bar, stop, evaluate, score)


def _loop(
    state: TrainState,
    steps: Iterator[StepData],
    checkpoints: Checkpoints,
    log: RunLog,
    bar: Progress,
    stop: Stop,
    evaluate: Evaluate | None,
    score: str,
) -> bool:
    """Trains until the end, or until a stop is requested on any rank."""
    config, card, finished = state.config, {}, False
    while True:
        if evaluate and _evaluation_is_due(state):
            card = _evaluate(state, stop, evaluate)
            if card is None:
                break
            state.evaluated = state.step
            if card[score] >= state.best:
                state.best = card[score]
                checkpoints.save_best(card)
        finished = state.step == config.steps
        if finished:
            break
        if state.step % config.save_every == 0:
            checkpoints.save_last()
        step_data = stop.unless_requested(next, steps)
        messages = distributed.exchange(_message(step_data, stop.requested))
        if any(message["stop"] for message in messages):
            break
        _count_clips(state, messages, log, checkpoints)
        tokens = sum(message["tokens"] for message in messages)
        metrics = train_step(state, step_data.batches) if tokens else {}
        state.step += 1
        bar.update()
        if metrics and (state.step % config.log_every == 0 or state.step == config.steps):
            figures = _figures(state, metrics)
            log.metrics(figures)
            bar.set_postfix({name: f"{figures[name]:.3f}" for name in LOSSES if name in figures})
        if state.skipped_in_a_row > config.max_skipped_steps:
            _raise_not_finite(state, metrics)
    checkpoints.save_last(card if finished else {})
    return finished


def _evaluation_is_due(state: TrainState) -> bool:
    """Whether it is; also after a resume, where a stop cut the last one short."""
    step, every = state.step, state.config.eval_every
    is_step = step == state.config.steps or (every > 0 and step % every == 0)
    return is_step and step > state.evaluated


def _evaluate(state: TrainState, stop: Stop, evaluate: Evaluate) -> dict[str, Any] | None:
    """Rank 0's card, on all ranks; None when a stop was requested meanwhile."""
    model, card = state.model, None
    if state.config.ranks == "fsdp" and distributed.world_size() > 1:
        tensors = {name: distributed.full(x) for name, x in state.model.state_dict().items()}
        if distributed.rank() == 0:
            model = SlapModel(state.config.model).to(state.device)
            model.load_state_dict(tensors)
    if distributed.rank() == 0:
        card = stop.unless_requested(evaluate, model)
    return distributed.exchange(card)[0]


def _message(step_data: StepData | None, stop: bool) -> dict[str, Any]:
    """What a rank sends the others before a step."""
    if step_data is None:
        return {"stop": stop}
    tokens = sum(len(batch.audio.patches) for batch in step_data.batches)
    bad = [clip._asdict() for clip in step_data.bad]
    clips = {"seen": step_data.seen, "bad": bad, "warned": Counter(step_data.warned)}
    return {"stop": stop, "tokens": tokens, **clips}


def _count_clips(
    state: TrainState, messages: Sequence[dict[str, Any]], log: RunLog, checkpoints: Checkpoints
) -> None:
    """Counts and logs the next step's clips and tokens.

    Raises RuntimeError, after the run was saved, where too many clips are bad.
    """
    counts = state.clip_counts.after(messages)
    log.bad_clips(state.step + 1, [clip for message in messages for clip in message["bad"]])
    if problem := counts.problem(state.config.data.max_bad_share):
        checkpoints.save_last()
        raise RuntimeError(f"{problem}; each clip is listed in bad_clips.jsonl")
    state.clip_counts = counts
    log.tokens += sum(message["tokens"] for message in messages)


def _figures(state: TrainState, metrics: dict[str, Tensor]) -> dict[str, float]:
    """A line of ``metrics.jsonl``."""
    figures = {"step": state.step, "lr": learning_rate(state.config, state.step - 1)}
    figures |= {name: float(value) for name, value in metrics.items()}
    if state.teacher is not None:
        figures["collapsed"] = int(self_distillation.collapsed(figures))
    counts = state.clip_counts
    clips = {"seen": counts.seen, "bad": counts.bad.total(), "warned": counts.warned.total()}
    return figures | clips | {"skipped": state.skipped}


def _raise_not_finite(state: TrainState, metrics: dict[str, Tensor]) -> None:
    names = [name for name in (*LOSSES, "grad_norm") if not math.isfinite(metrics.get(name, 0.0))]
    raise RuntimeError(
        f"step {state.step}: {', '.join(names)} is not finite, as in {state.skipped_in_a_row} "
        "steps in a row; none of them changed the model. Lower lr, or set precision=fp32"
    )
