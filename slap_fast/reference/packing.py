"""Bin packing of sequence lengths: the definition of what ``slap_fast._C.pack`` computes."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: bins of indices whose lengths sum to at most ``max_tokens``.

    The longest goes first, the lower index where lengths are equal, each into the earliest bin with
    room. Bins come in the order of opening, indices in the order of placement. At most
    11/9 of the fewest bins possible, plus 6/9 (Dosa 2007).

    Raises ValueError that names the first length that is negative or above ``max_tokens``.
    """
    for index, length in enumerate(lengths):
        if not 0 <= length <= max_tokens:
            expected = f"expected 0 .. max_tokens = {max_tokens}"
            raise ValueError(f"lengths[{index}]: found {length}, {expected}")
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        chosen = next((b for b, left in enumerate(free) if length <= left), len(bins))
        if chosen == len(bins):
            bins.append([])
            free.append(max_tokens)
        bins[chosen].append(index)
        free[chosen] -= length
    return bins
