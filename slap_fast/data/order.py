"""Which clip comes at which position of a run: computed, not stored.

Every pass over a source is a permutation of its clips under a key made of the seed, the source and
the pass. It is a Feistel network over a grid of about sqrt(n) by sqrt(n) places, walked on where it
leaves 0 .. n - 1 (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), so that 109 M
clips need no memory and resuming at a position is one evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ROUNDS = 4
SLOTS = 1024
"""Draws after which a mix of sources repeats; a weight is rounded to this fraction."""


def permute(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """int64 [n], each in 0 .. size - 1, to int64 [n]: a permutation of 0 .. size - 1 per key."""
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = np.random.SeedSequence(key).generate_state(2 * ROUNDS, np.uint64)
    out = np.array(index, dtype=np.int64)
    outside = np.arange(len(out))
    while len(outside):
        row, column = np.divmod(out[outside], columns)
        for to_row, to_column in keys.reshape(ROUNDS, 2):
            row = (row + _hash(column, to_row, rows)) % rows
            column = (column + _hash(row, to_column, columns)) % columns
        out[outside] = row * columns + column
        outside = outside[out[outside] >= size]
    return out


def _hash(value: np.ndarray, key: np.uint64, size: int) -> np.ndarray:
    """A number below ``size`` from each value: the finaliser of splitmix64."""
    x = value.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(size)).astype(np.int64)


class Order:
    """Endless passes over one or several sources, each in a new order, mixed by weight.

    Args:
        seed: of the orders.
        sizes: clips of each source; a clip's index counts on from the sources before its own.
        weights: of each source, > 0: its share of the draws is weight / sum. Draws of the sources
            interleave as evenly as they can, so every batch has the mix.

    Raises ValueError where a source is empty, or would get no draw.
    """

    def __init__(self, seed: int, sizes: Sequence[int], weights: Sequence[float]) -> None:
        slots = _apportion(weights)
        if min(sizes) < 1 or min(slots) < 1:
            raise ValueError(
                f"weights: found {list(weights)} for sources of {list(sizes)} clips, expected each "
                f"at least 1/{SLOTS} of the sum, and no empty source"
            )
        self.seed, self.sizes, self.slots = seed, sizes, slots
        self.bases = np.cumsum([0, *sizes])
        source = np.repeat(np.arange(len(sizes)), slots)
        number = np.concatenate([np.arange(n) for n in slots])
        order = np.argsort((number + 0.5) / slots[source], kind="stable")
        self._source, self._number = source[order], number[order]

    def draw(self, first: int, count: int) -> list[tuple[int, int]]:
        """(pass, index) of the draws ``first .. first + count - 1``."""
        cycle, slot = np.divmod(np.arange(first, first + count), SLOTS)
        source = self._source[slot]
        nth = cycle * self.slots[source] + self._number[slot]
        epoch, position = np.divmod(nth, np.array(self.sizes)[source])
        index = np.empty(count, dtype=np.int64)
        for s, e in set(zip(source.tolist(), epoch.tolist(), strict=True)):
            chosen = (source == s) & (epoch == e)
            shuffled = permute(position[chosen], self.sizes[s], (self.seed, s, e))
            index[chosen] = self.bases[s] + shuffled
        return list(zip(epoch.tolist(), index.tolist(), strict=True))


def _apportion(weights: Sequence[float]) -> np.ndarray:
    """SLOTS slots in proportion to the weights: the largest remainders are rounded up."""
    exact = np.array(weights, dtype=float) * (SLOTS / math.fsum(weights))
    slots = np.floor(exact).astype(int)
    slots[np.argsort(slots - exact, kind="stable")[: SLOTS - slots.sum()]] += 1
    return slots
