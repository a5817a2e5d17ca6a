"""The contrastive losses (SLAP, arXiv 2601.12594, section 3): softmax and sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor

from slap_fast.losses import chunked
from slap_fast.losses.chunked import GroupTargets
from slap_fast.precision import accumulation_dtype


def contrastive_loss(
    audio_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    groups: Tensor | None = None,
    chunk_size: int = 2048,
) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020); every caption that fits is a positive.

    The targets of a row are uniform over its positives (SupCon's L_out, arXiv 2004.11362);
    without groups, or with distinct ones, that is CLIP's loss.

    Args:
        audio_features: [B, E], unit norm; B may be 0 or 1, the loss is then 0.
        text_features: [B, E], unit norm; row i belongs to audio i.
        logit_scale: 0-d, multiplies the cosines (the scale itself, not its logarithm).
        groups: int64 [B], rows of equal number have equal captions; or [B, M], where text j is a
            positive of audio i when ``groups[j, 0]``, its own number, is among ``groups[i]``.
        chunk_size: rows of the B x B logits that exist at a time.

    Returns:
        0-d fp32 (fp64 for fp64), in nats: the mean of both directions.

    Raises:
        ValueError: shapes that do not fit.
    """
    audio, text, groups = _pairs(audio_features, text_features, groups)
    own = groups[:, :1]
    directions = (audio, text, GroupTargets(groups, own)), (text, audio, GroupTargets(own, groups))
    with torch.autocast(audio.device.type, enabled=False):
        total = sum(
            chunked.group_cross_entropy(logit_scale * rows, columns, targets, chunk_size)[0]
            for rows, columns, targets in directions
        )
    return total / (2 * max(1, len(audio)))


def sigmoid_contrastive_loss(
    audio_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    groups: Tensor | None = None,
    chunk_size: int = 2048,
) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343); every caption that fits is a positive.

    Arguments and errors are :func:`contrastive_loss`'s; ``logit_bias`` is 0-d and is added to every
    logit. Returns 0-d fp32 (fp64 for fp64), in nats: the sum over the B x B pairs / B; 0 for B = 0.
    """
    audio, text, groups = _pairs(audio_features, text_features, groups)
    ones, targets = torch.ones_like(audio[:, :1]), GroupTargets(groups, groups[:, :1])
    with torch.autocast(audio.device.type, enabled=False):
        rows = torch.cat((logit_scale * audio, logit_bias * ones), 1)
        columns = torch.cat((text, ones), 1)
        total = chunked.group_sigmoid(rows, columns, targets, chunk_size)[0]
    return total / max(1, len(audio))


def _pairs(
    audio_features: Tensor, text_features: Tensor, groups: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both sets of features in the accumulation dtype, and groups [B, M]."""
    _check_shape("text_features", text_features, tuple(audio_features.shape))
    if groups is None:
        groups = torch.arange(len(audio_features), device=audio_features.device)
    if groups.ndim == 1:
        groups = groups[:, None]
    _check_shape("groups", groups, (len(audio_features), groups.shape[1]))
    return *(x.to(accumulation_dtype(x)) for x in (audio_features, text_features)), groups


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: found shape {list(tensor.shape)}, expected {list(expected)}")
