"""Zero-shot classification of the clips that have a label."""

from __future__ import annotations

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
    labels: Sequence[str],
) -> dict[str, Any] | None:
    """Accuracy of the clips of these labels; None for fewer than two labels.

    ``vectors`` [N, E] are those of the clips; ``template`` is :meth:`AudioTextModel.classify`'s.
    """
    if len(labels) < 2:
        return None
    labelled = [i for i in range(len(source)) if source.label(i) in labels]
    scores = model.similarity(vectors[labelled], model.label_vectors(labels, template))
    targets = np.array([labels.index(source.label(i)) for i in labelled])
    return {**metrics.classification(scores, targets), "labels": labels, "n": len(labelled)}
