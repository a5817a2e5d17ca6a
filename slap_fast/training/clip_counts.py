"""Clip counts of a run: drawn, left out and warned about, by code."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


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

    @property
    def trained(self) -> int:
        """Clips trained on."""
        return self.seen - self.bad.total()

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "bad": dict(self.bad), "warned": dict(self.warned)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> ClipCounts:
        """Inverse of :meth:`to_dict`; what older versions stored beside them is left out."""
        return cls(stored["seen"], Counter(stored["bad"]), Counter(stored["warned"]))

    def after(self, messages: Sequence[dict[str, Any]]) -> ClipCounts:
        """The counts after one more step.

        Args:
            messages: one of each rank, with the step's number of clips ``seen``, the list of
                ``bad`` ones (code), and the number ``warned`` about by code.
        """
        new = copy.deepcopy(self)
        new.seen += sum(message["seen"] for message in messages)
        for message in messages:
            new.bad.update(clip["code"] for clip in message["bad"])
            new.warned.update(message["warned"])
        return new
