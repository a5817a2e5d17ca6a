"""The trainer: one step, one loop, and the schedules between them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slap_fast import atomic_files, checkpoint, distributed, losses
from slap_fast.config import TrainConfig, to_dict
from slap_fast.data.loader import StepData, TrainSteps, steps_from
from slap_fast.data.patch_cache import PatchCache
from slap_fast.data.source import ClipSource
from slap_fast.losses import self_distillation
from slap_fast.models.slap import SlapModel
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.packed import PackedBatch
from slap_fast.training import objective
from slap_fast.training.interrupts import Stop
from slap_fast.training.run_log import Journal
from slap_fast.training.state import TrainState, snapshot


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to ``lr``, then a cosine to ``lr_final`` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr_final + (config.lr - config.lr_final) * _cosine(share)


def ema_momentum(config: TrainConfig, step: int) -> float:
    """From ``ema_momentum`` to 1.0 along a cosine."""
    return 1.0 - (1.0 - config.ema_momentum) * _cosine(step / config.steps)


def teacher_temperature(config: TrainConfig, step: int) -> float:
    """Linear warm-up to ``ssl.teacher_temperature``."""
    ssl = config.model.ssl
    share = min(1.0, step / max(1.0, ssl.teacher_temperature_warmup * config.steps))
    return ssl.teacher_temperature_start + share * (
        ssl.teacher_temperature - ssl.teacher_temperature_start
    )


def _cosine(share: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """bf16 where the config and the device allow it, else nothing."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    enabled = config.precision == "bf16" or (config.precision == "auto" and has_bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def train_step(state: TrainState, batches: list[PackedBatch]) -> dict[str, Tensor]:
    """One optimiser step over the ``batches`` of all ranks; returns 0-d tensors, equal on all.

    A step whose loss or gradient is not finite changes nothing but ``state.skipped``. Whether it is
    is the one value that is read back from the device.
    """
    config, model, teacher, step = state.config, state.model, state.teacher, state.step
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    model.train()
    rows = distributed.exchange([loss_rows(batch) for batch in batches])
    forwards = max(map(len, rows))
    missing = forwards - len(batches)
    batches = [*batches, *[PackedBatch.empty(config.model.mel.patch_dim)] * missing]
    metrics: dict[str, Tensor] = {}
    temperature = teacher_temperature(config, step)
    cached: list[objective.Cached | None] = [None] * forwards
    if config.grad_cache and forwards > 1:
        whole = [{name: sum(pack[name] for pack in each) for name in NO_ROWS} for each in rows]
        with autocast(config, state.device):
            cached = objective.first_pass(state, batches, whole, temperature)
    for i, batch in enumerate(batches):
        here = [each[i] if i < len(each) else NO_ROWS for each in rows]
        share = _shares(rows, here) | ({"contrastive": 1.0} if cached[i] else {})
        with distributed.accumulating(state.replica, last=i == forwards - 1):
            figures = _forward_backward(
                state, batch.to(state.device), here, share, temperature, cached[i]
            )
        for name, value in figures.items():
            metrics[name] = metrics.get(name, 0.0) + value
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, config.clip_grad_norm)
    metrics["grad_norm"] = distributed.full(norm)
    metrics["logit_scale"] = distributed.full(model.logit_scale.detach())
    scores = metrics.pop("mean_scores", None)
    if scores is not None:
        (scores,) = distributed.mean({"mean_scores": scores}).values()
    metrics = distributed.mean(metrics)
    finite = bool(torch.isfinite(metrics["loss"] + metrics["grad_norm"]))
    if finite:
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if finite and teacher is not None:
        teacher.update(model, ema_momentum(config, step))
        if scores is not None and any(pack["ssl"] for each in rows for pack in each):
            teacher.center.lerp_(scores.to(teacher.center), 1.0 - config.model.ssl.center_momentum)
    state.skipped += not finite
    state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
    return metrics


