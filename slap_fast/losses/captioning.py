"""The caption loss (SLAP, arXiv 2601.12594, section 3): next-token cross-entropy."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from slap_fast.losses import chunked
from slap_fast.losses.chunked import LabelTargets

CHUNK_ROWS = 1024
"""Rows of logits that exist at a time."""


def caption_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    chunk_size: int = CHUNK_ROWS,
    impl: Literal["blockwise", "liger"] = "blockwise",
) -> Tensor:
    """Next-token cross-entropy, mean over the labels that are not ``ignore_index``.

    ``F.cross_entropy(hidden @ weight.T, labels)`` with at most ``chunk_size`` rows of logits at a
    time. The product with the weight follows autocast; all after it is fp32.

    Args:
        hidden: [N, C], the decoder's last states; N may be 0.
        weight: [V, C], the output embedding.
        labels: int64 [N], 0 .. V - 1 or ``ignore_index``.
        ignore_index: the label of positions that do not count.
        chunk_size: rows of logits that exist at a time, of ``blockwise``.
        impl: ``blockwise`` is ours, in chunks; ``liger`` the package liger-kernel's, on a GPU, not
            measured yet. On a CPU ``blockwise`` takes less time and more memory than torch 2.13's
            F.linear_cross_entropy (``slap-fast bench caption_loss``), which also rounds a bf16 loss
            to bf16.

    Returns:
        0-d fp32 (fp64 for fp64), in nats; without a label that counts, it and its gradients are 0.

    Raises:
        ValueError: shapes that do not fit, or an ``impl`` that does not load or fit the device.
    """
    if labels.shape != (len(hidden),):
        raise ValueError(f"labels: found shape {list(labels.shape)}, expected {[len(hidden)]}")
    if impl == "liger":
        total = _liger_cross_entropy(hidden, weight, labels, ignore_index)
    elif impl == "blockwise":
        targets = LabelTargets(labels, ignore_index)
        total = chunked.cross_entropy(hidden, weight, targets, chunk_size)[0]
    else:
        raise ValueError(f"impl: found {impl!r}, expected blockwise or liger")
    return total / (labels != ignore_index).sum().clamp(min=1)


def _liger_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int
) -> Tensor:
    """Liger's linear cross-entropy (arXiv 2410.10989), summed over the rows, 0-d fp32.

    It is chunked likewise, with a Triton kernel for the softmax. It reads the number of labels back
    to the host, so a GPU waits once in every loss.
    """
    expected = "expected blockwise, or "
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        from triton import knobs
    except ImportError as error:
        raise ValueError(f"impl: found liger, {expected}liger-kernel installed: {error}") from error
    if hidden.device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(f"impl: found liger on {hidden.device.type}, {expected}a GPU")
    if hidden.dtype == torch.float64:
        raise ValueError(f"impl: found liger for {hidden.dtype}, {expected}at most float32")
    if not len(hidden):  # Liger divides by the number of rows
        return (hidden.sum() + weight.sum()).float() * 0.0
    options = {"ignore_index": ignore_index, "reduction": "sum", "accum_dtype": torch.float32}
    return liger_fused_linear_cross_entropy(hidden, weight, labels, **options)
