"""Packed rotary attention beside its peers: `python benchmarks/attention.py [--json FILE]`.

One layer of the base model, local and global, on the packs C1 .. C5: from the projection
qkv [T, 3 H, D] to the output, rotary included, forward, backward and both. Each result is compared
with the fp32 reference before anything is timed. A peer that does not load is "not installed".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cases
import harness
import torch
from harness import NotInstalled
from torch import Tensor
from torch.nn import functional as F

from slap_fast import ops

COPIES = 3
"""Inputs that are rotated: three of C1's are 3.5 GB, past any cache."""


class Problem(NamedTuple):
    """What a variant is built for."""

    lengths: list[int]
    window: tuple[int, int]
    cu_seqlens: Tensor
    rope: tuple[Tensor, Tensor]

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)


Attend = Callable[[Tensor], Tensor]
"""qkv [T, 3 H, D] -> out [T, H, D]."""


def ours(problem: Problem) -> Attend:
    """``ops.attention_qkvpacked``: Triton on a GPU."""
    schedule = None
    total = int(problem.cu_seqlens[-1])
    if problem.cu_seqlens.is_cuda:
        schedule = ops.attention_schedule(problem.cu_seqlens, problem.max_seqlen, total)
    return lambda qkv: ops.attention_qkvpacked(
        qkv,
        cases.NUM_HEADS,
        problem.cu_seqlens,
        problem.max_seqlen,
        rope=problem.rope,
        window_size=problem.window,
        schedule=schedule,
    )


