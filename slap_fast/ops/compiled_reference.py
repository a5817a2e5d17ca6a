"""Engines that read ``cu_seqlens`` on the host, as single nodes for torch.compile.

The torch engine and the references go sequence by sequence, which no graph can hold. Under
torch.compile they run inside a registered operation instead, with the same numbers. Its backward
runs the engine again, so that nothing of it is kept in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slap_fast.ops import torch_attention
from slap_fast.ops.attention_options import AttentionOptions
from slap_fast.reference import attention as reference_attention
from slap_fast.reference import map_pool as reference_map_pool
from slap_fast.registration import register


def _differentiable(
    schema: str, num_inputs: int, run: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """The operation ``slap_fast::<schema> -> Tensor``, differentiable in its first arguments."""
    name, _, parameters = schema.removesuffix(")").partition("(")

    def forward(*arguments: Any) -> Tensor:
        with torch.no_grad():
            return run(*arguments).contiguous()  # as ``fake`` allocates it

    def backward(dout: Tensor, *arguments: Any) -> list[Tensor]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in arguments[:num_inputs]]
            out = run(*inputs, *arguments[num_inputs:])
            gradients = torch.autograd.grad(out, inputs, dout)
        return [x.contiguous() for x in gradients]

    op = register(f"{schema} -> Tensor", forward, fake)
    backward_op = register(
        f"{name}_backward(Tensor dout, {parameters}) -> Tensor[]",
        backward,
        lambda dout, *arguments: [x.new_empty(x.shape) for x in arguments[:num_inputs]],
    )

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.others, strict=True)
        arguments = [other if tensor is None else tensor for tensor, other in saved]
        return *backward_op(dout, *arguments), *(None,) * (len(arguments) - num_inputs)

    torch.library.register_autograd(f"slap_fast::{name}", gradient, setup_context=save_inputs)
    return op


_OPTIONS = "Tensor? cos, Tensor? sin, int left, int right, bool causal, float? softmax_scale"


def _attention_op(
    impl: str, function: str, parameters: str, num_inputs: int, fake: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """``function`` of an engine; ``parameters`` come before the options."""

    def run(*arguments: Any) -> Tensor:
        *inputs, cos, sin, left, right, causal, softmax_scale = arguments
        cu_seqlens_k = inputs.pop() if function == "attention" else None
        rope = None if cos is None else (cos, sin)
        options = AttentionOptions(cu_seqlens_k, None, rope, (left, right), causal, softmax_scale)
        if impl == "torch":
            return getattr(torch_attention, function)(*inputs, 0, options)
        return getattr(reference_attention, function)(*inputs, 0, **options._asdict())

    return _differentiable(f"{impl}_{function}({parameters}, {_OPTIONS})", num_inputs, run, fake)


_FUNCTIONS = {
    "attention": (
        "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k",
        3,
        lambda q, *_: q.new_empty(q.shape),
    ),
    "attention_qkvpacked": (
        "Tensor qkv, int num_heads_kv, Tensor cu_seqlens",
        1,
        lambda qkv, n, *_: qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * n, qkv.shape[2]),
    ),
}
_ATTENTION_OPS = {
    (impl, function): _attention_op(impl, function, *definition)
    for impl in ("torch", "reference")
    for function, definition in _FUNCTIONS.items()
}
map_pool = _differentiable(
    "reference_map_pool(Tensor x, Tensor score_weight, Tensor cu_seqlens)",
    2,
    reference_map_pool.map_pool,
    lambda x, w, starts: x.new_empty(starts.shape[0] - 1, w.shape[0], x.shape[1]),
)
"""x, score_weight, cu_seqlens -> pooled."""


def attention(impl: str, function: str, arguments: tuple, options: AttentionOptions) -> Tensor:
    """A function of :mod:`slap_fast.ops.attention` by "torch" or "reference"; no ``return_lse``."""
    if options.return_lse:
        raise NotImplementedError("return_lse: these engines have it outside torch.compile only")
    *inputs, _ = arguments  # the engines need no max_seqlen
    if function == "attention":
        inputs.append(options.cu_seqlens_k)
    cos, sin = options.rope or (None, None)
    scalars = *options.window_size, options.causal, options.softmax_scale
    return _ATTENTION_OPS[impl, function](*inputs, cos, sin, *scalars)
