"""An evaluation card as a table on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Column, Table


def render(card: dict[str, Any], console: Console) -> None:
    """Prints the card of :func:`slap_fast.evaluation.card.evaluate`, chance beside the figures."""
    numbers = (Column(name, justify="right") for name in ("", "chance"))
    title = f"{card['n']} of {card['n_expected']} clips evaluated"
    table = Table("task", "figure", *numbers, title=title)
    for side, name in (("t2a", "text to audio"), ("a2t", "audio to text")):
        for key, value in card["retrieval"][side].items():
            chance = card["retrieval"]["chance"][side].get(key)
            table.add_row(name, key, f"{value:.1%}", "" if chance is None else f"{chance:.1%}")
    if zero_shot := card["zero_shot"]:
        name = f"zero-shot, {len(zero_shot['labels'])} labels"
        majority = f"{zero_shot['majority']:.1%} (majority)"
        table.add_row(name, "accuracy", f"{zero_shot['accuracy']:.1%}", majority)
        chance = f"{zero_shot['chance']:.1%}"
        table.add_row(name, "balanced accuracy", f"{zero_shot['balanced_accuracy']:.1%}", chance)
    if caption := card["caption"]:
        shuffled = f"{caption['CIDEr-D_shuffled']:.3f} (shuffled)"
        table.add_row("captions", "CIDEr-D", f"{caption['CIDEr-D']:.3f}", shuffled)
    console.print(table)
    for code, count in card["failures"].items():
        console.print(f"{count} clips left out: {code}")
