"""Pairs of audio and captions in third-party WebDataset tars, read in one pass, not extracted.

A key is a member's path up to the first dot of its base name; the rest is its suffix. A pair is one
audio member and its captions, consecutive and of one key: KEY.flac (or another audio suffix) and
KEY.txt with a caption per line, or KEY.json with the fields of a manifest row ("text" will do for
"caption"), or both, where the JSON has precedence. Members of other suffixes are counted and
ignored.

Such a tar has no index: its headers have a checksum, but contents have none, and how much is
missing where it is truncated is unknown. All that is left out is reported, as one AudioError each.
Of pairs: E_PAIR (no captions, no audio, or one of them twice), E_DUP_KEY (an earlier pair of any of
the tars has the key), E_CAPTION_... and E_MANIFEST as of a manifest's row, E_TOO_LONG,
E_SHARD_MEMBER (a link, a device, a sparse file, a path that leaves the folder). Of tars, once each:
E_SHARD_MISSING (it cannot be read), E_SHARD_TRUNCATED (the file ends before the archive),
E_SHARD_CORRUPT (no header where one belongs, or data after the archive's end); it stands for the
incomplete pair and everything after it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slap_fast.data.audio.formats import BY_SUFFIX
from slap_fast.data.audio.track import AudioError
from slap_fast.data.manifest import ManifestError, audio_files, fields_of, row_of
from slap_fast.data.shards.index import INDEX, ShardError
from slap_fast.data.shards.tar_members import Member, members
from slap_fast.data.shards.writer import MAX_BYTES, Clip, too_large

AUDIO = {suffix[1:] for suffix in BY_SUFFIX}
TEXTS = ("txt", "json")
PAIR = "one audio file and its captions, one after the other"
MAX_TEXT = 1 << 20
"""Bytes of a caption member."""


def find_tars(data: Sequence[str | Path]) -> list[Path]:
    """The paths that end in .tar, and the tars below folders that have no audio files.

    Empty where ``data`` names none. Raises ShardError where only some of the paths do, or where an
    index beside the tars shows that they are packed.
    """
    tars: list[Path] = []
    others: list[Path] = []
    for path in map(Path, data):
        own = [path] if path.suffix == ".tar" else []
        if path.is_dir() and not audio_files(path):
            own = sorted(path.rglob("*.tar"))
        tars += own
        others += [] if own else [path]
    if tars and others:
        raise ShardError(f"{others[0]}: found no tars, expected some beside {tars[0]}")
    for folder in {tar.parent for tar in tars}:
        if (folder / INDEX).exists():
            raise ShardError(f"{folder}: found {INDEX}, expected tars that are not packed yet")
    return tars


def read_tars(tars: Sequence[Path], ignored: Counter[str]) -> Iterator[Clip | AudioError]:
    """Yields the pairs in the tars, in order, and an error for each thing that is left out.

    Memory holds one pair, its audio at most MAX_BYTES, and about 100 bytes per key so far.

    Args:
        tars: read one after the other.
        ignored: counts members of other suffixes, by suffix.
    """
    first: dict[bytes, Path] = {}
    for tar in tars:
        pairs = 0
        try:
            for sample in _samples(tar, ignored):
                clip = sample.clip(first)
                pairs += not isinstance(clip, AudioError)
                yield clip
        except AudioError as error:
            code, _, found, expected = error.args
            yield AudioError(code, tar, f"{found}, after {pairs} pairs", expected)
        except OSError as error:
            yield AudioError("E_SHARD_MISSING", tar, str(error.strerror), "a readable file")


def _samples(tar: Path, ignored: Counter[str]) -> Iterator[_Sample]:
    """Raises what :func:`members` does, after the last complete sample."""
    sample: _Sample | None = None
    try:
        for member in members(tar):
            key, suffix = member.split()
            if not member.refused and suffix not in AUDIO and suffix not in TEXTS:
                ignored[f".{suffix}" if suffix else "without suffix"] += 1
                continue
            if sample is not None and sample.key != key:
                yield sample
                sample = None
            # Lost if the tar ends within the member.
            current, sample = sample or _Sample(tar, key), None
            current.add(member, suffix)
            sample = current
    except (AudioError, OSError):
        if sample is not None and (sample.error or (sample.audio and sample.texts)):
            yield sample
        raise
    if sample is not None:
        yield sample


@dataclass(slots=True)
class _Sample:
    """Consecutive members of one key."""

    tar: Path
    key: str
    audio: tuple[str, bytes] | None = None
    """Name and contents."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """By suffix."""
    error: AudioError | None = None
    """The first fault; no more members are read after it."""

    def add(self, member: Member, suffix: str) -> None:
        if self.error is not None:
            return
        if member.refused:
            self.error = self._error("E_SHARD_MEMBER", member.refused, "files in the folder")
        elif suffix in self.texts or (suffix in AUDIO and self.audio is not None):
            self.error = self._error("E_PAIR", f"another .{suffix}", PAIR)
        elif suffix in AUDIO and member.size > MAX_BYTES:
            self.error = too_large(self.name)
        elif suffix in AUDIO:
            self.audio = member.name, member.read()
        elif member.size > MAX_TEXT:
            found = f"a .{suffix} of {member.size:,} bytes"
            self.error = self._error("E_CAPTION_LONG", found, f"at most {MAX_TEXT:,}")
        else:
            self.texts[suffix] = member.read()

    def clip(self, first: dict[bytes, Path]) -> Clip | AudioError:
        """The pair or its fault; adds the key to ``first``, the tar that each key is first in."""
        digest = hashlib.blake2b(self.key.encode(), digest_size=16).digest()
        if digest in first:
            return self._error("E_DUP_KEY", f"a key that {first[digest]} has too", "it once")
        first[digest] = self.tar
        if self.error is not None:
            return self.error
        if self.audio is None or not self.texts:
            found = "no captions" if self.audio else "no audio file"
            return self._error("E_PAIR", found, PAIR)
        name, data = self.audio
        try:
            return row_of(Path(self.name), 1, str(self.tar), {**self._fields(), "path": name}), data
        except ManifestError as error:
            return self._error(error.code, str(error), "a caption")

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for suffix in TEXTS:
            if suffix in self.texts:
                text = self.texts[suffix].decode("utf-8-sig", errors="surrogateescape")
                own = fields_of(Path(f"{self.name}.{suffix}"), text)
                if isinstance(own, ManifestError):
                    raise own
                if "text" in own:
                    own.setdefault("caption", own["text"])
                fields |= own
        return fields

    @property
    def name(self) -> str:
        return f"{self.tar}/{self.key}"

    def _error(self, code: str, found: str, expected: str) -> AudioError:
        return AudioError(code, self.name, found, expected)
