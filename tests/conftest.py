"""Fixtures of all tests: fixed seeds, uninitialised memory filled with NaN, and interpreted kernels
where there is no GPU."""

from __future__ import annotations

import os
import platform
import random
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line; before torch is loaded

# Parallel test processes share the processors.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

if platform.machine() in ("x86_64", "AMD64"):
    # The same order of additions in products on every processor: of NumPy (interpreter) and torch.
    os.environ.setdefault("OPENBLAS_CORETYPE", "Nehalem")
    os.environ.setdefault("MKL_CBWR", "AVX2")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined

# `pytest` without `python -m` lacks the checkout on its path; last, as a mutant's package is first.
sys.path.append(str(Path(__file__).parents[1]))

from tests.helpers.paths import SHARED_DATA  # noqa: E402

pytest_plugins = ["tests.helpers.figures"]


def pytest_configure() -> None:
    _check_interpreter()
    # Fills torch.empty with NaN (integers: the largest), which shows reads of uninitialised memory.
    torch.use_deterministic_algorithms(True, warn_only=True)


def _check_interpreter() -> None:
    """Raises where Triton's interpreter (before 3.7) cannot work with NumPy 2.4 or later."""
    try:
        releases = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    except PackageNotFoundError:
        return
    if not torch.cuda.is_available() and releases[0] < (3, 7) and releases[1] >= (2, 4):
        raise pytest.UsageError(
            f"numpy: found {version('numpy')}, expected below 2.4, as without a GPU Triton "
            f"{version('triton')} interprets the kernels: pip install 'numpy<2.4', or triton 3.7"
        )


def _minutes(item: pytest.Item) -> float:
    """Adds to the mark ``slow`` the tests that take more than a minute."""
    slow = item.get_closest_marker("slow")
    return slow.kwargs.get("minutes", 0.0) if slow else 0.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_minutes, reverse=True)  # side by side, no process ends with a long one alone
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """Real recordings beside the checkout; skips where there are none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return SHARED_DATA
