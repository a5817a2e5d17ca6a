"""What every test runs under: fixed seeds, NaN in memory that nobody wrote, and kernels that are
interpreted where there is no GPU."""

from __future__ import annotations

import os
import platform
import random
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line; before torch is loaded

# Processes side by side share the processors.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

if platform.machine() in ("x86_64", "AMD64"):
    # Products in one order on every processor: NumPy's, where kernels are interpreted, and torch's.
    os.environ.setdefault("OPENBLAS_CORETYPE", "Nehalem")
    os.environ.setdefault("MKL_CBWR", "AVX2")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined

# `pytest` alone has not the checkout on its path; at the end, as a mutant's package comes first.
sys.path.append(str(Path(__file__).parents[1]))

from tests.helpers.paths import SHARED_DATA  # noqa: E402

pytest_plugins = ["tests.helpers.figures"]


def pytest_configure() -> None:
    _check_interpreter()
    # Fills torch.empty with NaN (the largest integer for integers), so that a read of memory that
    # was never written shows.
    torch.use_deterministic_algorithms(True, warn_only=True)


def _check_interpreter() -> None:
    """Triton before 3.7 reads numbers out of arrays in a way that numpy 2.4 has ended."""
    try:
        releases = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    except PackageNotFoundError:
        return
    if not torch.cuda.is_available() and releases[0] < (3, 7) and releases[1] >= (2, 4):
        raise pytest.UsageError(
            f"numpy: found {version('numpy')}, expected below 2.4, as without a GPU Triton "
            f"{version('triton')} interprets the kernels: pip install 'numpy<2.4', or triton 3.7"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
    """Real recordings beside the checkout, which not every machine has."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return SHARED_DATA
