"""Zero-shot classification of the clips that have a label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from slap_fast.data.source import ClipSource
from slap_fast.evaluation import metrics
from slap_fast.inference.audio_text import AudioTextModel


def zero_shot_figures(
    model: AudioTextModel,
    source: ClipSource,
    vectors: np.ndarray,
    template: str | Sequence[str] | None,
    min_clips: int,
) -> dict[str, Any] | None:
    """Accuracy over the labels of at least ``min_clips`` clips; None for fewer than two labels.

    ``vectors`` [N, E] are those of the clips; ``template`` is :meth:`AudioTextModel.classify`'s.
    """
    counts = Counter(label for i in range(len(source)) if (label := source.label(i)) is not None)
    labels = sorted(label for label, count in counts.items() if count >= min_clips)
    labelled = [i for i in range(len(source)) if source.label(i) in labels]
    if len(labels) < 2:
        return None
    scores = model.similarity(vectors[labelled], model.label_vectors(labels, template))
    targets = np.array([labels.index(source.label(i)) for i in labelled])
    return {**metrics.classification(scores, targets), "labels": labels, "n": len(labelled)}
