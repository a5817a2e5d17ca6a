"""The README's pictures, from the recorded runs in benchmarks/results: `make figures`.

Each is written twice into docs/images, for GitHub's light and dark theme, on no background. An SVG
carries the digest of the record and of this file, so that one that is out of date shows without
drawing it again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]


class Theme(NamedTuple):
    """Colours that keep their contrast for the colour-blind too: blue, orange and grey."""

    ink: str
    grid: str
    ours: str
    second: str
    peer: str


THEMES = {
    "light": Theme("#1f2328", "#d8dee4", "#0969da", "#c4580a", "#9aa4ae"),
    "dark": Theme("#e6edf3", "#30363d", "#4c9aff", "#f0883e", "#6e7681"),
}


class Bar(NamedTuple):
    """A horizontal bar; ``value`` None has a note in its place."""

    label: str
    value: float | None
    ours: bool = False
    note: str = ""


def bars(axes: Any, theme: Theme, rows: list[Bar], unit: str) -> None:
    """Bars from the top down, each with its figure at its end."""
    longest = max(row.value or 0 for row in rows)
    for position, row in enumerate(rows):
        colour = theme.ours if row.ours else theme.peer
        weight = "bold" if row.ours else "normal"
        axes.barh(position, row.value or 0, height=0.7, color=colour)
        text = row.note if row.value is None else f"{row.value:,.{0 if longest >= 20 else 2}f}"
        end = (row.value or 0) + 0.015 * longest
        axes.text(end, position, text, va="center", weight=weight, color=theme.ink)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_weight("bold" if row.ours else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * longest)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def mel(record: Record, theme: Theme) -> Any:
    """Log-mel front ends on one thread."""
    rows = [row for row in record["rows"] if row["case"] == "C1" and row.get("threads", 1) == 1]
    best = [row for row in rows if row["variant"] in MEL_OURS]
    peers = [row for row in rows if not row["variant"].startswith("slap-fast")]
    peers.sort(key=lambda row: -row.get("audio_s_per_s", 0))
    drawn = [
        Bar(
            MEL_OURS.get(row["variant"], row["variant"]),
            row.get("audio_s_per_s"),
            row in best,
            "not installed",
        )
        for row in best + peers
    ]
    figure, (axes,) = canvas(theme, 1, 0.6 + 0.3 * len(drawn))
    bars(axes, theme, drawn, "seconds of audio per second, one thread")
    return figure


MEL_OURS = {
    "slap-fast cpp, kaldi, fp32": "slap-fast",
    "slap-fast cpp, kaldi, int16": "slap-fast, int16 in",
    "slap-fast triton, kaldi, fp32": "slap-fast",
    "slap-fast triton, kaldi, int16": "slap-fast, int16 in",
}
"""Which rows stand for slap-fast, and their names in the picture."""


def packing(record: Record, theme: Theme) -> Any:
    """What padding costs, in tokens and in time."""
    rows = [row for row in record["rows"] if row["what"] == "packing"]
    figure, (left, right) = canvas(theme, 2, 0.8 + 0.3 * len(rows))
    ours = [row["variant"] == "packed" for row in rows]
    for axes, key, unit in (
        (left, lambda row: 1 / row["useful"], "tokens computed per token of audio"),
        (right, lambda row: row["times_packed"], "time of one pass, packed = 1"),
    ):
        drawn = [Bar(row["variant"], key(row), mine) for row, mine in zip(rows, ours, strict=True)]
        bars(axes, theme, drawn, unit)
    right.set_yticklabels([])
    return figure


def loading(record: Record, theme: Theme) -> Any:
    """Files through the loader."""
    rows = [row for row in record["rows"] if row["what"] == "loading"]
    figure, (left, right) = canvas(theme, 2, 0.8 + 0.3 * len(rows))
    for axes, key, unit in (
        (left, "files/s", "files per second"),
        (right, "audio s/s", "seconds of audio per second"),
    ):
        bars(axes, theme, [Bar(row["variant"], row[key], True) for row in rows], unit)
    right.set_yticklabels([])
    return figure


def demo(record: Record, theme: Theme) -> Any:
    """How the losses of the demo fell, where that is recorded, and what it finds among unseen
    scenes."""
    curve = record.get("curve")
    figure, axes = canvas(theme, 2 if curve else 1, 2.8)
    if curve:
        colours = (theme.ours, theme.second, theme.peer)
        for (key, name), colour in zip(LOSSES.items(), colours, strict=True):
            steps, values = ([row[of] for row in curve] for of in ("step", key))
            axes[0].plot(steps, values, color=colour, linewidth=2, label=name)
        axes[0].set(xlabel="step", ylabel="loss, nats", ylim=(0, None))
    retrieval = record["card"]["retrieval"]
    ranks = ("R@1", "R@5", "R@10")
    for shift, side, name, colour in (
        (-0.2, "t2a", "text to audio", theme.ours),
        (0.2, "a2t", "audio to text", theme.second),
    ):
        for rank, key in enumerate(ranks):
            x, value = rank + shift, 100 * retrieval[side][key]
            axes[-1].bar(x, value, width=0.36, color=colour, label=name if not rank else "")
            axes[-1].text(x, value + 2, f"{value:.0f}", ha="center", color=theme.ink)
    chance = [100 * retrieval["chance"]["t2a"][key] for key in ranks]
    axes[-1].scatter(range(3), chance, 20, theme.ink, "D", label="chance", zorder=3, clip_on=False)
    axes[-1].set_xticks(range(3), ranks)
    axes[-1].set(ylabel=f"found, % of {retrieval['queries']:,} queries", ylim=(0, 107))
    axes[-1].grid(axis="x", visible=False)
    for part in axes:
        part.legend(
            frameon=False,
            labelcolor=theme.ink,
            loc="lower left",
            bbox_to_anchor=(-0.03, 0.98),
            ncols=3,
            handlelength=1.2,
            columnspacing=1.0,
        )
    return figure


LOSSES = {"contrastive": "contrastive", "ssl": "self-distillation", "caption": "caption"}


def attention(record: Record, theme: Theme) -> Any:
    """One layer of C1 beside the peers, local and global, forward and backward."""
    figure, axes = canvas(theme, 2, 3.2)
    for part, layer in zip(axes, ("local", "global"), strict=True):
        rows = [row for row in record["rows"] if row["case"] == "C1" and row["layer"] == layer]
        both = [row for row in rows if row.get("direction", "both") == "both"]
        both.sort(key=lambda row: (row["variant"] != "slap-fast", row.get("ms", float("inf"))))
        drawn = [
            Bar(row["variant"], row.get("ms"), row["variant"] == "slap-fast", row.get("note", ""))
            for row in both
        ]
        bars(part, theme, drawn, "ms, forward and backward")
        part.set_title(f"{layer} layer", color=theme.ink, fontsize=10)
    return figure


PLOTS: dict[str, Callable[[Record, Theme], Any]] = {
    "demo": demo,
    "mel": mel,
    "packing": packing,
    "loading": loading,
    "mel-gpu": mel,
    "attention-gpu": attention,
}


def canvas(theme: Theme, columns: int, height: float) -> tuple[Any, list[Any]]:
    """A figure of inches 8 x ``height`` in a theme, and its axes from left to right."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": "slap-fast", "font.size": 9.5}
    settings |= {f"{of}.color": theme.ink for of in ("text", "xtick", "ytick")}
    settings |= {"axes.labelcolor": theme.ink, "axes.edgecolor": theme.grid}
    settings |= {"axes.grid": True, "grid.color": theme.grid, "axes.axisbelow": True}
    settings |= {f"axes.spines.{side}": False for side in ("top", "right", "left")}
    pyplot.rcParams.update(settings)
    figure, axes = pyplot.subplots(
        1, columns, figsize=(8, height), layout="constrained", squeeze=False
    )
    return figure, list(axes[0])


