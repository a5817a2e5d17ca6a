"""Compiles every kernel for GPUs that this machine lacks: `make compile-report`.

Each file in kernels/ has a ``compile_cases()`` that yields all it can launch. Every case is
compiled for every target; the report has the registers and the memory that the assembler gave it.
Exit code 1 when one does not compile, when it compiles to something that cannot run, or when it
spills registers on sm_90.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted function has nothing to compile

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import machine
from slap_fast.kernels._compile import CompileCase

MODULES = ("attention", "map_pool", "mel_patches")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that a program may have; a launch that needs more raises."""
PRODUCTS = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")
"""Tensor-core instructions, the best first."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Row(NamedTuple):
    """The outcome of a case on a target."""

    kernel: str
    target: str
    num_warps: int
    num_stages: int
    registers: int | None = None
    """Per thread."""
    spilled: int | None = None
    """Bytes of stack per thread (CUDA), spilled registers (ROCm)."""
    shared: int | None = None
    """Bytes."""
    products: str | None = None
    """The tensor-core instruction, None where there is none."""
    error: str | None = None

    @property
    def fails(self) -> bool:
        """Does not compile, or spills where it may not."""
        spills = self.target == "sm_90" and bool(self.spilled)
        return self.error is not None or spills


def _cases_of(module: str) -> list[CompileCase]:
    return list(importlib.import_module(f"slap_fast.kernels.{module}").compile_cases())


def compile_case(case: CompileCase, target: str) -> Row:
    """Compiles one case for one target; a compile error becomes part of the row."""
    row = Row(case.name, target, case.num_warps, case.num_stages)
    multiples = {
        (position,): [["tt.divisibility", 16]]
        for position, (name, kind) in enumerate(case.signature.items())
        if kind.startswith("*") or (kind != "constexpr" and name.endswith("stride"))
    }
    # On AMD map_pool launches unpipelined: the pass that pipelines fails on its backward.
    unpipelined = TARGETS[target].backend == "hip" and "map_pool" in case.function.__module__
    num_stages = 1 if unpipelined else case.num_stages
    options = {"num_warps": case.num_warps, "num_stages": num_stages}
    try:
        source = ASTSource(case.function, case.signature, case.constexprs, multiples)
        kernel = triton.compile(source, target=TARGETS[target], options=options)
    except Exception as error:  # a compiler may raise anything; the report names it
        return row._replace(error=f"{type(error).__name__}: {str(error).strip()[:300]}")
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    if TARGETS[target].backend == "cuda":
        registers, spilled = _resources(kernel.asm["cubin"])
    else:
        registers, spilled = (
            int(re.search(rf"\.vgpr_{what}:\s*(\d+)", text).group(1))
            for what in ("count", "spill_count")
        )
    shared, error = kernel.metadata.shared, None
    if re.search(r"^\s*trap;", text, re.MULTILINE):
        # What Triton makes of a kernel that needs more tensor memory than there is.
        error = "compiles to a trap"
    elif re.search(r"mma.*\btf32|mfma.*_xf32", text):
        # All kernels ask for "ieee", which Triton ignores for large fp32 products on sm_100.
        error = "rounds fp32 products to tf32"
    elif shared > SHARED[target]:
        error = f"needs {shared} bytes of shared memory, {target} has {SHARED[target]}"
    return row._replace(
        registers=registers,
        spilled=spilled,
        shared=shared,
        products=next((name for name in PRODUCTS if name in text), None),
        error=error,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{what}:(\d+)", text).group(1)) for what in ("REG", "STACK"))


def _compile(job: tuple[str, int, str]) -> Row:
    module, number, target = job
    return compile_case(_cases_of(module)[number], target)


def report(targets: Iterable[str], *, jobs: int) -> list[Row]:
    """Compiles the cases for the targets, ``jobs`` at a time, with a bar on stderr."""
    chosen = [
        (module, number, target)
        for module in MODULES
        for number, case in enumerate(_cases_of(module))
        for target in targets
        if case.target in (None, target)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        rows = pool.map(_compile, chosen, chunksize=4)
        bar = partial(track, description="compiling", total=len(chosen))
        return list(bar(rows, console=Console(stderr=True)))


def render(rows: list[Row]) -> None:
    """The rows as a table on stdout, and the failures below it."""
    table = Table(title=f"{len(rows)} compiled with Triton {triton.__version__}")
    columns = ("kernel", "target", "warps", "stages", "registers", "spilled", "shared", "products")
    for column in columns:
        table.add_column(column, justify="left" if column in ("kernel", "target") else "right")
    for row in rows:
        figures = (row.num_warps, row.num_stages, row.registers, row.spilled, row.shared)
        cells = ("" if figure is None else str(figure) for figure in figures)
        table.add_row(row.kernel, row.target, *cells, row.error or row.products or "")
    Console(width=140).print(table)
    print("spilled: bytes of stack, on gfx942 registers")
    for row in rows:
        if row.fails:
            print(f"FAILS {row.kernel} {row.target}: {row.error or f'spills {row.spilled} bytes'}")


def main() -> int:
    """Compiles, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="with commas between")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the rows as JSON here")
    options = parser.parse_args()
    rows = report(options.targets.split(","), jobs=options.jobs)
    render(rows)
    if options.out:
        machine.write(options.out, machine.record(rows=[row._asdict() for row in rows]))
    return int(any(row.fails for row in rows))


if __name__ == "__main__":
    sys.exit(main())
