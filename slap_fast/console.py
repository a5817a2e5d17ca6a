"""What every command does with its output: people read stderr where stdout carries JSON."""

from __future__ import annotations

import json as json_module
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(json: bool, quiet: bool = False) -> Console:
    """Where a person reads."""
    from rich.console import Console

    # A path or a caption may hold brackets.
    return Console(stderr=json, quiet=quiet, markup=False)


def progress(json: bool) -> bool:
    """Whether to show bars."""
    return sys.stderr.isatty() and not json


def emit(value: Any, json: bool) -> None:
    """Prints a command's result as JSON, where that was asked for."""
    if json:
        print(json_module.dumps(value, indent=2, ensure_ascii=False))
