"""Every failure mode of the table has a test that is there."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.failure_modes import ABSENT, FAILURE_MODES, GPU
from tests.helpers.paths import ROOT


def test_no_mode_is_left_out():
    assert list(FAILURE_MODES) == list(range(1, 49))


@pytest.mark.parametrize("mode", FAILURE_MODES)
def test_has_tests_that_exist(mode):
    assert FAILURE_MODES[mode]
    for test in FAILURE_MODES[mode]:
        if test in (GPU, ABSENT):
            continue
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not name or name in defined, test
