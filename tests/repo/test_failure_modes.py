"""Every failure mode has a test that exists, and the documentation lists them all."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.failure_modes import ABSENT, FAILURE_MODES, GPU, PAGE, page
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("name", FAILURE_MODES)
def test_named_tests_exist(name):
    assert FAILURE_MODES[name].tests
    for test in FAILURE_MODES[name].tests:
        if test in (GPU, ABSENT):
            continue
        path, _, function = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not function or function in defined, test


def test_the_page_is_written_from_the_table():
    """``python -m tests.helpers.failure_modes`` writes it."""
    assert len(FAILURE_MODES) >= 48
    assert PAGE.read_text(encoding="utf-8") == page()
