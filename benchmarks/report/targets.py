"""The targets of slap-fast, and by how much each recorded run meets or misses them.

Times are of one H200; C1 and C2 are packs of benchmarks/cases.py. A target whose benchmark has no
record, or whose peer did not load, is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Record = dict[str, Any]


class Target(NamedTuple):
    """A figure of one record and its bound."""

    what: str
    unit: str
    record: str
    """A file of benchmarks/results, without .json."""
    value: Callable[[Record], float | None]
    """The figure; None where the record does not have it."""
    bound: float
    at_least: bool = True
    """Otherwise at most."""


def value_of(column: str, **where: Any) -> Callable[[Record], float | None]:
    """The least value of a column in the rows that have the values ``where``; a tuple of values is
    any of them."""
    return lambda record: min(_values(record, column, where), default=None)


def most_of(column: str, **where: Any) -> Callable[[Record], float | None]:
    """The greatest value of a column; see :func:`least_of`."""
    return lambda record: max(_values(record, column, where), default=None)


def _values(record: Record, column: str, where: dict[str, Any]) -> list[float]:
    accepted = {
        name: value if isinstance(value, tuple) else (value,) for name, value in where.items()
    }
    matching = [
        row for row in record["rows"] if all(row.get(name) in of for name, of in accepted.items())
    ]
    return [row[column] for row in matching if row.get(column) is not None]


def attention(column: str, case: str, layer: str, direction: str, variant: Any = "slap-fast"):
    """A figure of attention's record."""
    return value_of(column, case=case, layer=layer, direction=direction, variant=variant)


def over_peers(record: Record) -> float | None:
    """How many times the fastest other log-mel front end, on one thread."""
    rows = [row for row in record["rows"] if row["case"] == "C1" and row.get("threads") == 1]
    ours = value_of("audio_s_per_s", variant=MEL_CPP)({"rows": rows})
    peers = [row["audio_s_per_s"] for row in rows if not row["variant"].startswith("slap-fast")]
    return ours / max(peers) if ours and peers else None


def beside_compiled(column: str) -> Callable[[Record], float | None]:
    """The fused step's share of the compiled reference's figure."""

    def find(record: Record) -> float | None:
        ours, theirs = (value_of(column, way=way)(record) for way in (FUSED, COMPILED))
        return ours / theirs if ours and theirs else None

    return find


def mel_of_step(record: Record) -> float | None:
    """The share of a step that its log-mel patches would take."""
    step = value_of("ms", way=FUSED)(record)
    return record["parts"]["mel"]["ms"] / step if step else None


MEL_CPP, MEL_TRITON = "slap-fast cpp, kaldi, fp32", "slap-fast triton, kaldi, fp32"
HEAD = "SigLIP-style head, padded"
FUSED, COMPILED = "fused", "compiled reference"
ENCODERS = ("slap-fast", "slap-fast, compiled")
FA2, NEWER = ("FA2 in torch", "FA2 (flash-attn)"), ("FA3", "FA4")

TARGETS = [
    *(
        Target(
            f"{layer} attention, {direction}, C1",
            "ms",
            "attention_gpu",
            attention("ms", "C1", layer, direction),
            bound,
            at_least=False,
        )
        for layer in ("local", "global")
        for direction, bound in (("forward", 0.50), ("backward", 1.05))
    ),
    *(
        Target(
            f"local attention, forward and backward, C1, beside {name}",
            "x",
            "attention_gpu",
            attention("times_ours", "C1", "local", "both", peers),
            bound,
        )
        for name, peers, bound in (("FA2 and rotary", FA2, 2.0), ("FA3 and FA4", NEWER, 1.0))
    ),
    *(
        Target(
            f"global attention, {direction}, C2",
            "TFLOP/s",
            "attention_gpu",
            attention("TFLOP/s", "C2", "global", direction),
            bound,
        )
        for direction, bound in (("forward", 400.0), ("backward", 380.0))
    ),
    *(
        Target(
            f"MAP pooling, {direction}, C1",
            "of copy bandwidth",
            "map_pool_gpu",
            value_of("of_floor", case="C1", variant="operation alone", direction=direction),
            0.8,
        )
        for direction in ("forward", "backward")
    ),
    Target(
        "MAP pooling head, C1, beside a SigLIP-style head",
        "x",
        "map_pool_gpu",
        value_of("times_ours", case="C1", variant=HEAD),
        10.0,
    ),
    Target(
        "mel_patches, GPU, C1",
        "ms",
        "mel_gpu",
        value_of("ms", case="C1", variant=MEL_TRITON),
        0.6,
        at_least=False,
    ),
    Target(
        "mel_patches, GPU, C1, beside torch.stft",
        "x",
        "mel_gpu",
        value_of("times_stft", case="C1", variant=MEL_TRITON),
        5.0,
    ),
    Target(
        "mel_patches, CPU, one thread",
        "s of audio per s",
        "mel_cpu",
        value_of("audio_s_per_s", case="C1", variant=MEL_CPP, threads=1),
        30_000.0,
    ),
    Target("mel_patches, CPU, beside the fastest peer", "x", "mel_cpu", over_peers, 8.0),
    Target(
        "audio encoder, forward and backward, 256,000 tokens of C1",
        "ms",
        "encoder_gpu",
        value_of("ms_256k", case="C1", variant=ENCODERS, direction="both"),
        328.0,
        at_least=False,
    ),
    Target(
        "audio encoder, forward and backward, C1",
        "of 989 TFLOP/s",
        "encoder_gpu",
        most_of("mfu", case="C1", variant=ENCODERS, direction="both"),
        0.55,
    ),
    *(
        Target(
            f"{what} of a training step, CPU, beside the compiled reference",
            "x",
            "step_cpu",
            beside_compiled(column),
            bound,
            at_least=False,
        )
        for what, column, bound in (("time", "ms", 1.1), ("peak memory", "peak MB", 1.0))
    ),
    Target("training step", "of the peak", "step_gpu", value_of("MFU", way=FUSED), 0.5),
    Target(
        "the paper's pretraining, projected from the step",
        "days",
        "step_gpu",
        value_of("device days", way=FUSED),
        2.0,
        at_least=False,
    ),
    Target(
        "mel_patches beside a training step, GPU",
        "of its time",
        "step_gpu",
        mel_of_step,
        0.01,
        at_least=False,
    ),
]


def verdicts(records: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each target: its name, bound, figure and verdict."""
    return [_verdict(target, records.get(target.record)) for target in TARGETS]


def _verdict(target: Target, record: dict[str, Any] | None) -> list[str]:
    sign = "at least" if target.at_least else "at most"
    line = [target.what, f"{sign} {_figure(target.bound)} {target.unit}"]
    value = target.value(record) if record else None
    if value is None:
        return [*line, "", "not run"]
    share = value / target.bound
    met = share >= 1 if target.at_least else share <= 1
    return [*line, _figure(value), "met" if met else f"missed by {abs(share - 1):.1%}"]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
