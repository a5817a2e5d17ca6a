"""slap-fast: scalable language-audio pretraining (SLAP, arXiv 2601.12594), fast.

``Slap`` is a trained model, ``load`` opens that or another's, and ``ops`` are the packed
operations; the rest is imported from its subpackage.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "Slap": "slap_fast.inference.slap",
    "MelConfig": "slap_fast.config",
    "AudioError": "slap_fast.data.audio.track",
    "load": "slap_fast.interop.pretrained.load",
    "patch": "slap_fast.interop.patch",
    "which": "slap_fast.ops.dispatch",
}
__all__ = ["AudioError", "MelConfig", "Slap", "__version__", "load", "ops", "patch", "which"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `import slap_fast` must stay light.
    if name == "ops":
        return importlib.import_module("slap_fast.ops")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'slap_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
