"""MAP pooling beside the usual heads: `python benchmarks/map_pool.py [--json FILE]`.

Ours reads the tokens once, the probe folded into the keys; a SigLIP-style head projects every token
to a key and a value first (padded batches, SDPA). Forward, backward and both, on C1 .. C4.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import cases
import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slap_fast import ops
from slap_fast.models.layers import MAPHead

PASSES = {"forward": 1, "backward": 2, "both": 3}
"""Times that the tokens cross the memory at least: read, read again, and their gradient written."""


class PaddedHead(nn.Module):
    """Keys and values of every token, then attention from one probe: SigLIP's way."""

    def __init__(self, head: MAPHead, lengths: list[int]) -> None:
        super().__init__()
        self.head, self.lengths = head, lengths
        longest = max(lengths)
        device = head.probe.device
        inside = (
            torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        )
        self.mask = None if len(set(lengths)) == 1 else inside[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """x [T, C] -> [B, C]; padding it is part of the work, as in the loops it comes from."""
        attention, batch = self.head.attention, len(self.lengths)
        padded = nn.utils.rnn.pad_sequence(x.split(self.lengths), batch_first=True)
        w_q, w_kv = attention.in_proj_weight.tensor_split([x.shape[1]])
        heads = (attention.num_heads, -1)
        q = F.linear(self.head.probe.to(x.dtype).expand(batch, -1, -1), w_q.to(x.dtype))
        k, v = F.linear(padded, w_kv.to(x.dtype)).chunk(2, dim=-1)
        q, k, v = (tensor.unflatten(-1, heads).transpose(1, 2) for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2)[:, 0]
        return F.linear(out, attention.out_proj.weight.to(x.dtype))


def rows_of(case: cases.Case, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per variant and direction."""
    device = harness.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = MAPHead(cases.HIDDEN_SIZE, cases.NUM_HEADS, 4 * cases.HIDDEN_SIZE).to(device)
    starts = cases.cu_seqlens(case.lengths, device)
    padded = PaddedHead(head, case.lengths)
    shape = sum(case.lengths), cases.HIDDEN_SIZE
    inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    dout = torch.randn(len(case.lengths), cases.HIDDEN_SIZE, device=device, dtype=dtype)
    weight = torch.randn(cases.NUM_HEADS, cases.HIDDEN_SIZE, device=device, dtype=dtype) / 28
    dpooled = torch.randn(len(case.lengths), *weight.shape, device=device, dtype=dtype)

    def folded(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return head.attention(head.probe, x, starts)

    heads = {
        "operation alone": (lambda x: ops.map_pool(x, weight, starts), dpooled),
        "slap-fast head": (folded, dout),
        "SigLIP-style head, padded": (padded, dout),
    }
    want = padded(inputs[0]).detach().float()
    error = float((folded(inputs[0]).detach().float() - want).norm() / want.norm())
    if not error < (1e-4 if dtype == torch.float32 else 3e-2):
        raise RuntimeError(f"{case.name}: the two heads differ by {error:.2g}")
    calls = {
        name: harness.directions(pool, inputs, gradient) for name, (pool, gradient) in heads.items()
    }
    read = shape[0] * shape[1] * dtype.itemsize
    for direction, passes in PASSES.items():
        variants = {name: call[direction] for name, call in calls.items()}
        taken = harness.measure(variants, device, rounds=rounds)
        for name, figures in taken.items():
            ms = figures["ms"]
            row = {"case": case.name, "variant": name, "direction": direction, **figures}
            if name != "SigLIP-style head, padded":
                row |= harness.bandwidth(passes * read, ms)
            yield row | {"times_ours": ms / taken["slap-fast head"]["ms"], "error": error}


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
