"""The rules by which a run stops itself: bad clips, lost shards, steps that are not finite.

None of what they judge by is stored with the run: resumed, it judges from its first clip on, so it
goes on as soon as the cause is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

WINDOW = 50_000
"""Draws in one of the two windows that a share is taken over."""
ENOUGH_BAD = 20
"""Distinct bad clips from which on their share is judged; half of the clips, where that is less."""
MAX_LOST_SHARDS = 5
"""Shards that may fail one after the other; when a disk is gone, all fail."""


class RunStopped(Exception):
    """A run that one of its own rules stopped: the cause and what to do, in one line."""


class BadClipRule:
    """Judges the clips that a run could not use since it was started or resumed.

    Args:
        size: clips of the source.
        max_bad_share: share of the distinct clips that may be bad.
    """

    def __init__(self, size: int, max_bad_share: float) -> None:
        self._size, self._max_bad_share = size, max_bad_share
        self._draws = [0, 0]
        self._bad: list[dict[int, str]] = [{}, {}]
        """Code of each bad clip by its index, in this window and the one before."""
        self._first = ""
        self._lost_shards: list[str] = []
        """Shards that could not be read, in the steps since the last clip that could be read."""

    def add(self, messages: Sequence[dict[str, Any]]) -> None:
        """Adds a step.

        Args:
            messages: one of each rank, with its number of clips ``seen``, the list of ``bad`` ones
                (code, shard, message), and their ``bad_indices`` in the source.
        """
        bad = [clip for message in messages for clip in message["bad"]]
        indices = [index for message in messages for index in message["bad_indices"]]
        seen = sum(message["seen"] for message in messages)
        if self._draws[0] >= WINDOW:
            self._draws, self._bad = [0, self._draws[0]], [{}, self._bad[0]]
        self._draws[0] += seen
        for index, clip in zip(indices, bad, strict=True):
            self._bad[0][index] = clip["code"]
            self._first = self._first or clip["message"]
        lost = [clip["shard"] for clip in bad if clip["code"].startswith("E_SHARD_")]
        lost = list(dict.fromkeys([*self._lost_shards, *lost]))
        self._lost_shards = lost if len(bad) == seen else []

    def problem(self) -> str:
        """Why the run has to stop, in one line; empty where nothing is wrong."""
        if len(self._lost_shards) > MAX_LOST_SHARDS:
            names = f"{self._lost_shards[0]} to {self._lost_shards[-1]}"
            return (
                f"{len(self._lost_shards)} shards in a row cannot be read, {names}: is the disk "
                "there? Once it is, go on with --resume"
            )
        codes = self._bad[1] | self._bad[0]
        bad, drawn = len(codes), min(sum(self._draws), self._size)
        if bad == self._size:
            return self.cause()
        if bad < min(ENOUGH_BAD, self._size / 2) or bad <= self._max_bad_share * drawn:
            return ""
        return (
            f"{self.cause()}, or go on without them: --resume --set data.max_bad_share=1 (it is "
            f"{self._max_bad_share:g})"
        )

    def cause(self) -> str:
        """How many of the clips are bad, the first one, and what to do."""
        codes, drawn = self._bad[1] | self._bad[0], min(sum(self._draws), self._size)
        counts = ", ".join(f"{n} {code}" for code, n in Counter(codes.values()).most_common())
        return (
            f"{len(codes)} of {drawn} clips are bad ({counts}), such as {self._first}; each is in "
            "bad_clips.jsonl: mend them or the manifest, then go on with --resume"
        )
