"""Runs attention on tensors that end, then begin, at memory that nobody may touch.

An access outside a tensor kills the process with signal 11, so this runs in one of its own:
``python guard_pages.py``. It also holds the lazily committed tensors of the offset test.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


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


def main() -> None:
    import packs
    import pytest

    from slap_fast.kernels import attention

    allocate = attention._allocate_forward, attention._allocate_backward
    shapes = [([1, 15], None), ([17, 0], [3, 16]), ([64, 63], None), ([65], [66]), ([129], None)]
    for way, at_end, (lengths, lengths_k), tail in itertools.product(
        ("whole", "tiled"), (True, False), shapes, (0, 1)
    ):

        def guard(x, at_end=at_end):
            return guarded(x, at_end=at_end)

        with pytest.MonkeyPatch.context() as patch:
            packs.force(patch, way)
            patch.setattr(
                attention, "_allocate_forward", lambda *a, g=guard: tuple(map(g, allocate[0](*a)))
            )
            patch.setattr(
                attention, "_allocate_backward", lambda *a, g=guard: list(map(g, allocate[1](*a)))
            )
            make_starts = packs.starts
            patch.setattr(packs, "starts", lambda n, g=guard, make=make_starts: g(make(n)))
            pack = packs.Pack(lengths, lengths_k, (2, 1), 24, tail=tail)
            pack.options = {"window_size": (20, 40)}
            pack.given = {name: guard(x) for name, x in pack.given.items()}
            if pack.tables is not None:
                pack.tables = tuple(map(guard, pack.tables))
            inputs = [guard(x.detach()).requires_grad_() for x in pack.inputs()]
            pack.check_tails(pack.run(attention, inputs))
    print("no access outside")


if __name__ == "__main__":
    import os
    import sys
    from pathlib import Path

    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
