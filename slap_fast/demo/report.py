"""The demo's report: one HTML file with sounds, spectrograms, figures and curves, readable offline.

Text is escaped, audio and pictures are embedded once for each clip, and nothing is fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slap_fast.demo import sections
from slap_fast.demo.content import Promise, ReportClip, ReportQuery
from slap_fast.demo.media import embedded_clips


def write_report(
    path: Path,
    *,
    card: dict[str, Any],
    history: list[dict[str, float]],
    promises: list[Promise],
    clips: list[ReportClip],
    queries: list[ReportQuery],
    facts: dict[str, str],
) -> None:
    """Writes the page to ``path``.

    Args:
        path: the .html file; its folder exists.
        card: what :func:`slap_fast.evaluation.card.evaluate` returns.
        history: lines of ``metrics.jsonl``; each key of ``curves.LOSSES`` in them gets a curve.
        promises: figures with their thresholds.
        clips: sounds to listen to; about 43 kB of the file for each second at 16 kHz.
        queries: sentences, whose results are among the clips.
        facts: name and value of whatever else should be known of the run.
    """
    parts = [
        sections.header(card, promises, facts),
        sections.figures(card),
        sections.search(queries, clips),
        sections.clips_one_by_one(clips),
        sections.curves(history),
        sections.thresholds(promises),
        sections.facts(facts, card),
        sections.NEXT,
    ]
    assets = (Path(__file__).with_name(name) for name in ("report.css", "report.js"))
    style, script = (asset.read_text(encoding="utf-8") for asset in assets)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>slap-fast: demo report</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f"{''.join(parts)}</main>\n{embedded_clips(clips)}<script>{script}</script>\n</body>\n</html>\n"
    )
    path.write_text(page, encoding="utf-8")
