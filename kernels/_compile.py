"""Kernels as a launch compiles them, to compile them where there is no GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

TYPES = {
    "cu_ptr": "*i32",
    "cu_q_ptr": "*i32",
    "cu_k_ptr": "*i32",
    "tiles_ptr": "*i32",
    "lse_ptr": "*fp32",
    "dlse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
    "scale": "fp32",
}
"""Of the arguments that are neither pointers to a call's own dtype nor int32."""


class CompileCase(NamedTuple):
    """One kernel at one launch setting, as ``compile_cases()`` yields it."""

    name: str
    """Kernel, head size, dtype, block sizes."""
    function: Any
    """The jitted function."""
    signature: dict[str, str]
    """Type of every argument: "*bf16", "i64", "constexpr". Pointers and strides are compiled as
    multiples of 16, as those of a launch are."""
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    target: str | None = None
    """The one target that it is for; None: all."""


def compile_case(
    name: str,
    function: Any,
    dtype: str,
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int,
    target: str | None = None,
) -> CompileCase:
    """The case of a kernel for tensors of ``dtype`` ("bf16"), its signature made from the names of
    its arguments; of ``constexprs`` it takes those it knows, None for an absent pointer."""
    signature = {}
    for argument in function.arg_names:
        kind = f"*{dtype}" if argument.endswith("_ptr") else "i32"
        signature[argument] = TYPES.get(argument, kind)
    constants = {name: value for name, value in constexprs.items() if name in signature}
    signature |= dict.fromkeys(constants, "constexpr")
    return CompileCase(name, function, signature, constants, num_warps, num_stages, target=target)
