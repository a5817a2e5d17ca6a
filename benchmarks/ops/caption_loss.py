"""The caption loss beside its peers: `python -m benchmarks.ops.caption_loss [--json FILE]`.

From the decoder's states [N, C] and the output embedding [V, C] to the loss and both gradients,
the labels of one row in eight not counting: a step of the base model in bf16 on a GPU, scaled down
in fp32 on a CPU. Ours and some peers make the gradients in the forward, so all is timed as one.
Each result is compared with fp32 on the first rows before anything is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from slap_fast import compilation, losses

SHAPES = {"cuda": (82_000, 768, 50_368), "cpu": (2_048, 128, 8_192)}
"""Tokens, hidden size and vocabulary."""
CHECKED = 4_096
"""Rows that are compared: in fp32 the logits of all would take 16 GB."""
IGNORED = -100
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Of the relative L2 errors of the loss and of both gradients."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden [N, C], weight [V, C], labels int64 [N] -> the mean over the labels that count, 0-d."""


def ours() -> Loss:
    return losses.caption_loss


def ours_compiled() -> Loss:
    """As a compiled run has it: the work on a chunk of logits is a graph, on a GPU alone."""
    if harness.device().type == "cpu":
        raise harness.NotInstalled("needs a GPU")
    return compilation.compile_for_any_size(losses.caption_loss)


def full_logits() -> Loss:
    """As most people write it, in fp32 after the product."""
    return lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels)


def in_torch() -> Loss:
    """torch's own, in chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise harness.NotInstalled("not in this torch")
    options = nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: F.linear_cross_entropy(
        hidden, weight, labels, options=options
    )


def liger() -> Loss:
    loss = harness.load("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def cut_cross_entropy() -> Loss:
    """With all gradients, as the others: by default it leaves small ones out."""
    loss = harness.load("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, labels: loss(hidden, weight, labels, filter_eps=None)


VARIANTS: dict[str, Callable[[], Loss]] = {
    "slap-fast": ours,
    "slap-fast, compiled": ours_compiled,
    "whole logits": full_logits,
    "F.linear_cross_entropy": in_torch,
    "Liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
}


def with_gradients(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """The loss, and its gradients by hidden and by weight."""
    value = loss(hidden, weight, labels)
    return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]


def rows_of(tokens: int, size: int, words: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per variant; one that cannot run has a note with the reason."""
    device = harness.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = {"device": device, "dtype": dtype}
    inputs = [torch.randn(tokens, size, **options).requires_grad_() for _ in range(3)]
    weight = (torch.randn(words, size, **options) * size**-0.5).requires_grad_()
    labels = torch.randint(words, (tokens,), device=device)
    labels[::8] = IGNORED
    few = inputs[0][:CHECKED].detach().requires_grad_()
    exact = (tensor.detach().float().requires_grad_() for tensor in (few, weight))
    expected = with_gradients(full_logits(), *exact, labels[:CHECKED])
    variants: dict[str, harness.Variant] = {}
    errors = {}
    for name, make in VARIANTS.items():
        try:
            loss = make()
            results = with_gradients(loss, few, weight, labels[:CHECKED])
            errors[name] = max(
                float((a.float() - b).norm() / b.norm())
                for a, b in zip(results, expected, strict=True)
            )
            if not errors[name] < TOLERANCE[dtype]:
                raise RuntimeError(f"wrong, error {errors[name]:.2g}")

            def call(number: int, loss: Loss = loss) -> None:
                with_gradients(loss, inputs[number % 3], weight, labels)

            call(0)  # all logits may not fit
        except harness.NotInstalled as reason:
            yield {"variant": name, "note": str(reason)}
        except Exception as error:  # a peer may fail in any way; ours may not
            if name == "slap-fast":
                raise
            yield {"variant": name, "note": f"fails: {harness.first_line(error)}"}
        else:
            variants[name] = call
    taken = harness.measure(variants, device, rounds=rounds)
    for name, figures in taken.items():
        yield {
            "variant": name,
            "direction": "both",
            **figures,
            "TFLOP/s": 6 * tokens * size * words / figures["ms"] / 1e9,  # three products
            "times_ours": figures["ms"] / taken["slap-fast"]["ms"],
            "error": errors[name],
        }


def main() -> int:
    """Prints the table."""
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    tokens, size, words = SHAPES[harness.device().type]
    tokens = max(16, round(tokens * (options.scale or 1.0)))
    title = f"caption loss, {tokens:,} tokens of {size}, {words:,} words"
    harness.finish({"all": partial(rows_of, tokens, size, words, options.rounds)}, title, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
