"""Attention pooling over packed sequences, the learned probe already folded into the keys."""

from __future__ import annotations

import torch
from torch import Tensor


def map_pool(x: Tensor, score_weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """pooled[b, h] = sum_i softmax_i(x_i . score_weight[h]) x_i over the tokens i of sequence b.

    x [T, C], score_weight [H, C], cu_seqlens int32 [B + 1] -> [B, H, C] in x's dtype; the softmax
    is fp32 or wider. A sequence without tokens gives zeros. Rows past ``cu_seqlens[-1]`` are
    not read.
    """
    lengths = cu_seqlens.diff().tolist()
    # One product per sequence: nothing of size [T, H, C], and a sequence's bits ignore its
    # neighbours. Without any sequence, an empty one keeps the gradients defined.
    sequences = x.split([*lengths, len(x) - sum(lengths)])[:-1] or (x[:0],)
    softmax_dtype = torch.promote_types(x.dtype, torch.float32)
    pooled = [
        (score_weight @ tokens.T).to(softmax_dtype).softmax(-1).to(x.dtype) @ tokens
        for tokens in sequences
    ]
    return torch.stack(pooled)[: len(lengths)]
