"""A whole training step, three ways: `python -m benchmarks.model.step [--tokens N] [--json FILE]`.

The same step in turns on three batches of noise: the *reference* (plain PyTorch operations, whole
logits, AdamW one parameter at a time), the *compiled reference* (torch.compile around it) and the
*fused* step, made of the trainer's parts with ``compile=true``. Their losses must agree; a way that
runs out of a GPU's memory is told so and left out. On a CPU slap_tiny, on a GPU slap_base; the
compiler takes minutes before the first step.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import harness, machine
from slap_fast import losses, ops
from slap_fast.config import TrainConfig, override, slap_base, slap_tiny
from slap_fast.data.augment import mask_indices
from slap_fast.diagnostics import flops
from slap_fast.diagnostics import memory as plan
from slap_fast.losses import self_distillation
from slap_fast.models.layers import Segments
from slap_fast.models.slap import SlapModel, SlapOutput
from slap_fast.ops import dispatch
from slap_fast.packed import IGNORE_INDEX, PackedBatch, starts_of
from slap_fast.training import objective
from slap_fast.training import state as runstate
from slap_fast.training.loop import autocast

DATASHEET_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""bf16, dense."""
PAIRS = 2 * 109e6
"""Of the paper's pretraining: two epochs."""
TOKENS_PER_CAPTION = 40
BATCHES = 3
"""That are rotated."""
LEAST_ROUNDS = 3
MOST_SECONDS = 45.0
"""Of a way's steps that count: past it and LEAST_ROUNDS it has no more."""
WAYS = {
    "reference": {"compiled": False, "fused": False},
    "compiled reference": {"compiled": True, "fused": False},
    "fused": {"compiled": True, "fused": True},
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of the losses, relative."""


def make_batch(
    config: TrainConfig, tokens: int, number: int = 0
) -> tuple[Tensor, Tensor, PackedBatch]:
    """Noise of 1 to 30 s, log-uniform, and random captions: (waveform, cu_samples, batch).

    ``number``: batches have clips of the same lengths, each in another order; all else differs.
    """
    rng, mel = np.random.default_rng(0), config.model.mel
    samples, count = [], 0
    while True:
        samples.append(int(30 ** rng.random() * mel.sample_rate))
        count += mel.num_patches(samples[-1])
        if count > tokens and len(samples) > 2:
            break
    samples.pop()
    rng = np.random.default_rng(number)
    rng.shuffle(samples)
    starts = starts_of(samples, torch.int64)
    waveform = torch.from_numpy(rng.normal(0, 0.1, int(starts[-1])).astype(np.float32))
    audio = ops.mel_patches(waveform, starts, mel)
    ids = rng.integers(5, config.model.text.vocab_size, len(samples) * TOKENS_PER_CAPTION)
    batch = PackedBatch.from_lengths(
        audio.patches,
        audio.cu_seqlens.diff().tolist(),
        torch.from_numpy(ids),
        [TOKENS_PER_CAPTION] * len(samples),
        patches_per_column=mel.patches_per_column,
        mask_indices=torch.from_numpy(
            mask_indices(audio.cu_seqlens, config.model.ssl.mask_ratio, rng)
        ),
    )
    return waveform, starts, batch


def textbook_losses(
    state: runstate.TrainState,
    out: SlapOutput,
    features: Tensor,
    prototypes: Tensor,
    batch: PackedBatch,
) -> dict[str, Tensor]:
    """The three losses as a paper writes them: all logits exist at once."""
    ssl = state.config.model.ssl
    targets = (features @ prototypes.T).float() / ssl.teacher_temperature
    for _ in range(ssl.sinkhorn_iterations):
        targets = (targets - targets.logsumexp(0)).log_softmax(1)
    targets = targets.exp()
    logits = (out.logit_scale * out.audio_features @ out.text_features.T).float()
    own = torch.arange(len(logits), device=logits.device)
    student = (out.student_features @ out.prototypes.T).float() / ssl.student_temperature
    words = (out.caption_hidden @ out.caption_weight.T).float()
    return {
        "contrastive": (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2,
        "ssl": -(targets * student.log_softmax(1)).sum(1).mean(),
        "caption": F.cross_entropy(words, batch.labels, ignore_index=IGNORE_INDEX),
    }


def blockwise_losses(
    state: runstate.TrainState,
    out: SlapOutput,
    features: Tensor,
    prototypes: Tensor,
    batch: PackedBatch,
) -> dict[str, Tensor]:
    """The trainer's."""
    ssl = state.config.model.ssl
    targets = objective.teacher_targets(state, features, prototypes, ssl.teacher_temperature)
    student = out.student_features, out.prototypes
    pair = out.audio_features, out.text_features
    words = out.caption_hidden, out.caption_weight
    contrastive, ssl_loss, caption = (
        objective.as_graph(state.config, loss)
        for loss in (
            losses.contrastive_loss,
            self_distillation.self_distillation_loss,
            losses.caption_loss,
        )
    )
    return {
        "contrastive": contrastive(*pair, out.logit_scale, groups=batch.groups),
        "ssl": ssl_loss(*student, targets, ssl.student_temperature)[0],
        "caption": caption(*words, batch.labels),
    }


@contextmanager
def on_reference() -> Iterator[None]:
    """Inside, operations of the model are the reference's."""
    known = dict(dispatch.IMPLEMENTATIONS)
    dispatch.IMPLEMENTATIONS |= {name: ("reference",) for name in ("attention", "map_pool")}
    try:
        yield
    finally:
        dispatch.IMPLEMENTATIONS |= known


class Taken(NamedTuple):
    """What a step took."""

    loss: float
    laps: dict[str, float]
    """Seconds of each stage."""
    peak_bytes: int | None
    """At the peak, beyond those before; None where the system does not say."""

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(self.laps.values())


class Way:
    """One way of the step, with a model of its own that starts from the same weights."""

    def __init__(
        self, config: TrainConfig, device: torch.device, *, compiled: bool, fused: bool
    ) -> None:
        config = override(config, {"compile": compiled})
        torch.manual_seed(0)
        self.state = runstate.new_state(config, SlapModel(config.model), device)
        textbook = objective.as_graph(config, textbook_losses)
        self.losses_of = blockwise_losses if fused else textbook
        self.fused = fused
        if not fused:
            groups = self.state.optimizer.param_groups
            groups = [{k: g[k] for k in ("params", "weight_decay")} for g in groups]
            options = {"lr": config.lr, "betas": config.betas}
            self.state.optimizer = torch.optim.AdamW(groups, foreach=False, **options)

    def step(self, batch: PackedBatch, lap: Callable[[str], None]) -> Tensor:
        """One step; ``lap`` is called at the end of each stage. Returns the loss."""
        state = self.state
        with autocast(state.config, state.device):
            taught = state.teacher(batch)
            lap("teacher")
            out = state.model(batch, state.config.loss)
            lap("student, text, decoder")
            values = self.losses_of(state, out, *taught, batch)
            total = losses.total_loss(values, state.config.loss)
        del out, taught, values
        lap("losses")
        total.backward()
        lap("backward")
        trained = [p for group in state.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, state.config.clip_grad_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        lap("optimiser")
        state.teacher.update(state.model, 0.99)
        lap("EMA")
        return total.detach()

    def timed(self, batch: PackedBatch) -> Taken:
        """A step, and what it took."""
        laps: dict[str, float] = {}
        last = _now(self.state.device)

        def lap(name: str) -> None:
            nonlocal last
            now = _now(self.state.device)
            laps[name] = now - last
            last = now

        peak = harness.Peak(self.state.device)
        with nullcontext() if self.fused else on_reference(), peak:
            last = _now(self.state.device)
            loss = self.step(batch, lap)
        return Taken(float(loss), laps, peak.bytes)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_flops(device: torch.device) -> tuple[float, str]:
    """(FLOP/s that MFU is a share of, where they come from)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        known = next((kind for kind in DATASHEET_FLOPS if kind in name), None)
        if known:
            return DATASHEET_FLOPS[known], f"{known} datasheet, bf16"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(1536, 1536, device=device, dtype=dtype)
    taken = []
    for _ in range(8):
        started = _now(device)
        a @ a
        taken.append(_now(device) - started)
    return 2 * 1536**3 / min(taken), f"a product of 1536 x 1536 here, {dtype}"


def bench_step(
    config: TrainConfig,
    tokens: int,
    rounds: int,
    device: torch.device,
    names: Sequence[str] = tuple(WAYS),
) -> Iterator[dict[str, Any]]:
    """Rows of all ways, the parts alone, and what they stand on; anew after each round and part,
    with what there is so far.

    Args:
        config: model, losses and precision; the ways set ``compile``.
        tokens: most audio tokens in a batch.
        rounds: steps of each way that count.
        device: where it runs.
        names: of the ways, "fused" the last.

    Raises RuntimeError where the ways' losses differ.
    """
    config = dataclasses.replace(config, warmup_steps=0)
    made = [make_batch(config, tokens, number) for number in range(BATCHES)]
    waveforms, starts, batches = ([x.to(device) for x in each] for each in zip(*made, strict=True))
    work = flops.Work.of(batches[0])  # the others have the same
    wanted = flops.step(config.model, config.loss, work)
    peak, peak_is = peak_flops(device)
    ways = {name: Way(config, device, **WAYS[name]) for name in names}
    runs: dict[str, list[Taken]] = {name: [] for name in ways}
    first = {name: taken.loss for name, taken in _turn(ways, list(ways), batches[0]).items()}
    low = device.type == "cuda" and config.precision != "fp32"
    bound = TOLERANCE[torch.bfloat16 if low else torch.float32]
    known = next(iter(first))
    for name, loss in first.items():
        if not abs(loss - first[known]) <= bound * abs(first[known]):
            raise RuntimeError(f"{name}: loss {loss}, the {known} has {first[known]}")
    for batch in batches[1:]:
        _turn(ways, list(ways), batch)
    mel, parts = [], {}
    found = {
        "parts": parts,
        "clips": len(work.audio),
        "tokens": len(batches[0].audio.patches),
        "flops": wanted,
        "peak_flops": peak,
        "peak_is": peak_is,
        "first_loss": first,
    }
    audio = len(waveforms[0]) / config.model.mel.sample_rate
    for number in range(rounds):
        turn = number % BATCHES
        due = [
            name
            for name in ways
            if number < LEAST_ROUNDS or sum(each.seconds for each in runs[name]) < MOST_SECONDS
        ]
        for name, taken in _turn(ways, due, batches[turn]).items():
            runs[name].append(taken)
        started = _now(device)
        ops.mel_patches(waveforms[turn], starts[turn], config.model.mel)
        mel.append(_now(device) - started)
        parts["mel"] = {"ms": 1e3 * statistics.median(mel)}
        measured = {name: runs[name] if name in ways else [] for name in names}
        found |= {"rows": _rows(measured, found, audio), "rounds": number + 1}
        yield found
    for name, part in _parts(ways["fused"].state, batches, config, work, peak, rounds):
        parts[name] = part
        yield found


def _turn(ways: dict[str, Way], due: list[str], batch: PackedBatch) -> dict[str, Taken]:
    """A step of each way that is due; a way with no room for it is taken out of ``ways``."""
    taken = {}
    for name in due:
        try:
            taken[name] = ways[name].timed(batch)
        except torch.OutOfMemoryError:
            if name == "fused":
                raise
            del ways[name]
    return taken


def _rows(runs: dict[str, list[Taken]], found: dict[str, Any], audio: float) -> list[harness.Row]:
    """One row per way of what its steps took, or that it found no room for one; ``audio``: seconds
    of it in a step."""
    fused = statistics.median(each.seconds for each in runs["fused"])
    rows: list[harness.Row] = []
    for name, taken in runs.items():
        if not taken:
            rows.append({"way": name, "note": "out of memory"})
            continue
        spread = harness.summary([each.seconds for each in taken])
        seconds = spread["ms"] / 1e3
        sizes = [each.peak_bytes for each in taken]
        stages = {
            stage: statistics.median(each.laps[stage] for each in taken) for stage in taken[0].laps
        }
        rows.append(
            {
                "way": name,
                **spread,
                "steps": len(taken),
                "tokens/s": found["tokens"] / seconds,
                "audio s/s": audio / seconds,
                "MFU": found["flops"] / seconds / found["peak_flops"],
                "peak MB": statistics.median(sizes) / 1e6 if None not in sizes else None,
                "times_fused": seconds / fused,
                "device days": PAIRS / found["clips"] * seconds / 86_400,
                **{f"{stage} ms": 1e3 * value for stage, value in stages.items()},
            }
        )
    return rows


def _parts(
    state: runstate.TrainState,
    batches: list[PackedBatch],
    config: TrainConfig,
    work: flops.Work,
    peak: float,
    rounds: int,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Parts of the model alone on the best operations, forward and backward, uncompiled; the
    decoder is with its loss. The teacher is the fused step's, forward alone."""
    model, counts = state.model, flops.forward(config.model, config.loss, work)
    with torch.no_grad(), autocast(config, state.device):
        heard = [model.audio_encoder(batch.audio).requires_grad_() for batch in batches]
    contexts = [
        Segments.scheduled(audio.cu_seqlens, audio.max_seqlen, len(audio.patches))
        for audio in (batch.audio for batch in batches)
    ]

    def encoder(turn: int) -> Tensor:
        return model.audio_encoder(batches[turn].audio, batches[turn].mask_indices)

    def decoder(turn: int) -> Tensor:
        hidden = model.caption_decoder(batches[turn].text, heard[turn], contexts[turn])
        words = model.caption_decoder.token_embedding.weight
        return losses.caption_loss(hidden, words, batches[turn].labels)

    parts = {
        "encoder": (encoder, 3 * counts["student"]),
        "text": (lambda turn: model.embed_text(batches[turn].text), 3 * counts["text"]),
        "decoder": (decoder, 3 * (counts["decoder"] + counts["logits"])),
        "teacher": (lambda turn: state.teacher(batches[turn])[0], counts["teacher"]),
    }
    for name, (forward, wanted) in parts.items():
        taken = []
        for number in range(rounds + 1):
            started = _now(state.device)
            with autocast(config, state.device):
                out = forward(number % BATCHES)
            if out.requires_grad:
                out.float().square().mean().backward()
            taken.append(_now(state.device) - started)
        seconds = statistics.median(taken[1:])
        yield name, {"ms": 1e3 * seconds, "MFU": wanted / seconds / peak}
    state.optimizer.zero_grad(set_to_none=True)


def render(found: dict[str, Any], console: Console) -> None:
    """The rows as a table, one way a column."""
    rows = found["rows"]
    table = Table("", *(row["way"] for row in rows), title="a training step")
    for key in list(rows[-1])[1:]:
        values = (row.get(key, row.get("note")) for row in rows)
        table.add_row(key, *(_cell(value) for value in values))
    console.print(table)
    for name, part in found["parts"].items():
        figures = ", ".join(f"{key} {value:.3g}" for key, value in part.items())
        console.print(f"{name} alone: {figures}")
    console.print(
        f"{found['clips']} clips, {found['tokens']} audio tokens, {found['flops']:.3g} FLOP; "
        f"MFU of {found['peak_flops']:.3g} FLOP/s: {found['peak_is']}. device days: 2 x 109 M "
        "pairs, as the paper's pretraining, at this speed of this model and these lengths of clips"
    )


def _cell(value: float | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else value or ""


def default_tokens(config: TrainConfig, memory: float) -> int:
    """Half of what fits beside three models of the same size: whole logits take the rest.

    The estimate is :func:`slap_fast.diagnostics.memory.plan`'s of a device with ``memory`` bytes.
    """
    alone = plan.plan(config, memory)["fixed_bytes"]
    models = sum(alone.values()) - alone["reserved"]
    return plan.plan(config, max(models, memory - 2 * models))["max_tokens"] // 2


def main() -> int:
    """Runs and records."""
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="of audio; by default what fits, 8192 on a CPU")
    others = [name for name in WAYS if name != "fused"]
    told = "ways beside the fused one; what is compiled takes minutes before it is timed"
    parser.add_argument("--beside", nargs="*", choices=others, default=others, help=told)
    options = parser.parse_args()
    device = harness.device()
    if device.type == "cuda":
        config = slap_base()
        most = default_tokens(config, torch.cuda.get_device_properties(device).total_memory)
    else:
        config, most = slap_tiny(), 8192
    tokens = options.tokens or round((options.scale or 1.0) * most)
    about = machine.record(title="a training step")
    names = [*options.beside, "fused"]
    for found in bench_step(config, tokens, options.rounds, device, names):
        if options.json:
            machine.write(options.json, about | found)
    render(found, Console(width=120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
