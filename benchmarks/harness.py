"""Timing: results compared first, variants in turn, medians with their spread.

Every variant takes the number of the round, to pick its inputs by: they are rotated, so that a GPU
does not find the last round's in its cache.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import cases, machine

Variant = Callable[[int], Any]
Row = dict[str, Any]
"""One line of a record: a variant, where it ran, and its figures."""


class Prepared(NamedTuple):
    """A variant in two parts: only the second is timed, on what the first returns."""

    first: Variant
    then: Callable[[Any], Any]


class NotInstalled(Exception):
    """A peer that does not load here or does not run on this device; the message is the reason."""


def load(name: str) -> Any:
    """Imports a peer that needs a GPU; raises NotInstalled."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a binary that does not fit this torch raises anything
        absent = isinstance(error, ModuleNotFoundError)
        raise NotInstalled(
            "not installed" if absent else f"does not load: {type(error).__name__}"
        ) from None
    if device().type != "cuda":
        raise NotInstalled("needs a GPU")
    return module


def seconds(
    variants: Mapping[str, Variant | Prepared], device: torch.device, *, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each of ``rounds`` calls of each variant, after three that are not timed.

    Each round has an order of its own: a variant that follows a slow one finds a cold cache.
    """
    clock = _cuda_seconds if device.type == "cuda" else _host_seconds
    for _ in range(3):
        for variant in variants.values():
            _ready(variant, 0)()
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in random.Random(number).sample(list(variants), len(variants)):
            taken[name].append(clock(_ready(variants[name], number)))
    return taken


def _ready(variant: Variant | Prepared, number: int) -> Callable[[], Any]:
    """The timed part of a call, once the untimed part is done."""
    if isinstance(variant, Prepared):
        return partial(variant.then, variant.first(number))
    return partial(variant, number)


def _host_seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _cuda_seconds(call: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The call's launches queue up behind this, so that no time of the host counts; and it takes
    # what is left of the last call out of the cache.
    torch.zeros(2**28, dtype=torch.int32, device="cuda")
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def summary(taken: list[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile, in milliseconds."""
    tenths = statistics.quantiles(taken, n=10, method="inclusive") if len(taken) > 1 else taken * 9
    return {
        "ms": 1e3 * statistics.median(taken),
        "ms_p10": 1e3 * tenths[0],
        "ms_p90": 1e3 * tenths[-1],
    }


def measure(
    variants: Mapping[str, Variant | Prepared], device: torch.device, *, rounds: int
) -> dict[str, dict[str, float | None]]:
    """The summary of each variant's times, and the MiB that a call has allocated at its peak."""
    taken = seconds(variants, device, rounds=rounds)
    return {
        name: {**summary(taken[name]), "peak_MiB": _peak_mib(variant, device)}
        for name, variant in variants.items()
    }


def _peak_mib(variant: Variant | Prepared, device: torch.device) -> float | None:
    call = _ready(variant, 0)
    with Peak(device) as peak:
        call()
    return None if peak.bytes is None else peak.bytes / 2**20


class Peak:
    """Peak memory beyond what was allocated before: a GPU's own count, or resident pages.

    ``bytes`` is set after the block; None on a CPU whose system has no such count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif PEAK_RESET.exists():
            ctypes.CDLL(None).malloc_trim(0)  # returns freed pages to the system
            PEAK_RESET.write_text("5", encoding="ascii")  # the peak is now
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            self.bytes = _status("VmHWM") - self.before if PEAK_RESET.exists() else None


PEAK_RESET = Path("/proc/self/clear_refs")
"""Linux's; a write to it restarts the peak of resident memory."""


def _status(name: str) -> int:
    """Bytes from a line of Linux's /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def directions(
    call: Callable[[Tensor], Tensor], inputs: list[Tensor], dout: Tensor, *, backward: bool = True
) -> dict[str, Variant]:
    """The same call forward, backward and both; the backward's graph is built before."""

    def forward(number: int) -> None:
        with torch.no_grad():
            call(inputs[number % len(inputs)])

    if not backward:
        return {"forward": forward}
    graphs = [(call(x), x) for x in inputs]

    def back(number: int) -> None:
        out, x = graphs[number % len(inputs)]
        torch.autograd.grad(out, x, dout, retain_graph=True)

    def both(number: int) -> None:
        x = inputs[number % len(inputs)]
        torch.autograd.grad(call(x), x, dout)

    return {"forward": forward, "backward": back, "both": both}


def of_floor(floor_ms: float, ms: float) -> float | None:
    """The least time on one H200 as a share of a time; None on a CPU."""
    return floor_ms / ms if device().type == "cuda" else None


def bandwidth(moved: float, ms: float) -> dict[str, float | None]:
    """GB/s of bytes that have to be moved, and the share of the time that copying them takes."""
    return {
        "GB/s": moved / ms / 1e6,
        "of_floor": of_floor(1e3 * moved / cases.COPY_BYTES_PER_S, ms),
    }


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:100]


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    rounds = 30 if device().type == "cuda" else 10
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--scale", type=float, help="of the shapes; by default 1 on a GPU")
    parser.add_argument("--json", type=Path, help="also write the rows and the machine here")
    parser.add_argument("--resume", action="store_true", help="keep what the same run left there")
    return parser


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish(
    parts: Mapping[str, Callable[[], Iterable[Row]]],
    title: str,
    options: argparse.Namespace,
    packs: Iterable[cases.Case] = (),
) -> list[Row]:
    """Runs the parts, writes their rows as they come, prints them as a table and returns them.

    An interrupted run keeps its complete parts; with ``--resume`` it resumes after its last
    complete part. ``packs``: the cases, for the record.
    """
    record = machine.record(title=title, rounds=options.rounds, done={}, rows=[])
    if packs:
        record["cases"] = {
            case.name: {"what": case.what, "clips": len(case.lengths), "tokens": sum(case.lengths)}
            for case in packs
        }
    if options.resume:
        record = _earlier(options.json, record)
    rows, done = record["rows"], record["done"]
    for name, run in parts.items():
        if name in done:
            continue
        for row in run():
            rows.append(row)
            _write(options.json, record)
        done[name] = len(rows)
        _write(options.json, record)
    _print(rows, title)
    return rows


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        machine.write(path, record)


def _earlier(path: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """The file's record of the same run, without its incomplete part; else ``record``."""
    if path is None or not path.exists():
        return record
    earlier = json.loads(path.read_text(encoding="utf-8"))
    earlier["rows"] = earlier["rows"][: max(earlier.get("done", {}).values(), default=0)]
    header = {key: value for key, value in record.items() if key not in ("done", "rows")}
    return earlier if header.items() <= earlier.items() else record


def _print(rows: list[dict[str, Any]], title: str) -> None:
    shown = [_with_spread(row) for row in rows]
    columns = list(dict.fromkeys(key for row in shown for key, value in row.items() if value))
    table = Table(title=title, caption="ms: median (10th to 90th percentile)")
    for column in columns:
        is_text = any(isinstance(row.get(column), str) for row in rows)
        table.add_column(column, justify="left" if is_text else "right")
    for row in shown:
        table.add_row(*(row.get(column, "") for column in columns))
    knows_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if knows_width else 160).print(table)


def _with_spread(row: dict[str, Any]) -> dict[str, str]:
    cells = {name: _cell(value) for name, value in row.items()}
    if "ms" in cells and "ms_p10" in cells:
        cells["ms"] += f" ({cells.pop('ms_p10')} to {cells.pop('ms_p90')})"
    return cells


def _cell(value: Any) -> str:
    """A figure to three digits, never in powers of ten."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)
