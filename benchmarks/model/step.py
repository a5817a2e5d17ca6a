"""A training step in three variants: `python -m benchmarks.model.step [--tokens N] [--json FILE]`.

The same step in turns on three batches of noise: the *reference* (plain PyTorch operations, full
logits, AdamW one parameter at a time), the *compiled reference* (torch.compile around it) and the
*fused* step, made of the trainer's parts with ``compile=true``. Their losses must agree; a
variant that runs out of a GPU's memory is left out with a note. On a CPU slap_tiny, on a GPU
slap_base; the compiler takes minutes before the first step.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import harness, machine
from benchmarks.model.step_variants import VARIANTS, StepResult, StepVariant, now
from slap_fast import losses, ops
from slap_fast.config import TrainConfig, slap_base, slap_tiny
from slap_fast.data.augment import mask_indices
from slap_fast.diagnostics import flops
from slap_fast.diagnostics.memory import estimate_memory
from slap_fast.models.layers import Segments
from slap_fast.packed import PackedBatch, starts_of
from slap_fast.training.state import TrainState
from slap_fast.training.step import autocast

PAIRS = 2 * 109e6
"""Of the paper's pretraining: two epochs."""
TOKENS_PER_CAPTION = 40
BATCHES = 3
"""That are rotated."""
LEAST_ROUNDS = 3
MOST_SECONDS = 45.0
"""A variant takes no more steps once it took this long and LEAST_ROUNDS."""
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


def peak_flops(device: torch.device) -> tuple[float, str]:
    """(FLOP/s that MFU is a share of, where they come from)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        if peak := flops.datasheet_peak(name):
            return peak, f"{name} datasheet, bf16"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(1536, 1536, device=device, dtype=dtype)
    taken = []
    for _ in range(8):
        started = now(device)
        a @ a
        taken.append(now(device) - started)
    return 2 * 1536**3 / min(taken), f"a product of 1536 x 1536 here, {dtype}"


def bench_step(
    config: TrainConfig,
    tokens: int,
    rounds: int,
    device: torch.device,
    names: Sequence[str] = tuple(VARIANTS),
) -> Iterator[dict[str, Any]]:
    """The record so far after each round and part: rows of all variants, and the parts alone.

    Args:
        config: model, losses and precision; the variants set ``compile``.
        tokens: most audio tokens in a batch.
        rounds: steps of each variant that are timed.
        device: where it runs.
        names: of the variants, "fused" the last.

    Raises RuntimeError where the variants' losses differ.
    """
    config = dataclasses.replace(config, warmup_steps=0)
    made = [make_batch(config, tokens, number) for number in range(BATCHES)]
    waveforms, starts, batches = (
        [x.to(device) for x in tensors] for tensors in zip(*made, strict=True)
    )
    work = flops.StepShape.of(batches[0])  # the others have the same
    step_flops = flops.step(config.model, config.loss, work)
    peak, peak_is = peak_flops(device)
    variants = {name: StepVariant(config, device, **VARIANTS[name]) for name in names}
    runs: dict[str, list[StepResult]] = {name: [] for name in variants}
    results = _turn(variants, list(variants), batches[0])
    first = {name: result.loss for name, result in results.items()}
    is_bf16 = device.type == "cuda" and config.precision != "fp32"
    bound = TOLERANCE[torch.bfloat16 if is_bf16 else torch.float32]
    expected = next(iter(first))
    for name, loss in first.items():
        if not abs(loss - first[expected]) <= bound * abs(first[expected]):
            raise RuntimeError(f"{name}: loss {loss}, the {expected} has {first[expected]}")
    for batch in batches[1:]:
        _turn(variants, list(variants), batch)
    mel, parts = [], {}
    record = {
        "parts": parts,
        "clips": len(work.audio),
        "tokens": len(batches[0].audio.patches),
        "flops": step_flops,
        "peak_flops": peak,
        "peak_is": peak_is,
        "first_loss": first,
    }
    audio = len(waveforms[0]) / config.model.mel.sample_rate
    for number in range(rounds):
        turn = number % BATCHES
        due = [
            name
            for name in variants
            if number < LEAST_ROUNDS or sum(run.seconds for run in runs[name]) < MOST_SECONDS
        ]
        for name, result in _turn(variants, due, batches[turn]).items():
            runs[name].append(result)
        started = now(device)
        ops.mel_patches(waveforms[turn], starts[turn], config.model.mel)
        mel.append(now(device) - started)
        parts["mel"] = {"ms": 1e3 * statistics.median(mel)}
        kept = {name: runs[name] if name in variants else [] for name in names}
        record |= {"rows": _rows(kept, record, audio), "rounds": number + 1}
        yield record
    for name, part in _parts(variants["fused"].state, batches, config, work, peak, rounds):
        parts[name] = part
        yield record


def _turn(
    variants: dict[str, StepVariant], due: list[str], batch: PackedBatch
) -> dict[str, StepResult]:
    """A step of each variant that is due; one that runs out of memory leaves ``variants``."""
    results = {}
    for name in due:
        try:
            results[name] = variants[name].timed(batch)
        except torch.OutOfMemoryError:
            if name == "fused":
                raise
            del variants[name]
    return results


def _rows(
    runs: dict[str, list[StepResult]], record: dict[str, Any], audio: float
) -> list[harness.Row]:
    """One row per variant: the medians of its steps, or a note that memory ran out. ``audio``:
    seconds of it in a step."""
    fused = statistics.median(run.seconds for run in runs["fused"])
    rows: list[harness.Row] = []
    for name, taken in runs.items():
        if not taken:
            rows.append({"way": name, "note": "out of memory"})
            continue
        spread = harness.summary([run.seconds for run in taken])
        seconds = spread["ms"] / 1e3
        sizes = [run.peak_bytes for run in taken]
        stages = {
            stage: statistics.median(run.laps[stage] for run in taken) for stage in taken[0].laps
        }
        rows.append(
            {
                "way": name,
                **spread,
                "steps": len(taken),
                "tokens/s": record["tokens"] / seconds,
                "audio s/s": audio / seconds,
                "MFU": record["flops"] / seconds / record["peak_flops"],
                "peak MB": statistics.median(sizes) / 1e6 if None not in sizes else None,
                "times_fused": seconds / fused,
                "device days": PAIRS / record["clips"] * seconds / 86_400,
                **{f"{stage} ms": 1e3 * value for stage, value in stages.items()},
            }
        )
    return rows


def _parts(
    state: TrainState,
    batches: list[PackedBatch],
    config: TrainConfig,
    work: flops.StepShape,
    peak: float,
    rounds: int,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Parts of the model alone on the best operations, forward and backward, uncompiled; the
    decoder is with its loss. The teacher is the fused step's, forward alone."""
    model, counts = state.model, flops.forward(config.model, config.loss, work)
    with torch.no_grad(), autocast(config, state.device):
        features = [model.audio_encoder(batch.audio).requires_grad_() for batch in batches]
    contexts = [
        Segments.scheduled(audio.cu_seqlens, audio.max_seqlen, len(audio.patches))
        for audio in (batch.audio for batch in batches)
    ]

    def encoder(turn: int) -> Tensor:
        return model.audio_encoder(batches[turn].audio, batches[turn].mask_indices)

    def decoder(turn: int) -> Tensor:
        hidden = model.caption_decoder(batches[turn].text, features[turn], contexts[turn])
        embedding = model.caption_decoder.token_embedding.weight
        return losses.caption_loss(hidden, embedding, batches[turn].labels)

    parts = {
        "encoder": (encoder, 3 * counts["student"]),
        "text": (lambda turn: model.embed_text(batches[turn].text), 3 * counts["text"]),
        "decoder": (decoder, 3 * (counts["decoder"] + counts["logits"])),
        "teacher": (lambda turn: state.teacher(batches[turn])[0], counts["teacher"]),
    }
    for name, (forward, part_flops) in parts.items():
        taken = []
        for number in range(rounds + 1):
            started = now(state.device)
            with autocast(config, state.device):
                out = forward(number % BATCHES)
            if out.requires_grad:
                out.float().square().mean().backward()
            taken.append(now(state.device) - started)
        seconds = statistics.median(taken[1:])
        yield name, {"ms": 1e3 * seconds, "MFU": part_flops / seconds / peak}
    state.optimizer.zero_grad(set_to_none=True)


