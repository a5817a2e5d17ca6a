"""The trainer: one step, one loop, and the schedules between them."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slap_fast import checkpoint, losses
from slap_fast.batch import PackedBatch
from slap_fast.config import TrainConfig, from_dict, to_dict
from slap_fast.data.clips import ClipSource
from slap_fast.data.loader import PatchCache, StepData, TrainSteps, steps_from
from slap_fast.data.tokenizer import CaptionTokenizer
from slap_fast.models.slap import SlapModel, Teacher
from slap_fast.models.text_encoder import resolve_pretrained


@dataclass
class TrainState:
    """A run between two steps."""

    config: TrainConfig
    model: SlapModel
    teacher: Teacher | None
    """None when the self-supervised loss has no weight."""
    optimizer: torch.optim.Optimizer
    device: torch.device
    step: int = 0
    seen: int = 0
    """Clips drawn so far, good and bad."""
    bad: Counter[str] = field(default_factory=Counter)
    """Clips left out so far, by code."""
    best: float = -math.inf
    """The best validation score so far."""


def new_state(config: TrainConfig, model: SlapModel, device: torch.device) -> TrainState:
    """A run at step 0."""
    model.to(device)
    model.freeze_unused(config.loss)
    teacher = Teacher(model) if config.loss.ssl else None
    return TrainState(config, model, teacher, make_optimizer(model, config), device)


def begin(
    config: TrainConfig, tokenizer: str | None, init: Path | None, device: torch.device
) -> tuple[TrainState, CaptionTokenizer]:
    """A new run and its tokenizer: from random weights, a pretrained text tower, or ``init``.

    Args:
        config: the run.
        tokenizer: as :meth:`CaptionTokenizer.load`; None takes the pretrained text tower's, else
            the bundled one.
        init: a model folder whose architecture and weights the run starts from (fine-tuning).
        device: where it trains.
    """
    torch.manual_seed(config.seed)
    if init is not None:
        model, words, _ = checkpoint.read_model(init)
        config = dataclasses.replace(config, model=model.config)
        return new_state(config, model, device), words
    pretrained = config.model.text.pretrained
    text = resolve_pretrained(config.model.text)
    words = CaptionTokenizer.load(tokenizer or pretrained, text.max_tokens)
    if words.vocab_size > text.vocab_size:
        raise ValueError(
            f"model.text.vocab_size: found {text.vocab_size}, expected at least the tokenizer's "
            f"{words.vocab_size}"
        )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    model = SlapModel(config.model)
    if pretrained is not None:
        model.text_encoder.load_pretrained(pretrained)
    return new_state(config, model, device), words


def describe(state: TrainState, source: ClipSource) -> str:
    """One line about a run that is about to start."""
    config = state.config
    millions = sum(p.numel() for p in state.model.parameters()) / 1e6
    hours = source.total_seconds() / 3600
    batch = min(config.batch_size, len(source))
    short = (
        "" if batch == config.batch_size else f" (batch_size {config.batch_size}: all there are)"
    )
    return (
        f"{len(source)} clips, {hours:.2f} h; {millions:.1f} M parameters on {state.device}; "
        f"steps {state.step} to {config.steps}, {batch} clips each{short}"
    )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (norms, scales and single vectors have none)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


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


def batch_losses(
    state: TrainState, batch: PackedBatch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({"contrastive", "ssl", "caption"} as far as they have a weight, health figures)."""
    config, weights = state.config, state.config.loss
    out = state.model(batch, weights)
    values, health = {}, {}
    if weights.contrastive:
        pair = (out.audio_features, out.text_features, out.logit_scale)
        if weights.contrastive_kind == "sigmoid":
            values["contrastive"] = losses.sigmoid_contrastive_loss(
                *pair, out.logit_bias, groups=batch.groups
            )
        else:
            values["contrastive"] = losses.contrastive_loss(*pair, groups=batch.groups)
    if weights.ssl:
        ssl = config.model.ssl
        scores = state.teacher(batch)
        temperature = teacher_temperature(config, state.step)
        if ssl.targets == "sinkhorn":
            targets = losses.sinkhorn(scores, temperature, ssl.sinkhorn_iterations)
        else:
            targets = losses.centered_targets(scores, state.teacher.center, temperature)
            losses.update_center(state.teacher.center, scores, ssl.center_momentum)
        values["ssl"] = losses.self_distillation_loss(
            out.student_features, out.prototypes, targets, ssl.student_temperature
        )
        health = losses.prototype_health(targets, out.student_features)
    if weights.caption:
        values["caption"] = losses.caption_loss(
            out.caption_hidden, out.caption_weight, batch.labels
        )
    return values, health


