"""What became of the clips that a run drew: trained on, left out or warned about, by code."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOW = 50_000
"""Clips in one count of ``recent``."""
MOST_LOST_SHARDS = 5
"""Shards that may fail one after the other; a disk that is gone fails all."""


@dataclass
class Tally:
    """Clips of all ranks up to some step, each time they were drawn: a part of the run's state.

    ``seen`` is what was trained on plus ``bad``, exactly, wherever a run was stopped or killed.
    """

    seen: int = 0
    """Clips drawn."""
    bad: Counter[str] = field(default_factory=Counter)
    """Clips left out, by E_ code."""
    warned: Counter[str] = field(default_factory=Counter)
    """Clips trained on in spite of something, by W_ code; one clip may have several."""
    recent: list[list[int]] = field(default_factory=lambda: [[0, 0], [0, 0]])
    """(seen, bad) of the last WINDOW clips or fewer, and of the WINDOW before those."""
    lost_shards: list[str] = field(default_factory=list)
    """Shards with a clip that could not be read, in the steps since the last clip that could."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "bad": dict(self.bad), "warned": dict(self.warned)}

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Tally:
        """From what :meth:`to_dict` gave."""
        counts = {name: Counter(stored[name]) for name in ("bad", "warned")}
        return cls(**{**stored, **counts})

    def after(self, said: Sequence[dict[str, Any]]) -> Tally:
        """With one more step, of which each rank said what it ``seen``, ``bad`` and ``warned``."""
        new = copy.deepcopy(self)
        bad = [clip for each in said for clip in each["bad"]]
        seen = sum(each["seen"] for each in said)
        new.seen += seen
        new.bad.update(clip["code"] for clip in bad)
        for each in said:
            new.warned.update(each["warned"])
        new.recent[0][0] += seen
        new.recent[0][1] += len(bad)
        if new.recent[0][0] >= WINDOW:
            new.recent = [[0, 0], new.recent[0]]
        lost = [clip["shard"] for clip in bad if clip["code"].startswith("E_SHARD_")]
        lost = list(dict.fromkeys([*new.lost_shards, *lost]))
        new.lost_shards = lost if len(bad) == seen else []
        return new

    def problem(self, max_bad_share: float) -> str:
        """Why training should not go on; empty where it may."""
        lost = len(self.lost_shards)
        if lost > MOST_LOST_SHARDS:
            names = f"{self.lost_shards[0]} to {self.lost_shards[-1]}"
            return f"{lost} shards in a row cannot be read, {names}: is the disk there?"
        seen, bad = (sum(count) for count in zip(*self.recent, strict=True))
        if seen > 100 and bad > max_bad_share * seen:
            return (
                f"{bad} of the last {seen} clips are bad, more than data.max_bad_share "
                f"{max_bad_share:g}: {dict(self.bad)} since the start"
            )
        return ""
