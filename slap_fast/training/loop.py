"""The training loop: steps, evaluations, checkpoints and stops."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

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
from slap_fast.training.clip_counts import ClipCounts
from slap_fast.training.interrupts import Stop
from slap_fast.training.run_log import RunLog
from slap_fast.training.schedules import learning_rate
from slap_fast.training.speed import Speed
from slap_fast.training.state import TrainState
from slap_fast.training.step import HEALTH, LOSSES, train_step
from slap_fast.training.stop_rules import BadClipRule, RunStopped
from slap_fast.training.stored_run import seal

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
        RunStopped: too many steps in a row are not finite; or, after the run was saved: too many
            clips are bad, shards are missing, or no clip could be trained or evaluated on.
        RuntimeError: another rank stopped answering, and at which step.
        OSError: a checkpoint cannot be written; the ones before it are kept.
        ValueError: another process is writing to ``out``.
    """
    config, is_lead = state.config, distributed.rank() == 0
    plan = {"format_version": FORMAT_VERSION, "plan": invocation, "config": to_dict(config)}
    run, ranks = seal(plan), (distributed.rank(), distributed.world_size())
    distributed.barrier()  # until no rank looks for an older run.json
    with atomic_files.only_writer(out) if is_lead else contextlib.nullcontext():
        data = TrainSteps(source, tokenizer, config, None, *ranks)
        data.cache = PatchCache.build(source, config, workers, progress)
        steps = steps_from(data, state.step, workers, state.device)
        with (
            Checkpoints(state, tokenizer, out, run) as checkpoints,
            RunLog(out, state.step, writes=is_lead, tensorboard=tensorboard) as log,
            Progress(total=config.steps, initial=state.step, desc="training", show=progress) as bar,
            Stop() as stop,
            distributed.located_errors(lambda: f"step {state.step + 1}"),
        ):
            if is_lead:  # only now: a run that cannot start leaves a folder without a run
                atomic_files.write_json(out / "run.json", run)
            rule = BadClipRule(len(source), config.data.max_bad_share)
            return _loop(state, steps, checkpoints, rule, log, bar, stop, evaluate, score)


def _loop(
    state: TrainState,
    steps: Iterator[StepData],
    checkpoints: Checkpoints,
    rule: BadClipRule,
    log: RunLog,
    bar: Progress,
    stop: Stop,
    evaluate: Evaluate | None,
    score: str,
) -> bool:
    """Trains until the end, or until a stop is requested on any rank."""
    config, card, finished, speed = state.config, {}, False, Speed(state.config, state.device)
    while True:
        finished = state.step == config.steps
        if finished and not state.clip_counts.trained:
            drawn = state.clip_counts.seen
            state.step, state.clip_counts = 0, ClipCounts()  # where the model still is
            _stop_saved(checkpoints, f"none of {drawn} clips could be trained on: {rule.cause()}")
        if evaluate and _evaluation_is_due(state):
            card = _evaluate(state, stop, evaluate)
            if card is None:
                finished = False
                break
            if card.get("n") == 0:
                cause = f"none of {card['n_expected']} validation clips could be read"
                codes = ", ".join(f"{n} {code}" for code, n in card["failures"].items())
                _stop_saved(checkpoints, f"{cause}: {codes}; mend them, then go on with --resume")
            state.evaluated = state.step
            log.validation(state.step, card)
            if card[score] >= state.best:
                state.best = card[score]
                checkpoints.save_best(card)
        if finished:
            break
        if state.step % config.save_every == 0:
            checkpoints.save_last()
        step_data = stop.unless_requested(next, steps)
        messages = distributed.exchange(_message(step_data, stop.requested))
        if any(message["stop"] for message in messages):
            break
        log.bad_clips(state.step + 1, [clip for message in messages for clip in message["bad"]])
        rule.add(messages)
        if problem := rule.problem():
            _stop_saved(checkpoints, problem)
        state.clip_counts = state.clip_counts.after(messages)
        tokens = sum(message["tokens"] for message in messages)
        speed.tokens += tokens
        metrics = train_step(state, step_data.batches) if tokens else {}
        state.step += 1
        bar.update()
        if metrics and (state.step % config.log_every == 0 or state.step == config.steps):
            figures = _figures(state, metrics, sum(message["masked"] for message in messages))
            figures |= speed.figures(step_data.batches)
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
    return is_step and step > state.evaluated and state.clip_counts.trained > 0


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
    clips = {"seen": step_data.seen, "bad": bad, "bad_indices": step_data.bad_indices}
    clips |= {"warned": Counter(step_data.warned)}
    masked = sum(batch.masked_clips for batch in step_data.batches)
    return {"stop": stop, "tokens": tokens, "masked": masked, **clips}


def _stop_saved(checkpoints: Checkpoints, cause: str) -> NoReturn:
    """Saves the run as it was before the step or the evaluation, and raises RunStopped."""
    checkpoints.save_last()
    raise RunStopped(cause)


def _figures(state: TrainState, metrics: dict[str, Tensor], masked: int) -> dict[str, float]:
    """A line of ``metrics.jsonl``; without the self-supervised loss where no clip is masked."""
    figures = {"step": state.step, "lr": learning_rate(state.config, state.step - 1)}
    figures |= {name: float(value) for name, value in metrics.items()}
    if state.teacher is not None:
        figures["masked_clips"] = masked
        if masked:
            figures["collapsed"] = int(self_distillation.collapsed(figures))
        else:  # zeros, which would look like a loss that jumps and a collapse
            figures = {k: v for k, v in figures.items() if k not in ("ssl", *HEALTH)}
    counts = state.clip_counts
    clips = {"seen": counts.seen, "bad": counts.bad.total(), "warned": counts.warned.total()}
    return figures | clips | {"skipped": state.skipped}


def _raise_not_finite(state: TrainState, metrics: dict[str, Tensor]) -> None:
    names = [name for name in (*LOSSES, "grad_norm") if not math.isfinite(metrics.get(name, 0.0))]
    raise RunStopped(
        f"step {state.step}: {', '.join(names)} is not finite, as in {state.skipped_in_a_row} "
        "steps in a row; none of them changed the model. Go on from the last checkpoint with "
        "--resume --precision fp32, or with a lower lr: --resume --set "
        f"lr={state.config.lr / 3:.2g}"
    )
