"""Liger's linear cross-entropy (arXiv 2410.10989), where ``liger-kernel`` is installed.

It has blockwise.py's scheme, blocks with the gradient beside the loss, and a Triton kernel for the
softmax. It reads the number of labels back to the host, so a GPU waits once in every loss.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """``F.cross_entropy(hidden @ weight.T, labels, reduction="sum")``, 0-d fp32.

    Raises:
        ValueError: it is not installed, or does not fit the device or dtype.
    """
    wanted = "expected blockwise, or "
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        from triton import knobs
    except ImportError as error:
        raise ValueError(f"impl: found liger, {wanted}liger-kernel installed: {error}") from error
    if hidden.device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(f"impl: found liger on {hidden.device.type}, {wanted}a GPU")
    if hidden.dtype == torch.float64:
        raise ValueError(f"impl: found liger for {hidden.dtype}, {wanted}at most float32")
    if not len(hidden):  # Liger divides by the rows; the gradients are zeros all the same
        return (hidden.sum() + weight.sum()).float() * 0.0
    return liger_fused_linear_cross_entropy(
        hidden, weight, labels, ignore_index=ignore_index, reduction="sum",
        accum_dtype=torch.float32,
    )  # fmt: skip
