"""Clips from a manifest of files, shards, a mix of them or the built-in sounds.

Anything with the methods of :class:`ClipSource` can be trained on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from slap_fast.data.audio.decode import IN_PROCESS, Audio, AudioError, Decoder
from slap_fast.data.builtin.scenes import SoundSet
from slap_fast.data.manifest import Row, read_manifest
from slap_fast.data.shards.index import INDEX, ShardClips, read_index
from slap_fast.data.sources.mixture import MixedClips, read_mix

FULL_WORDINGS = 3
"""Of a built-in scene's captions, as many say all there is to it; one more names the source
alone."""


class ClipSource(Protocol):
    """Captioned clips by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What an error message calls the clip."""

    def total_seconds(self) -> float:
        """Of all clips."""

    def longest_seconds(self) -> float:
        """Of one clip, at most."""

    def seconds(self, index: int) -> float:
        """Duration; 0 where the file cannot be read (its error comes from ``audio``)."""

    def captions(self, index: int) -> tuple[str, ...]:
        """One or more. Raises AudioError where they are stored with the clip and it is bad."""

    def meaning(self, index: int, caption: str) -> Hashable:
        """What the caption says; it is right for every clip that has a caption of this meaning."""

    def label(self, index: int) -> str | None:
        """The class, where there is one."""

    def item(self, index: int) -> Any:
        """The whole clip, as :meth:`slap_fast.inference.slap.Slap.embed_audio` takes it."""

    def audio(self, index: int, start: float = 0.0, end: float | None = None) -> Audio:
        """Samples at the sample rate, and warnings; start and end in seconds. Raises AudioError."""


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

    def total_seconds(self) -> float:
        return sum(map(self.seconds, range(len(self))))

    def longest_seconds(self) -> float:
        return max(map(self.seconds, range(len(self))))

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
        return self.audio(index).waveform, self.sample_rate

    def audio(self, index: int, start: float = 0.0, end: float | None = None) -> Audio:
        last = None if end is None else round(end * self.sample_rate)
        waveform = self.sounds.waveform(index)[round(start * self.sample_rate) : last]
        return Audio(waveform, len(waveform) / self.sample_rate, ())


class ManifestClips:
    """The rows of a manifest as a source."""

    def __init__(
        self,
        rows: Sequence[Row],
        sample_rate: int = 16_000,
        decoder: Decoder = IN_PROCESS,
    ) -> None:
        self.rows = rows
        self.sample_rate, self.decoder = sample_rate, decoder
        with ThreadPoolExecutor(8) as pool:
            self._seconds = list(pool.map(self._row_seconds, rows))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return str(self.rows[index].path)

    def total_seconds(self) -> float:
        return sum(self._seconds)

    def longest_seconds(self) -> float:
        return max(self._seconds)

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

    def audio(self, index: int, start: float = 0.0, end: float | None = None) -> Audio:
        row = self.rows[index]
        last = row.end if end is None else row.start + end
        return self.decoder.decode(
            row.path, sample_rate=self.sample_rate, start=row.start + start, end=last
        )

    def _row_seconds(self, row: Row) -> float:
        try:
            end = row.end or row.seconds or self.decoder.probe(row.path).seconds
        except AudioError:
            return 0.0
        return end - row.start


class BadClip(NamedTuple):
    """A clip that could not be used."""

    shard: str
    """The tar that holds it, or the folder of the file."""
    key: str
    """Its name in there."""
    code: str
    """E_..., as in :mod:`slap_fast.data.audio.decode` and :mod:`slap_fast.data.shards.index`."""
    bytes: int
    """Size of the audio file; 0 where it could not be read."""
    sha1: str
    """First 8 hex digits of the audio file's; empty where it could not be read."""
    message: str
    """One line."""


def bad_clip(source: ClipSource, index: int, error: AudioError) -> BadClip:
    """What the record of bad clips says of one."""
    shard, key = os.path.split(source.name(index))
    try:
        size, digest = _fingerprint(source.item(index)[0])
    except (OSError, AudioError):
        size, digest = 0, ""
    return BadClip(shard, key, error.code, size, digest, str(error))


def _fingerprint(audio: Path | bytes) -> tuple[int, str]:
    if isinstance(audio, Path):
        if not audio.is_file():
            return 0, ""
        audio = audio.read_bytes()
    return len(audio), hashlib.sha1(audio, usedforsecurity=False).hexdigest()[:8]


BUILTIN_SIZES = {"train": 5_000, "validation": 200, "test": 500}


def open_source(
    data: str | Path,
    split: str | None,
    *,
    fallback: str,
    sample_rate: int = 16_000,
    decoder: Decoder = IN_PROCESS,
) -> ClipSource:
    """The built-in sounds for ``"builtin"``, else a manifest, a folder, shards, or a mix of them.

    Args:
        data: ``"builtin"``, or the path of a JSONL or CSV manifest, of a folder of files or of
            shards, or of a YAML file that :mod:`slap_fast.data.sources.mixture` describes.
        split: clips of this split; None takes ``fallback`` where the data has it, else every clip.
        fallback: "train", "validation" or "test".
        sample_rate: Hz, of the waveforms.
        decoder: of the files; :class:`slap_fast.data.audio.isolated.IsolatedDecoder` is another.

    Raises:
        ManifestError: the manifest is not one; names file and line.
        ShardError: the index of the shards is damaged.
    """
    path = Path(data)
    if str(data) == "builtin":
        name = split or fallback
        if name not in BUILTIN_SIZES:
            raise ValueError(f"split: found {name!r}, expected one of {tuple(BUILTIN_SIZES)}")
        return BuiltinClips(SoundSet(name, BUILTIN_SIZES[name]), sample_rate)
    names = {"validation": ("validation", "valid", "val", "dev")}.get(fallback, (fallback,))
    if path.suffix in (".yaml", ".yml"):
        parts = read_mix(path)
        options = {"fallback": fallback, "sample_rate": sample_rate, "decoder": decoder}
        sources = [open_source(part.data, split, **options) for part in parts]
        return MixedClips(sources, [part.weight for part in parts])
    if (path / INDEX).exists():
        index = read_index(path)
        there = [name for name in index.splits if name]
        found = split or next((name for name in names if name in there), None)
        return ShardClips(path, found if there else None, sample_rate, decoder, index)
    rows = read_manifest(path, split)
    if split is None:
        rows = [row for row in rows if row.split in names] or rows
    return ManifestClips(rows, sample_rate, decoder)
