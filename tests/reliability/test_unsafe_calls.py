"""No module calls functions that could run code from a file or unpack files anywhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "torch.load",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "torch.hub.load",
}  # fmt: skip
UNSAFE_METHODS = {"extractall", "extract"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def unsafe(source: str) -> list[str]:
    """Imports and calls of a module that could run code from a file, or write outside a folder."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            complaints += [a.name for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            complaints += [
                n for n in names if n.split(".")[0] in UNSAFE_MODULES or n in UNSAFE_CALLS
            ]
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            method = name.rpartition(".")[2] if "." in name else ""
            if name in UNSAFE_CALLS or method in UNSAFE_METHODS:
                complaints.append(name)
            for switch in ("shell", "trust_remote_code", "allow_pickle"):
                if switch in keywords and keywords[switch] is not False:
                    complaints.append(f"{name}({switch}=...)")
            if name in ("np.load", "numpy.load") and "allow_pickle" not in keywords:
                complaints.append(f"{name} without allow_pickle=False")
    return complaints


def modules() -> list[Path]:
    folders = ("slap_fast", "kernels", "benchmarks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_module_calls_anything_unsafe(figure):
    files = modules()
    assert len(files) > 40
    for seed in figure("A7", ci=len(files), soak=len(files)):
        complaints = unsafe(files[seed].read_text(encoding="utf-8"))
        assert not complaints, f"{files[seed]}: {complaints}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import dill as d",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load(path, weights_only=True)",
        "import yaml\nyaml.load(text, yaml.SafeLoader)",
        "eval('1')",
        "exec(code)",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "AutoConfig.from_pretrained(name, trust_remote_code=flag)",
        "tar.extractall(path)",
        "tar.extract(member)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_source_is_reported(source):
    assert unsafe(source)


def test_safe_source_is_not_reported():
    assert not unsafe("model.eval()\nnp.load(p, allow_pickle=False)\nyaml.safe_load(t)")
