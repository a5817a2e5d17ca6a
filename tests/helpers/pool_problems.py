"""MAP pooling problems for the kernel tests: made and run."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from slap_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 63, 0, 130]
TAIL = 5


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def run(
    x: Tensor, score_weight: Tensor, cu_seqlens: Tensor, dout: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """pooled, dx, dscore_weight."""
    x, score_weight = x.detach().requires_grad_(), score_weight.detach().requires_grad_()
    pooled = ops.map_pool(x, score_weight, cu_seqlens, impl=impl)
    return pooled, *torch.autograd.grad(pooled, (x, score_weight), dout)


def inputs(
    C: int = 32, H: int = 2, dtype: torch.dtype = torch.float32, lengths: list[int] = LENGTHS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with TAIL rows of NaN after the last sequence, score_weight, cu_seqlens, dout."""
    total = sum(lengths)
    x = torch.randn(total + TAIL, C, device=DEVICE)
    x[total:] = math.nan
    score_weight = torch.randn(H, C, device=DEVICE) / C**0.5
    dout = torch.randn(len(lengths), H, C, device=DEVICE)
    return x.to(dtype), score_weight.to(dtype), starts(lengths), dout.to(dtype)
