"""The audio encoder, each direction and both: `python -m benchmarks.model.encoder [--json FILE]`.

The base model in bf16 on a GPU, the tiny one in fp32 on a CPU, on packs C1 .. C4 of random patches.
Beside it the same network with the same weights as people write it, examples/padded.py: batches
padded to the longest, plain PyTorch; and on a GPU ours with Liger's layers, and compiled in bf16
and in torchao's float8. Their outputs are compared before anything is timed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import cases, harness
from benchmarks.examples import padded
from slap_fast.config import MelConfig, slap_base, slap_tiny
from slap_fast.diagnostics import flops
from slap_fast.models.audio_encoder import AudioEncoder
from slap_fast.models.layers import RMSNorm, SwiGLU
from slap_fast.packed import PackedPatches, patch_coords

TOLERANCE = {"cuda": 3e-2, "cpu": 1e-4}
"""Of the relative L2 difference from slap-fast."""
FLOAT8_TOLERANCE = 0.2
"""Three bits of mantissa: 3 % of each factor, over all layers."""
COMPILED_FOR = ("C1",)
"""The cases that what compiles for minutes gets; float8 needs a multiple of 16 tokens."""
MEL = MelConfig()
PASSES = {"forward": 1, "backward": 2, "both": 3}
"""The work of each direction, in forwards."""

Encode = Callable[[Tensor], Tensor]
"""patches [T, 256] -> features [T, C]."""


def packed(encoder: AudioEncoder, case: cases.Case, device: torch.device) -> Encode:
    """Ours, on one run of tokens."""
    coords = patch_coords(case.lengths, MEL.patches_per_column).to(device)
    starts = cases.cu_seqlens(case.lengths, device)
    return lambda patches: encoder(PackedPatches(patches, coords, starts, max(case.lengths)))


def padded_to_longest(encoder: AudioEncoder, case: cases.Case, device: torch.device) -> Encode:
    """The padded network; padding the patches is part of the work."""
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


def liger(encoder: AudioEncoder, case: cases.Case, device: torch.device) -> Encode:
    """Ours with Liger's RMSNorm and SwiGLU."""
    functional = harness.load("liger_kernel.transformers.functional")
    other = copy.deepcopy(encoder)

    def norm(module: RMSNorm, x: Tensor) -> Tensor:
        return functional.liger_rms_norm(x, module.weight, module.eps, in_place=False)

    def swiglu(module: SwiGLU, x: Tensor) -> Tensor:
        # Two products: it takes gate and up apart, and would copy the halves of one.
        gate, up = (F.linear(x, part) for part in module.gate_up_proj.weight.chunk(2))
        return module.down_proj(functional.liger_swiglu(gate, up))

    for module in other.modules():
        for kind, forward in ((RMSNorm, norm), (SwiGLU, swiglu)):
            if isinstance(module, kind):
                module.forward = partial(forward, module)
    return packed(other, case, device)


def compiled(encoder: AudioEncoder, case: cases.Case, device: torch.device) -> Encode:
    """Ours through torch.compile: the baseline of float8."""
    if device.type != "cuda":
        raise harness.NotInstalled("needs a GPU")
    if case.name not in COMPILED_FOR:
        raise harness.NotInstalled("not compiled for this case")
    return packed(torch.compile(encoder, dynamic=False), case, device)


def float8(encoder: AudioEncoder, case: cases.Case, device: torch.device) -> Encode:
    """The compiled one with all products of the layers in torchao's float8."""
    convert = harness.load("torchao.float8").convert_to_float8_training
    return compiled(convert(copy.deepcopy(encoder)), case, device)


VARIANTS = {
    "slap-fast": packed,
    "PyTorch, padded": padded_to_longest,
    "Liger layers": liger,
    "slap-fast, compiled": compiled,
    "slap-fast, compiled, torchao float8": float8,
}


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
    calls: dict[str, dict[str, harness.Variant | harness.Prepared]] = {
        direction: {} for direction in PASSES
    }
    errors, expected = {}, None
    for name, build in VARIANTS.items():
        try:
            encode = build(encoder, case, device)
        except harness.NotInstalled as reason:
            yield {"case": case.name, "variant": name, "note": str(reason)}
            continue

        def forward(number: int, encode: Encode = encode) -> Tensor:
            with torch.no_grad(), amp:
                return encode(inputs[number % 3])

        def graph(number: int, encode: Encode = encode) -> Tensor:
            with amp:
                return encode(inputs[number % 3])

        def backward(out: Tensor) -> None:
            out.backward(dout.to(out.dtype))

        def both(number: int, graph: Encode = graph) -> None:
            backward(graph(number))

        try:
            out = forward(0).float()
            both(0)
            expected = out if expected is None else expected
            errors[name] = float((out - expected).norm() / expected.norm())
            if not errors[name] < (
                FLOAT8_TOLERANCE if "float8" in name else TOLERANCE[device.type]
            ):
                raise RuntimeError(f"differs from slap-fast by {errors[name]:.2g}")
        except Exception as error:  # a peer may fail in any way; ours may not
            if name == "slap-fast":
                raise
            yield {
                "case": case.name,
                "variant": name,
                "note": f"fails: {harness.first_line(error)}",
            }
            continue
        calls["forward"][name] = forward
        # Not made before, as harness.directions does: each graph holds up to 80 GB.
        calls["backward"][name] = harness.Prepared(graph, backward)
        calls["both"][name] = both
    flop, seconds = (
        flops.audio_encoder(model, case.lengths),
        sum(case.lengths) / cases.TOKENS_PER_SECOND,
    )
    for direction, passes in PASSES.items():
        work, taken = passes * flop, harness.measure(calls[direction], device, rounds=rounds)
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
                "times_ours": ms / taken["slap-fast"]["ms"],
                "error": errors[name],
            }


def main() -> int:
    """Runs the cases and prints the table."""
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    scale = options.scale or default_scale()
    packs = cases.packs(scale)[:4]
    parts = {case.name: partial(rows_of, case, options.rounds) for case in packs}
    harness.finish(parts, f"audio encoder, scale {scale:g}", options, packs)
    return 0


def default_scale() -> float:
    """On half of 256,000 tokens what is padded and not compiled keeps 80 GB for the backward."""
    if harness.device().type == "cpu":
        return 0.01
    return 0.5 if torch.cuda.get_device_properties(0).total_memory > 120e9 else 0.25


if __name__ == "__main__":
    sys.exit(main())
