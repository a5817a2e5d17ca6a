"""MAP pooling beside the usual heads: `python -m benchmarks.ops.map_pool [--json FILE]`.

Ours reads the tokens once, the probe folded into the keys; a SigLIP-style head projects every token
to a key and a value first (SDPA), in batches that are padded before the clock starts. Forward,
backward and both, on C1 .. C4.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import cases, harness
from slap_fast import ops
from slap_fast.models.layers import MAPHead

PASSES = {"forward": 1, "backward": 2, "both": 3}
"""Times that the tokens cross the memory at least: read, read again, and their gradient written."""
SIGLIP = "SigLIP-style head, padded"


class PaddedHead(nn.Module):
    """Keys and values of every token, then attention from one probe, as SigLIP does."""

    def __init__(self, head: MAPHead, lengths: list[int]) -> None:
        super().__init__()
        self.head, self.lengths = head, lengths
        longest = max(lengths)
        device = head.probe.device
        inside = (
            torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        )
        self.mask = None if len(set(lengths)) == 1 else inside[:, None, None]

    def padded(self, x: Tensor) -> Tensor:
        """x [T, C] -> [B, longest, C], zero at the padding."""
        return nn.utils.rnn.pad_sequence(x.split(self.lengths), batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, longest, C] -> [B, C]."""
        attention = self.head.attention
        w_q, w_kv = attention.in_proj_weight.tensor_split([x.shape[-1]])
        heads = (attention.num_heads, -1)
        q = F.linear(self.head.probe.to(x.dtype).expand(len(x), -1, -1), w_q.to(x.dtype))
        k, v = F.linear(x, w_kv.to(x.dtype)).chunk(2, dim=-1)
        q, k, v = (tensor.unflatten(-1, heads).transpose(1, 2) for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2)[:, 0]
        return F.linear(out, attention.out_proj.weight.to(x.dtype))


def rows_of(case: cases.Case, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per variant and direction."""
    device = harness.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = MAPHead(cases.HIDDEN_SIZE, cases.NUM_HEADS, 4 * cases.HIDDEN_SIZE).to(device)
    starts = cases.cu_seqlens(case.lengths, device)
    siglip = PaddedHead(head, case.lengths)
    shape = sum(case.lengths), cases.HIDDEN_SIZE
    inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    dout = torch.randn(len(case.lengths), cases.HIDDEN_SIZE, device=device, dtype=dtype)
    weight = torch.randn(cases.NUM_HEADS, cases.HIDDEN_SIZE, device=device, dtype=dtype) / 28
    dpooled = torch.randn(len(case.lengths), *weight.shape, device=device, dtype=dtype)

    def folded(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return head.attention(head.probe, x, starts)

    batches = [siglip.padded(x.detach()).requires_grad_() for x in inputs]
    expected = siglip(batches[0])
    out = folded(inputs[0])
    (dx,) = torch.autograd.grad(out, inputs[0], dout)
    (dpadded,) = torch.autograd.grad(expected, batches[0], dout)
    error = max(_error(out, expected), _error(siglip.padded(dx), dpadded))
    if not error < (1e-4 if dtype == torch.float32 else 3e-2):
        raise RuntimeError(f"{case.name}: the two heads differ by {error:.2g}")
    heads = {
        "operation alone": (lambda x: ops.map_pool(x, weight, starts), inputs, dpooled),
        "slap-fast head": (folded, inputs, dout),
        SIGLIP: (siglip, batches, dout),
    }
    calls = {name: harness.directions(*head) for name, head in heads.items()}
    read = shape[0] * shape[1] * dtype.itemsize
    for direction, passes in PASSES.items():
        variants = {name: call[direction] for name, call in calls.items()}
        taken = harness.measure(variants, device, rounds=rounds)
        for name, figures in taken.items():
            ms = figures["ms"]
            row = {"case": case.name, "variant": name, "direction": direction, **figures}
            if name != SIGLIP:
                row |= harness.bandwidth(passes * read, ms)
            yield row | {"times_ours": ms / taken["slap-fast head"]["ms"], "error": error}


def _error(out: Tensor, expected: Tensor) -> float:
    """Relative L2 error of a tensor."""
    out, expected = out.detach().float(), expected.detach().float()
    return float((out - expected).norm() / expected.norm())


def main() -> int:
    """Runs the cases and prints the table."""
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    scale = options.scale or (1.0 if harness.device().type == "cuda" else 0.02)
    packs = cases.packs(scale)[:4]
    parts = {case.name: partial(rows_of, case, options.rounds) for case in packs}
    harness.finish(parts, f"MAP pooling, scale {scale:g}", options, packs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
