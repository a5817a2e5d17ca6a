"""What the demo's report shows: sounds, queries and promises."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class ReportClip(NamedTuple):
    """A sound, what it is, and what the model makes of it."""

    name: str
    waveform: np.ndarray
    """float32 [num_samples], full scale 1."""
    sample_rate: int
    """Hz."""
    log_mel: np.ndarray
    """float32 [frames, n_mels], any offset and scale; it spans the duration of the waveform."""
    captions: tuple[str, ...]
    """What it is; the first is shown, the others unfold."""
    generated: str
    """The model's caption."""
    labels: list[tuple[str, float]]
    """Zero-shot labels and their probabilities, best first."""
    label: str | None
    """The true one of them; None where no single label is right."""


class ReportQuery(NamedTuple):
    """A sentence and the clips that the model finds for it."""

    text: str
    results: list[tuple[int, float, bool]]
    """(index into the clips, cosine, is it the right one), best first."""


class Promise(NamedTuple):
    """A figure and the threshold that it must reach."""

    name: str
    value: float
    threshold: float
    passed: bool
    at_least: bool
    """True: ``value >= threshold`` is wanted. False: ``value < threshold``."""

    @property
    def wanted(self) -> str:
        """The threshold in words."""
        return f"{'at least' if self.at_least else 'below'} {self.threshold:.3g}"
