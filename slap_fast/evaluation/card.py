"""What a model can do, in figures: retrieval both ways, zero-shot labels, captions. Draws no random
numbers, so the same model and data give the same card."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from slap_fast.data.audio.track import AudioError
from slap_fast.data.source import ClipSource
from slap_fast.data.sources.mixture import ChosenClips
from slap_fast.evaluation import metrics
from slap_fast.inference.slap import DEFAULT_TEMPLATE, Slap


class _Items(Sequence):
    """The source's audio items, read one at a time."""

    def __init__(self, source: ClipSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Any:
        return self.source.item(self.indices[place])


def evaluate(
    slap: Slap,
    source: ClipSource,
    *,
    captions: bool = True,
    num_beams: int = 1,
    template: str | Sequence[str] = DEFAULT_TEMPLATE,
    min_label_clips: int = 3,
    progress: bool = False,
) -> dict[str, Any]:
    """The card of a model on captioned clips.

    Args:
        slap: the model.
        source: the clips; every caption of a clip is a query, captions of equal key and text are
            one query with several positives.
        captions: also generate captions and score them.
        num_beams: of the generation.
        template: of the zero-shot prompts, as in :meth:`Slap.classify`.
        min_label_clips: labels of fewer clips are left out of the zero-shot accuracy.
        progress: show bars.

    Returns:
        JSON values, fractions of 1: ``retrieval`` {t2a, a2t, chance}, ``zero_shot``, ``caption``
        (None where there is nothing to evaluate), ``n`` of ``n_expected`` clips, ``failures`` by
        code.
    """
    lost, kept = Counter[str](), []
    for i in range(len(source)):
        try:
            source.captions(i)
            kept.append(i)
        except AudioError as error:  # in a damaged shard: there is nothing to ask for
            lost[error.code] += 1
    expected = len(source)
    source = ChosenClips(source, kept) if lost else source
    everything = range(len(source))
    vectors, failures = slap.embed_audio(
        _Items(source, everything), on_error="skip", progress=progress
    )
    failed = {failure.index for failure in failures}
    good = [i for i in everything if i not in failed]
    return {
        "retrieval": _retrieval(slap, source, vectors),
        "zero_shot": _zero_shot(slap, source, vectors, template, min_label_clips),
        "caption": _captions(slap, source, good, num_beams) if captions and good else None,
        "n": len(good),
        "n_expected": expected,
        "failures": dict(lost + Counter(failure.code for failure in failures)),
    }


def _retrieval(slap: Slap, source: ClipSource, vectors: np.ndarray) -> dict[str, Any]:
    keys = [{source.caption_key(i, c) for c in source.captions(i)} for i in range(len(source))]
    queries: dict[tuple[Hashable, str], str] = {}
    for i in range(len(source)):
        for caption in source.captions(i):
            queries.setdefault((source.caption_key(i, caption), caption.casefold()), caption)
    clips_of: dict[Hashable, set[int]] = {}
    for i, own in enumerate(keys):
        for key in own:
            clips_of.setdefault(key, set()).add(i)
    texts_of: dict[Hashable, set[int]] = {}
    for j, (key, _) in enumerate(queries):
        texts_of.setdefault(key, set()).add(j)
    similarity = slap.similarity(vectors, slap.embed_text(list(queries.values())))
    t2a = [clips_of[key] for key, _ in queries]
    a2t = [set().union(*(texts_of[key] for key in own)) for own in keys]
    return {
        "t2a": metrics.retrieval(similarity.T, t2a),
        "a2t": metrics.retrieval(similarity, a2t),
        "chance": {
            "t2a": {f"R@{k}": _chance(t2a, len(source), k) for k in (1, 5, 10)},
            "a2t": {f"R@{k}": _chance(a2t, len(queries), k) for k in (1, 5, 10)},
        },
        "queries": len(queries),
    }


def _chance(positives: list[set[int]], size: int, k: int) -> float:
    """Expected recall of a random order: one minus the chance that no positive is in the first
    k."""
    k = min(k, size)
    miss = [math.comb(size - len(p), k) / math.comb(size, k) for p in positives]
    return 1.0 - sum(miss) / len(miss)


def _zero_shot(
    slap: Slap,
    source: ClipSource,
    vectors: np.ndarray,
    template: str | Sequence[str],
    min_clips: int,
) -> dict[str, Any] | None:
    counts = Counter(label for i in range(len(source)) if (label := source.label(i)) is not None)
    labels = sorted(label for label, count in counts.items() if count >= min_clips)
    chosen = [i for i in range(len(source)) if source.label(i) in labels]
    if len(labels) < 2:
        return None
    scores = slap.similarity(vectors[chosen], slap.label_vectors(labels, template))
    targets = np.array([labels.index(source.label(i)) for i in chosen])
    return {**metrics.classification(scores, targets), "labels": labels, "n": len(chosen)}


def _captions(slap: Slap, source: ClipSource, indices: list[int], num_beams: int) -> dict[str, Any]:
    generated = slap.caption(_Items(source, indices), num_beams=num_beams)
    references = [list(source.captions(i)) for i in indices]
    # Against the references of the clip half the set away: what fluent but deaf captions get.
    half = len(indices) // 2
    shifted = references[half:] + references[:half]
    return {
        "CIDEr-D": metrics.cider_d(generated, references)[0],
        "CIDEr-D_shuffled": metrics.cider_d(generated, shifted)[0],
        "n": len(indices),
    }


def score(card: dict[str, Any]) -> float:
    """The mean of R@1, R@5 and R@10 both ways: what picks the best checkpoint."""
    sides = (card["retrieval"]["t2a"], card["retrieval"]["a2t"])
    return float(np.mean([side[f"R@{k}"] for side in sides for k in (1, 5, 10)]))


def render(card: dict[str, Any], console: Console) -> None:
    """The card as a table, chance levels beside the figures."""
    table = Table(title=f"{card['n']} of {card['n_expected']} clips evaluated")
    for column, justify in (
        ("task", "left"),
        ("figure", "left"),
        ("", "right"),
        ("chance", "right"),
    ):
        table.add_column(column, justify=justify)
    names = {"t2a": "text to audio", "a2t": "audio to text"}
    for side, name in names.items():
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
