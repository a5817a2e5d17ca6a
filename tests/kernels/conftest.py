"""Fixtures that choose the attention kernel."""

from __future__ import annotations

import pytest

from slap_fast.ops import dispatch
from tests.helpers import packs


@pytest.fixture(params=["whole", "tiled"])
def kernel(request, monkeypatch):
    """The short-sequence kernel ("whole"), then the tiled one, for any lengths."""
    packs.force(monkeypatch, request.param)


@pytest.fixture
def triton_by_default():
    """The public attention runs Triton, on a CPU too."""
    with dispatch.using({"attention": "triton"}):
        yield
