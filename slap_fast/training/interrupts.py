"""Ctrl-C and SIGTERM as a request to stop: after the step, or at once while no state changes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class _Stopped(BaseException):
    """Not an Exception, so that no handler in between catches it."""


class Stop:
    """A request to stop: a context that catches both signals.

    After the first, Ctrl-C raises KeyboardInterrupt again. A second SIGTERM changes nothing, as
    SLURM and torchrun both send one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True
        if self._interrupts:
            raise _Stopped

    def unless_requested(self, function: Callable[..., T], *args: Any) -> T | None:
        """``function(*args)``, or None once a stop is requested, before it or while it runs.

        For calls that may take long and change no state: waiting for data, evaluating.
        """
        try:
            self._interrupts = True
            try:
                return None if self.requested else function(*args)
            finally:
                self._interrupts = False
        except _Stopped:
            return None
