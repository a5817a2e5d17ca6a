"""Packed attention problems for the kernel tests: made, run and compared with the reference."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from slap_fast.kernels import attention as triton_attention
from slap_fast.kernels.attention import Setting, Settings
from slap_fast.reference import attention as reference_attention
from slap_fast.reference.rope import rope_tables, rotate
from tests.helpers.tolerance import assert_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TAIL = 5
"""Rows past the last sequence: NaN in every input."""

KERNELS = {
    "whole": Settings(
        forward_short={16: Setting(16, 16, 4, 1), 256: Setting(64, 256, 8, 1)},
        forward_tiled=Setting(64, 64, 4, 1),
        backward_short={16: Setting(16, 16, 4, 1), 256: Setting(256, 32, 8, 1)},
        backward_queries=Setting(64, 64, 4, 1),
        backward_keys=Setting(64, 64, 4, 1),
    ),
    "tiled": Settings({}, Setting(64, 32, 4, 1), {}, Setting(128, 32, 8, 1), Setting(64, 64, 4, 1)),
    "mixed": Settings(
        forward_short={64: Setting(32, 64, 4, 1)},
        forward_tiled=Setting(128, 64, 8, 1),
        backward_short={32: Setting(32, 16, 4, 1)},
        backward_queries=Setting(64, 64, 4, 1),
        backward_keys=Setting(32, 128, 8, 1),
    ),
    "table": None,
}
"""Launch settings that make a test run the short-sequence kernel ("whole"), the tiled one, or both,
whatever the dtype, in blocks that its short sequences fill and overrun; None: those of the package.
"""


def force(monkeypatch: Any, kernel: str) -> None:
    """Replaces the launch table by settings of ``KERNELS``."""
    if KERNELS[kernel] is not None:
        settings = dict.fromkeys(triton_attention.SETTINGS, KERNELS[kernel])
        monkeypatch.setattr(triton_attention, "SETTINGS", settings)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


class Eager:
    """Plain attention in eager PyTorch: every product in the dtype of its operands.

    The reference computes in fp32, which would make another rule for fp16.
    """

    @staticmethod
    def attention(
        q, k, v, cu_seqlens, max_seqlen, *, cu_seqlens_k=None, max_seqlen_k=None, rope=None,
        window_size=(-1, -1), causal=False, softmax_scale=None, return_lse=True,
    ):  # fmt: skip
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        group, scale = q.shape[1] // k.shape[1], softmax_scale or q.shape[2] ** -0.5
        left, right = (10**9 if side == -1 else side for side in window_size)
        tied = sum(x[:0].sum() for x in (q, k, v))  # 0: gradients exist even if no row sees a key
        out = torch.zeros_like(q) + tied
        lse = q.new_full((q.shape[1], len(q)), -math.inf).float() + tied
        if rope is not None:
            end = int(cu_seqlens[-1])
            q, k = (rotate(x[:end], tuple(table[:end] for table in rope)) for x in (q, k))
        spans = (itertools.pairwise(x.tolist()) for x in (cu_seqlens, cu_seqlens_k))
        for (begin, end), (begin_k, end_k) in zip(*spans, strict=True):
            position = torch.arange(end - begin, device=q.device) + end_k - end + begin - begin_k
            distance = torch.arange(end_k - begin_k, device=q.device) - position[:, None]
            seen = (distance >= -left) & (distance <= (0 if causal else right))
            rows = seen.any(1).nonzero()[:, 0]
            q_h = q[begin + rows].transpose(0, 1)
            k_h, v_h = (
                x[begin_k:end_k].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v)
            )
            scores = (q_h @ k_h.mT * scale).masked_fill(~seen[rows], -math.inf)
            out_rows = (scores.softmax(-1) @ v_h).transpose(0, 1)
            out = out.index_put((begin + rows,), out_rows)
            lse = lse.index_put(
                (torch.arange(len(lse), device=q.device)[:, None], begin + rows),
                scores.float().logsumexp(-1),
            )
        return out, lse


@dataclasses.dataclass
class Pack:
    """An attention problem, and its results."""

    lengths: list[int]
    lengths_k: list[int] | None = None
    heads: tuple[int, int] = (2, 2)
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    rope: bool = True
    tail: int = TAIL
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, rows_k = self.total + self.tail, self.total_k + self.tail
        shapes = {"q": (rows, 0), "dout": (rows, 0), "k": (rows_k, 1), "v": (rows_k, 1)}
        self.values = {
            name: torch.randn(n, self.heads[i], self.head_dim, device=DEVICE).to(self.dtype)
            for name, (n, i) in shapes.items()
        }
        self.values["dlse"] = torch.randn(self.heads[0], rows, device=DEVICE)
        for name, x in self.values.items():
            end = self.total_k if name in ("k", "v") else self.total
            (x[:, end:] if name == "dlse" else x[end:]).fill_(math.nan)
        self.tables = None
        if self.rope and self.lengths_k is None:
            positions = torch.randint(0, 999, (rows, 1), dtype=torch.int32, device=DEVICE)
            self.tables = rope_tables(positions, self.head_dim)
            for table in self.tables:
                table[self.total :] = math.nan

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def total_k(self) -> int:
        return sum(self.lengths if self.lengths_k is None else self.lengths_k)

    def inputs(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """New q, k and v that require gradients."""
        dtype = dtype or self.dtype
        return [self.values[name].to(dtype).detach().clone().requires_grad_() for name in "qkv"]

    def run(
        self, module: Any, inputs: list[Tensor], *, packed: bool = False, **options: Any
    ) -> dict[str, Tensor]:
        """out, lse, dq, dk, dv of an implementation."""
        options = self.options | options | {"rope": self.tables, "return_lse": True}
        cu_seqlens, longest = starts(self.lengths), max(self.lengths, default=0)
        if packed:
            qkv = torch.cat([x.detach() for x in inputs], 1).requires_grad_()
            out, lse = module.attention_qkvpacked(
                qkv, self.heads[1], cu_seqlens, longest, **options
            )
            leaves = [qkv]
        else:
            if self.lengths_k is not None:
                longest_k = max(self.lengths_k, default=0)
                options |= {"cu_seqlens_k": starts(self.lengths_k), "max_seqlen_k": longest_k}
            out, lse = module.attention(*inputs, cu_seqlens, longest, **options)
            leaves = inputs
        dout, dlse = self.values["dout"].to(out.dtype), self.values["dlse"].to(lse.dtype)
        if module is not triton_attention:
            # A fully masked row has no lse to change; the kernels get NaN there.
            dlse = dlse.masked_fill(lse.isinf(), 0)
            dout = dout.nan_to_num(0)
        else:
            dlse = dlse.masked_fill(lse.isinf(), math.nan).T.contiguous().T
        grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        if packed:
            counts = (self.heads[0], self.heads[1], self.heads[1])
            grads = grads[0].split(counts, dim=1)
        results = (out.detach(), lse.detach(), *grads)
        return dict(zip(("out", "lse", "dq", "dk", "dv"), results, strict=True))

    def assert_accurate(
        self, inputs: list[Tensor] | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """Runs the kernels; asserts the tolerance rule for each result, and the tail."""
        actual = self.run(triton_attention, inputs or self.inputs(), **options)
        eager = self.run(Eager, self.inputs())
        truth = self.run(reference_attention, self.inputs(torch.float64))
        q, k, v, dout = (
            self.values[name][: self.total_k if name in "kv" else self.total].nan_to_num(0)
            for name in ("q", "k", "v", "dout")
        )
        # A score adds up head_dim products: where they cancel, its rounding is still of their size.
        scale = self.options.get("softmax_scale") or self.head_dim**-0.5
        operands = {
            "out": (v,),
            "lse": (q, k * (self.head_dim * scale)),
            "dq": (dout, v, k),
            "dk": (dout, v, q),
            "dv": (dout,),
        }
        for name, factors in operands.items():
            factors = [x if x.numel() else x.new_zeros(1) for x in factors]
            gradient = name.startswith("d")
            triple = actual[name], eager[name].to(actual[name].dtype), truth[name]
            assert_accurate(*triple, operands=factors, gradient=gradient)
        self.assert_tails(actual)
        return actual

    def assert_tails(self, results: dict[str, Tensor]) -> None:
        """Rows past the last sequence are exactly 0, and lse -inf."""
        for name, x in results.items():
            if name == "lse":
                assert x[:, self.total :].eq(-math.inf).all()
            else:
                tail = x[self.total_k if name in ("dk", "dv") else self.total :]
                assert torch.equal(tail, torch.zeros_like(tail)), name


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


def random_pack(seed: int) -> Pack:
    """Random lengths, heads, window, dtype and layout, as K1 draws them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*choices: Any) -> Any:
        return choices[torch.randint(len(choices), (), generator=generator)]

    def length() -> int:
        longest = draw(0, 1, 2, 17, 64, 65, 129, 300)
        return int(torch.randint(longest + 1, (), generator=generator))

    lengths = [length() for _ in range(draw(0, 1, 2, 3, 4))]
    cross = draw(False, False, True)
    heads = draw((1, 1), (2, 2), (2, 1), (4, 2), (3, 1))
    side = draw(-1, 0, 1, 5, 48, 64, 400)
    window = draw((-1, -1), (side, side), (side, -1), (-1, side), (side, 0))
    head_dim = draw(16, 24, 32, 40, 48, 59, 64, 72, 80, 96, 111, 128)
    lengths_k = [length() for _ in lengths] if cross else None
    causal = draw(False, False, True)
    dtype = draw(torch.float32, torch.float16)
    # The rule for fp16 compares means: a mean over a few rows depends on a few roundings.
    after = 0 if causal else math.inf if window[1] == -1 else window[1]
    pairs = zip(lengths, lengths_k or lengths, strict=True)
    if sum(min(n, m + after) for n, m in pairs if m) < 64:
        dtype = torch.float32
    return Pack(
        lengths,
        lengths_k,
        heads,
        head_dim,
        dtype,
        rope=draw(True, False) and head_dim % 2 == 0,
        tail=draw(0, 1, TAIL),
        options={"window_size": window, "causal": causal},
    )