def train_step(state: TrainState, batches: list[PackedBatch]) -> dict[str, Tensor]:
    """One optimiser step over ``batches``; returns 0-d tensors, none of them read yet."""
    config, model, step = state.config, state.model, state.step
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    model.train()
    metrics: dict[str, Tensor] = {}
    sizes = [_loss_sizes(batch) for batch in batches]
    for batch, size in zip(batches, sizes, strict=True):
        # Each loss is a mean over its own rows: of the whole step, whatever the forwards hold.
        share = {name: rows / max(1, sum(s[name] for s in sizes)) for name, rows in size.items()}
        with autocast(config, state.device):
            values, health = batch_losses(state, batch.to(state.device))
            values = {name: share[name] * value for name, value in values.items()}
            total = losses.total_loss(values, config.loss)
        total.backward()
        health = {name: share["ssl"] * value for name, value in health.items()}
        for name, value in {"loss": total, **values, **health}.items():
            metrics[name] = metrics.get(name, 0.0) + value.detach()
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    metrics["grad_norm"] = nn.utils.clip_grad_norm_(trained, config.clip_grad_norm)
    metrics["logit_scale"] = model.logit_scale.detach()
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.teacher is not None:
        state.teacher.update(model, ema_momentum(config, step))
    return metrics


def _loss_sizes(batch: PackedBatch) -> dict[str, int]:
    """The rows that each loss averages over."""
    clips = len(batch.groups)
    masked, predicted = len(batch.mask_indices), len(batch.labels) - clips
    return {"contrastive": clips, "ssl": masked, "caption": predicted}


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

    Args:
        state: a new or restored run.
        source: training clips.
        tokenizer: the captions' tokenizer.
        out: the run's folder: ``run.json``, ``metrics.jsonl``, ``bad_clips.jsonl``, ``last/``,
            ``best/``.
        plan: kept in ``run.json`` beside the config: where the data is, for resuming.
        workers: loader processes.
        evaluate: called every ``eval_every`` steps and at the end; its ``score`` picks ``best/``.
        score: the key of the figure that is maximised.
        progress: show bars.
        tensorboard: also write TensorBoard events.

    Raises:
        RuntimeError: a loss is not finite, or too many clips are bad.
    """
    config = state.config
    out.mkdir(parents=True, exist_ok=True)
    run = {"format_version": checkpoint.FORMAT_VERSION, "plan": plan, "config": to_dict(config)}
    checkpoint.write_json(out / "run.json", run)
    cache = PatchCache.build(source, config, workers, progress)
    data = TrainSteps(source, tokenizer, config, cache)
    # Cached patches need no decoding: a worker would only copy them through shared memory.
    steps = steps_from(data, state.step, 0 if cache is not None else workers)
    log = _Log(out, tensorboard)
    bar = tqdm(total=config.steps, initial=state.step, desc="training", disable=not progress)
    with _stop_signals() as stopped, log, bar:
        for item in steps:
            _count_bad(state, item, out)
            metrics = train_step(state, item.batches) if item.batches else {}
            log.tokens += sum(len(batch.audio.patches) for batch in item.batches)
            state.step += 1
            bar.update()
            done = state.step == config.steps
            if metrics and (state.step % config.log_every == 0 or done):
                row = log.write(state, metrics)
                bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k in _SHOWN})
                _check_finite(state, row)
            if evaluate and (done or (config.eval_every and state.step % config.eval_every == 0)):
                card = evaluate(state.model)
                if card[score] >= state.best:
                    state.best = card[score]
                    save(state, tokenizer, out / "best", card)
            if done or stopped() or state.step % config.save_every == 0:
                save(state, tokenizer, out / "last", card if done and evaluate else {})
            if stopped():
                break
    return state.step == config.steps


_SHOWN = ("loss", "contrastive", "ssl", "caption")


def save(
    state: TrainState, tokenizer: CaptionTokenizer, folder: Path, card: dict[str, Any]
) -> None:
    """A checkpoint that :func:`restore` goes on from exactly."""
    counters = {
        "step": state.step,
        "seen": state.seen,
        "bad": dict(state.bad),
        "best": state.best if math.isfinite(state.best) else None,
    }

    def write(path: Path) -> None:
        checkpoint.write_model(path, state.model, tokenizer, card)
        checkpoint.write_training(path, state.model, state.teacher, state.optimizer, counters)

    checkpoint.write_folder(folder, write)


def restore(state: TrainState, folder: Path) -> None:
    """Takes model, teacher, optimiser and counters from a checkpoint of a run of this config."""
    folder = checkpoint.find_folder(folder)
    path = folder / "model.safetensors"
    checkpoint.load_tensors(state.model, checkpoint.read_tensors(path), path)
    counters = checkpoint.read_training(folder, state.model, state.teacher, state.optimizer)
    state.step, state.seen = counters["step"], counters["seen"]
    state.bad = Counter(counters["bad"])
    state.best = -math.inf if counters["best"] is None else counters["best"]


def stored_config(run: dict[str, Any]) -> TrainConfig:
    """The config that ``run.json`` holds."""
    return from_dict(TrainConfig, run["config"])


class _Log:
    """``metrics.jsonl``, and TensorBoard by option."""

    def __init__(self, out: Path, tensorboard: bool) -> None:
        self.tokens = 0
        """Audio tokens since the last line."""
        self._since = time.perf_counter()
        self._file = (out / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"))

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, state: TrainState, metrics: dict[str, Tensor]) -> dict[str, float]:
        row = {"step": state.step, "lr": learning_rate(state.config, state.step - 1)}
        row |= {name: float(value) for name, value in metrics.items()}
        if state.teacher is not None:
            row["collapsed"] = int(losses.collapsed(row))
        now = time.perf_counter()
        row["tokens_per_second"] = self.tokens / (now - self._since)
        self.tokens, self._since = 0, now
        row |= {"seen": state.seen, "bad": state.bad.total()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, state.step)
        return row


def _count_bad(state: TrainState, item: StepData, out: Path) -> None:
    state.seen += item.seen
    if not item.bad:
        return
    state.bad.update(clip.code for clip in item.bad)
    with (out / "bad_clips.jsonl").open("a", encoding="utf-8") as file:
        for clip in item.bad:
            file.write(json.dumps({"step": state.step, **clip._asdict()}) + "\n")
    bad, limit = state.bad.total(), state.config.data.max_bad_share
    if state.seen > 100 and bad > limit * state.seen:
        raise RuntimeError(
            f"{bad} of {state.seen} clips are bad, more than data.max_bad_share {limit:g}: "
            f"{dict(state.bad)}; each is listed in {out / 'bad_clips.jsonl'}"
        )


def _check_finite(state: TrainState, row: dict[str, float]) -> None:
    wrong = [name for name in (*_SHOWN, "grad_norm") if not math.isfinite(row.get(name, 0.0))]
    if wrong:
        raise RuntimeError(
            f"step {state.step}: {', '.join(wrong)} is not finite; the last checkpoint is from "
            "before it. Lower lr, or set precision=fp32"
        )


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the loop after the current step; a second Ctrl-C ends it at once."""
    caught: list[int] = []

    def handle(number: int, _: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
