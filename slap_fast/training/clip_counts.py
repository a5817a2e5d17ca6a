"""Clip counts of a run: drawn, left out and warned about, by code."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOW = 50_000
"""Clips in one count of ``recent``."""
MAX_LOST_SHARDS = 5
"""Shards that may fail one after the other; when a disk is gone, all fail."""


@dataclass
class ClipCounts:
    """Clips of all ranks up to some step, counted each time they are drawn.

    They are part of the run's state: ``seen`` is exactly the clips that were trained on plus
    ``bad``, wherever a run was stopped or killed.
    """

    seen: int = 0
    """Clips drawn."""
    bad: Counter[str] = field(default_factory=Counter)
    """Clips left out, by E_ code."""
    warned: Counter[str] = field(default_factory=Counter)
    """Clips trained on with a warning, by W_ code; one clip may have several."""
    recent: list[list[int]] = field(default_factory=lambda: [[0, 0], [0, 0]])
    """(seen, bad) of the last WINDOW clips or fewer, and of the WINDOW before those."""
    lost_shards: list[str] = field(default_factory=list)
    """Shards that could not be read, in the steps since the last clip that could be read."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "bad": dict(self.bad), "warned": dict(self.warned)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> ClipCounts:
        """Inverse of :meth:`to_dict`."""
        counts = {name: Counter(stored[name]) for name in ("bad", "warned")}
        return cls(**{**stored, **counts})

    def after(self, messages: Sequence[dict[str, Any]]) -> ClipCounts:
        """The counts after one more step.

        Args:
            messages: one of each rank, with the step's number of clips ``seen``, the list of
                ``bad`` ones (code, shard), and the number ``warned`` about by code.
        """
        new = copy.deepcopy(self)
        bad = [clip for message in messages for clip in message["bad"]]
        seen = sum(message["seen"] for message in messages)
        new.seen += seen
        new.bad.update(clip["code"] for clip in bad)
        for message in messages:
            new.warned.update(message["warned"])
        new.recent[0][0] += seen
        new.recent[0][1] += len(bad)
        if new.recent[0][0] >= WINDOW:
            new.recent = [[0, 0], new.recent[0]]
        lost = [clip["shard"] for clip in bad if clip["code"].startswith("E_SHARD_")]
        lost = list(dict.fromkeys([*new.lost_shards, *lost]))
        new.lost_shards = lost if len(bad) == seen else []
        return new

    def problem(self, max_bad_share: float) -> str:
        """The reason why training has to stop; empty where there is none."""
        lost = len(self.lost_shards)
        if lost > MAX_LOST_SHARDS:
            names = f"{self.lost_shards[0]} to {self.lost_shards[-1]}"
            return f"{lost} shards in a row cannot be read, {names}: is the disk there?"
        seen, bad = (sum(count) for count in zip(*self.recent, strict=True))
        if seen > 100 and bad > max_bad_share * seen:
            return (
                f"{bad} of the last {seen} clips are bad, more than data.max_bad_share "
                f"{max_bad_share:g}: {dict(self.bad)} since the start"
            )
        return ""
