"""Retrieval of clips by their captions and of captions by their clips."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import numpy as np

from slap_fast.data.source import ClipSource
from slap_fast.evaluation import metrics
from slap_fast.inference.slap import Slap


def retrieval_figures(slap: Slap, source: ClipSource, vectors: np.ndarray) -> dict[str, Any]:
    """Recall and mAP, text to audio (``t2a``) and back (``a2t``), and the recall of chance.

    ``vectors`` [N, E] are those of the clips. Captions of equal key and text are one query with
    several positives.
    """
    queries: dict[tuple[Hashable, str], str] = {}
    clips_by_key = defaultdict[Hashable, set[int]](set)
    for i in range(len(source)):
        for caption in source.captions(i):
            key = source.caption_key(i, caption)
            clips_by_key[key].add(i)
            queries.setdefault((key, caption.casefold()), caption)
    similarity = slap.similarity(vectors, slap.embed_text(list(queries.values())))
    t2a = [clips_by_key[key] for key, _ in queries]
    a2t: list[set[int]] = [set() for _ in range(len(source))]
    for query, clips in enumerate(t2a):
        for clip in clips:
            a2t[clip].add(query)
    return {
        "t2a": metrics.retrieval(similarity.T, t2a),
        "a2t": metrics.retrieval(similarity, a2t),
        "chance": {"t2a": _chance(t2a, len(source)), "a2t": _chance(a2t, len(queries))},
        "queries": len(queries),
    }


def _chance(positives: list[set[int]], size: int) -> dict[str, float]:
    """Expected recalls of a random order of ``size`` items."""
    recalls = {}
    for k in (1, 5, 10):
        drawn = min(k, size)
        misses = [math.comb(size - len(p), drawn) / math.comb(size, drawn) for p in positives]
        recalls[f"R@{k}"] = 1.0 - sum(misses) / len(misses)
    return recalls
