"""``slap-fast demo``: the main job on the built-in sounds, from random weights to answers.

Trains ``slap_tiny`` for a fixed number of steps from a fixed seed, evaluates it on scenes whose
attribute combinations were never trained on, and says whether the figures are what they should be.
"""

from __future__ import annotations

import json as json_module
import math
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slap_fast.atomic_files import only_writer, write_json
from slap_fast.config import TrainConfig, override, slap_tiny
from slap_fast.console import emit, make_console, show_progress
from slap_fast.data.builtin.scenes import LABELS
from slap_fast.data.open import open_source
from slap_fast.data.patches import clip_patches
from slap_fast.data.sources.builtin import BuiltinClips
from slap_fast.demo.content import Promise, ReportClip, ReportQuery
from slap_fast.demo.report import write_report
from slap_fast.evaluation.card import evaluate
from slap_fast.evaluation.table import render
from slap_fast.inference.slap import Slap
from slap_fast.training.loop import train
from slap_fast.training.state import begin, describe

EXAMPLES = 12
TEMPLATES = ("{}", "the sound of {}", "a recording of {}", "{} can be heard")
"""Zero-shot prompts, averaged."""


def run(out: Path, *, workers: int, json: bool) -> int:
    """Trains, evaluates, prints and writes ``out``; 1 when a figure misses its threshold."""
    with only_writer(out, replaced=True):
        return _run(out, workers, json)


def _run(out: Path, workers: int, json: bool) -> int:
    console = make_console(json)
    if out.exists():
        if not (out / "run.json").exists() and any(out.iterdir()):
            expected = "expected a new folder or an old demo"
            raise ValueError(f"--out: {out} holds other files, {expected}")
        with only_writer(out):
            pass  # no training run is writing there
        shutil.rmtree(out)
    # A few epochs of clean, generated scenes leave nothing for SpecAugment to prevent.
    config = override(slap_tiny(), {"data.time_masks": 0, "data.freq_masks": 0})
    rate = config.model.mel.sample_rate
    source = open_source("builtin", "train", fallback="train", sample_rate=rate)
    state, tokenizer = begin(config, None, None, torch.device("cpu"))
    console.print(describe(state, source))
    started = time.perf_counter()
    if not train(state, source, tokenizer, out, workers=workers, progress=show_progress(json)):
        return 130
    seconds = time.perf_counter() - started

    slap = Slap(state.model, tokenizer)
    test = open_source("builtin", "test", fallback="test", sample_rate=rate)
    console.print(f"trained in {seconds:.0f} s; evaluating on {len(test)} unseen scenes")
    card = evaluate(slap, test, template=TEMPLATES, progress=show_progress(json))
    render(card, console)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json_module.loads(line) for line in lines]
    promises = _promises(config, card, history)
    facts = {
        "trained for": f"{seconds:.0f} s, {config.steps} steps",
        "device": f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "parameters": f"{sum(p.numel() for p in state.model.parameters()) / 1e6:.1f} M",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    card = {**card, "checks": [promise._asdict() for promise in promises], "facts": facts}
    slap.card = card
    slap.save_pretrained(out / "model")
    write_json(out / "card.json", card)
    clips, queries = _examples(slap, test)
    write_report(
        out / "report.html",
        card=card,
        history=history,
        promises=promises,
        clips=clips,
        queries=queries,
        facts=facts,
    )
    _render_examples(clips, queries, console)
    _render_promises(promises, console)
    console.print(f"report: {out / 'report.html'}\nmodel:  {out / 'model'}")
    emit(card, json)
    return 0 if all(promise.passed for promise in promises) else 1


def _promises(
    config: TrainConfig, card: dict[str, Any], history: list[dict[str, float]]
) -> list[Promise]:
    """What a healthy run reaches; the project's promises for this command."""
    first, last = history[0], history[-1]
    t2a, caption = card["retrieval"]["t2a"], card["caption"]

    over_shuffled = caption["CIDEr-D"] / max(caption["CIDEr-D_shuffled"], 1e-9)
    uniform = math.log(config.model.ssl.prototypes)
    at_least = (
        ("text-to-audio R@1", t2a["R@1"], 0.40),
        ("text-to-audio R@10", t2a["R@10"], 0.90),
        ("zero-shot accuracy", card["zero_shot"]["accuracy"], 0.90),
        ("CIDEr-D over that of shuffled captions", over_shuffled, 2.0),
    )
    below = (
        ("contrastive loss, last over first", last["contrastive"] / first["contrastive"], 1.0),
        ("caption loss, last over first", last["caption"] / first["caption"], 1.0),
        ("self-supervised loss, against ln(prototypes)", last["ssl"], uniform),
        ("collapse alarms", sum(row.get("collapsed", 0) for row in history), 1.0),
    )
    promises = [Promise(*figure, figure[1] >= figure[2], True) for figure in at_least]
    return promises + [Promise(*figure, figure[1] < figure[2], False) for figure in below]


def _examples(slap: Slap, source: BuiltinClips) -> tuple[list[ReportClip], list[ReportQuery]]:
    """A few clips with what the model says of them, and the clips it finds for their captions."""
    indices = range(0, len(source), max(1, len(source) // EXAMPLES))[:EXAMPLES]
    items = [source.item(i) for i in indices]
    vectors = slap.embed_audio(items)
    captions = slap.caption(items, num_beams=3)
    labels = slap.classify(items, LABELS, TEMPLATES)
    mel = slap.model.config.mel
    clips = []
    for i, caption, row in zip(indices, captions, labels, strict=True):
        waveform = source.audio(i).waveform
        columns = clip_patches(waveform, mel).patches.unflatten(0, (-1, mel.patches_per_column))
        log_mel = columns.unflatten(2, (mel.patch_time, mel.patch_freq)).transpose(1, 2).flatten(2)
        clips.append(
            ReportClip(
                name=source.name(i),
                waveform=waveform,
                sample_rate=mel.sample_rate,
                log_mel=log_mel.flatten(0, 1)[: mel.num_frames(len(waveform))].numpy(),
                captions=source.captions(i),
                generated=caption,
                labels=list(row.items())[:4],
                label=source.label(i),
            )
        )
    texts = [clip.captions[-1] for clip in clips[:4]]
    similarity = slap.similarity(vectors, slap.embed_text(texts))
    queries = []
    for j, (text, cosines) in enumerate(zip(texts, similarity.T, strict=True)):
        best = (-cosines).argsort()[:3].tolist()
        queries.append(ReportQuery(text, [(i, float(cosines[i]), i == j) for i in best]))
    return clips, queries


def _render_examples(clips: list[ReportClip], queries: list[ReportQuery], console: Console) -> None:
    columns = ("what it is", "what the model says", "zero-shot label")
    table = Table(*columns, title="unseen scenes", show_lines=True)
    for clip in clips[:5]:
        label, probability = clip.labels[0]
        table.add_row(clip.captions[0], clip.generated, f"{label} {probability:.0%}")
    console.print(table)
    title = "search: the best of the example clips for a caption"
    table = Table("query", "found", "cosine", title=title, show_lines=True)
    for query in queries:
        index, cosine, hit = query.results[0]
        mark = "" if hit else " (wrong)"
        table.add_row(query.text, clips[index].captions[0] + mark, f"{cosine:.2f}")
    console.print(table)


def _render_promises(promises: list[Promise], console: Console) -> None:
    table = Table("check", "value", "wanted", "")
    for promise in promises:
        mark = Text("ok", "green") if promise.passed else Text("missed", "red")
        table.add_row(promise.name, f"{promise.value:.3g}", promise.wanted, mark)
    console.print(table)
