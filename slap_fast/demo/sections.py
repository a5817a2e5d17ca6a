"""The sections of the demo's report, as HTML; all text is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from slap_fast.demo.content import Promise, ReportClip, ReportQuery
from slap_fast.demo.curves import LOSSES, curve


def _section(name: str, title: str, lead: str, body: str) -> str:
    """A titled section; nothing where there is nothing to show."""
    if not body:
        return ""
    head = f'<h2>{title}</h2>\n<p class="lead">{lead}</p>\n'
    return f'<section id="{name}">\n{head}{body}</section>\n'


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def header(card: dict[str, Any], promises: list[Promise], facts: dict[str, str]) -> str:
    """The title, the first facts and how many promises were kept."""
    passed = sum(promise.passed for promise in promises)
    verdict = "good" if passed == len(promises) else "bad"
    strip = "".join(f"<li>{escape(k)} <b>{escape(v)}</b></li>" for k, v in list(facts.items())[:3])
    return (
        '<header>\n<p class="kicker">slap-fast <span>demo report</span></p>\n'
        "<h1>What a tiny model learned to&nbsp;hear</h1>\n"
        '<p class="intro">It began with random weights and was shown sounds with sentences. Now it '
        "finds a sound for a sentence and a sentence for a sound, names the source and describes "
        f"what it hears. Every figure below comes from {card['n']:,} sounds in combinations that "
        f'it never met in training.</p>\n<ul class="strip">{strip}'
        f'<li><a class="{verdict}" href="#checks">{passed} of {len(promises)} checks passed</a>'
        "</li></ul>\n</header>\n"
    )


def figures(card: dict[str, Any]) -> str:
    """Tiles of the main figures beside their chance levels."""
    retrieval, tiles = card["retrieval"], []
    sides = (
        ("t2a", "Sentence to sound", "the right sound comes first among", card["n_expected"]),
        ("a2t", "Sound to sentence", "a right sentence comes first among", retrieval["queries"]),
    )
    for side, name, text, size in sides:
        recall, chance = retrieval[side], retrieval["chance"][side]
        first_ten, by_chance = _percent(recall["R@10"]), _percent(chance["R@10"])
        note = f"in the first ten: {first_ten}, chance&nbsp;{by_chance}"
        beside = f"chance<br>{_percent(chance['R@1'])}"
        tiles.append(_tile(name, recall["R@1"], chance["R@1"], beside, f"{text} {size:,}", note))
    if zero_shot := card["zero_shot"]:
        accuracy, chance = zero_shot["accuracy"], zero_shot["chance"]
        text = f"the source is named, out of {len(zero_shot['labels'])}, with no classifier"
        note = f"always the commonest label: {_percent(zero_shot['majority'])}"
        beside = f"chance<br>{_percent(chance)}"
        tiles.append(_tile("Zero-shot label", accuracy, chance, beside, text, note))
    if caption := card["caption"]:
        value, shuffled = caption["CIDEr-D"], caption["CIDEr-D_shuffled"]
        name, shown = "Sound to words", f"{value:.2f}"
        text, beside = "CIDEr-D of the captions it writes", f"mixed up<br>{shuffled:.2f}"
        note = "mixed up: against another sound's captions; 10 is a perfect match"
        tiles.append(_tile(name, value / 10, shuffled / 10, beside, text, note, shown))
    return f'<section id="figures" class="tiles">\n{"".join(tiles)}</section>\n'


def _tile(
    name: str, share: float, chance: float, beside: str, text: str, note: str, shown: str = ""
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


def search(queries: list[ReportQuery], clips: list[ReportClip]) -> str:
    """Each query with its three best sounds."""
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
        note = '<p class="note bad">&#10007; the one described is not among them</p>'
        note = "" if any(right for _, _, right in query.results[:3]) else note
        items = f"<ol>{''.join(results)}</ol>{note}"
        body.append(f'<article class="query"><h3>{escape(query.text)}</h3>\n{items}</article>\n')
    return _section("search", "Find a sound by a sentence", lead, "".join(body))


def clips_one_by_one(clips: list[ReportClip]) -> str:
    """Each sound with its captions, the model's caption and its labels."""
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
    truth = "no single label is right" if clip.label is None else f"truly {escape(clip.label)}"
    truth = "" if clip.label in dict(clip.labels) else truth
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

    true_words = {key(word) for caption in captions for word in caption.split()}
    return " ".join(
        escape(word) if key(word) in true_words else f"<mark>{escape(word)}</mark>"
        for word in generated.split()
    )


def curves(history: list[dict[str, float]]) -> str:
    """Each loss over the steps."""
    panels = "".join(curve(history, key, *text) for key, text in LOSSES.items())
    lead = "Each loss over the training steps, as it was logged."
    body = f'<div class="panels">{panels}</div>\n' if panels else ""
    return _section("curves", "How it learned", lead, body)


def thresholds(promises: list[Promise]) -> str:
    """A table of the promises."""
    rows = []
    for promise in promises:
        mark = ("good", "&#10003; passed") if promise.passed else ("bad", "&#10007; missed")
        rows.append(
            f"<tr><th>{escape(promise.name)}</th><td>{promise.value:.3g}</td>"
            f'<td>{promise.wanted}</td><td><span class="{mark[0]}">{mark[1]}</span></td></tr>\n'
        )
    body = (
        '<table>\n<thead><tr><th scope="col">Figure</th><th scope="col">Measured</th>'
        '<th scope="col">Wanted</th><th scope="col">Result</th></tr></thead>\n'
        f"<tbody>\n{''.join(rows)}</tbody>\n</table>\n"
    )
    lead = "What a healthy run reaches. A figure that misses its threshold makes the command fail."
    return _section("checks", "Checks", lead, body)


def facts(facts: dict[str, str], card: dict[str, Any]) -> str:
    """What else is known of the run."""
    shown = {**facts, "evaluated on": f"{card['n']:,} of {card['n_expected']:,} sounds"}
    items = [f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in shown.items()]
    lead = "Where these figures come from."
    return _section("facts", "This run", lead, f'<dl class="facts">{"".join(items)}</dl>')


NEXT = """<section id="next">
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
