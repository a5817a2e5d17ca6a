"""Where clips come from: a manifest of files, or the built-in sounds; and one clip as patches.

A source has ``len()``, ``name(i)``, ``seconds(i)``, ``captions(i)``, ``meaning(i, caption)``,
``label(i)``, ``item(i)`` and ``waveform(i, start, end)``; anything with those methods can be
trained on.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from slap_fast import ops
from slap_fast.config import MelConfig
from slap_fast.data.decode import AudioError, decode, probe
from slap_fast.data.manifest import Row, read_manifest
from slap_fast.data.sounds import SoundSet
from slap_fast.ops import PackedPatches

FULL_WORDINGS = 3
"""Of a built-in scene's captions, as many say all there is to it; one more names the source
alone."""


class ClipSource(Protocol):
    """Captioned clips by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What an error message calls the clip."""

    def seconds(self, index: int) -> float:
        """Duration; 0 where the file cannot be read (its error comes from ``waveform``)."""

    def captions(self, index: int) -> tuple[str, ...]:
        """One or more."""

    def meaning(self, index: int, caption: str) -> Hashable:
        """What the caption says; it is right for every clip that has a caption of this meaning."""

    def label(self, index: int) -> str | None:
        """The class, where there is one."""

    def item(self, index: int) -> Any:
        """The whole clip, as :meth:`slap_fast.inference.Slap.embed_audio` takes it."""

    def waveform(self, index: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
        """float32 [num_samples] at the sample rate, start and end in seconds. Raises AudioError."""


class BuiltinClips:
    """The generated scenes of :class:`SoundSet` as a source."""

    def __init__(self, sounds: SoundSet, sample_rate: int = 16_000) -> None:
        self.sounds = sounds
        self.sample_rate = sample_rate
        self._known: dict[int, dict[str, Hashable]] = {}

    def __len__(self) -> int:
        return len(self.sounds)

    def name(self, index: int) -> str:
        return f"built-in sound {index}"

    def seconds(self, index: int) -> float:
        return self.sounds.seconds(index)

    def captions(self, index: int) -> tuple[str, ...]:
        # The short wording of a single source trains the labels' prompts; as a query it names no
        # scene, so only training has it.
        return tuple(self._meanings(index))

    def meaning(self, index: int, caption: str) -> Hashable:
        return self._meanings(index)[caption]

    def _meanings(self, index: int) -> dict[str, Hashable]:
        if index not in self._known:
            captions, scene = self.sounds.captions(index), self.sounds.description(index)
            known: dict[str, Hashable] = dict.fromkeys(captions[:FULL_WORDINGS], scene)
            if self.sounds.split == "train":
                known |= dict.fromkeys(captions[FULL_WORDINGS:], self.sounds.label(index))
            self._known[index] = known
        return self._known[index]

    def label(self, index: int) -> str | None:
        return self.sounds.label(index)

    def item(self, index: int) -> Any:
        return self.waveform(index), self.sample_rate

    def waveform(self, index: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
        last = None if end is None else round(end * self.sample_rate)
        return self.sounds.waveform(index)[round(start * self.sample_rate) : last]


class ManifestClips:
    """The rows of a manifest as a source."""

    def __init__(self, rows: Sequence[Row], sample_rate: int = 16_000) -> None:
        self.rows = rows
        self.sample_rate = sample_rate
        with ThreadPoolExecutor(8) as pool:
            self._seconds = list(pool.map(_row_seconds, rows))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return str(self.rows[index].path)

    def seconds(self, index: int) -> float:
        return self._seconds[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.rows[index].captions

    def meaning(self, index: int, caption: str) -> Hashable:
        return caption.casefold()

    def label(self, index: int) -> str | None:
        return self.rows[index].label

    def item(self, index: int) -> Any:
        row = self.rows[index]
        return row.path, row.start, row.end

    def waveform(self, index: int, start: float = 0.0, end: float | None = None) -> np.ndarray:
        row = self.rows[index]
        last = row.end if end is None else row.start + end
        audio = decode(row.path, sample_rate=self.sample_rate, start=row.start + start, end=last)
        return audio.waveform


def _row_seconds(row: Row) -> float:
    try:
        end = row.end or row.seconds or probe(row.path).seconds
    except AudioError:
        return 0.0
    return end - row.start


class BadClip(NamedTuple):
    """A clip that could not be used."""

    name: str
    """The file."""
    code: str
    """E_..., as in :mod:`slap_fast.data.decode`."""
    message: str
    """One line."""


def clip_patches(waveform: np.ndarray, mel: MelConfig) -> PackedPatches:
    """One clip's patches: waveform [num_samples] float32 or int16 -> a packed run of one."""
    cu_samples = torch.tensor([0, len(waveform)])
    return ops.mel_patches(torch.from_numpy(waveform), cu_samples, mel)


def pack_patches(clips: Sequence[torch.Tensor], mel: MelConfig) -> PackedPatches:
    """Clips [T_i, patch_dim], each whole columns, end to end."""
    lengths = torch.tensor([0, *map(len, clips)])
    starts = lengths.cumsum(0)
    token = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(lengths[1:])
    bands = mel.patches_per_column
    coords = torch.stack([token // bands, token % bands], dim=1).int()
    patches = torch.cat(list(clips)) if clips else torch.zeros(0, mel.patch_dim)
    return PackedPatches(patches, coords, starts.int(), int(lengths.max()))


BUILTIN_SIZES = {"train": 5_000, "validation": 200, "test": 500}


def open_source(
    data: str | Path, split: str | None, *, fallback: str, sample_rate: int = 16_000
) -> ClipSource:
    """The built-in sounds for ``"builtin"``, else a manifest or a folder of files.

    Args:
        data: ``"builtin"``, or the path of a JSONL or CSV manifest or of a folder.
        split: rows of this split; None takes ``fallback`` where the data has it, else every row.
        fallback: "train", "validation" or "test".
        sample_rate: Hz, of the waveforms.

    Raises:
        ManifestError: the manifest is not one; names file and line.
    """
    if str(data) == "builtin":
        name = split or fallback
        if name not in BUILTIN_SIZES:
            raise ValueError(f"split: found {name!r}, expected one of {tuple(BUILTIN_SIZES)}")
        return BuiltinClips(SoundSet(name, BUILTIN_SIZES[name]), sample_rate)
    rows = read_manifest(data, split)
    if split is None:
        names = {"validation": ("validation", "valid", "val", "dev")}.get(fallback, (fallback,))
        rows = [row for row in rows if row.split in names] or rows
    return ManifestClips(rows, sample_rate)
