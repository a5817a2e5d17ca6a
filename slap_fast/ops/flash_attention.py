"""``impl="flash"``: the varlen kernels of flash-attn or of torch, with rotary applied before.

On request only, a peer to measure against: flash-attn, or else ``torch.nn.attention.varlen``.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from slap_fast.ops.attention_options import AttentionOptions
from slap_fast.reference.rope import rotate

Varlen = Callable[..., tuple[Tensor, Tensor]]


def flash_attn_varlen() -> Varlen:
    """flash-attn's function as :func:`attention` calls it; raises where it does not import."""
    from flash_attn import flash_attn_varlen_func

    def run(*arguments, scale, window, causal):
        options = {"softmax_scale": scale, "window_size": window, "causal": causal}
        return flash_attn_varlen_func(*arguments, **options, return_attn_probs=True)[:2]

    return run


def torch_varlen() -> Varlen:
    """torch's function as :func:`attention` calls it; raises where torch has none."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    # torch 2.11 has no such parameter.
    takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def run(q, k, v, *lengths, scale, window, causal):
        group = q.shape[1] // k.shape[1]
        options = {"scale": scale, "window_size": (window[0], 0) if causal else window}
        if group > 1 and takes_groups:
            options["enable_gqa"] = True
        elif group > 1:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return varlen_attn(q, k, v, *lengths, return_aux=AuxRequest(lse=True), **options)

    return run


@functools.cache
def varlen() -> Varlen | None:
    """The first one that loads, or None. A broken flash-attn raises more than ImportError."""
    for load in (flash_attn_varlen, torch_varlen):
        try:
            return load()
        except Exception:  # noqa: S112
            continue
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, options: AttentionOptions
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`slap_fast.ops.attention`, which documents and checks the arguments."""
    cu_seqlens_k, max_seqlen_k = options.cu_seqlens_k, options.max_seqlen_k
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    if options.rope is not None:
        q, k = rotate(q, options.rope), rotate(k, options.rope)
    # Those functions leave rows past the last sequence undefined, in gradients too.
    inside, inside_k = (
        torch.arange(len(x), device=x.device) < starts[-1]
        for x, starts in ((q, cu_seqlens), (k, cu_seqlens_k))
    )
    q = torch.where(inside[:, None, None], q, 0)
    k, v = (torch.where(inside_k[:, None, None], x, 0) for x in (k, v))
    out, lse = varlen()(
        q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k,
        scale=options.softmax_scale, window=tuple(options.window_size), causal=options.causal,
    )  # fmt: skip
    out = torch.where(inside[:, None, None], out, 0)
    if not options.return_lse:
        return out
    # Their lse of a fully masked row is +inf.
    return out, lse.masked_fill(~inside | lse.isposinf(), -math.inf)


def attention_qkvpacked(
    qkv: Tensor, num_heads_kv: int, cu_seqlens: Tensor, max_seqlen: int, options: AttentionOptions
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` of the queries, keys and values in qkv [T, H + 2 Hkv, D]."""
    num_heads = qkv.shape[1] - 2 * num_heads_kv
    q, k, v = qkv.split((num_heads, num_heads_kv, num_heads_kv), dim=1)
    return attention(q, k, v, cu_seqlens, max_seqlen, options)
