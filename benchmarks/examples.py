"""The scripts of examples/ as modules; they import each other as scripts do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import clap_after
import clap_before
import padded
import sounds

__all__ = ["clap_after", "clap_before", "padded", "sounds"]
