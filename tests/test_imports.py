"""Imports run one way, and `import slap_fast` is light."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    {"cli"},
    {"train", "runstate", "objective", "evaluate", "demo", "report", "doctor", "parity", "interop"}
    | {"data_cli", "export"},
    {"inference", "flops", "plan"},
    {"batch", "blockwise", "checkpoint", "console", "data", "distillation", "distributed"}
    | {"journal", "liger", "losses", "metrics", "models", "signals", "storage", "tally"},
    {"autocast", "ops", "dispatch", "checks", "flash", "opaque"},
    {"reference", "kernels", "_C", "config"},
)
"""The parts of the package, from the top: a part imports from its own layer or one further down. In
the last layer each stands alone. A new part has to be given a place here."""

OTHERS = {"config": set(), "reference": {"torch"}, "kernels": {"torch", "triton"}}
"""All that a part of the last layer may import besides itself and the standard library."""

DEPTH = {part: depth for depth, layer in enumerate(LAYERS) for part in layer}
FACADE = "__init__"
MODULES = sorted(
    path.relative_to(ROOT)
    for top in ("slap_fast", "kernels")
    for path in (ROOT / top).rglob("*.py")
)


def part_of(module: Path) -> str:
    """``slap_fast/data/x.py`` -> data, ``slap_fast/ops.py`` -> ops, ``kernels/x.py`` -> kernels."""
    return "kernels" if module.parts[0] == "kernels" else module.with_suffix("").parts[1]


def imported(source: str) -> Iterator[str]:
    """Dotted names of all that a module imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def complaints(part: str, source: str) -> list[str]:
    """What a module of ``part`` imports and must not."""
    found = []
    for name in imported(source):
        top, *rest = name.split(".")
        target = (rest[0] if rest and rest[0] in DEPTH else FACADE) if top == "slap_fast" else None
        if top == "kernels":
            found.append(f"{name}: the bare name is another package's")
        elif target is None:
            if part in OTHERS and top not in OTHERS[part] | sys.stdlib_module_names:
                found.append(name)
        elif part in LAYERS[-1]:
            if target != part:
                found.append(name)
        elif part not in (FACADE, "cli") and (target == FACADE or DEPTH[target] < DEPTH[part]):
            found.append(name)
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_run_one_way(module: Path) -> None:
    part = part_of(module)
    assert part in DEPTH or part == FACADE, f"give {part} a place in LAYERS"
    assert not complaints(part, (ROOT / module).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("ops", "from slap_fast.models.slap import SlapModel"),
        ("models", "def f():\n    from slap_fast import inference"),
        ("inference", "import slap_fast.train"),
        ("train", "from slap_fast.cli import main"),
        ("data", "from slap_fast import Slap"),
        ("data", "import slap_fast"),
        ("reference", "from slap_fast.config import MelConfig"),
        ("reference", "import numpy"),
        ("kernels", "from slap_fast.reference.rope import rotate"),
        ("kernels", "from transformers import AutoModel"),
        ("config", "import torch"),
        ("config", "from slap_fast import ops"),
        ("ops", "from kernels import attention"),
    ],
)
def test_a_wrong_import_is_seen(part: str, source: str) -> None:
    assert complaints(part, source)


def added_to_torch(code: str) -> tuple[float, set[str]]:
    """Processor seconds and top-level packages that ``code`` adds after ``import torch``."""
    program = f"""
import json, sys, time, torch
before, start = set(sys.modules), time.process_time()
{code}
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, modules = json.loads(run.stdout)
    return seconds, {module.partition(".")[0] for module in modules}


def test_import_adds_little_to_torch() -> None:
    """The operations pick Triton when one is called, not before."""
    runs = [added_to_torch("import slap_fast, slap_fast.ops") for _ in range(3)]
    assert statistics.median(seconds for seconds, _ in runs) < 0.3
    assert "slap_fast" in runs[0][1]
    assert not runs[0][1] & {"transformers", "triton"}
