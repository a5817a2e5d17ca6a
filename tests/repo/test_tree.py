"""The tree: short files, tests that import no other test, private names that stay private."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

MOST_LINES = 450
FILES = sorted(
    path.relative_to(ROOT)
    for top in ("slap_fast", "benchmarks", "tests", "examples")
    for path in (ROOT / top).rglob("*.py")
    if "kernels" not in path.relative_to(ROOT).parts[:2]  # slap_fast/kernels may be a link
)
TESTS = [path for path in FILES if path.parts[0] == "tests"]


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_private(name: str) -> bool:
    """Whether a dotted name has a private part; kernels are tested through their launchers."""
    parts = name.split(".")
    private = any(part.startswith("_") and part != "_C" for part in parts)
    return parts[0] == "slap_fast" and parts[1:2] != ["kernels"] and private


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_short(path: Path) -> None:
    """A kernel file, from forward to public function, may be longer."""
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{path}: found {lines} lines, expected at most {MOST_LINES}"


def test_no_test_imports_another() -> None:
    """Shared code of tests is in tests/helpers."""
    complaints = [
        f"{path}: {name}"
        for path in TESTS
        for name in imported(path)
        if name.startswith("tests.") and ".test_" in name
    ]
    assert not complaints


def test_tests_import_no_private_names() -> None:
    complaints = [
        f"{path}: {name}" for path in TESTS for name in filter(is_private, imported(path))
    ]
    assert not complaints


def test_a_test_folder_is_a_package() -> None:
    """Two files of one name in folders without __init__.py would be one module."""
    folders = {path.parent for path in TESTS}
    assert not [folder for folder in folders if not (ROOT / folder / "__init__.py").exists()]
