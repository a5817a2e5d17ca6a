"""Bin packing of clips into batches: the arguments, the checks, and the choice of what runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slap_fast.ops import dispatch
from slap_fast.reference import packing as reference


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most ``max_tokens``, by first-fit decreasing.

    Deterministic: the longest first, the lower index where lengths are equal, each into the
    earliest bin with room. Runs on the host, in C++ where it is built.

    Raises ValueError that names the first length below 0 or above ``max_tokens``.
    """
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        shape = list(array.shape)
        raise ValueError(f"lengths: found {array.dtype} of shape {shape}, expected integers [n]")
    array = array.astype(np.int64)
    if dispatch.EXTENSION is not None:
        return dispatch.EXTENSION.pack(array, max_tokens)
    return reference.pack(array.tolist(), max_tokens)
