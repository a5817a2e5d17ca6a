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
            array = np.asarray(value["array"])
            return array if array.ndim == 1 else array.mean(0), value["sampling_rate"]
        source = Path(value["path"]) if value.get("bytes") is None else value["bytes"]
        return source, 0.0, None
    if hasattr(value, "get_all_samples"):
        samples = value.get_all_samples()
        return samples.data.mean(0), samples.sample_rate
    return value
