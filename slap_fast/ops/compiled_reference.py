"""The reference operations as single nodes for torch.compile.

The reference reads ``cu_seqlens`` on the host, sequence by sequence, which no graph can hold. Under
torch.compile it runs inside a registered operation instead, with the same numbers. The operation's
backward runs the reference again, so that nothing of it is kept in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slap_fast.reference import attention as reference_attention
from slap_fast.reference import map_pool as reference_map_pool
from slap_fast.registration import register


def _differentiable(
    schema: str, num_inputs: int, run: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """The operation ``slap_fast::<schema> -> Tensor``, differentiable in its first arguments."""
    name, _, arguments = schema.removesuffix(")").partition("(")

    def forward(*given: Any) -> Tensor:
        with torch.no_grad():
            return run(*given).contiguous()  # as the fake one

    def backward(dout: Tensor, *given: Any) -> list[Tensor]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in given[:num_inputs]]
            out = run(*inputs, *given[num_inputs:])
            found = torch.autograd.grad(out, inputs, dout)
        return [x.contiguous() for x in found]

    def fake_backward(dout: Tensor, *given: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in given[:num_inputs]]

    op = register(f"{schema} -> Tensor", forward, fake)
    backward_op = register(
        f"{name}_backward(Tensor dout, {arguments}) -> Tensor[]", backward, fake_backward
    )

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = [x for x in inputs if not isinstance(x, Tensor)]

    def gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        given = [next(tensors if is_tensor else others) for is_tensor in ctx.is_tensor]
        return *backward_op(dout, *given), *(None,) * (len(given) - num_inputs)

    torch.library.register_autograd(f"slap_fast::{name}", gradient, setup_context=keep)
    return op


def _tables(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if cos is None else (cos, sin)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    left: int,
    right: int,
    causal: bool,
    softmax_scale: float | None,
) -> Tensor:
    return reference_attention.attention(
        q, k, v, cu_seqlens, 0, cu_seqlens_k=cu_seqlens_k, rope=_tables(cos, sin),
        window_size=(left, right), causal=causal, softmax_scale=softmax_scale,
    )  # fmt: skip


def _attention_qkvpacked(
    qkv: Tensor,
    num_heads_kv: int,
    cu_seqlens: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    left: int,
    right: int,
    causal: bool,
    softmax_scale: float | None,
) -> Tensor:
    return reference_attention.attention_qkvpacked(
        qkv, num_heads_kv, cu_seqlens, 0, rope=_tables(cos, sin),
        window_size=(left, right), causal=causal, softmax_scale=softmax_scale,
    )  # fmt: skip


_OPTIONS = "Tensor? cos, Tensor? sin, int left, int right, bool causal, float? softmax_scale"
_attention_op = _differentiable(
    "reference_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, "
    f"{_OPTIONS})",
    3,
    _attention,
    lambda q, *_: q.new_empty(q.shape),
)
_qkvpacked_op = _differentiable(
    f"reference_attention_qkvpacked(Tensor qkv, int num_heads_kv, Tensor cu_seqlens, {_OPTIONS})",
    1,
    _attention_qkvpacked,
    lambda qkv, n, *_: qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * n, qkv.shape[2]),
)
map_pool = _differentiable(
    "reference_map_pool(Tensor x, Tensor score_weight, Tensor cu_seqlens)",
    2,
    reference_map_pool.map_pool,
    lambda x, w, starts: x.new_empty(starts.shape[0] - 1, w.shape[0], x.shape[1]),
)
"""x, score_weight, cu_seqlens -> pooled."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    window_size: tuple[int, int] = (-1, -1),
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor:
    """:func:`slap_fast.ops.attention` without ``return_lse``, of which no model here has need."""
    _refuse(return_lse)
    cos, sin = rope or (None, None)
    return _attention_op(
        q, k, v, cu_seqlens, cu_seqlens_k, cos, sin, *window_size, causal, softmax_scale
    )


def attention_qkvpacked(
    qkv: Tensor,
    num_heads_kv: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    window_size: tuple[int, int] = (-1, -1),
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor:
    """:func:`slap_fast.ops.attention_qkvpacked`, likewise."""
    _refuse(return_lse)
    cos, sin = rope or (None, None)
    return _qkvpacked_op(
        qkv, num_heads_kv, cu_seqlens, cos, sin, *window_size, causal, softmax_scale
    )


def _refuse(return_lse: bool) -> None:
    if return_lse:
        raise NotImplementedError("return_lse: the reference has it outside torch.compile only")
