"""Several sources as one, mixed by weight: a YAML file in the place of a manifest.

::

    - data: speech/manifest.csv     # anything --data takes but another mix; counts from this file
      weight: 3                     # share of the draws: 3 in 4
    - data: shards/music            # weight 1
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from slap_fast.data.source import ClipSource


class Part(NamedTuple):
    """One source of a mix."""

    data: str
    weight: float


def read_mix(path: Path) -> list[Part]:
    """The sources that a YAML file lists. Raises ValueError."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: found no list, expected entries of data and weight")
    return [_part(path, entry) for entry in entries]


def _part(path: Path, entry: Any) -> Part:
    if not isinstance(entry, dict) or not entry.keys() <= {"data", "weight"}:
        raise ValueError(f"{path}: found {entry!r}, expected data and weight")
    data, weight = entry.get("data"), entry.get("weight", 1.0)
    if not isinstance(data, str) or data.endswith((".yaml", ".yml")):
        raise ValueError(f"{path}: found data {data!r}, expected a manifest or a folder")
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"{path}: {data}: found weight {weight!r}, expected a number > 0")
    return Part(data if data == "builtin" else str(path.parent / data), float(weight))


def _of_the_source(method: str) -> Callable[..., Any]:
    def call(self: View, index: int, *args: Any, **kwargs: Any) -> Any:
        source, index_there = self._at(index)
        return getattr(source, method)(index_there, *args, **kwargs)

    return call


class View(ClipSource):
    """Clips of other sources: a subclass defines ``_at``, a clip's source and its index there."""

    name = _of_the_source("name")
    seconds = _of_the_source("seconds")
    captions = _of_the_source("captions")
    caption_key = _of_the_source("caption_key")
    label = _of_the_source("label")
    item = _of_the_source("item")
    audio = _of_the_source("audio")


class MixedClips(View):
    """Sources end to end; the trainer draws by their weights."""

    def __init__(self, sources: Sequence[ClipSource], weights: Sequence[float]) -> None:
        self.sources = sources
        self.parts = [(len(s), weight) for s, weight in zip(sources, weights, strict=True)]
        """(clips, weight) of each."""
        self._ends = list(accumulate(map(len, sources)))

    def _at(self, index: int) -> tuple[ClipSource, int]:
        k = bisect.bisect_right(self._ends, index)
        return self.sources[k], index - (self._ends[k - 1] if k else 0)

    def __len__(self) -> int:
        return self._ends[-1]

    def total_seconds(self) -> float:
        return sum(source.total_seconds() for source in self.sources)

    def longest_seconds(self) -> float:
        return max(source.longest_seconds() for source in self.sources)


class ChosenClips(View):
    """Some clips of a source, in the order given."""

    def __init__(self, source: ClipSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def _at(self, index: int) -> tuple[ClipSource, int]:
        return self.source, self.indices[index]

    def __len__(self) -> int:
        return len(self.indices)
