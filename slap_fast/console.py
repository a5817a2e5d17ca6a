"""What commands print: where stdout carries JSON, everything else goes to stderr."""

from __future__ import annotations

import json as json_module
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def make_console(json: bool, quiet: bool = False) -> Console:
    """Returns the console for text and tables: on stderr where stdout carries JSON."""
    from rich.console import Console

    # A path or a caption may hold brackets.
    return Console(stderr=json, quiet=quiet, markup=False)


def show_progress(json: bool) -> bool:
    """Whether to show progress bars."""
    return sys.stderr.isatty() and not json


def emit(value: Any, json: bool) -> None:
    """Prints a command's result as JSON on stdout where ``json`` is set."""
    if json:
        print(json_module.dumps(value, indent=2, ensure_ascii=False))