def digest(record: Record) -> str:
    """What a picture of the record is made of."""
    text = Path(__file__).read_text(encoding="utf-8") + json.dumps(record)
    return hashlib.sha256(text.encode()).hexdigest()


def draw(name: str, record: Record, images: Path) -> None:
    """Writes a picture in both themes."""
    from matplotlib import pyplot

    images.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Description": f"sha256:{digest(record)}"}
    for theme, colours in THEMES.items():
        figure = PLOTS[name](record, colours)
        figure.savefig(images / f"{name}-{theme}.svg", transparent=True, metadata=metadata)
        pyplot.close(figure)


def is_fresh(name: str, record: Record, images: Path) -> bool:
    """Whether both pictures are of this record."""
    paths = [images / f"{name}-{theme}.svg" for theme in THEMES]
    expected = re.compile(f"sha256:{digest(record)}")
    return all(path.exists() and expected.search(path.read_text("utf-8")) for path in paths)


def markdown(name: str, alternative: str) -> str:
    """The picture as GitHub shows it in the reader's theme."""
    return (
        f'<picture>\n<source media="(prefers-color-scheme: dark)" '
        f'srcset="docs/images/{name}-dark.svg">\n'
        f'<img alt="{alternative}" src="docs/images/{name}-light.svg">\n</picture>'
    )
