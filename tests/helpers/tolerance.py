"""The one tolerance rule of the suite. Nothing loosens it: no argument, no environment variable."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slap_fast.diagnostics import parity


def assert_accurate(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    operands: Sequence[Tensor],
    gradient: bool = False,
) -> None:
    """:func:`slap_fast.diagnostics.parity.compare`, all passed; it has the arguments."""
    for figure in parity.compare(actual, eager, truth, operands=operands, gradient=gradient):
        assert figure.passed, f"{figure.name} {figure.value:.3g}, allowed {figure.allowed:.3g}"
