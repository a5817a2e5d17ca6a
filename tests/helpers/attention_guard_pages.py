"""Runs attention on guarded tensors, see :mod:`guard_pages`; its results are unchanged."""

from __future__ import annotations

import pytest
import torch

from slap_fast.kernels import attention
from tests.helpers import guard_pages, packs

LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 129]


def trial(seed: int) -> None:
    def lengths(count: int) -> list[int]:
        return [LENGTHS[i] for i in torch.randint(len(LENGTHS), (count,)).tolist()]

    def guard(x: torch.Tensor) -> torch.Tensor:
        return guard_pages.guarded(x, at_end=seed % 2 == 0)

    count, cross = 1 + seed // 2 % 2, seed // 4 % 2
    lengths_k = lengths(count) if cross else None
    pack = packs.Pack(lengths(count), lengths_k, (2, 1 + seed // 3 % 2), 24, tail=seed // 5 % 2)
    pack.options = {"window_size": [(20, 40), (-1, -1)][seed // 7 % 2]}
    allocate_forward, allocate_backward = attention._allocate_forward, attention._allocate_backward
    starts = packs.starts
    with pytest.MonkeyPatch.context() as patch:
        packs.force(patch, ["whole", "tiled", "mixed"][seed % 3])
        expected = pack.run(attention, pack.inputs())
        patch.setattr(
            attention, "_allocate_forward", lambda *a: tuple(map(guard, allocate_forward(*a)))
        )
        patch.setattr(
            attention, "_allocate_backward", lambda *a: list(map(guard, allocate_backward(*a)))
        )
        patch.setattr(packs, "starts", lambda n: guard(starts(n)))
        pack.values = {name: guard(x) for name, x in pack.values.items()}
        if pack.tables is not None:
            pack.tables = tuple(map(guard, pack.tables))
        actual = pack.run(attention, [guard(x.detach()).requires_grad_() for x in pack.inputs()])
    pack.assert_tails(actual)
    packs.assert_same_bits(actual, expected)


if __name__ == "__main__":
    guard_pages.main(trial)