def rotated(problem: Problem, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [T, H, D] after a compiled rotary pass, as the peers need them."""
    qk, v = qkv.split((2 * cases.NUM_HEADS, cases.NUM_HEADS), dim=1)
    q, k = rotate(qk, *problem.rope).chunk(2, dim=1)
    return q, k, v


@torch.compile(dynamic=True)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D], cos and sin [T, D / 2], the pairs (j, j + D / 2)."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def fa2_torch(problem: Problem) -> Attend:
    """FlashAttention 2 in torch: ``varlen_attn``."""
    from torch.nn.attention.varlen import varlen_attn

    _needs_gpu(problem)
    starts, longest = problem.cu_seqlens, problem.max_seqlen
    return lambda qkv: varlen_attn(
        *rotated(problem, qkv), starts, starts, longest, longest, window_size=problem.window
    )


def fa2_package(problem: Problem) -> Attend:
    """The flash-attn package."""
    flash = _load("flash_attn").flash_attn_varlen_func
    _needs_gpu(problem)
    starts, longest = problem.cu_seqlens, problem.max_seqlen
    return lambda qkv: flash(
        *rotated(problem, qkv), starts, starts, longest, longest, window_size=problem.window
    )


def fa4(problem: Problem) -> Attend:
    """FlashAttention 4 (CuTe)."""
    flash = _load("flash_attn.cute").flash_attn_varlen_func
    _needs_gpu(problem)
    starts, longest = problem.cu_seqlens, problem.max_seqlen
    window = tuple(None if side == -1 else side for side in problem.window)

    def attend(qkv: Tensor) -> Tensor:
        out = flash(
            *rotated(problem, qkv),
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            window_size=window,
        )
        return out[0] if isinstance(out, tuple) else out

    return attend


def flex(problem: Problem) -> Attend:
    """FlexAttention, compiled, its block mask built once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _needs_gpu(problem)
    device = problem.cu_seqlens.device
    lengths = torch.tensor(problem.lengths, device=device)
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    left, right = (len(document) if side == -1 else side for side in problem.window)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & (j >= i - left) & (j <= i + right)

    total = len(document)
    mask = create_block_mask(visible, None, None, total, total, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in rotated(problem, qkv))
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return attend


def cudnn(problem: Problem) -> Attend:
    """cuDNN's dense attention: equal lengths, no window; what a pack could reach at best."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _needs_gpu(problem)
    if len(set(problem.lengths)) > 1 or problem.window != (-1, -1):
        raise NotInstalled("needs equal lengths and no window")

    def attend(qkv: Tensor) -> Tensor:
        batched = [x.unflatten(0, (len(problem.lengths), -1)) for x in rotated(problem, qkv)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in batched))
        return out.transpose(1, 2).flatten(0, 1)

    return attend


VARIANTS = {
    "slap-fast": ours,
    "FA2 (torch varlen_attn)": fa2_torch,
    "FA2 (flash-attn)": fa2_package,
    "FA4": fa4,
    "FlexAttention": flex,
    "cuDNN dense": cudnn,
}


def _load(name: str) -> Any:
    try:
        return __import__(name, fromlist=["_"])
    except Exception as error:  # a binary that does not fit this torch raises anything
        raise NotInstalled(f"not installed ({type(error).__name__})") from None


def _needs_gpu(problem: Problem) -> None:
    if not problem.cu_seqlens.is_cuda:
        raise NotInstalled("needs a GPU")


def floors(problem: Problem) -> dict[str, dict[str, float]]:
    """FLOP, bytes and the floor in ms of each direction on an H200."""
    pairs = sum(cases.visible_pairs(length, problem.window) for length in problem.lengths)
    product = 2 * cases.NUM_HEADS * cases.HEAD_DIM * pairs
    tensor = 2 * sum(problem.lengths) * cases.HIDDEN_SIZE  # one [T, C] in bf16
    work = {"forward": (2 * product, 4 * tensor), "backward": (5 * product, 8 * tensor)}
    work["both"] = tuple(a + b for a, b in zip(*work.values(), strict=True))
    return {
        direction: {
            "flop": flop,
            "bytes": moved,
            "floor_ms": 1e3 * max(flop / cases.BF16_FLOP_PER_S, moved / cases.COPY_BYTES_PER_S),
        }
        for direction, (flop, moved) in work.items()
    }


def directions(attend: Attend, inputs: list[Tensor], dout: Tensor) -> dict[str, harness.Variant]:
    """The same call timed forward, backward and both; a graph for the backward is made before."""
    graphs: list[tuple[Tensor, Tensor]] = [(attend(qkv), qkv) for qkv in inputs]

    def forward(number: int) -> None:
        with torch.no_grad():
            attend(inputs[number % len(inputs)])

    def backward(number: int) -> None:
        out, qkv = graphs[number % len(inputs)]
        torch.autograd.grad(out, qkv, dout, retain_graph=True)

    def both(number: int) -> None:
        qkv = inputs[number % len(inputs)]
        torch.autograd.grad(attend(qkv), qkv, dout)

    return {"forward": forward, "backward": backward, "both": both}


def correct(attend: Attend, want: tuple[Tensor, Tensor], qkv: Tensor, dout: Tensor) -> float:
    """The largest relative L2 error of out and dqkv against the fp32 reference."""
    out = attend(qkv)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    pairs = zip((out, dqkv), want, strict=True)
    return max(float((a.detach().float() - b).norm() / b.norm()) for a, b in pairs)


def rows_of(case: cases.Case, window: tuple[int, int], rounds: int) -> Iterator[dict[str, Any]]:
    """One row per variant and direction."""
    device = harness.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    starts = cases.cu_seqlens(case.lengths, device)
    positions = torch.cat([torch.arange(length) for length in case.lengths]).to(device).int()
    coords = torch.stack((positions // 4, positions % 4), dim=1)
    problem = Problem(case.lengths, window, starts, ops.rope_tables(coords, cases.HEAD_DIM))
    shape = (sum(case.lengths), 3 * cases.NUM_HEADS, cases.HEAD_DIM)
    inputs = [
        torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(COPIES)
    ]
    dout = torch.randn(shape[0], cases.NUM_HEADS, cases.HEAD_DIM, device=device, dtype=dtype)
    exact = inputs[0].detach().float().requires_grad_()
    out = ops.attention_qkvpacked(
        exact,
        cases.NUM_HEADS,
        starts,
        problem.max_seqlen,
        rope=problem.rope,
        window_size=window,
        impl="reference",
    )
    want = out.detach(), torch.autograd.grad(out, exact, dout.float())[0]
    shared = {"case": case.name, "layer": "global" if window == (-1, -1) else "local"}
    calls, errors = {}, {}
    for name, build in VARIANTS.items():
        try:
            attend = build(problem)
            errors[name] = correct(attend, want, inputs[0], dout)
        except NotInstalled as reason:
            yield {**shared, "variant": name, "note": str(reason)}
            continue
        if not errors[name] < 2e-2:
            yield {**shared, "variant": name, "note": f"wrong, error {errors[name]:.2g}"}
            continue
        calls[name] = directions(attend, inputs, dout)
    for direction, work in floors(problem).items():
        variants = {name: call[direction] for name, call in calls.items()}
        taken = harness.seconds(variants, device, rounds=rounds)
        fastest = harness.summary(taken["slap-fast"])["ms"]
        for name, times in taken.items():
            figures = harness.summary(times)
            yield {
                **shared,
                "variant": name,
                "direction": direction,
                **figures,
                "TFLOP/s": work["flop"] / figures["ms"] / 1e9,
                "GB/s": work["bytes"] / figures["ms"] / 1e6,
                "of_floor": work["floor_ms"] / figures["ms"] if device.type == "cuda" else None,
                "times_ours": figures["ms"] / fastest,
                "error": errors[name],
            }


def main() -> int:
    """Runs the cases and prints the table."""
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    scale = options.scale or (1.0 if harness.device().type == "cuda" else 0.01)
    packs = cases.packs(scale)
    rows = (
        row
        for case in packs
        for window in (cases.WINDOW, (-1, -1))
        for row in rows_of(case, window, options.rounds)
    )
    harness.finish(rows, f"packed rotary attention, scale {scale:g}", options.json, packs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
