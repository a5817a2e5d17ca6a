"""The evaluation card: retrieval both ways, zero-shot labels, captions.

It draws no random numbers, so the same model and clips give the same card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from slap_fast.data.audio.track import AudioError
from slap_fast.data.source import ClipSource
from slap_fast.data.sources.mixture import ChosenClips
from slap_fast.evaluation.captioning import captioning_figures
from slap_fast.evaluation.retrieval import retrieval_figures
from slap_fast.evaluation.zero_shot import zero_shot_figures
from slap_fast.inference.slap import DEFAULT_TEMPLATE, Slap


class _Items(Sequence):
    """Audio items of a source, read one at a time."""

    def __init__(self, source: ClipSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        return self.source.item(self.indices[position])


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
    unreadable, readable = Counter[str](), []
    for i in range(len(source)):
        try:
            source.captions(i)
            readable.append(i)
        except AudioError as error:  # a damaged shard: without captions there is no query
            unreadable[error.code] += 1
    num_expected = len(source)
    source = ChosenClips(source, readable) if unreadable else source
    items = _Items(source, range(len(source)))
    vectors, failures = slap.embed_audio(items, on_error="skip", progress=progress)
    failed = {failure.index for failure in failures}
    good = [i for i in range(len(source)) if i not in failed]
    caption = None
    if captions and good:
        references = [list(source.captions(i)) for i in good]
        caption = captioning_figures(slap, _Items(source, good), references, num_beams)
    return {
        "retrieval": retrieval_figures(slap, source, vectors),
        "zero_shot": zero_shot_figures(slap, source, vectors, template, min_label_clips),
        "caption": caption,
        "n": len(good),
        "n_expected": num_expected,
        "failures": dict(unreadable + Counter(failure.code for failure in failures)),
    }


def score(card: dict[str, Any]) -> float:
    """The mean of R@1, R@5 and R@10 both ways, which picks the best checkpoint."""
    sides = (card["retrieval"]["t2a"], card["retrieval"]["a2t"])
    return float(np.mean([side[f"R@{k}"] for side in sides for k in (1, 5, 10)]))
