"""Rotary tables against fp64 maths, entry by entry, and the invariances of rotation."""

from __future__ import annotations

import math

import pytest
import torch

from slap_fast.reference.rope import rope_tables, rotate


def coords(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("theta", [10_000.0, 160_000.0], ids=["theta1e4", "theta1.6e5"])
@pytest.mark.parametrize("axes", [1, 2], ids=["1d", "2d"])
def test_tables_entry_by_entry(axes, theta):
    head_dim = 24
    positions = [0, 1, 3, 256, 257, 15_000, 99_991]
    rows = [(p,) if axes == 1 else (p, i) for i, p in enumerate(positions)]
    cos, sin = rope_tables(coords(*rows), head_dim, theta)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (len(rows), head_dim // 2)
    per_axis = head_dim // (2 * axes)
    for i, row in enumerate(rows):
        for j in range(head_dim // 2):
            # 1-D: theta^(-2j / D), j < D / 2. 2-D: theta^(-4j / D), j < D / 4, time then frequency.
            power = -2 * axes * (j % per_axis) / head_dim
            angle = row[j // per_axis] * theta**power
            # fp32 angles would be wrong by 4e-3 at position 1e5.
            assert abs(cos[i, j].item() - math.cos(angle)) < 6e-8
            assert abs(sin[i, j].item() - math.sin(angle)) < 6e-8


def test_swapping_the_axes_swaps_the_halves():
    time_first = rope_tables(coords((5, 2), (7, 0)), 16)
    freq_first = rope_tables(coords((2, 5), (0, 7)), 16)
    for a, b in zip(time_first, freq_first, strict=True):
        assert torch.equal(a, torch.cat((b[:, 4:], b[:, :4]), dim=1))
        assert not torch.equal(a, b)


def test_rotation_is_a_complex_product():
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    cos, sin = rope_tables(torch.randint(0, 1000, (5, 2), dtype=torch.int32), 8)
    product = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin).to(x.device)[:, None]
    expected = torch.cat((product.real, product.imag), dim=-1)
    torch.testing.assert_close(rotate(x, (cos, sin)), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shift", [(1, 0), (0, 3), (600, 2)], ids=str)
def test_scores_depend_on_relative_positions_only(shift):
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)
    first, second = coords((3, 1)), coords((40, 2))
    moved = [rope_tables(c + coords(shift), 16) for c in (first, second)]
    fixed = [rope_tables(c, 16) for c in (first, second)]
    scores = [(rotate(q, a) * rotate(k, b)).sum() for a, b in (fixed, moved)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-6)
    other = (rotate(q, fixed[0]) * rotate(k, moved[1])).sum()
    assert (other - scores[0]).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_inputs_are_rotated_in_fp32(dtype):
    x = torch.randn(50, 2, 16).to(dtype)
    rope = rope_tables(torch.arange(50, dtype=torch.int32)[:, None], 16)
    assert torch.equal(rotate(x, rope), rotate(x.float(), rope).to(dtype))


def test_gradient(figure):
    for seed in figure("K6", ci=10, soak=100):
        torch.manual_seed(seed)
        x = torch.randn(4, 2, 8, dtype=torch.float64, requires_grad=True)
        rope = rope_tables(torch.randint(0, 50, (4, 2), dtype=torch.int32), 8)
        assert torch.autograd.gradcheck(lambda x, *rope: rotate(x, rope), (x, *rope))