def _forward_backward(
    state: TrainState,
    batch: PackedBatch,
    here: objective.Rows,
    share: dict[str, float],
    temperature: float,
    cached: objective.Cached | None,
) -> dict[str, Tensor]:
    """Adds to the gradients; returns this forward's part of the metrics."""
    with autocast(state.config, state.device):
        values, health = objective.batch_losses(state, batch, here, temperature, cached)
        values = {name: share[name] * value for name, value in values.items()}
        total = losses.total_loss(values, state.config.loss)
    total.backward()
    if share["ssl"]:
        health = {name: share["ssl"] * value for name, value in health.items()}
    else:  # without rows they are NaN
        health = {name: torch.zeros_like(value) for name, value in health.items()}
    return {name: x.detach() for name, x in {"loss": total, **values, **health}.items()}


NO_ROWS = {"contrastive": 0, "ssl": 0, "caption": 0}


def loss_rows(batch: PackedBatch) -> dict[str, int]:
    """The rows that each loss averages over."""
    clips = len(batch.groups)
    masked, predicted = len(batch.mask_indices), len(batch.labels) - clips
    return {"contrastive": clips, "ssl": masked, "caption": predicted}


def _shares(
    rows: Sequence[Sequence[dict[str, int]]], here: Sequence[dict[str, int]]
) -> dict[str, float]:
    """What one forward's losses are multiplied by: each is a mean over all rows of the step, once
    it is added up over forwards and averaged over ranks.

    ``rows`` are those of each rank's forwards, ``here`` those of each rank's present one.
    """
    total = {name: sum(each[name] for some in rows for each in some) for name in NO_ROWS}
    mine = {name: len(here) * count for name, count in here[distributed.rank()].items()}
    # Every rank has the contrastive loss of all ranks' clips.
    mine["contrastive"] = sum(each["contrastive"] for each in here)
    return {name: mine[name] / max(1, total[name]) for name in NO_ROWS}


def train(
    state: TrainState,
    source: ClipSource,
    tokenizer: CaptionTokenizer,
    out: Path,
    *,
    plan: dict[str, Any] | None = None,
    workers: int = 0,
    evaluate: Callable[[SlapModel], dict[str, Any]] | None = None,
    score: str = "score",
    progress: bool = True,
    tensorboard: bool = False,
) -> bool:
    """Runs from ``state.step`` to the end; False when a signal stopped it, after it was saved.

    On several ranks each calls it; rank 0 evaluates and writes.

    Args:
        state: a new or restored run.
        source: training clips.
        tokenizer: the captions' tokenizer.
        out: the run's folder: ``run.json``, ``metrics.jsonl``, ``bad_clips.jsonl``, ``last/`` and
            the checkpoint before it, ``last.old/``, and ``best/``.
        plan: kept in ``run.json`` beside the config: where the data is, for resuming.
        workers: loader processes of each rank.
        evaluate: called every ``eval_every`` steps and at the end; its ``score`` picks ``best/``.
        score: the key of the figure that is maximised.
        progress: show bars.
        tensorboard: also write TensorBoard events.

    Raises:
        RuntimeError: too many steps in a row are not finite; too many clips are bad, or shards
            are gone, and the run is saved; or another rank stopped answering, and names the step.
        OSError: a checkpoint cannot be written; the ones before it are kept.
        ValueError: another process is writing to ``out``.
    """
    config, lead = state.config, distributed.rank() == 0
    run = {"format_version": checkpoint.FORMAT_VERSION, "plan": plan, "config": to_dict(config)}
    distributed.exchange("nobody looks for an older run.json any more")
    with atomic_files.only_writer(out) if lead else contextlib.nullcontext():
        if lead:
            checkpoint.write_json(out / "run.json", run)
        cache = PatchCache.build(source, config, workers, progress)
        ranks = distributed.rank(), distributed.world_size()
        data = TrainSteps(source, tokenizer, config, cache, *ranks)
        steps = steps_from(data, state.step, workers, state.device)
        with (
            atomic_files.Writer(config.saving == "background") as writer,
            Journal(out, state.step, writes=lead, tensorboard=tensorboard) as journal,
            tqdm(
                total=config.steps, initial=state.step, desc="training", disable=not progress
            ) as bar,
            Stop() as stop,
            distributed.naming(lambda: f"step {state.step + 1}"),
        ):

            def save(name: str, card: dict[str, Any]) -> None:
                if not lead and config.ranks != "fsdp":
                    return  # has nothing that the lead has not
                files = snapshot(state, tokenizer, card, run)
                fill = functools.partial(checkpoint.write_files, files=files)
                if lead:
                    old = name == "last"
                    writer.submit(lambda: atomic_files.write_folder(out / name, fill, keep_old=old))

            card: dict[str, Any] | None = {}
            unsaved = finished = False
            while True:
                if evaluate and _evaluation_is_due(state):
                    card = _evaluate(state, stop, evaluate)
                    if card is None:
                        break
                    unsaved, state.evaluated = True, state.step
                    if card[score] >= state.best:
                        state.best = card[score]
                        save("best", card)
                finished = state.step == config.steps
                if finished:
                    break
                if unsaved and state.step % config.save_every == 0:
                    save("last", {})
                    unsaved = False
                item = stop.unless_requested(next, steps)
                said = distributed.exchange(_message(item, stop.requested))
                if any(each["stop"] for each in said):
                    break
                tally = state.tally.after(said)
                journal.bad_clips(state.step + 1, [clip for each in said for clip in each["bad"]])
                if problem := tally.problem(config.data.max_bad_share):
                    if unsaved:
                        save("last", {})
                    raise RuntimeError(f"{problem}; each clip is listed in bad_clips.jsonl")
                state.tally = tally
                journal.tokens += sum(each["tokens"] for each in said)
                metrics = train_step(state, item.batches) if any(e["tokens"] for e in said) else {}
                state.step += 1
                unsaved = True
                bar.update()
                if metrics and (state.step % config.log_every == 0 or state.step == config.steps):
                    row = _row(state, metrics)
                    journal.row(row)
                    bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k in LOSSES})
                if state.skipped_in_a_row > config.max_skipped_steps:
                    _raise_not_finite(state, metrics)
            if unsaved:
                save("last", card if finished else {})
    return finished


