"""The contrastive and the caption loss as pure functions: tensors in, scalar out (arXiv 2601.12594,
section 3), and the sum of all three; self-distillation is in ``distillation.py``.

Softmaxes and sums run in fp32 (fp64 when given fp64), under autocast too. Nothing here reads a
value back to the host, so all of it compiles without a graph break. Every loss is a mean over the
rows it is given; a caller that splits a batch weights the parts by their rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from slap_fast.losses import chunked, liger

CAPTION_ROWS = 1024
"""Rows of logits that exist at a time."""


class LossWeights(Protocol):
    """What :func:`total_loss` reads; ``config.LossConfig`` is one."""

    contrastive: float
    ssl: float
    caption: float


def contrastive_loss(
    audio_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    groups: Tensor | None = None,
    block_size: int = 2048,
) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020), with every caption that fits a positive.

    Of each row the targets are uniform over its positives (SupCon's L_out, arXiv 2004.11362);
    without groups, or with all of them distinct, that is CLIP's loss.

    Args:
        audio_features: [B, E], unit norm; B may be 0 or 1, the loss is then 0.
        text_features: [B, E], unit norm; row i belongs to audio i.
        logit_scale: 0-d, multiplies the cosines (the scale itself, not its logarithm).
        groups: int64 [B], rows of equal number have equal captions; or [B, M], where text j is
            right for audio i when ``groups[j, 0]``, its own number, is among ``groups[i]``.
        block_size: rows of the B x B logits that exist at a time.

    Returns:
        0-d fp32 (fp64 for fp64), in nats: the mean of both directions.

    Raises:
        ValueError: shapes that do not fit.
    """
    audio, text, groups = _pairs(audio_features, text_features, groups)
    with torch.autocast(audio.device.type, enabled=False):
        total = sum(
            chunked.group_cross_entropy(
                logit_scale * rows, columns, row_groups, block_size, columns=[column_groups]
            )[0]
            for rows, columns, row_groups, column_groups in (
                (audio, text, groups, groups[:, :1]),
                (text, audio, groups[:, :1], groups),
            )
        )
    return total / (2 * max(1, len(audio)))


def sigmoid_contrastive_loss(
    audio_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    groups: Tensor | None = None,
    block_size: int = 2048,
) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343); every caption that fits is positive.

    Arguments and errors are :func:`contrastive_loss`'s; ``logit_bias`` is 0-d and is added to every
    logit. Returns 0-d fp32 (fp64 for fp64), in nats: the sum over the B x B pairs / B; 0 for B = 0.
    """
    audio, text, groups = _pairs(audio_features, text_features, groups)
    ones = torch.ones_like(audio[:, :1])
    with torch.autocast(audio.device.type, enabled=False):
        total = chunked.group_sigmoid(
            torch.cat((logit_scale * audio, logit_bias * ones), 1),
            torch.cat((text, ones), 1),
            groups,
            block_size,
            columns=[groups[:, :1]],
        )[0]
    return total / max(1, len(audio))


def caption_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    chunk_size: int = CAPTION_ROWS,
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
        chunk_size: rows, of ``blockwise``.
        impl: ``liger`` is that package's, on a GPU; no GPU has measured it yet. On a CPU
            ``blockwise`` takes less time and more memory than torch 2.13's F.linear_cross_entropy
            (``slap-fast bench caption_loss``), which also rounds a bf16 loss to bf16.

    Returns:
        0-d fp32 (fp64 for fp64), in nats; without a label that counts, it and its gradients are 0.

    Raises:
        ValueError: shapes that do not fit, or an ``impl`` that does not load or fit the device.
    """
    _check_shape("labels", labels, (len(hidden),))
    if impl == "liger":
        total = liger.cross_entropy_sum(hidden, weight, labels, ignore_index)
    elif impl == "blockwise":
        total = chunked.cross_entropy(hidden, weight, labels, chunk_size, option=ignore_index)[0]
    else:
        raise ValueError(f"impl: found {impl!r}, expected blockwise or liger")
    return total / (labels != ignore_index).sum().clamp(min=1)


def total_loss(losses: Mapping[str, Tensor], weights: LossWeights) -> Tensor:
    """The weighted sum, 0-d, of ``losses``: any of ``contrastive``, ``ssl`` and ``caption``.

    A weight of 0 leaves its loss out, so that not even a NaN of it counts. Raises ValueError for
    another key, or when nothing is left to train on.
    """
    for name in losses:
        if name not in ("contrastive", "ssl", "caption"):
            raise ValueError(f"losses: found {name!r}, expected contrastive, ssl or caption")
    factors = {name: getattr(weights, name) for name in losses}
    parts = [factors[name] * loss for name, loss in losses.items() if factors[name]]
    if not parts:
        raise ValueError(f"losses: found {list(losses)}, expected one with a weight above 0")
    return torch.stack(parts).sum()


def _full(x: Tensor) -> Tensor:
    """fp64 stays, anything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def _pairs(
    audio_features: Tensor, text_features: Tensor, groups: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both sets of features in full precision, and groups [B, M]."""
    _check_shape("text_features", text_features, tuple(audio_features.shape))
    if groups is None:
        groups = torch.arange(len(audio_features), device=audio_features.device)
    if groups.ndim == 1:
        groups = groups[:, None]
    _check_shape("groups", groups, (len(audio_features), groups.shape[1]))
    return _full(audio_features), _full(text_features), groups


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: found shape {list(tensor.shape)}, expected {list(expected)}")
