"""Retrieval of clips by their captions and of captions by their clips."""

from __future__ import annotations

import math
from collections.abc import Hashable, Set
from typing import Any

import numpy as np

from slap_fast.console import Progress
from slap_fast.data.source import ClipSource
from slap_fast.evaluation import metrics
from slap_fast.inference.audio_text import AudioTextModel


def retrieval_figures(
    model: AudioTextModel, source: ClipSource, vectors: np.ndarray, *, progress: bool = False
) -> dict[str, Any]:
    """Recall and mAP, text to audio (``t2a``) and back (``a2t``), and the recall of chance.

    ``vectors`` [N, E] are those of the clips. Captions of equal key and text are one query with
    several positives.
    """
    keys = [{source.caption_key(i, c) for c in source.captions(i)} for i in range(len(source))]
    queries: dict[tuple[Hashable, str], str] = {}
    for i in range(len(source)):
        for caption in source.captions(i):
            queries.setdefault((source.caption_key(i, caption), caption.casefold()), caption)
    clips_by_key: dict[Hashable, set[int]] = {}
    for i, clip_keys in enumerate(keys):
        for key in clip_keys:
            clips_by_key.setdefault(key, set()).add(i)
    queries_by_key: dict[Hashable, set[int]] = {}
    for j, (key, _) in enumerate(queries):
        queries_by_key.setdefault(key, set()).add(j)
    with Progress(desc=f"embedding {len(queries)} captions", show=progress):
        text_vectors = model.embed_text(list(queries.values()))
    similarity = model.similarity(vectors, text_vectors)
    t2a = [clips_by_key[key] for key, _ in queries]
    a2t = [set().union(*(queries_by_key[key] for key in clip_keys)) for clip_keys in keys]
    return {
        "t2a": metrics.retrieval(similarity.T, t2a),
        "a2t": metrics.retrieval(similarity, a2t),
        "chance": {
            "t2a": {f"R@{k}": _chance(t2a, len(source), k) for k in (1, 5, 10)},
            "a2t": {f"R@{k}": _chance(a2t, len(queries), k) for k in (1, 5, 10)},
        },
        "queries": len(queries),
    }


def _chance(positives: list[Set[int]], size: int, k: int) -> float:
    """Expected recall at k of a random order of ``size`` items."""
    k = min(k, size)
    misses = [math.comb(size - len(p), k) / math.comb(size, k) for p in positives]
    return 1.0 - sum(misses) / len(misses)
