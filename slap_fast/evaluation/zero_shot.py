"""Zero-shot classification of the clips that have a label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from slap_fast.data.source import ClipSource
from slap_fast.evaluation import metrics
from slap_fast.inference.slap import Slap


def zero_shot_figures(
    slap: Slap,
    source: ClipSource,
    vectors: np.ndarray,
    template: str | Sequence[str],
    min_clips: int,
) -> dict[str, Any] | None:
    """Accuracy over the labels of at least ``min_clips`` clips; None for fewer than two labels.

    ``vectors`` [N, E] are those of the clips; ``template`` is :meth:`Slap.classify`'s.
    """
    counts = Counter(label for i in range(len(source)) if (label := source.label(i)) is not None)
    labels = sorted(label for label, count in counts.items() if count >= min_clips)
    labelled = [i for i in range(len(source)) if source.label(i) in labels]
    if len(labels) < 2:
        return None
    scores = slap.similarity(vectors[labelled], slap.label_vectors(labels, template))
    targets = np.array([labels.index(source.label(i)) for i in labelled])
    return {**metrics.classification(scores, targets), "labels": labels, "n": len(labelled)}
