"""A Hugging Face dataset with an ``Audio`` column as clips to train and evaluate on.

The column is read undecoded and decoded by slap-fast: no torchcodec is needed, and a bad clip is
left out and listed, as everywhere.
"""

from __future__ import annotations

from typing import Any

import datasets

from slap_fast.data.audio.decode import IN_PROCESS, Decoder
from slap_fast.data.audio.items import audio_item
from slap_fast.data.source import EncodedClips


class DatasetClips(EncodedClips):
    """The rows of a dataset."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        audio: str = "audio",
        caption: str = "caption",
        label: str | None = None,
        seconds: str | None = None,
        sample_rate: int = 16_000,
        decoder: Decoder = IN_PROCESS,
        min_seconds: float = 0.025,
    ) -> None:
        """
        Args:
            dataset: a map-style dataset; ``load_dataset(..., split=...)`` gives one.
            audio: its column of ``datasets.Audio``.
            caption: its column of captions, one string or a list of them per clip.
            label: its column of classes, strings or ``ClassLabel``, where it has one.
            seconds: its column of durations; without one each file's header is read, once.
            sample_rate: Hz, of the waveforms.
            decoder: of the files.
            min_seconds: shorter clips are bad, E_TOO_SHORT.

        Raises ValueError where the dataset has no such column.
        """
        for column in filter(None, (audio, caption, label, seconds)):
            if column not in dataset.column_names:
                raise ValueError(
                    f"dataset: found columns {', '.join(dataset.column_names)}, expected {column!r}"
                )
        self.rows = dataset.cast_column(audio, datasets.Audio(decode=False))
        self._audio, self._caption, self._label = audio, caption, label
        self.sample_rate, self.decoder, self.min_seconds = sample_rate, decoder, min_seconds
        if seconds is None:
            self._seconds = [self.header_seconds(self.item(i)[0]) for i in range(len(dataset))]
        else:
            self._seconds = [float(value) for value in dataset[seconds]]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows[index][self._audio]["path"] or f"row {index}"

    def seconds(self, index: int) -> float:
        return self._seconds[index]

    def captions(self, index: int) -> tuple[str, ...]:
        captions = self.rows[index][self._caption]
        return (captions,) if isinstance(captions, str) else tuple(captions)

    def label(self, index: int) -> str | None:
        if self._label is None:
            return None
        label, feature = self.rows[index][self._label], self.rows.features[self._label]
        return feature.int2str(label) if isinstance(feature, datasets.ClassLabel) else label

    def item(self, index: int) -> Any:
        return audio_item(self.rows[index][self._audio])
