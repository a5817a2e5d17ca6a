"""The clips that a run trains on, and those that validate it: never the same ones in silence.

Where the data has no validation split, every tenth file is held out of training, at most 1,000. Of
fewer than 20 files none is: then the validation is on the training clips.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from slap_fast.data.audio.decode import IN_PROCESS, Decoder
from slap_fast.data.manifest import ManifestError
from slap_fast.data.open import SYNONYMS, open_source
from slap_fast.data.order import permute
from slap_fast.data.source import ClipSource
from slap_fast.data.sources.files import ManifestClips
from slap_fast.data.sources.mixture import ChosenClips, MixedClips, View, read_mix
from slap_fast.data.sources.shards import ShardClips

SHARE = 10
"""One file in this many is held out."""
MOST, FEWEST_FILES = 1_000, 20


class TrainingData(NamedTuple):
    """What a run reads."""

    train: ClipSource
    validation: ClipSource
    validated_on: str
    """``validation split``, ``held-out clips`` or ``training clips``; several of them for a mix."""


def training_data(
    data: str | Path,
    split: str | None,
    *,
    hold_out: bool = True,
    sample_rate: int = 16_000,
    min_seconds: float = 0.025,
    decoder: Decoder = IN_PROCESS,
    bad: list[ManifestError] | None = None,
) -> TrainingData:
    """Opens what ``slap-fast train`` reads.

    Args:
        data: as of :func:`slap_fast.data.open.open_source`.
        split: clips to train on; None takes those of "train" where there are such.
        hold_out: False validates on the training clips where the data has no validation split, as
            runs of format version 2 did.
        sample_rate: Hz, of the waveforms.
        min_seconds: shorter clips are bad.
        decoder: of all clips.
        bad: takes the rows of manifests that cannot be used; without it the first raises.

    Raises:
        ValueError: as ``open_source`` does; or the data has splits, but none of them is "train".
    """
    path = Path(data)
    options = {"sample_rate": sample_rate, "min_seconds": min_seconds, "decoder": decoder}
    if path.suffix in (".yaml", ".yml"):
        mix = read_mix(path)
        parts = [
            training_data(part.data, split, hold_out=hold_out, bad=bad, **options) for part in mix
        ]
        weights = [part.weight for part in mix]
        return TrainingData(
            MixedClips([part.train for part in parts], weights),
            MixedClips([part.validation for part in parts], weights),
            ", ".join(dict.fromkeys(part.validated_on for part in parts)),
        )
    train = open_source(data, split, fallback="train", bad=bad, **options)
    again = None if bad is None else list[ManifestError]()  # the same rows
    validation = open_source(data, None, fallback="validation", bad=again, **options)
    splits, names = _splits(validation), SYNONYMS["validation"]
    if splits & {*names} and split not in names:
        return TrainingData(train, validation, "validation split")
    if split is None and not splits <= {None, "train"} and "train" not in splits:
        if None not in splits:
            found = ", ".join(sorted(map(str, splits)))
            raise ManifestError(f"{data}: found splits {found}, expected one called train: --split")
        train = _without_split(train)
    left_out = _held_out(train) if hold_out else []
    if not left_out:
        return TrainingData(train, train, "training clips")
    return TrainingData(AllBut(train, left_out), ChosenClips(train, left_out), "held-out clips")


def _splits(source: ClipSource) -> set[str | None]:
    """Names of the splits of a source's clips, None for those without one."""
    if isinstance(source, ManifestClips):
        return {row.split for row in source.rows}
    if isinstance(source, ShardClips):
        return {name or None for name in source.splits}
    return {source.sounds.split}


def _without_split(source: ClipSource) -> ClipSource:
    """Those clips of a source with splits that have none."""
    if isinstance(source, ManifestClips):
        rows = [row for row in source.rows if row.split is None]
        return ManifestClips(rows, source.sample_rate, source.decoder, source.min_seconds)
    return ShardClips(
        source.folder, "", source.sample_rate, source.decoder, min_seconds=source.min_seconds
    )


def _held_out(source: ClipSource) -> list[int]:
    """Indices of the clips to hold out, sorted; the same ones wherever the data is.

    All clips of a file are, or none. One that cannot be read is not: training names it.
    """
    if isinstance(source, ShardClips):  # perhaps a hundred million, each under a name of its own
        count = min(len(source) // SHARE, MOST) if len(source) >= FEWEST_FILES else 0
        return sorted(permute(np.arange(count), len(source), (0,)).tolist())
    files: dict[str, list[int]] = {}
    for i in range(len(source)):
        if source.seconds(i):
            files.setdefault(source.name(i), []).append(i)
    count = min(round(len(files) / SHARE), MOST) if len(files) >= FEWEST_FILES else 0
    chosen = sorted(files, key=_number)[:count]
    return sorted(i for name in chosen for i in files[name])


def _number(name: str) -> bytes:
    return hashlib.blake2b(PurePath(name).name.encode(errors="surrogateescape")).digest()


class AllBut(View):
    """A source's clips in their order, without those of the sorted indices ``left_out``."""

    def __init__(self, source: ClipSource, left_out: Sequence[int]) -> None:
        self.source, self.left_out = source, left_out
        # Clips before each of them: where it would stand if none was left out.
        self._before = [index - i for i, index in enumerate(left_out)]

    def _at(self, index: int) -> tuple[ClipSource, int]:
        return self.source, index + bisect.bisect_right(self._before, index)

    def __len__(self) -> int:
        return len(self.source) - len(self.left_out)

    def total_seconds(self) -> float:
        return self.source.total_seconds() - sum(map(self.source.seconds, self.left_out))

    def longest_seconds(self) -> float:
        return self.source.longest_seconds()
