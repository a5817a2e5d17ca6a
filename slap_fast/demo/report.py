"""The demo's report: one HTML file with sounds, spectrograms, figures and curves, readable offline.

Text is escaped, audio and pictures are embedded once for each clip, and nothing is fetched.
"""

from __future__ import annotations

import base64
import io
import math
import wave
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class ReportClip(NamedTuple):
    """A sound, what it is, and what the model makes of it."""

    name: str
    waveform: np.ndarray
    """float32 [num_samples], full scale 1."""
    sample_rate: int
    """Hz."""
    log_mel: np.ndarray
    """float32 [frames, n_mels], any offset and scale; it spans the duration of the waveform."""
    captions: tuple[str, ...]
    """What it is; the first is shown, the others unfold."""
    generated: str
    """The model's caption."""
    labels: list[tuple[str, float]]
    """Zero-shot labels and their probabilities, best first."""
    label: str | None
    """The true one of them; None where no single label is right."""


class ReportQuery(NamedTuple):
    """A sentence and the clips that the model finds for it."""

    text: str
    results: list[tuple[int, float, bool]]
    """(index into the clips, cosine, is it the right one), best first."""


class Check(NamedTuple):
    """A figure and the threshold that it must reach."""

    name: str
    value: float
    threshold: float
    passed: bool
    at_least: bool
    """True: ``value >= threshold`` is wanted. False: ``value < threshold``."""


LOSSES = {
    # key of metrics.jsonl: (title, what it asks of the model)
    "contrastive": ("Contrastive loss", "Which sentence belongs to which sound?"),
    "caption": ("Caption loss", "Which word comes next?"),
    "ssl": ("Self-distillation loss", "What is in the half that was hidden?"),
    "loss": ("Total loss", "The weighted sum that is minimised."),
}
# Nine equally spaced points of the magma colour map (https://bids.github.io/colormap).
_MAGMA = "000004 1c1044 4f127b 812581 b5367a e55064 fb8761 fec287 fcfdbf".split()
MAX_COLUMNS = 640
"""Widest spectrogram, pixels: enough for its place on the page."""


def write_report(
    path: Path,
    *,
    card: dict[str, Any],
    history: list[dict[str, float]],
    checks: list[Check],
    clips: list[ReportClip],
    queries: list[ReportQuery],
    facts: dict[str, str],
) -> None:
    """Writes the page to ``path``.

    Args:
        path: the .html file; its folder exists.
        card: what :func:`slap_fast.evaluation.card.evaluate` returns.
        history: rows of ``metrics.jsonl``; a curve is drawn for each key of LOSSES that occurs.
        checks: figures with their thresholds.
        clips: sounds to listen to; about 43 kB of the file for each second at 16 kHz.
        queries: sentences, whose results are among the clips.
        facts: name and value of whatever else should be known of the run.
    """
    parts = [
        _header(card, checks, facts),
        _figures(card),
        _search(queries, clips),
        _clips(clips),
        _curves(history),
        _checks(checks),
        _facts(facts, card),
        _NEXT,
    ]
    style, script = (
        Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js")
    )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>slap-fast: demo report</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f"{''.join(parts)}</main>\n{_data(clips)}<script>{script}</script>\n</body>\n</html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _section(name: str, title: str, lead: str, body: str) -> str:
    """A titled section; nothing where there is nothing to show."""
    if not body:
        return ""
    head = f'<h2>{title}</h2>\n<p class="lead">{lead}</p>\n'
    return f'<section id="{name}">\n{head}{body}</section>\n'


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _header(card: dict[str, Any], checks: list[Check], facts: dict[str, str]) -> str:
    passed = sum(check.passed for check in checks)
    verdict = "good" if passed == len(checks) else "bad"
    strip = "".join(f"<li>{escape(k)} <b>{escape(v)}</b></li>" for k, v in list(facts.items())[:3])
    return (
        '<header>\n<p class="kicker">slap-fast <span>demo report</span></p>\n'
        "<h1>What a tiny model learned to&nbsp;hear</h1>\n"
        '<p class="intro">It began with random weights and was shown sounds with sentences. Now it '
        "finds a sound for a sentence and a sentence for a sound, names the source and describes "
        f"what it hears. Every figure below comes from {card['n']:,} sounds in combinations that "
        f'it never met in training.</p>\n<ul class="strip">{strip}'
        f'<li><a class="{verdict}" href="#checks">{passed} of {len(checks)} checks passed</a></li>'
        "</ul>\n</header>\n"
    )


