"""What commands print: where stdout carries JSON, everything else goes to stderr."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from slap_fast.atomic_files import to_json

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 30.0
"""Between two lines of :class:`Progress` without a terminal."""
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"
LINE_WITHOUT_TOTAL = "{desc}: {elapsed} gone"


def print_any_text() -> None:
    """Escapes what stdout and stderr cannot encode, such as an accent under cp1252 or ASCII.

    An error there would come after all the work.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def make_console(json: bool, quiet: bool = False) -> Console:
    """Returns the console for text and tables: on stderr where stdout carries JSON."""
    from rich.console import Console

    # A path or a caption may hold brackets.
    return Console(stderr=json, quiet=quiet, markup=False)


def show_progress(json: bool) -> bool:
    """Whether to show how far long work is, see :class:`Progress`."""
    return not json


def emit(value: Any, json: bool) -> None:
    """Prints a command's result as JSON on stdout where ``json`` is set."""
    if json:
        sys.stdout.write(to_json(value, encoding=sys.stdout.encoding or "ascii"))


class Progress(tqdm):
    """A bar on a terminal; elsewhere a line every half minute, while one long item lasts too.

    Args:
        iterable: what is worked through, or None for :meth:`update`.
        show: False shows nothing.
        options: tqdm's, such as ``desc``, ``total``, ``unit``, ``initial``.
    """

    def __init__(self, iterable: Any = None, *, show: bool, **options: Any) -> None:
        self._ended = threading.Event()
        self._as_lines = show and not sys.stderr.isatty()
        super().__init__(iterable, disable=not show, **options)
        if self._as_lines:
            self.bar_format = LINE_WITHOUT_TOTAL if self.total is None else LINE
            threading.Thread(target=self._print_lines, daemon=True).start()

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            print(self, file=sys.stderr, flush=True)

    def display(self, *args: Any, **options: Any) -> bool | None:
        """Draws the bar, where there is one."""
        return None if self._as_lines else super().display(*args, **options)

    def close(self) -> None:
        """Ends the bar or the lines."""
        self._ended.set()
        if self._as_lines:
            self.disable = True  # or it would end a line that is not there
        super().close()
