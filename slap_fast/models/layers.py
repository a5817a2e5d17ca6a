"""Building blocks of the towers: RMSNorm, SwiGLU, packed attention and the MAP head.

Shapes: T packed tokens, B sequences, C hidden size, H heads, D head size. No layer has a bias
unless asked, as in the paper (arXiv 2601.12594, section 3).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slap_fast import ops
from slap_fast.precision import compute_dtype


class Segments(NamedTuple):
    """Bounds of the sequences of a packed run."""

    cu_seqlens: Tensor
    """int32 [B + 1], starts at 0."""
    max_seqlen: int
    """Length of the longest sequence."""
    schedule: Tensor | None = None
    """Result of :func:`slap_fast.ops.attention_schedule`, shared by the layers."""

    @classmethod
    def scheduled(cls, cu_seqlens: Tensor, max_seqlen: int, total_tokens: int) -> Segments:
        """Builds the schedule too, for a run of T tokens that several layers attend to."""
        schedule = ops.attention_schedule(cu_seqlens, max_seqlen, total_tokens)
        return cls(cu_seqlens, max_seqlen, schedule)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis (arXiv 1910.07467).

    In the dtype of its input, with fp32 sums: autocast would return fp32 or, where the weight has
    another dtype, run several kernels instead of one and keep two fp32 copies for the backward.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C] -> [T, C]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C] -> [T, C]."""
        return self.down_proj(silu_mul(self.gate_up_proj(x)))


def silu_mul(*inputs: Tensor) -> Tensor:
    """Computes silu(gate) * up, keeping nothing but its inputs for the backward.

    ``inputs`` is gate and up, each [..., I], or one tensor [..., 2 I] with gate before up. The
    backward computes silu again, on one CPU thread in 0.8 to 0.95 of autograd's own time.
    """
    if torch.compiler.is_compiling():  # the compiler chooses what to keep
        gate, up = _gate_and_up(inputs)
        return F.silu(gate) * up
    return _SiluMul.apply(*inputs)


def _gate_and_up(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return inputs if len(inputs) == 2 else inputs[0].chunk(2, dim=-1)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        gate, up = _gate_and_up(inputs)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors  # a checkpoint lets them be read once
        gate, up = _gate_and_up(inputs)
        dinputs = tuple(map(torch.empty_like, inputs))
        dgate, dup = _gate_and_up(dinputs)
        torch.mul(dout, F.silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(dout * up, gate, grad_input=dgate)
        return dinputs


class Attention(nn.Module):
    """Packed self-attention that rotates inside the operation."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        window_size: tuple[int, int] = (-1, -1),
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.causal = num_heads, window_size, causal
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """x [T, C], rope (cos, sin) each [T, D / 2] -> [T, C]."""
        qkv = self.qkv_proj(x).unflatten(-1, (3 * self.num_heads, -1))
        out = ops.attention_qkvpacked(
            qkv,
            self.num_heads,
            segments.cu_seqlens,
            segments.max_seqlen,
            rope=rope,
            window_size=self.window_size,
            causal=self.causal,
            schedule=segments.schedule,
        )
        return self.out_proj(out.flatten(-2))


class CrossAttention(nn.Module):
    """Packed attention of one run's tokens to another's, sequence by sequence."""

    def __init__(self, hidden_size: int, context_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.kv_proj = nn.Linear(context_size, 2 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context [Tk, context_size] -> k, v, each [Tk, H, D]."""
        return self.kv_proj(context).unflatten(-1, (2 * self.num_heads, -1)).chunk(2, dim=1)

    def forward(
        self, x: Tensor, segments: Segments, keys_values: tuple[Tensor, Tensor], context: Segments
    ) -> Tensor:
        """x [T, C], keys_values each [Tk, H, D] -> [T, C]."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
        out = ops.attention(
            q,
            *keys_values,
            segments.cu_seqlens,
            segments.max_seqlen,
            cu_seqlens_k=context.cu_seqlens,
            max_seqlen_k=context.max_seqlen,
            schedule=segments.schedule,
            schedule_k=context.schedule,
        )
        return self.out_proj(out.flatten(-2))


class _ProbeAttention(nn.Module):
    """An nn.MultiheadAttention from one learned probe, by its parameter names; its weights are
    applied folded."""

    def __init__(self, hidden_size: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size)) if bias else None
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, probe: Tensor, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """probe [1, 1, C], x [T, C] -> [B, C].

        The query is the same for every key, so it folds into the key projection: one score vector
        per head. A key bias shifts all scores of a head alike and drops out; the value projection,
        being linear, is applied after pooling.

        Under autocast the tokens are pooled in its dtype: a preceding norm would leave them in
        fp32, twice the bytes. The fold keeps the dtype of the weights.
        """
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, _, b_v = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        x = x.to(compute_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            q = F.linear(probe.flatten(), w_q, b_q).unflatten(0, (self.num_heads, -1))
            w_k = w_k.unflatten(0, q.shape)
            score_weight = torch.einsum("hd,hdc->hc", q * q.shape[-1] ** -0.5, w_k)
        pooled = ops.map_pool(x, score_weight.to(x.dtype), cu_seqlens)
        w_v = w_v.unflatten(0, (self.num_heads, -1))
        values = torch.einsum("bhc,hdc->bhd", pooled, w_v.to(pooled.dtype)).flatten(1)
        if b_v is not None:
            values = values + b_v * (cu_seqlens.diff() > 0)[:, None]
        return self.out_proj(values)


class MAPHead(nn.Module):
    """Multi-head attention pooling with a learned probe, then a norm + MLP residual.

    Parameter names are those of transformers' SigLIP head, so its weights load unchanged into
    ``MAPHead(..., norm="layer", bias=True)`` (SigLIP, arXiv 2303.15343).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        norm: Literal["rms", "layer"] = "rms",
        bias: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, hidden_size))
        self.attention = _ProbeAttention(hidden_size, num_heads, bias)
        make_norm = RMSNorm if norm == "rms" else nn.LayerNorm
        self.layernorm = make_norm(hidden_size, eps=eps)
        fc1 = nn.Linear(hidden_size, intermediate_size, bias=bias)
        fc2 = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU("tanh"), fc2=fc2))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """x [T, C], cu_seqlens int32 [B + 1] -> pooled [B, C]."""
        pooled = self.attention(self.probe, x, cu_seqlens)
        return pooled + self.mlp(self.layernorm(pooled))


def init_weights(module: nn.Module, num_layers: int) -> None:
    """Truncated normal matrices of std 1 / sqrt(fan in).

    The projections that end a residual branch (``out_proj``, ``down_proj``, ``fc2``) are smaller by
    sqrt(2 x num_layers), so that the residual stream keeps its size with depth (GPT-2).
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            std = parameter.shape[1] ** -0.5
            if {"out_proj", "down_proj", "fc2"} & set(name.split(".")):
                std /= (2 * num_layers) ** 0.5
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
