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

from tests.helpers.paths import ROOT

ROOMS = (
    ("cli",),
    ("demo",),
    ("evaluation", "interop"),
    ("training", "inference"),
    ("diagnostics",),
    ("checkpoint",),
    ("data",),
    ("models", "losses"),
    ("ops",),
    ("reference", "kernels", "_C"),
    (
        "atomic_files",
        "compilation",
        "console",
        "distributed",
        "packed",
        "precision",
        "registration",
    ),
    ("config",),
)
"""The rooms of the package from the top. A room imports itself and rooms of a later line, never one
beside it; those of the ground, the last line but one, import each other. A new room has to be given
a place here."""

GROUND = ROOMS[-2]
OURS = {"config": set(), "reference": set(), "kernels": {"registration"}}
OTHERS = {"config": set(), "reference": {"torch"}, "kernels": {"torch", "triton"}}
"""All that such a room may import besides itself and the standard library."""

DEPTH = {room: depth for depth, line in enumerate(ROOMS) for room in line}
FACADE = "__init__"
MODULES = sorted(
    path.relative_to(ROOT)
    for top in ("slap_fast", "kernels")
    for path in (ROOT / top).rglob("*.py")
)


def room_of(module: Path) -> str:
    """``slap_fast/data/x.py`` -> data, ``kernels/x.py`` -> kernels."""
    return "kernels" if module.parts[0] == "kernels" else module.with_suffix("").parts[1]


def imported(source: str) -> Iterator[str]:
    """Dotted names of all that a module imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed(room: str, target: str) -> bool:
    """Whether a module of ``room`` may import one of ``target``."""
    if room == target or room == FACADE:
        return True
    if target == FACADE:
        return room == "cli"
    if room in OURS:
        return target in OURS[room]
    return DEPTH[target] > DEPTH[room] or (room in GROUND and target in GROUND)


def complaints(room: str, source: str) -> list[str]:
    """What a module of ``room`` imports and must not."""
    problems = []
    for name in imported(source):
        top, *parts = name.split(".")
        if top == "kernels":
            problems.append(f"{name}: the bare name is another package's")
        elif top == "slap_fast":
            target = parts[0] if parts and parts[0] in DEPTH else FACADE
            problems += [name] * (not allowed(room, target))
        elif room in OTHERS and top not in OTHERS[room] | sys.stdlib_module_names:
            problems.append(name)
    return problems


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_run_one_way(module: Path) -> None:
    room = room_of(module)
    assert room in DEPTH or room == FACADE, f"give {room} a place in ROOMS"
    assert not complaints(room, (ROOT / module).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("ops", "from slap_fast.models.slap import SlapModel"),
        ("models", "def f():\n    from slap_fast import inference"),
        ("inference", "import slap_fast.training.loop"),
        ("training", "from slap_fast.cli import main"),
        ("training", "from slap_fast.inference.slap import Slap"),
        ("packed", "from slap_fast import ops"),
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
def test_a_wrong_import_is_detected(room: str, source: str) -> None:
    assert complaints(room, source)


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
