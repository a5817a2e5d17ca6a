"""A run whose checkpoints the tests copy and damage."""

from __future__ import annotations

import pytest

from tests.helpers import runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps with the checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("run")
    runs.start_or_resume(out, runs.override(runs.TINY, {"steps": 4}))
    return out