def render(record: dict[str, Any], console: Console) -> None:
    """The rows as a table, one variant a column."""
    rows = record["rows"]
    table = Table("", *(row["way"] for row in rows), title="a training step")
    for key in list(rows[-1])[1:]:
        values = (row.get(key, row.get("note")) for row in rows)
        table.add_row(key, *(_cell(value) for value in values))
    console.print(table)
    for name, part in record["parts"].items():
        figures = ", ".join(f"{key} {value:.3g}" for key, value in part.items())
        console.print(f"{name} alone: {figures}")
    console.print(
        f"{record['clips']} clips, {record['tokens']} audio tokens, {record['flops']:.3g} FLOP; "
        f"MFU of {record['peak_flops']:.3g} FLOP/s: {record['peak_is']}. device days: 2 x 109 M "
        "pairs, as the paper's pretraining, at this speed of this model and these lengths of clips"
    )


def _cell(value: float | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else value or ""


def default_tokens(config: TrainConfig, device_bytes: float) -> int:
    """Half of what fits beside three models of the same size: full logits take the other half.

    The estimate is :func:`estimate_memory`'s of a device with ``device_bytes``.
    """
    alone = estimate_memory(config, device_bytes)["fixed_bytes"]
    models = sum(alone.values()) - alone["reserved"]
    return estimate_memory(config, max(models, device_bytes - 2 * models))["max_tokens"] // 2


def main() -> int:
    """Runs and records."""
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="of audio; by default what fits, 8192 on a CPU")
    others = [name for name in VARIANTS if name != "fused"]
    note = "variants beside the fused one; what is compiled takes minutes before it is timed"
    parser.add_argument("--beside", nargs="*", choices=others, default=others, help=note)
    options = parser.parse_args()
    device = harness.device()
    if device.type == "cuda":
        config = slap_base()
        most = default_tokens(config, torch.cuda.get_device_properties(device).total_memory)
    else:
        config, most = slap_tiny(), 8192
    tokens = options.tokens or round((options.scale or 1.0) * most)
    header = machine.record(title="a training step")
    names = [*options.beside, "fused"]
    for record in bench_step(config, tokens, options.rounds, device, names):
        if options.json:
            machine.write(options.json, header | record)
    render(record, Console(width=120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
