"""The options that every attention engine takes, once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionOptions(NamedTuple):
    """Keyword arguments of :func:`slap_fast.ops.attention`, which documents and checks them."""

    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None
    rope: tuple[Tensor, Tensor] | None = None
    window_size: tuple[int, int] = (-1, -1)
    causal: bool = False
    softmax_scale: float | None = None
    return_lse: bool = False
