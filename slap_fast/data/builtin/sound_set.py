"""The built-in sound set: captioned scenes, made from (split, seed, index) alone.

Captions name what can be heard; exact pitch, timbre, rate, onset and gain are free. Durations are
log-uniform.
"""

from __future__ import annotations

import math
import random
from typing import Literal

import numpy as np

from slap_fast.data.builtin.scenes import Scene, draw_scene, near_misses, needed_seconds
from slap_fast.data.builtin.synthesis import SAMPLE_RATE, hiss, render_event, rumble
from slap_fast.data.builtin.wording import caption, source_caption

DISTINCT_SCENES = 500
"""Number of scenes at the start of validation and of test that differ pairwise."""
FULL_WORDINGS = 3
"""Captions of a scene that describe all of it; further ones name its single source alone."""


class SoundSet:
    """Captioned scenes of one split; every method is a pure function of (split, seed, index).

    Args:
        split: which combinations of attributes the scenes may hold.
        size: number of scenes. Scene i does not depend on it.
        seed: another seed, other scenes; the splits stay disjoint across seeds.
        min_seconds, max_seconds: range of the log-uniform duration, seconds; min_seconds >= 1.

    Raises ValueError for an unknown split, a negative size or seed, or an impossible range.
    """

    def __init__(
        self,
        split: Literal["train", "validation", "test"],
        size: int,
        seed: int = 0,
        min_seconds: float = 1.0,
        max_seconds: float = 30.0,
    ):
        splits = ("train", "validation", "test")
        if split not in splits:
            raise ValueError(f"split: found {split!r}, expected one of {splits}")
        if size < 0 or seed < 0:
            raise ValueError(f"size, seed: found {(size, seed)!r}, expected numbers >= 0")
        if not 1 <= min_seconds <= max_seconds:
            problem = f"min_seconds, max_seconds: found {(min_seconds, max_seconds)!r}"
            raise ValueError(f"{problem}, expected 1 <= min_seconds <= max_seconds")
        self.split, self.size, self.seed = split, size, seed
        self.min_seconds, self.max_seconds = min_seconds, max_seconds
        self._distinct: list[Scene] = []

    def __len__(self) -> int:
        return self.size

    def _rng(self, index: int, purpose: str) -> random.Random:
        if not 0 <= index < self.size:
            raise IndexError(f"index: found {index}, expected 0 .. {self.size - 1}")
        return random.Random(f"{self.split} {self.seed} {index} {purpose}")

    def _num_samples(self, index: int) -> int:
        shortest, longest = math.log(self.min_seconds), math.log(self.max_seconds)
        seconds = math.exp(self._rng(index, "seconds").uniform(shortest, longest))
        return round(seconds * SAMPLE_RATE)

    def seconds(self, index: int) -> float:
        """Duration of scene ``index``, known without synthesis."""
        return self._num_samples(index) / SAMPLE_RATE

    def description(self, index: int) -> Scene:
        """The scene: clips of equal scenes are positives of each other's captions."""
        if self.split == "train" or index >= DISTINCT_SCENES:
            return draw_scene(self._rng(index, "scene"), self.split, self.seconds(index))
        for earlier in range(len(self._distinct), index + 1):
            rng, seconds = self._rng(earlier, "scene"), self.seconds(earlier)
            scene = draw_scene(rng, self.split, seconds)
            while scene in self._distinct:
                scene = draw_scene(rng, self.split, seconds)
            self._distinct.append(scene)
        return self._distinct[index]

    def label(self, index: int) -> str | None:
        """The source, one of LABELS, of a scene that has exactly one; else None."""
        events = self.description(index).events
        return events[0].source if len(events) == 1 else None

    def captions(self, index: int) -> tuple[str, ...]:
        """Three wordings of scene ``index``, the canonical one first; of a single source five.

        The fourth and fifth name the source and nothing else, as a label's prompt does: they are
        true of the scene, but not of it alone.
        """
        scene, rng = self.description(index), self._rng(index, "captions")
        wordings = {caption(scene): None}
        while len(wordings) < FULL_WORDINGS:
            wordings[caption(scene, rng)] = None
        while len(scene.events) == 1 and len(wordings) < 5:
            wordings[source_caption(scene.events[0].source, rng)] = None
        return tuple(wordings)

    def hard_negatives(self, index: int) -> tuple[str, ...]:
        """Canonical captions of the scene's near misses: each is wrong in one respect."""
        return tuple(caption(scene) for scene in near_misses(self.description(index)))

    def waveform(self, index: int) -> np.ndarray:
        """Scene ``index``, float32 [num_samples] at 16 kHz, peak below the full scale of 1."""
        scene, num_samples = self.description(index), self._num_samples(index)
        rng = np.random.default_rng(self._rng(index, "waveform").getrandbits(64))
        # A microphone is never silent: a floor 20 dB or more below the quiet backgrounds.
        out = hiss(num_samples, rng) * np.float32(10 ** rng.uniform(-4.0, -3.4))
        gains = [rng.uniform(0.7, 1.0) for _ in scene.events]
        if scene.louder is not None:
            gains[1 - scene.louder] *= 0.1
        spans = _spans(scene, num_samples, rng)
        for event, gain, span in zip(scene.events, gains, spans, strict=True):
            part = out[span]
            part += render_event(*event, len(part), rng) * np.float32(gain)
        if scene.background:
            make = hiss if scene.background == "hiss" else rumble
            out += make(num_samples, rng) * np.float32(rng.uniform(0.012, 0.02))
        peak = max(out.max(), -out.min())
        return out * np.float32(rng.uniform(0.25, 0.9) / peak)


def _spans(scene: Scene, num_samples: int, rng: np.random.Generator) -> list[slice]:
    """Where each event sounds: the whole clip, or one stretch after the other with short gaps."""
    if scene.relation != "then":
        return [slice(0, num_samples)] * len(scene.events)
    needed = np.array([needed_seconds(event) for event in scene.events]) * SAMPLE_RATE
    shares = rng.uniform(0.7, 1.3, len(needed))
    lengths = needed + (num_samples - needed.sum()) * shares / shares.sum()
    ends, gap = np.cumsum(lengths).astype(int), SAMPLE_RATE // 20
    return [slice(start, end - gap) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
