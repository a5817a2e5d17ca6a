"""Padded attention by torch, on a dense mask: what the packed operation leaves to others."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from slap_fast.models.packed_view import PackedView


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """query [B, H, L, D], key and value [B, Hkv, Lk, D], mask [B, 1 or H, L, Lk or more], bool or
    added to the scores -> [B, L, H, D]."""
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        mask[..., : key.shape[2]],
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


def dropout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: PackedView,
    keys: PackedView,
    *,
    dropout: float,
    window: int,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """query [B, H, L, D], key and value [B, Hkv, Lk, D] -> [B, L, H, D], 0 at the padding.

    ``window`` is the largest distance, -1 for any. As in packed attention, the last query of a
    sequence stands where its last key does.
    """
    q_number, q_from_end = queries.places(len(query), query.shape[2])
    k_number, k_from_end = keys.places(len(key), key.shape[2])
    ahead = q_from_end[:, :, None] - k_from_end[:, None, :]
    seen = q_number[:, :, None] == k_number[:, None, :]
    if causal:
        seen = seen & (ahead <= 0)
    if window >= 0:
        seen = seen & (ahead.abs() <= window)
    real = (q_number < len(queries.cu_seqlens) - 1) & seen.any(-1)
    seen = seen | ~real[:, :, None]  # a row that sees nothing would be NaN
    out = dense_attention(query, key, value, seen[:, None], dropout=dropout, scale=scale)
    return out.masked_fill(~real[:, :, None, None], 0)
