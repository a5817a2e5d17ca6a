"""Tensors and formulas for the tests of the losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

F64 = torch.float64
SCALE, BIAS = torch.tensor(7.0, dtype=F64), torch.tensor(-3.0, dtype=F64)
CHUNKS = pytest.mark.parametrize("chunk_size", [1, 4, 5, 100], ids=lambda n: f"chunks_of_{n}")


def unit(*shape, seed=0, dtype=F64):
    """Random rows of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=F64), dim=-1).to(dtype)


def normal(*shape, seed=0):
    """Standard normal numbers in fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def log_softmax(x, axis):
    """numpy's, so that no code is shared with the package."""
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))
