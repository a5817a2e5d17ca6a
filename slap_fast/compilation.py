"""torch.compile for sizes that change, with less kept for the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MAX_GRAPHS = 32
"""Graphs of one forward; any further size runs eagerly. A gradient cache on uneven ranks needs
more than torch's own 8."""


@functools.cache
def compile_for_any_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled for tensors of any size, at its first call."""
    return torch.compile(function, dynamic=True)


def compiles_chunks(x: Tensor) -> bool:
    """Whether the work on a chunk of ``x`` is compiled: on a GPU, inside a compiled caller."""
    return x.is_cuda and torch.compiler.is_compiling()


def compile_modules(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Compiles their forwards in place, so that parameters keep their names.

    Raises:
        ValueError: ``device`` is a CPU and no C++ compiler is installed.
    """
    from torch._dynamo import config

    # Sizes of 0, 1 and more have separate graphs, with gradient and without.
    config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
    config.specialize_float = True  # numbers that change are tensors; else graphs are traced twice
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise ValueError(
                "compile: found no C++ compiler, expected g++, or one that CXX names, to compile "
                "for a CPU; or set compile=false"
            ) from error
    for module in modules:
        module.compile(dynamic=True, backend=recompute_backend)


def recompute_backend(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], backend: str = "inductor"
) -> Callable[..., Any]:
    """torch.compile's ``backend`` with the outputs of norms and gates recomputed in the backward.

    By itself it keeps them, as the gradients of the products after them need them.
    """
    from torch._dynamo import lookup_backend
    from torch._functorch import config

    with config.patch(ban_recompute_materialized_backward=False):
        return lookup_backend(backend)(graph, inputs)
