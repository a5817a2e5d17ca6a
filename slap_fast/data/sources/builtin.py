"""The built-in sounds as clips."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import soxr

from slap_fast.data.audio.decode import Audio
from slap_fast.data.builtin.sound_set import FULL_WORDINGS, SoundSet
from slap_fast.data.builtin.synthesis import SAMPLE_RATE
from slap_fast.data.source import ClipSource


class BuiltinClips(ClipSource):
    """The generated scenes of :class:`SoundSet` as a source, resampled from their 16 kHz."""

    def __init__(self, sounds: SoundSet, sample_rate: int = 16_000) -> None:
        self.sounds, self.sample_rate = sounds, sample_rate
        self._keys: dict[int, dict[str, Hashable]] = {}

    def __len__(self) -> int:
        return len(self.sounds)

    def name(self, index: int) -> str:
        return f"built-in sound {index}"

    def seconds(self, index: int) -> float:
        return self.sounds.seconds(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(self._caption_keys(index))

    def caption_key(self, index: int, caption: str) -> Hashable:
        return self._caption_keys(index)[caption]

    def _caption_keys(self, index: int) -> dict[str, Hashable]:
        if index not in self._keys:
            captions, scene = self.sounds.captions(index), self.sounds.description(index)
            keys: dict[str, Hashable] = dict.fromkeys(captions[:FULL_WORDINGS], scene)
            # A caption that names the source alone trains the labels' prompts; as a query it would
            # fit many scenes, so only training has it.
            if self.sounds.split == "train":
                keys |= dict.fromkeys(captions[FULL_WORDINGS:], self.sounds.label(index))
            self._keys[index] = keys
        return self._keys[index]

    def label(self, index: int) -> str | None:
        return self.sounds.label(index)

    def item(self, index: int) -> Any:
        return self.sounds.waveform(index), SAMPLE_RATE

    def audio(self, index: int, start: float = 0.0, end: float | None = None) -> Audio:
        last = None if end is None else round(end * SAMPLE_RATE)
        waveform = self.sounds.waveform(index)[round(start * SAMPLE_RATE) : last]
        if self.sample_rate != SAMPLE_RATE:
            waveform = soxr.resample(waveform, SAMPLE_RATE, self.sample_rate)
        return Audio(waveform, len(waveform) / self.sample_rate, ())
