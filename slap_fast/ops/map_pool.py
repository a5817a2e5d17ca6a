"""Attention pooling: the arguments, the checks, and the choice of what runs."""

from __future__ import annotations

import torch
from torch import Tensor

from slap_fast.ops import compiled_reference, dispatch
from slap_fast.ops.validation import FLOATS, check_starts, check_tensor
from slap_fast.reference import map_pool as reference


def map_pool(
    x: Tensor, score_weight: Tensor, cu_seqlens: Tensor, *, impl: str | None = None
) -> Tensor:
    """Attention pooling: pooled[b, h] = sum_i softmax_i(x_i . score_weight[h]) x_i over sequence b.

    Args:
        x: [T, C], fp16, bf16, fp32 or fp64.
        score_weight: [H, C]: for head h the probe's query, folded into the key projection and
            scaled, W_k,h^T q_h / sqrt(D). A key bias would drop out of the softmax.
        cu_seqlens: int32 [B + 1], where each sequence begins.
        impl: see the module.

    Returns:
        [B, H, C] in x's dtype; an empty sequence gives zeros.

    Source: multi-head attention pooling, arXiv 2106.04560, appendix; SigLIP's head.
    """
    check_tensor("x", x, FLOATS, ("T", "C"))
    check_tensor("score_weight", score_weight, (x.dtype,), ("H", x.shape[1]), x.device)
    check_starts("cu_seqlens", cu_seqlens, torch.int32, x, "x")
    limits = dispatch.pool_limits(x.shape[1], len(score_weight), x.dtype)
    if dispatch.choose("map_pool", impl, x.device, x.dtype, limits) == "triton":
        from slap_fast.kernels.map_pool import map_pool as run

        return run(x, score_weight, cu_seqlens)
    if torch.compiler.is_compiling():
        return compiled_reference.map_pool(x, score_weight, cu_seqlens)
    return reference.map_pool(x, score_weight, cu_seqlens)
