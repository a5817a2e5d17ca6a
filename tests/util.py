"""The one tolerance rule of the suite. Nothing loosens it: no argument, no environment variable."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def assert_accurate(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    operands: Sequence[Tensor],
    gradient: bool = False,
) -> None:
    """``actual`` is as close to the fp64 ``truth`` as eager PyTorch in the same dtype.

    fp32: the L2 error is at most 1e-6 (gradients 1e-5) of the truth's norm, or twice eager's error.
    fp16, bf16: the mean error is at most 1.1 times and the largest at most twice eager's, with a
    floor of 1 ulp of the truth's mean or largest size.
    In each case the bound is at least one fp32 eps of the size of the product of ``operands``, the
    tensors that are multiplied to make the result: a true gradient can be exactly 0, the rounding
    of the terms that cancel in it is not. Infinite entries (``lse``) must be the truth's.

    Args:
        actual: the result under test, fp16, bf16 or fp32.
        eager: the same from plain PyTorch in the same dtype.
        truth: the same in fp64.
        operands: (v,) for out, (dout, v, k) for dq, and so on, of any dtype.
        gradient: the wider fp32 bound.
    """
    assert actual.dtype == eager.dtype and truth.dtype == torch.float64
    assert actual.shape == eager.shape == truth.shape
    finite = truth.isfinite()
    unbounded = truth[~finite]
    assert torch.equal(actual.double()[~finite], unbounded), "infinite entries differ"
    truth = truth[finite]
    if truth.numel() == 0:
        return
    error = (actual.double()[finite] - truth).abs()
    eager_error = (eager.double()[finite] - truth).abs()
    rounding = torch.finfo(torch.float32).eps * math.prod(
        x.double().square().mean().sqrt().item() for x in operands
    )
    if actual.dtype == torch.float32:
        share = 1e-5 if gradient else 1e-6
        floor = rounding * math.sqrt(truth.numel())
        bound = max(share * truth.norm().item(), 2 * eager_error.norm().item(), floor)
        checks = {"L2 error": (error.norm().item(), bound)}
    else:
        ulp = torch.finfo(actual.dtype).eps
        mean = max(1.1 * eager_error.mean().item(), ulp * truth.abs().mean().item(), rounding)
        largest = max(2 * eager_error.max().item(), ulp * truth.abs().max().item(), rounding)
        checks = {
            "mean error": (error.mean().item(), mean),
            "largest error": (error.max().item(), largest),
        }
    for what, (found, allowed) in checks.items():
        # Written so that a NaN fails.
        assert found <= allowed, f"{what} {found:.3g}, allowed {allowed:.3g}"
