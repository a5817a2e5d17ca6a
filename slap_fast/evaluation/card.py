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
from slap_fast.inference.audio_text import AudioTextModel, Captioner


class _Items(Sequence):
    """Audio items of a source, read one at a time."""

    def __init__(self, source: ClipSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        return self.source.item(self.indices[position])


def evaluate(
    model: AudioTextModel,
    source: ClipSource,
    *,
    captions: bool = True,
    num_beams: int = 1,
    template: str | Sequence[str] | None = None,
    min_label_clips: int = 3,
    progress: bool = False,
) -> dict[str, Any]:
    """The card of a model on captioned clips.

    Args:
        model: ours, or another that :func:`slap_fast.load` gives.
        source: the clips; every caption of a clip is a query, captions of equal key and text are
            one query with several positives.
        captions: also generate captions and score them, of a model that can.
        num_beams: of the generation.
        template: of the zero-shot prompts, as in :meth:`AudioTextModel.classify`.
        min_label_clips: labels of fewer good clips are left out of the zero-shot accuracy.
        progress: show bars.

    Returns:
        JSON values, fractions of 1: ``retrieval`` {t2a, a2t, chance}, ``zero_shot``, ``caption``
        (None where there is nothing to evaluate), ``labels_left_out`` {label: clips} of too few
        clips, ``n`` of ``n_expected`` clips, ``seconds_heard`` of them, ``failures`` by code. Clips
        that failed, their captions and their labels count nowhere else.
    """
    unreadable, readable = Counter[str](), []
    for i in range(len(source)):
        try:
            source.captions(i)
            readable.append(i)
        except AudioError as error:  # a damaged shard: without captions there is no query
            unreadable[error.code] += 1
    vectors, failures, seconds = model.embed_files(_Items(source, readable), progress=progress)
    failed = {failure.index for failure in failures}
    good = [position for position in range(len(readable)) if position not in failed]
    clips = ChosenClips(source, [readable[position] for position in good])
    vectors = vectors[good]
    counts = Counter(label for i in range(len(clips)) if (label := clips.label(i)) is not None)
    labels = sorted(label for label, count in counts.items() if count >= min_label_clips)
    card = {
        "retrieval": None,
        "zero_shot": None,
        "caption": None,
        "labels_left_out": {name: n for name, n in sorted(counts.items()) if name not in labels},
        "n": len(good),
        "n_expected": len(source),
        "seconds_heard": round(float(seconds.sum()), 3),
        "failures": dict(unreadable + Counter(failure.code for failure in failures)),
    }
    if good:
        captioned = [i for i in range(len(clips)) if clips.captions(i)]  # others have a label alone
        pairs = ChosenClips(clips, captioned)
        if captioned:
            card["retrieval"] = retrieval_figures(
                model, pairs, vectors[captioned], progress=progress
            )
        card["zero_shot"] = zero_shot_figures(model, clips, vectors, template, labels)
        if captions and captioned and isinstance(model, Captioner):
            references = [list(pairs.captions(i)) for i in range(len(pairs))]
            items = _Items(pairs, range(len(pairs)))
            card["caption"] = captioning_figures(model, items, references, num_beams, progress)
    return card


def score(card: dict[str, Any]) -> float:
    """The mean of R@1, R@5 and R@10 both ways, which picks the best checkpoint.

    Raises ValueError where no clip could be evaluated, or none has a caption.
    """
    if card["retrieval"] is None:
        what = "with a caption" if card["n"] else "that can be read"
        raise ValueError(
            f"evaluation: found 0 of {card['n_expected']} clips {what}, expected one: "
            f"{card['failures']}"
        )
    sides = (card["retrieval"]["t2a"], card["retrieval"]["a2t"])
    return float(np.mean([side[f"R@{k}"] for side in sides for k in (1, 5, 10)]))