def _figures(card: dict[str, Any]) -> str:
    retrieval, tiles = card["retrieval"], []
    sides = (
        ("t2a", "Sentence to sound", "the right sound comes first among", card["n_expected"]),
        ("a2t", "Sound to sentence", "a right sentence comes first among", retrieval["queries"]),
    )
    for side, name, text, size in sides:
        found, chance = retrieval[side], retrieval["chance"][side]
        note = (
            f"in the first ten: {_percent(found['R@10'])}, chance&nbsp;{_percent(chance['R@10'])}"
        )
        beside = f"chance<br>{_percent(chance['R@1'])}"
        tiles.append(_tile(name, found["R@1"], chance["R@1"], beside, f"{text} {size:,}", note))
    if zero_shot := card["zero_shot"]:
        accuracy, chance = zero_shot["accuracy"], zero_shot["chance"]
        text = f"the source is named, out of {len(zero_shot['labels'])}, with no classifier"
        note = f"always the commonest label: {_percent(zero_shot['majority'])}"
        beside = f"chance<br>{_percent(chance)}"
        tiles.append(_tile("Zero-shot label", accuracy, chance, beside, text, note))
    if caption := card["caption"]:
        value, shuffled = caption["CIDEr-D"], caption["CIDEr-D_shuffled"]
        text, beside = "CIDEr-D of the captions it writes", f"mixed up<br>{shuffled:.2f}"
        note = "mixed up: against another sound's captions; 10 is a perfect match"
        tiles.append(
            _tile("Sound to words", value / 10, shuffled / 10, beside, text, note, f"{value:.2f}")
        )
    return f'<section id="figures" class="tiles">\n{"".join(tiles)}</section>\n'


def _tile(
    name: str,
    share: float,
    chance: float,
    beside: str,
    text: str,
    note: str,
    shown: str | None = None,
) -> str:
    shown = shown or f"{100 * share:.1f}<small>%</small>"
    return (
        f'<div class="tile"><h3>{name}</h3><p class="big">{shown}<span>{beside}</span></p>'
        f'<div class="meter"><i style="width:{_percent(share)}"></i>'
        f'<b style="left:{_percent(chance)}"></b></div>'
        f'<p>{text}</p><p class="note">{note}</p></div>\n'
    )


def _player(index: int, clip: ReportClip, aside: str = "") -> str:
    seconds = len(clip.waveform) / clip.sample_rate
    return (
        f'<div class="player" data-clip="{index}"><div class="picture">'
        f'<canvas role="img" aria-label="Spectrogram of sound {index + 1}"></canvas>'
        f'<input type="range" min="0" max="{seconds:.3f}" step="0.01" value="0" '
        f'aria-label="Position in sound {index + 1}, seconds"></div><div class="row">'
        f'<button type="button" aria-pressed="false" aria-label="Play sound {index + 1}"></button>'
        f'<span class="time"><span>0.0</span> / {seconds:.1f} s</span>{aside}</div></div>\n'
    )


