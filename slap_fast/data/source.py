"""The contract of a source of clips, what several sources share, and the record of a bad clip."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from slap_fast.data.audio.decode import Audio, Decoder
from slap_fast.data.audio.track import AudioError


class ClipSource(Protocol):
    """Captioned clips by index: anything with these methods can be trained on."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """The clip's name in error messages."""

    def total_seconds(self) -> float:
        """Duration of all clips."""
        return sum(map(self.seconds, range(len(self))))

    def longest_seconds(self) -> float:
        """Duration of the longest clip, or a little more."""
        return max(map(self.seconds, range(len(self))))

    @abstractmethod
    def seconds(self, index: int) -> float:
        """Duration; 0 where the file cannot be read (its error comes from ``audio``)."""

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """None only where there is a label. Raises AudioError where a stored one is damaged."""

    def caption_key(self, index: int, caption: str) -> Hashable:
        """Key of a caption: it is a positive of every clip that has a caption of the same key."""
        return caption.casefold()

    @abstractmethod
    def label(self, index: int) -> str | None:
        """The class, where there is one."""

    @abstractmethod
    def item(self, index: int) -> Any:
        """The clip as :meth:`slap_fast.inference.slap.Slap.embed_audio` takes it."""

    @abstractmethod
    def audio(self, index: int, start: float = 0.0, end: float | None = None) -> Audio:
        """Samples at the sample rate, and warnings; start and end in seconds. Raises AudioError."""


class EncodedClips(ClipSource):
    """Clips whose ``item`` is (path or bytes of an audio file, start, end), decoded on request."""

    sample_rate: int
    decoder: Decoder
    min_seconds: float = 0.025
    """Shorter clips are bad, E_TOO_SHORT."""

    def audio(self, index: int, start: float = 0.0, end: float | None = None) -> Audio:
        source, first, last = self.item(index)
        options = {"start": first + start, "end": last if end is None else first + end}
        options |= {"sample_rate": self.sample_rate, "min_seconds": self.min_seconds}
        try:
            return self.decoder.decode(source, **options)
        except AudioError as error:
            raise error.named(self.name(index)) from None

    def header_seconds(self, source: Path | bytes) -> float:
        """Duration that a file's header declares; 0 where it cannot be read."""
        try:
            return self.decoder.probe(source).seconds
        except AudioError:
            return 0.0


class BadClip(NamedTuple):
    """A clip that could not be used."""

    shard: str
    """The tar or the folder that holds it."""
    key: str
    """Its name in that."""
    code: str
    """E_..., as in :mod:`slap_fast.data.audio.decode` and :mod:`slap_fast.data.sources.shards`."""
    bytes: int
    """Size of the audio file; 0 where it could not be read."""
    sha1: str
    """First 8 hex digits of the audio file's; empty where it could not be read."""
    message: str
    """One line."""


def bad_clip(source: ClipSource, index: int, error: AudioError) -> BadClip:
    """The record of a bad clip."""
    shard, key = os.path.split(source.name(index))
    size, digest = 0, ""
    with suppress(OSError, AudioError):
        audio = source.item(index)[0]
        if isinstance(audio, Path) and audio.is_file():  # reading a pipe would block
            audio = audio.read_bytes()
        if not isinstance(audio, Path):
            size, digest = len(audio), hashlib.sha1(audio, usedforsecurity=False).hexdigest()[:8]
    return BadClip(shard, key, error.code, size, digest, str(error))