LOSSES = ("loss", "contrastive", "ssl", "caption")


def _evaluation_is_due(state: TrainState) -> bool:
    """Also where a stop cut it short before the run was saved."""
    step, every = state.step, state.config.eval_every
    now = step == state.config.steps or (every > 0 and step % every == 0)
    return now and step > state.evaluated


def _evaluate(
    state: TrainState, stop: Stop, evaluate: Callable[[SlapModel], dict[str, Any]]
) -> dict[str, Any] | None:
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


def _message(item: StepData | None, stop: bool) -> dict[str, Any]:
    """What the ranks tell each other between two steps."""
    if item is None:
        return {"stop": stop}
    tokens = sum(len(batch.audio.patches) for batch in item.batches)
    bad = [clip._asdict() for clip in item.bad]
    said = {"seen": item.seen, "bad": bad, "warned": Counter(item.warned)}
    return {"stop": stop, "tokens": tokens, **said}


def _row(state: TrainState, metrics: dict[str, Tensor]) -> dict[str, float]:
    """A line of ``metrics.jsonl``."""
    row = {"step": state.step, "lr": learning_rate(state.config, state.step - 1)}
    row |= {name: float(value) for name, value in metrics.items()}
    if state.teacher is not None:
        row["collapsed"] = int(self_distillation.collapsed(row))
    tally = state.tally
    clips = {"seen": tally.seen, "bad": tally.bad.total(), "warned": tally.warned.total()}
    return row | clips | {"skipped": state.skipped}


def _raise_not_finite(state: TrainState, metrics: dict[str, Tensor]) -> None:
    wrong = [name for name in (*LOSSES, "grad_norm") if not math.isfinite(metrics.get(name, 0.0))]
    raise RuntimeError(
        f"step {state.step}: {', '.join(wrong)} is not finite, as in {state.skipped_in_a_row} "
        "steps in a row; none of them changed the model. Lower lr, or set precision=fp32"
    )
