"""``slap-fast demo``."""

from __future__ import annotations

from pathlib import Path

from slap_fast.config.bounds import CountOrZero


def demo(out: Path = Path("runs/demo"), workers: CountOrZero = 2, json: bool = False) -> int:
    """Train a tiny model on the built-in sounds, evaluate it on unseen ones, write a report.

    Example: slap-fast demo

    Args:
        out: Folder for the run and its report.html.
        workers: Processes that make the sounds.
        json: Print the evaluation card as JSON on stdout.
    """
    from slap_fast.demo.run import run

    return run(out, workers=workers, json=json)
