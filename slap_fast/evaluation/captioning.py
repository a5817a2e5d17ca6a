"""Generated captions against the clips' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slap_fast.evaluation import metrics
from slap_fast.inference.audio_text import Captioner


def captioning_figures(
    model: Captioner,
    items: Sequence[Any],
    references: Sequence[Sequence[str]],
    num_beams: int,
    progress: bool = False,
) -> dict[str, Any]:
    """CIDEr-D of captions generated for the audio ``items``, against each item's references."""
    generated = model.caption(items, num_beams=num_beams, progress=progress)
    # The references of other clips: what fluent captions score that ignore the audio.
    half = len(references) // 2
    shuffled = [*references[half:], *references[:half]]
    return {
        "CIDEr-D": metrics.cider_d(generated, references)[0],
        "CIDEr-D_shuffled": metrics.cider_d(generated, shuffled)[0],
        "n": len(references),
    }
