"""Whether somebody else's model still gives its own numbers: the same inputs before and after."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slap_fast.interop.probe_inputs import (
    SHORT,
    TOKENS,
    Inputs,
    is_left_padded,
    is_right_padded,
    probe_inputs,
)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest relative L2 difference of a model's outputs and gradients; of other dtypes 0.05. Layers
add up: one alone is held to 1e-5."""
GRADIENT_FLOOR = 0.01
"""Share of all gradients that one is compared with at least: those of queries and keys are small
differences of large numbers, whose rounding is large beside them in the model's own attention."""


@dataclass(frozen=True)
class _Sample:
    inputs: Inputs
    steps: bool
    """Whether one more token follows, on the cache of the first ones."""
    expected: dict[str, Tensor]


class Probe:
    """A transformers model's own outputs and gradients, to compare with later ones.

    It runs in eval mode, on a few random tokens; parameters, their gradients and the random numbers
    stay as they are.
    """

    def __init__(self, model: Any, parts: list[nn.Module]) -> None:
        """``parts`` are the modules whose parameters' gradients are compared: the first and the
        last that has any."""
        self.model = model
        trained = [[p for p in part.parameters() if p.requires_grad] for part in parts]
        trained = [parameters for parameters in trained if parameters]
        self.watched = list(dict.fromkeys(chain(*trained[:1], *trained[-1:])))
        self.samples: list[_Sample] = []
        with evaluating(self.model):
            for inputs in probe_inputs(model):
                self._add(inputs, steps=False)
                if "use_cache" in inspect.signature(type(model).forward).parameters:
                    self._add({**inputs, "use_cache": False}, steps=False)
                if _generates(model) and inputs.keys() <= {"input_ids", "attention_mask"}:
                    if not is_right_padded(inputs):
                        self._add(inputs, steps=True)

    def obstacle(self) -> str | None:
        """Says why the model as it is now must not be used; None where all numbers are its own."""
        if not self.samples:
            return "nothing to try it on: it does not run on plain text, pixels or audio"
        with evaluating(self.model):
            for sample in self.samples:
                try:
                    actual = self._run(sample.inputs, sample.steps)
                except Exception as error:  # whatever its code raises
                    return f"raises {one_line(error)}"
                floor = GRADIENT_FLOOR * _norm_of_gradients(sample.expected)
                for name, value in sample.expected.items():
                    smallest = floor if name.startswith("gradient") else 0.0
                    difference = _difference(actual.get(name), value, smallest)
                    if not difference <= TOLERANCE.get(value.dtype, 0.05):
                        what = ", ".join(sorted(sample.inputs))
                        return f"computes something else: {name} {difference:.1e} away on {what}"
        return None

    def _add(self, inputs: Inputs, *, steps: bool) -> None:
        try:
            expected = self._run(inputs, steps)
        except Exception:  # it does not run by itself: nothing to hold it to
            return
        if all(value.isfinite().all() for value in expected.values()):
            self.samples.append(_Sample(inputs, steps, expected))

    def _run(self, inputs: Inputs, steps: bool) -> dict[str, Tensor]:
        """Outputs at real positions, and gradients, by name."""
        torch.manual_seed(0)  # of a model that draws random numbers even in eval mode
        if steps:
            with torch.no_grad():
                return _outputs(_next_token(self.model, inputs), None)
        with torch.enable_grad():
            values = _outputs(self.model(**inputs), inputs)
            loss = sum((x.float() * _weights(x)).sum() for x in values.values() if x.requires_grad)
            grads: Any = []
            if self.watched and isinstance(loss, Tensor):
                grads = torch.autograd.grad(loss, self.watched, allow_unused=True)
        named = {f"gradient {i}": grad for i, grad in enumerate(grads) if grad is not None}
        return {name: value.detach() for name, value in {**values, **named}.items()}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A transformers model in eval mode, for the duration; modes and random numbers stay."""
    training = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, was in training.items():
            module.training = was


def _generates(model: Any) -> bool:
    return model.can_generate() and not model.config.is_encoder_decoder


def _next_token(model: Any, inputs: Inputs) -> Any:
    """The output for the last token on the cache of all before it."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    first = model(
        input_ids=inputs["input_ids"][:, :-1], attention_mask=mask[:, :-1], use_cache=True
    )
    return model(
        input_ids=inputs["input_ids"][:, -1:],
        attention_mask=mask,
        past_key_values=first.past_key_values,
        use_cache=True,
    )


def _outputs(output: Any, inputs: Inputs | None) -> dict[str, Tensor]:
    """The floating-point tensors of two samples, at positions that are no padding."""
    values = {
        name: value
        for name, value in output.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:1] == (2,)
    }
    if inputs is None or "attention_mask" not in inputs:
        return values
    if is_left_padded(inputs):  # what is pooled from the first position is of the padding
        length = inputs["attention_mask"].shape[1]
        values = {n: x for n, x in values.items() if x.ndim == 3 and x.shape[1] == length}
    return {name: _real(name, value, inputs) for name, value in values.items()}


def _real(name: str, value: Tensor, inputs: Inputs) -> Tensor:
    """[2, positions, ...] without the padding of the second sample, as [real positions, ...]."""
    of_decoder = "decoder_input_ids" in inputs and not name.startswith("encoder_")
    if value.ndim < 3 or of_decoder and value.shape[1] == inputs["decoder_input_ids"].shape[1]:
        return value
    # A model may have fewer positions than its input: of the second sample the same share is real,
    # less one that may reach into the padding.
    positions = value.shape[1]
    real = positions * SHORT // TOKENS
    if positions != inputs["attention_mask"].shape[1]:
        real = max(real - 1, 0)
    second = value[1, positions - real :] if is_left_padded(inputs) else value[1, :real]
    return torch.cat([value[0], second])


def _weights(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(x.shape, generator=generator).to(x.device)


def _norm_of_gradients(values: dict[str, Tensor]) -> float:
    norms = [x.float().norm() for name, x in values.items() if name.startswith("gradient")]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _difference(actual: Tensor | None, expected: Tensor, smallest: float) -> float:
    """L2 relative to the expected, at least ``smallest``; infinite where it is missing or of
    another shape, NaN where it is."""
    if actual is None or actual.shape != expected.shape:
        return float("inf")
    norm = expected.float().norm().clamp(min=max(smallest, 1e-30))
    return float((actual.float() - expected.float()).norm() / norm)


def unready(module: nn.Module) -> str | None:
    """Says why a module cannot be tried now; None where its parameters are all here."""
    for parameter in module.parameters():
        if parameter.is_meta:
            return "has no weights yet to compare with"
        if isinstance(parameter, DTensor):
            return "its parameters are sharded: patch before fully_shard"
    return None


def one_line(error: Exception) -> str:
    """An error's type and the start of its message."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:97] + '...' if len(message) > 100 else message}"
