"""Candidates in third-party models for a faster forward: found by their parts, proven by a run.

A candidate is used only if it gives the layer's own numbers on random input and weights, so a
look-alike (Gemma's RMSNorm, a GeGLU) is left alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slap_fast import ops
from slap_fast.interop import replaced_forward
from slap_fast.interop.probe import one_line, unready
from slap_fast.models.layers import silu_mul

TOLERANCE = 1e-5
"""Largest relative difference, in fp32, between a layer and what replaces it."""

_SWIGLU_PARTS = (
    ("gate_proj", "up_proj", "down_proj"),  # LLaMA and its descendants
    ("fc1_g", "fc1_x", "fc2"),  # timm
    ("w1", "w3", "w2"),  # Mixtral's experts
    ("weights_in", "weights_out"),  # DINOv2
    ("gate_up_proj", "down_proj"),  # Phi-3
    ("Wi", "Wo"),  # ModernBERT
)


class Candidate(NamedTuple):
    """A new forward for a layer."""

    option: str
    """The keyword of ``patch``."""
    forward: Callable[..., Tensor]
    """Of (layer, *args, input)."""
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    """Of an input for the comparison."""
    description: str
    """For the report."""


def candidates(module: nn.Module) -> Iterator[Candidate]:
    """Yields at most one candidate for a layer."""
    if _looks_like_rms_norm(module):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        shape = (8, len(module.weight))
        yield Candidate("rms_norm", _rms_norm, (eps,), shape, "torch's fused rms_norm")
    for names in _SWIGLU_PARTS:
        if _has_linear(module, *names):
            shape = (8, getattr(module, names[0]).in_features)
            how = "SwiGLU, one activation less kept"
            yield Candidate("swiglu", _swiglu, (names,), shape, how)
            return
    if _has_linear(module, "qkv", "proj") and isinstance(getattr(module, "num_heads", None), int):
        shape = (2, 4, module.qkv.in_features)
        yield Candidate("attention", _self_attention, (), shape, "packed attention for timm's")


def _looks_like_rms_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        "rmsnorm" in type(module).__name__.lower()
        and not isinstance(module, nn.RMSNorm)  # torch's is fused already
        and isinstance(weight, Tensor)
        and weight.ndim == 1
    )


def _has_linear(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)


def _rms_norm(module: Any, eps: float, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, module.weight.shape, module.weight, eps)


def _swiglu(module: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    *inner, down = (getattr(module, name) for name in names)
    return down(silu_mul(*(part(x) for part in inner)))


def _self_attention(
    module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """x [B, L, C] -> [B, L, C]; with a mask, the layer's own."""
    if attn_mask is not None:
        return replaced_forward.own(module)(x, attn_mask=attn_mask)
    batch_size, length, _ = x.shape
    heads = module.num_heads
    starts = torch.arange(batch_size + 1, device=x.device, dtype=torch.int32) * length
    qkv = module.qkv(x).flatten(0, 1).unflatten(-1, (3 * heads, -1))
    out = ops.attention_qkvpacked(qkv, heads, starts, length, causal=is_causal)
    return module.proj(out.flatten(1)).unflatten(0, (batch_size, length))


def obstacle(module: nn.Module, candidate: Candidate) -> str | None:
    """Says why a candidate must not be used; None if it gives the layer's numbers."""
    if replaced_forward.is_replaced(module):
        return "its forward was replaced before"
    if (why := unready(module)) is not None:
        return why
    if any(isinstance(child, nn.Dropout) and child.p for child in module.modules()):
        return "has dropout inside"
    own = set(inspect.signature(type(module).forward).parameters)
    more = own - set(inspect.signature(candidate.forward).parameters) - {"self"}
    if len(own) > 2 and more - {"hidden_states", "x"}:
        return f"its forward also takes {', '.join(sorted(more))}"
    try:
        difference = _difference(module, candidate)
    except Exception as error:  # whatever its code raises
        return f"raises {one_line(error)}"
    if not difference <= TOLERANCE:
        return f"computes something else: {difference:.1e} away on a random input"
    return None


@torch.no_grad()
def _difference(module: nn.Module, candidate: Candidate) -> float:
    """Measures the relative L2 difference in fp32: the largest of 8 rows, from small to large so
    that an epsilon shows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, candidate.shape[-1], generator=generator)
    x = (x * torch.logspace(-3, 1, 8)[:, None]).reshape(candidate.shape)
    layer = copy.deepcopy(module).float().cpu().eval()
    for parameter in layer.parameters():
        random = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(random / parameter.shape[-1] ** 0.5)
    expected = type(layer).forward(layer, x)
    if not isinstance(expected, Tensor) or expected.shape != x.shape:
        return float("inf")
    actual = candidate.forward(layer, *candidate.args, x)
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
