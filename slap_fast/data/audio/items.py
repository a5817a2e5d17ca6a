"""Audio as Hugging Face's packages hand it around, as :class:`slap_fast.Slap` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def audio_item(value: Any) -> Any:
    """An item for :meth:`slap_fast.Slap.embed_audio`.

    ``value`` is what an ``Audio`` column holds: not decoded, {"bytes", "path"}; decoded, {"array",
    "sampling_rate"}, [num_samples] or [channels, num_samples], or an object with
    ``get_all_samples``. Anything else, such as a path, is given back as it is.
    """
    if isinstance(value, Mapping):
        if "array" in value:
            return _mono(value["array"]), value["sampling_rate"]
        source = Path(value["path"]) if value.get("bytes") is None else value["bytes"]
        return source, 0.0, None
    if hasattr(value, "get_all_samples"):
        samples = value.get_all_samples()
        return _mono(samples.data), samples.sample_rate
    return value


def _mono(samples: Any) -> np.ndarray:
    """[num_samples] or [channels, num_samples] to [num_samples], with int16 at its full scale."""
    array = np.asarray(samples)
    if array.ndim == 1:
        return array
    scale = 32_768.0 if array.dtype == np.int16 else 1.0
    return (array.mean(0, dtype=np.float64) / scale).astype(np.float32)