def _search(queries: list[ReportQuery], clips: list[ReportClip]) -> str:
    lead = (
        f"A sentence goes in; of the {len(clips)} sounds on this page the three closest come out, "
        "best first. Press play, or click into a picture to listen from there: time runs to the "
        "right, pitch upwards, brighter is louder."
    )
    body = []
    for query in queries:
        results = []
        for rank, (index, cosine, right) in enumerate(query.results[:3], start=1):
            aside = f'<span class="cosine">cosine {cosine:.2f}</span>'
            mark = '<p class="good">&#10003; the one described</p>' if right else ""
            results.append(
                f'<li class="{"right" if right else "other"}">{_player(index, clips[index], aside)}'
                f'<p><span class="rank">{rank}</span> {escape(clips[index].captions[0])}</p>'
                f"{mark}</li>\n"
            )
        missed = not any(right for _, _, right in query.results[:3])
        note = '<p class="note bad">&#10007; the one described is not among them</p>'
        body.append(
            f'<article class="query"><h3>{escape(query.text)}</h3>\n<ol>{"".join(results)}</ol>'
            f"{note if missed else ''}</article>\n"
        )
    return _section("search", "Find a sound by a sentence", lead, "".join(body))


def _clips(clips: list[ReportClip]) -> str:
    lead = (
        "For each sound: what it is, what the model says, and the labels that it finds likeliest. "
        "A word <mark>underlined</mark> is in none of the sound's own captions; that is a mistake "
        "or a synonym."
    )
    return _section("clips", "Sound by sound", lead, "".join(map(_clip, range(len(clips)), clips)))


def _clip(index: int, clip: ReportClip) -> str:
    others = "".join(f"<li>{escape(caption)}</li>" for caption in clip.captions[1:])
    wordings = f"<details><summary>in other words</summary><ul>{others}</ul></details>"
    bars = []
    for label, probability in clip.labels:
        right = label == clip.label
        bars.append(
            f'<li class="{"right" if right else "other"}"><span>{escape(label)}'
            f'{" &#10003;" if right else ""}</span><div class="bar"><i style="width:'
            f'{_percent(probability)}"></i></div><span>{100 * probability:.0f}%</span></li>'
        )
    truth = ""
    if clip.label is None:
        truth = "no single label is right"
    elif clip.label not in dict(clip.labels):
        truth = f"truly {escape(clip.label)}"
    return (
        f'<article class="clip">{_player(index, clip)}<div class="text"><dl>'
        f"<dt>What it is</dt><dd>{escape(clip.captions[0])}{wordings if others else ''}</dd>"
        f"<dt>What the model says</dt><dd>{_marked(clip.generated, clip.captions)}</dd>"
        f'<dt>Zero-shot labels <span class="note">{truth}</span></dt>'
        f'<dd><ul class="bars">{"".join(bars)}</ul></dd></dl></div></article>\n'
    )


def _marked(generated: str, captions: tuple[str, ...]) -> str:
    """The caption with the words marked that no true caption has."""

    def key(word: str) -> str:
        return word.strip(".,;:!?\"'").casefold()

    known = {key(word) for caption in captions for word in caption.split()}
    return " ".join(
        escape(word) if key(word) in known else f"<mark>{escape(word)}</mark>"
        for word in generated.split()
    )


def _curves(history: list[dict[str, float]]) -> str:
    panels = "".join(_curve(history, key, *text) for key, text in LOSSES.items())
    lead = "Each loss over the training steps, as it was logged."
    body = f'<div class="panels">{panels}</div>\n' if panels else ""
    return _section("curves", "How it learned", lead, body)


def _curve(history: list[dict[str, float]], key: str, title: str, question: str) -> str:
    """One loss as inline SVG; a gap where a value is missing or not finite."""
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
    marks += [
        f'<text x="{x(tick):.1f}" y="{height - 26}" text-anchor="middle">{tick:g}</text>'
        for tick in x_ticks
    ]
    middle = x(x_ticks[-1] / 2)
    marks.append(f'<text x="{middle:.1f}" y="{height - 6}" text-anchor="middle">step</text>')
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


