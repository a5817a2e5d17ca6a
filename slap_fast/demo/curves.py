"""Loss curves of the demo's report, as inline SVG."""

from __future__ import annotations

import math

LOSSES = {
    # key of metrics.jsonl: (title, what it asks of the model)
    "contrastive": ("Contrastive loss", "Which sentence belongs to which sound?"),
    "caption": ("Caption loss", "Which word comes next?"),
    "ssl": ("Self-distillation loss", "What is in the half that was hidden?"),
    "loss": ("Total loss", "The weighted sum that is minimised."),
}


def curve(history: list[dict[str, float]], key: str, title: str, question: str) -> str:
    """One loss as inline SVG, with a gap where a value is missing or not finite."""
    rows = [(row["step"], row.get(key, math.nan)) for row in history]
    finite = [(step, value) for step, value in rows if math.isfinite(value)]
    if not finite:
        return ""
    width, height, left, right, top, bottom = 440, 236, 44, 14, 12, 44
    x_ticks = _ticks(0, max(step for step, _ in finite))
    y_ticks = _ticks(*(extreme(value for _, value in finite) for extreme in (min, max)))

    def x(step: float) -> float:
        return left + (width - left - right) * step / x_ticks[-1]

    def y(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return height - bottom - (height - top - bottom) * share

    marks = [
        f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in y_ticks
    ]
    labels = [(x(tick), height - 26, f"{tick:g}") for tick in x_ticks]
    for place, y_text, text in [*labels, (x(x_ticks[-1] / 2), height - 6, "step")]:
        marks.append(f'<text x="{place:.1f}" y="{y_text}" text-anchor="middle">{text}</text>')
    line, pen = "", "M"
    for step, value in rows:
        if math.isfinite(value):
            line += f"{pen}{x(step):.1f} {y(value):.1f}"
        pen = "L" if math.isfinite(value) else "M"
    first, last = finite[0], finite[-1]
    return (
        f"<figure><figcaption><h3>{title}</h3>"
        f"<span>{first[1]:.2f} &rarr; <b>{last[1]:.2f}</b></span>"
        f'<p class="note">{question}</p></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title} over steps, from '
        f'{first[1]:.2f} to {last[1]:.2f}">{"".join(marks)}<path d="{line}"/>'
        f'<circle cx="{x(last[0]):.1f}" cy="{y(last[1]):.1f}" r="4"/></svg></figure>\n'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers that enclose low .. high."""
    span = (high - low) or 1.0
    power = 10 ** math.floor(math.log10(span / 3))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= 4.5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]
