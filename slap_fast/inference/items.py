"""Audio items, in the forms that :class:`slap_fast.Slap` takes them, as blocks of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from slap_fast.data.audio.decode import as_waveform, decode, stream


def blocks(item: Any, sample_rate: int) -> Iterator[np.ndarray]:
    """The item's samples at ``sample_rate``: float32 mono blocks [n].

    An array has one block; memory does not grow with a file. Raises AudioError.
    """
    source, start, end = item if _is_span(item) else (item, 0.0, None)
    if _holds_array(source):
        yield _resampled(source, sample_rate)
    else:
        yield from stream(source, sample_rate=sample_rate, start=start, end=end)


def whole(item: Any, sample_rate: int) -> np.ndarray:
    """The item in one piece: float32 mono [num_samples] at ``sample_rate``. Raises AudioError."""
    source, start, end = item if _is_span(item) else (item, 0.0, None)
    if _holds_array(source):
        return _resampled(source, sample_rate)
    return decode(source, sample_rate=sample_rate, start=start, end=end).waveform


def is_list(items: Any) -> bool:
    """Whether these are several items, not one."""
    return isinstance(items, Sequence) and not isinstance(items, (str, bytes, tuple))


def as_list(items: Any) -> Sequence[Any]:
    """The items, or the one item in a list."""
    return items if is_list(items) else [items]


def name_of(item: Any) -> str:
    """The file, or a description of the array, for messages."""
    source = item[0] if isinstance(item, tuple) else item
    return f"array of {len(source)} samples" if _is_array(source) else str(source)


def _holds_array(source: Any) -> bool:
    return _is_array(source[0] if isinstance(source, tuple) else source)


def _resampled(source: Any, sample_rate: int) -> np.ndarray:
    array, array_rate = source if isinstance(source, tuple) else (source, sample_rate)
    return as_waveform(array, array_rate, sample_rate=sample_rate)


def _is_array(item: Any) -> bool:
    return isinstance(item, (np.ndarray, torch.Tensor))


def _is_span(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 3