def _checks(checks: list[Check]) -> str:
    rows = []
    for check in checks:
        mark = ("good", "&#10003; passed") if check.passed else ("bad", "&#10007; missed")
        wanted = f"{'at least' if check.at_least else 'below'} {check.threshold:.3g}"
        rows.append(
            f"<tr><th>{escape(check.name)}</th><td>{check.value:.3g}</td><td>{wanted}</td>"
            f'<td><span class="{mark[0]}">{mark[1]}</span></td></tr>\n'
        )
    body = (
        '<table>\n<thead><tr><th scope="col">Figure</th><th scope="col">Measured</th>'
        '<th scope="col">Wanted</th><th scope="col">Result</th></tr></thead>\n'
        f"<tbody>\n{''.join(rows)}</tbody>\n</table>\n"
    )
    lead = "What a healthy run reaches. A figure that misses its threshold makes the command fail."
    return _section("checks", "Checks", lead, body)


def _facts(facts: dict[str, str], card: dict[str, Any]) -> str:
    shown = {**facts, "evaluated on": f"{card['n']:,} of {card['n_expected']:,} sounds"}
    items = [f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in shown.items()]
    lead = "Where these figures come from."
    return _section("facts", "This run", lead, f'<dl class="facts">{"".join(items)}</dl>')


def _data(clips: list[ReportClip]) -> str:
    """Audio and pictures as base64 in inert script elements; players refer to them by number."""
    points = [list(bytes.fromhex(colour)) for colour in _MAGMA]
    places, at = np.linspace(0, 1, len(points)), np.linspace(0, 1, 256)
    palette = np.stack([np.interp(at, places, channel) for channel in zip(*points, strict=True)], 1)
    blocks = [_block("palette", np.rint(palette).astype(np.uint8).tobytes())]
    for i, clip in enumerate(clips):
        picture = _picture(clip.log_mel)
        blocks.append(_block(f"wav-{i}", _wav(clip.waveform, clip.sample_rate)))
        size = f' data-height="{picture.shape[0]}" data-width="{picture.shape[1]}"'
        blocks.append(_block(f"mel-{i}", picture.tobytes(), size))
    return "".join(blocks)


def _block(name: str, content: bytes, attributes: str = "") -> str:
    text = base64.b64encode(content).decode("ascii")
    return f'<script type="text/plain" id="{name}"{attributes}>{text}</script>\n'


def _wav(waveform: np.ndarray, sample_rate: int) -> bytes:
    """A mono 16-bit WAV file; what lies beyond full scale is clipped."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(sample_rate)
        out.writeframes(np.rint(np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def _picture(log_mel: np.ndarray) -> np.ndarray:
    """uint8 [n_mels, columns], highest bin first; the quietest tenth of the picture is black.

    A column is the loudest of its frames, which keeps clicks visible in long clips.
    """
    frames = len(log_mel)
    log_mel = np.maximum.reduceat(log_mel, range(0, frames, math.ceil(frames / MAX_COLUMNS)))
    low, high = np.percentile(log_mel, (10, 99.9))
    scaled = np.clip((log_mel - low) / max(high - low, 1e-6), 0, 1)
    return np.ascontiguousarray(np.rint(255 * scaled).astype(np.uint8).T[::-1])


_NEXT = """<section id="next">
<h2>Your own sounds next</h2>
<p class="lead">Write down a file and a sentence per line, then train, evaluate and embed. Clips may
have any length and any common format.</p>
<pre><code><span>my/manifest.csv</span>
path,caption
rain.wav,heavy rain on a tin roof
door.flac,"a door creaks, then slams"</code></pre>
<pre><code><span># train on it</span>
slap-fast train --data my/manifest.csv --out runs/my
<span># retrieval, zero-shot labels and captions, as a table</span>
slap-fast eval --model runs/my/best --data my/manifest.csv
<span># one vector per file, for your own search or classifier</span>
slap-fast embed --model runs/my/best --out vectors my/</code></pre>
</section>
"""
