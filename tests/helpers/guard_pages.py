"""Tensors that end, or begin, at an inaccessible page, and tensors with sparse memory.

An access outside a guarded tensor kills the process with signal 11, so trials run in a process
of their own: their script ends with ``guard_pages.main(trial)``, a test calls ``invalid_accesses``.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers.paths import ROOT

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
NO_ACCESS_OUTSIDE = "no access outside\n"


def lazy(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A dense tensor whose memory exists only where it is touched (zeros elsewhere)."""
    size = max(math.prod(shape) * dtype.itemsize, 1)
    # The flag is Linux's MAP_NORESERVE.
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    return torch.frombuffer(area, dtype=dtype, count=math.prod(shape)).view(shape)


def guarded(x: Tensor, *, at_end: bool) -> Tensor:
    """A copy of x whose last (or first) byte touches a page without access."""
    size = x.numel() * x.element_size()
    pages = -(-max(size, 1) // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for guard in (base, base + (pages + 1) * PAGE):
        assert LIBC.mprotect(ctypes.c_void_p(guard), PAGE, 0) == 0
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    if size == 0:
        return x.clone()
    copy = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return copy.copy_(x)


def guard_allocations(patch: pytest.MonkeyPatch, *, at_end: bool) -> None:
    """What a kernel's host code allocates by ``new_empty`` is guarded, and starts as NaN."""
    new_empty = torch.Tensor.new_empty

    def empty(x, *size, **options):
        made = new_empty(x, *size, **options)
        # The interpreter names a device, for copies of its own.
        return made if "device" in options else guarded(made, at_end=at_end)

    patch.setattr(torch.Tensor, "new_empty", empty)


def invalid_accesses(script: str, first: int, count: int) -> str:
    """The error of a script's trials from seed ``first`` on; "" where none left its tensors."""
    command = [sys.executable, "-m", f"tests.helpers.{script}", str(first), str(count)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    passed = done.returncode == 0 and done.stdout == NO_ACCESS_OUTSIDE
    return "" if passed else f"exit code {done.returncode}: {done.stderr[-2000:]}"


def main(trial: Callable[[int], None]) -> None:
    """Runs the trials that the command line names: the first seed, and how many."""
    first, count = map(int, sys.argv[1:])
    torch.use_deterministic_algorithms(True, warn_only=True)  # NaN in uninitialised memory
    for seed in range(first, first + count):
        torch.manual_seed(seed)
        print(f"seed {seed}", file=sys.stderr, flush=True)
        trial(seed)
    print(NO_ACCESS_OUTSIDE, end="")
