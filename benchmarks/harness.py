"""Timing that can be trusted: checked first, variants in turn, medians with their spread.

Every variant takes the number of the round, to pick its inputs by: they are rotated, so that a GPU
does not find the last round's in its cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import machine
import torch
from rich.console import Console
from rich.table import Table

Variant = Callable[[int], Any]


class NotInstalled(Exception):
    """A peer that does not load here, or does not run on this device; its text says why."""


def seconds(
    variants: Mapping[str, Variant], device: torch.device, *, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each of ``rounds`` calls of each variant, in turn, after three that do not
    count."""
    clock = _cuda_seconds if device.type == "cuda" else _host_seconds
    for _ in range(3):
        for variant in variants.values():
            variant(0)
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, variant in variants.items():
            taken[name].append(clock(variant, number))
    return taken


def _host_seconds(variant: Variant, number: int) -> float:
    started = time.perf_counter()
    variant(number)
    return time.perf_counter() - started


def _cuda_seconds(variant: Variant, number: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    variant(number)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def summary(taken: list[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile, in milliseconds."""
    tenths = statistics.quantiles(taken, n=10) if len(taken) > 1 else taken * 9
    return {
        "ms": 1e3 * statistics.median(taken),
        "ms_p10": 1e3 * tenths[0],
        "ms_p90": 1e3 * tenths[-1],
    }


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--scale", type=float, help="of the shapes; by default 1 on a GPU")
    parser.add_argument("--json", type=Path, help="also write the rows and the machine here")
    return parser


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish(rows: list[dict[str, Any]], title: str, path: Path | None) -> None:
    """Prints the rows as a table and writes them beside what they ran on."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title)
    for column in columns:
        words = any(isinstance(row.get(column), str) for row in rows)
        table.add_column(column, justify="left" if words else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console(width=160).print(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"title": title, "machine": machine.facts(), "rows": rows}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)
