"""Packed rotary attention beside its peers: `python -m benchmarks.ops.attention [--json FILE]`.

One layer of the base model, local and global, on the packs C1 .. C5: from the projection
qkv [T, 3 H, D] to the output, rotary included, forward, backward and both. Each result is compared
with the fp32 reference before anything is timed. A peer that does not load is "not installed".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import cases, harness
from benchmarks.ops.attention_peers import VARIANTS, Attend, Problem
from slap_fast import ops

COPIES = 3
"""Inputs that are rotated: three of C1's are 3.5 GB, past any cache."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Of the relative L2 error against the fp32 reference."""
COMPILED_FOR = {"FlexAttention": ("C1", "C3")}
"""Variants that take half a minute to compile for a case and a window, and the cases they get."""


class Work(NamedTuple):
    """What a direction has to do, and the least time one H200 needs for it."""

    flop: int
    moved: int
    """Bytes."""
    floor_ms: float


def work_of(problem: Problem) -> dict[str, Work]:
    """The work of each direction."""
    pairs = sum(cases.visible_pairs(length, problem.window) for length in problem.lengths)
    product = 2 * problem.num_heads * cases.HEAD_DIM * pairs
    tensor = 2 * sum(problem.lengths) * problem.num_heads * cases.HEAD_DIM  # [T, C] in bf16

    def work(products: int, tensors: int) -> Work:
        flop, moved = products * product, tensors * tensor
        floor = max(flop / cases.BF16_FLOP_PER_S, moved / cases.COPY_BYTES_PER_S)
        return Work(flop, moved, 1e3 * floor)

    forward, backward = work(2, 4), work(5, 8)
    both = Work(*(a + b for a, b in zip(forward, backward, strict=True)))
    return {"forward": forward, "backward": backward, "both": both}


def errors(
    attend: Attend, expected: tuple[Tensor, Tensor], qkv: Tensor, dout: Tensor
) -> list[float]:
    """Relative L2 errors of out and of dqkv against the reference; of out alone without a
    backward."""
    results = [attend(qkv)]
    try:
        results += torch.autograd.grad(results[0], qkv, dout)
    except (RuntimeError, NotImplementedError) as error:
        print(f"no backward: {error}", file=sys.stderr)
    pairs = zip(results, expected, strict=False)
    return [float((a.detach().float() - b).norm() / b.norm()) for a, b in pairs]


def reference(problem: Problem, qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """out and dqkv in fp32."""
    exact = qkv.detach().float().requires_grad_()
    out = ops.attention_qkvpacked(
        exact,
        problem.num_heads,
        problem.cu_seqlens,
        problem.max_seqlen,
        rope=problem.rope,
        window_size=problem.window,
        impl="torch",
    )
    return out.detach(), torch.autograd.grad(out, exact, dout.float())[0]


def problem_of(
    lengths: list[int], window: tuple[int, int], num_heads: int, device: torch.device
) -> Problem:
    """Sequences with the rotary tables of clips, four tokens a column."""
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device).int()
    coords = torch.stack((positions // 4, positions % 4), dim=1)
    rope = ops.rope_tables(coords, cases.HEAD_DIM)
    return Problem(lengths, window, num_heads, cases.cu_seqlens(lengths, device), rope)


def rows_of(case: cases.Case, window: tuple[int, int], rounds: int) -> Iterator[dict[str, Any]]:
    """One row per variant and direction; one that cannot run has a note with the reason."""
    device = harness.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    problem = problem_of(case.lengths, window, cases.NUM_HEADS, device)
    shape = (sum(case.lengths), 3 * cases.NUM_HEADS, cases.HEAD_DIM)
    inputs = [
        torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(COPIES)
    ]
    dout = torch.randn(shape[0], cases.NUM_HEADS, cases.HEAD_DIM, device=device, dtype=dtype)
    expected = reference(problem, inputs[0], dout)
    shared = {"case": case.name, "layer": "global" if window == (-1, -1) else "local"}
    calls, errors_of = {}, {}
    for name, build in VARIANTS.items():
        try:
            if case.name not in COMPILED_FOR.get(name, (case.name,)):
                raise harness.NotInstalled("not compiled for this case")
            attend = build(problem)
            errors_of[name] = errors(attend, expected, inputs[0], dout)
            if not max(errors_of[name]) < TOLERANCE[dtype]:
                raise RuntimeError(f"wrong, error {max(errors_of[name]):.2g}")
            backward = len(errors_of[name]) == 2
            calls[name] = harness.directions(attend, inputs, dout, backward=backward)
        except harness.NotInstalled as reason:
            yield {**shared, "variant": name, "note": str(reason)}
        except Exception as error:  # a peer may fail in any way; ours may not
            if name == "slap-fast":
                raise
            yield {**shared, "variant": name, "note": f"fails: {harness.first_line(error)}"}
    assert len(errors_of["slap-fast"]) == 2, "slap-fast has no backward"
    for direction, work in work_of(problem).items():
        variants = {name: call[direction] for name, call in calls.items() if direction in call}
        taken = harness.measure(variants, device, rounds=rounds)
        for name, figures in taken.items():
            ms = figures["ms"]
            yield {
                **shared,
                "variant": name,
                "direction": direction,
                **figures,
                "TFLOP/s": work.flop / ms / 1e9,
                "GB/s": work.moved / ms / 1e6,
                "of_floor": harness.of_floor(work.floor_ms, ms),
                "times_ours": ms / taken["slap-fast"]["ms"],
                "error": max(errors_of[name]),
            }


def main() -> int:
    """Runs the cases and prints the table."""
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    scale = options.scale or (1.0 if harness.device().type == "cuda" else 0.01)
    packs = cases.packs(scale)
    parts = {
        f"{case.name} {layer}": partial(rows_of, case, window, options.rounds)
        for case in packs
        for layer, window in (("local", cases.WINDOW), ("global", (-1, -1)))
    }
    harness.finish(parts, f"packed rotary attention, scale {scale:g}", options, packs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
