"""Runs map_pool on guarded tensors, see :mod:`guard_pages`; its results are unchanged."""

from __future__ import annotations

import pytest
import torch

from slap_fast.kernels import map_pool as kernels
from tests.helpers import guard_pages
from tests.helpers.pool_problems import inputs, run

LENGTHS = [0, 1, 15, 16, 63, 64, 66, 129]


def trial(seed: int) -> None:
    at_end = seed % 2 == 0
    lengths = [LENGTHS[i] for i in torch.randint(len(LENGTHS), (1 + seed % 4,)).tolist()]
    hidden_size, num_heads = [(20, 2), (100, 3), (16, 1)][seed % 3]
    dtype = [torch.float32, torch.float16][seed // 2 % 2]
    x, *others = inputs(hidden_size, num_heads, dtype, lengths)
    call = x[: sum(lengths)].contiguous() if seed // 4 % 2 else x, *others
    expected = run(*call, "triton")
    with pytest.MonkeyPatch.context() as patch:
        guard_pages.guard_allocations(patch, at_end=at_end)
        actual = run(*(guard_pages.guarded(x, at_end=at_end) for x in call), "triton")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


if __name__ == "__main__":
    kernels.SPLIT = 64
    guard_pages.main(trial)
