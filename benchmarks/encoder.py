"""The audio encoder, forward and with backward: `python benchmarks/encoder.py [--json FILE]`.

The base model in bf16 on a GPU, the tiny one in fp32 on a CPU, on packs C1 .. C4 of random patches.
Beside it the same network with the same weights as people write it, examples/padded.py: batches
padded to the longest, plain PyTorch. Their outputs are compared before anything is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import harness
import torch
from torch import Tensor, nn

from slap_fast import flops
from slap_fast.config import MelConfig, slap_base, slap_tiny
from slap_fast.models.audio_encoder import AudioEncoder
from slap_fast.ops import PackedPatches

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import padded

TOLERANCE = {"cuda": 3e-2, "cpu": 1e-4}
"""Of the relative L2 difference of the two."""
MEL = MelConfig()

Encode = Callable[[Tensor], Tensor]
"""patches [T, 256] -> features [T, C]."""


def packed(encoder: AudioEncoder, case: cases.Case, device: torch.device) -> Encode:
    """Ours, on one run of tokens."""
    token = torch.cat([torch.arange(length) for length in case.lengths]).to(device).int()
    coords = torch.stack((token // MEL.patches_per_column, token % MEL.patches_per_column), dim=1)
    starts = cases.cu_seqlens(case.lengths, device)
    return lambda patches: encoder(PackedPatches(patches, coords, starts, max(case.lengths)))


def padded_to_longest(encoder: AudioEncoder, case: cases.Case, device: torch.device) -> Encode:
    """The other; padding the patches is part of the work."""
    with device:
        other = padded.Encoder(encoder.config, MEL)
    other.load_state_dict(encoder.state_dict())
    lengths = torch.tensor(case.lengths, device=device)
    real = torch.arange(max(case.lengths), device=device) < lengths[:, None]

    def encode(patches: Tensor) -> Tensor:
        batch = nn.utils.rnn.pad_sequence(patches.split(case.lengths), batch_first=True)
        with device:
            return other(batch, real)[real]

    return encode


VARIANTS = {"slap-fast": packed, "PyTorch, padded": padded_to_longest}


def rows_of(case: cases.Case, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per variant and direction."""
    device = harness.device()
    on_gpu = device.type == "cuda"
    model = (slap_base() if on_gpu else slap_tiny()).model
    config = model.audio
    encoder = AudioEncoder(config, MEL).to(device)
    inputs = [torch.randn(sum(case.lengths), MEL.patch_dim, device=device) for _ in range(3)]
    dout = torch.randn(sum(case.lengths), config.hidden_size, device=device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    forwards, boths, want = {}, {}, None
    for name, build in VARIANTS.items():
        encode = build(encoder, case, device)

        def forward(number: int, encode: Encode = encode) -> Tensor:
            with torch.no_grad(), amp:
                return encode(inputs[number % 3])

        def both(number: int, encode: Encode = encode) -> None:
            with amp:
                out = encode(inputs[number % 3])
            out.backward(dout.to(out.dtype))

        try:
            out = forward(0).float()
            both(0)
        except torch.OutOfMemoryError:
            yield {"case": case.name, "variant": name, "note": "out of memory"}
            continue
        want = out if want is None else want
        error = float((out - want).norm() / want.norm())
        if not error < TOLERANCE[device.type]:
            raise RuntimeError(f"{case.name}, {name}: differs from slap-fast by {error:.2g}")
        forwards[name], boths[name] = forward, both
    flop, seconds = (
        flops.audio_encoder(model, case.lengths),
        sum(case.lengths) / cases.TOKENS_PER_SECOND,
    )
    for direction, variants, work in (("forward", forwards, flop), ("both", boths, 3 * flop)):
        taken = harness.measure(variants, device, rounds=rounds)
        for name, figures in taken.items():
            ms = figures["ms"]
            yield {
                "case": case.name,
                "variant": name,
                "direction": direction,
                **figures,
                "ms_256k": ms * cases.TOKENS / sum(case.lengths),
                "TFLOP/s": work / ms / 1e9,
                "mfu": harness.of_floor(1e3 * work / cases.DATASHEET_FLOP_PER_S, ms),
                "audio_s_per_s": 1e3 * seconds / ms,
                "times_ours": ms / taken[next(iter(taken))]["ms"],
            }


def main() -> int:
    """Runs the cases and prints the table."""
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    scale = options.scale or default_scale()
    packs = cases.packs(scale)[:4]
    rows = (row for case in packs for row in rows_of(case, options.rounds))
    harness.finish(rows, f"audio encoder, scale {scale:g}", options.json, packs)
    return 0


def default_scale() -> float:
    """256,000 tokens leave up to 94 GB for the backward."""
    if harness.device().type == "cpu":
        return 0.01
    return 1.0 if torch.cuda.get_device_properties(0).total_memory > 120e9 else 0.5


if __name__ == "__main__":
    sys.exit(main())
