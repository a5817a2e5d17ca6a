"""Whether what runs on a device agrees with the reference: ``slap-fast doctor --parity``.

The references of :mod:`slap_fast.reference` in fp64 are the truth. :func:`compare` holds the one
tolerance rule of the project, which the tests use too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from slap_fast import ops
from slap_fast.config import MelConfig
from slap_fast.ops import dispatch
from slap_fast.reference import mel_patches as reference

LENGTHS, SAMPLES = (1, 63, 0, 130, 250, 750), (1, 399, 16_000, 33_333)
LENGTHS_INTERPRETED, SAMPLES_INTERPRETED = (1, 0, 63, 70), (1, 399, 3_000)
"""Interpreted, a kernel takes seconds for what a GPU does in microseconds."""
CANCELLED = 8
"""eps between two fp32 sums of the same products, as dp and delta are for a row that sees one key:
in 80,000 draws of 128 products, summed in two orders, up to 6.2."""
NUM_HEADS, NUM_HEADS_KV, HEAD_DIM, HIDDEN_SIZE = 4, 2, 64, 192


class Figure(NamedTuple):
    """An error beside the largest one allowed."""

    name: str
    value: float
    allowed: float

    @property
    def passed(self) -> bool:
        """A NaN fails."""
        return self.value <= self.allowed


class Comparison(NamedTuple):
    """One figure of one result of an implementation."""

    op: str
    impl: str
    case: str
    figure: Figure


def compare(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    operands: Sequence[Tensor],
    gradient: bool = False,
) -> list[Figure]:
    """Whether ``actual`` is as close to the fp64 ``truth`` as eager PyTorch in the same dtype.

    fp32: the L2 error is at most 1e-6 (gradients 1e-5) of the truth's norm, or twice eager's error.
    fp16, bf16: the mean error is at most 1.1 times and the largest at most twice eager's, with a
    floor of 1 ulp of the truth's mean or largest size.
    In each case the bound is at least one fp32 eps (gradients ``CANCELLED``) of the size of the
    product of ``operands``, the tensors that are multiplied to make the result: a true gradient can
    be exactly 0, the rounding of the terms that cancel in it is not. Infinite entries (``lse``)
    must be the truth's.

    Args:
        actual: the result under test, fp16, bf16 or fp32.
        eager: the same from plain PyTorch in the same dtype.
        truth: the same in fp64.
        operands: (v,) for out, (dout, v, k) for dq, and so on, of any dtype.
        gradient: the wider fp32 bound.
    """
    assert actual.dtype == eager.dtype and truth.dtype == torch.float64
    assert actual.shape == eager.shape == truth.shape
    finite = truth.isfinite()
    differ = (actual.double()[~finite] != truth[~finite]).sum().item()
    infinite = Figure("infinite entries that differ", differ, 0)
    truth = truth[finite]
    if truth.numel() == 0:
        return [infinite]
    error, eager_error = ((x.double()[finite] - truth).abs() for x in (actual, eager))
    sizes = (x.double().square().mean().sqrt().item() for x in operands)
    rounding = torch.finfo(torch.float32).eps * math.prod(sizes) * (CANCELLED if gradient else 1)
    if actual.dtype == torch.float32:
        share = 1e-5 if gradient else 1e-6
        floor = rounding * math.sqrt(truth.numel())
        bound = max(share * truth.norm().item(), 2 * eager_error.norm().item(), floor)
        return [infinite, Figure("L2 error", error.norm().item(), bound)]
    ulp = torch.finfo(actual.dtype).eps
    mean = max(1.1 * eager_error.mean().item(), ulp * truth.abs().mean().item(), rounding)
    largest = max(2 * eager_error.max().item(), ulp * truth.abs().max().item(), rounding)
    mean_error = Figure("mean error", error.mean().item(), mean)
    return [infinite, mean_error, Figure("largest error", error.max().item(), largest)]


def run(device: torch.device) -> Iterator[Comparison]:
    """What runs by default on the device, against the reference in fp64, in under a minute.

    An operation that runs the reference itself has no comparison. On a CPU with TRITON_INTERPRET=1
    the Triton kernels run too, interpreted: that shows that they compute the right thing, and
    nothing of a GPU.
    """
    dtypes = [torch.float32] + [torch.float16, torch.bfloat16] * (device.type == "cuda")
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes:
        for op, compared in (("attention", _attention), ("map_pool", _map_pool)):
            for impl in _compared_impls(op, device, dtype):
                yield from compared(impl, device, dtype, generator)
    for preset, dtype in itertools.product(("kaldi", "torchaudio"), (torch.float32, torch.int16)):
        for impl in _compared_impls("mel_patches", device, dtype):
            yield from _mel_patches(impl, device, preset, dtype, generator)


def _compared_impls(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    chosen = dispatch.which(op, device=str(device), dtype=dtype)[op].partition(":")[0]
    interpreted = ["triton"] if dispatch.INTERPRETED and device.type == "cpu" else []
    return [impl for impl in (chosen, *interpreted) if impl != "reference"]


def _label(impl: str, device: torch.device) -> str:
    return "triton, interpreted" if (impl, device.type) == ("triton", "cpu") else impl


def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _random(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(device)


def _attention(
    impl: str, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Comparison]:
    lengths = LENGTHS if device.type == "cuda" else LENGTHS_INTERPRETED
    starts, total = _starts(lengths, device), sum(lengths)
    dout = _random(generator, device, total, NUM_HEADS, HEAD_DIM).to(dtype)
    position = torch.cat([torch.arange(length) for length in lengths]).to(device)
    coords = torch.stack((position // 4, position % 4), 1).int()
    rope = ops.rope_tables(coords, HEAD_DIM)
    layers = {  # those of the models have keys for each head, which decides what runs
        "local": (NUM_HEADS, {"window_size": (48, 48)}),
        "global": (NUM_HEADS, {}),
        "causal, shared keys": (NUM_HEADS_KV, {"causal": True}),
    }
    for name, (heads, options) in layers.items():
        qkv = _random(generator, device, total, NUM_HEADS + 2 * heads, HEAD_DIM).to(dtype)
        q, k, v = qkv.split((NUM_HEADS, heads, heads), dim=1)
        sequences = {"cu_seqlens": starts, "max_seqlen": max(lengths), "rope": rope}
        attend = partial(ops.attention_qkvpacked, num_heads_kv=heads, **sequences, **options)
        operands = {"out": (v,), "gradient": (dout, v, k, q)}
        yield from _compared("attention", impl, f"{name}, ", attend, qkv, dout, operands)


def _map_pool(
    impl: str, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Comparison]:
    lengths = LENGTHS if device.type == "cuda" else LENGTHS_INTERPRETED
    x = _random(generator, device, sum(lengths), HIDDEN_SIZE).to(dtype)
    weight = _random(generator, device, NUM_HEADS, HIDDEN_SIZE).to(dtype) * HIDDEN_SIZE**-0.5
    dout = _random(generator, device, len(lengths), NUM_HEADS, HIDDEN_SIZE).to(dtype)
    starts = _starts(lengths, device)

    def pool(x: Tensor, impl: str) -> Tensor:
        return ops.map_pool(x, weight.to(x.dtype), starts, impl=impl)

    operands = {"out": (x,), "gradient": (dout, x, weight)}
    yield from _compared("map_pool", impl, "", pool, x, dout, operands)


def _compared(
    op: str,
    impl: str,
    prefix: str,
    call: Callable[..., Tensor],
    x: Tensor,
    dout: Tensor,
    operands: dict[str, tuple[Tensor, ...]],
) -> Iterator[Comparison]:
    """Output and gradient, beside those of the reference in the same dtype and in fp64."""
    results = []
    for name, dtype in ((impl, x.dtype), ("reference", x.dtype), ("reference", torch.float64)):
        inputs = x.to(dtype).detach().requires_grad_()
        out = call(inputs, impl=name)
        (gradient,) = torch.autograd.grad(out, inputs, dout.to(out.dtype))
        results.append({"out": out.detach(), "gradient": gradient})
    for name, factors in operands.items():
        triple = [result[name] for result in results]
        case = f"{prefix}{str(x.dtype).removeprefix('torch.')}, {name}"
        for figure in compare(*triple, operands=factors, gradient=name == "gradient"):
            if figure.allowed > 0 or not figure.passed:  # else no infinite entry differs
                yield Comparison(op, _label(impl, x.device), case, figure)


def _mel_patches(
    impl: str, device: torch.device, preset: str, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Comparison]:
    """|d ln mel| against fp64, at most 1.5 times what fp32 PyTorch has itself.

    The largest may be 1e-3 (0.004 dB) anyway: it comes from one bin near the floor, by chance.
    """
    config, label = MelConfig(preset=preset), _label(impl, device)
    lengths = SAMPLES_INTERPRETED if "interpreted" in label else SAMPLES
    time = torch.arange(sum(lengths)) / config.sample_rate
    noise = 0.1 * torch.randn(len(time), generator=generator)
    waveform = (0.3 * torch.sin(2_000 * time * time) + noise).clamp(-1, 1)
    if dtype == torch.int16:
        waveform = (waveform * 32_767).short()
    starts = _starts(lengths, torch.device("cpu")).long()
    exact = waveform.double() / (1 if dtype.is_floating_point else 32_768)
    truth = reference.mel_patches(exact, starts, config)[0]
    eager = ops.mel_patches(waveform, starts, config, impl="reference").patches
    inputs = waveform.to(device), starts.to(device)
    actual = ops.mel_patches(*inputs, config, impl=impl).patches.cpu()
    error, eager_error = (((x - truth) * config.std).abs().flatten() for x in (actual, eager))
    case = f"{preset}, {str(dtype).removeprefix('torch.')}"
    quantiles = (("99.9 % of |d ln mel|", 0.999, 1e-5), ("largest |d ln mel|", 1.0, 1e-3))
    for name, share, floor in quantiles:
        rank = round(share * (len(error) - 1))
        value, of_eager = (float(x.sort().values[rank]) for x in (error, eager_error))
        allowed = max(1.5 * of_eager, floor)
        yield Comparison("mel_patches", label, case, Figure(name, value, allowed))
