"""What is installed on this machine, what runs on it, and how to get the rest."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import sysconfig
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

from slap_fast.console import make_console

Status = Literal["ok", "missing", "optional"]
REBUILD = "pip install --no-deps -e ."
REINSTALL = f"reinstall slap-fast: {REBUILD}"
COMPILER = {
    "Linux": "apt-get install g++ python3-dev, or your distribution's",
    "Darwin": "xcode-select --install",
    "Windows": "install the Visual Studio Build Tools",
}


class Component(TypedDict):
    """A part of the installation: a package, a device, an operation."""

    name: str
    found: str
    """A version, a description, or why there is none."""
    status: Status
    """``missing``: needed, and it fails the report. ``optional``: absent or unfit, not needed."""
    todo: str
    """The remedy, or what its absence means; empty when there is nothing to do."""


class Parity(TypedDict):
    """One figure of an implementation on this machine's best device."""

    operation: str
    runs: str
    """The implementation."""
    case: str
    figure: str
    found: float
    allowed: float
    status: Literal["ok", "wrong"]


class Report(TypedDict):
    """Plain JSON values."""

    ok: bool
    rows: list[Component]
    parity: list[Parity] | None
    """None until :func:`parity` is asked for; empty where everything runs the reference."""


class Package(NamedTuple):
    """A distribution, the module it brings and the least version that will do."""

    name: str
    module: str
    minimum: str
    extra: str | None = None
    """The extra of ours that installs it, for a package that is not needed."""
    purpose: str = ""


PACKAGES = (
    Package("torch", "torch", "2.11"),
    Package("triton", "triton", "3.6"),
    Package("numpy", "numpy", "1.26"),
    Package("transformers", "transformers", "5"),
    Package("tokenizers", "tokenizers", "0.22"),
    Package("safetensors", "safetensors", "0.4.3"),
    Package("huggingface_hub", "huggingface_hub", "1.0"),
    Package("soundfile", "soundfile", "0.12"),
    Package("soxr", "soxr", "0.5"),
    Package("tyro", "tyro", "1.0.14"),
    Package("rich", "rich", "13"),
    Package("tqdm", "tqdm", "4.66"),
    Package("pyyaml", "yaml", "6"),
    Package("flash-attn", "flash_attn", "2.7", "flash", 'impl="flash" on a GPU'),
    Package("av", "av", "13", "av", "video and the audio formats libsndfile lacks"),
    Package("webdataset", "webdataset", "1.0", "webdataset", "shards read by other trainers"),
    Package("tensorboard", "tensorboard", "2.16", "tracking", "curves in TensorBoard"),
    Package("pybind11", "pybind11", "2.13", "dev", "rebuilding slap_fast._C with no network"),
)
"""pyproject.toml's dependencies and extras; a test keeps the two the same."""

TESTED = (("2.13", "3.7"),)
"""Releases of torch and of triton that the tests have run with, together."""

OFFLINE = (
    "On a machine with no network: where there is one, pip download -d wheels PACKAGE... (the same "
    "system and Python); here, pip install --no-index --find-links wheels PACKAGE... A checkout "
    "builds with: pip install --no-index --no-build-isolation --no-deps -e . (needs pybind11 and "
    "setuptools)"
)


def report() -> Report:
    """Examines the interpreter, the packages, the extension, the devices and the operations.

    Nothing that is broken raises: it becomes a component that is missing.
    """
    python = platform.python_version()
    components = [
        _component("Python", python, sys.version_info >= (3, 10), "Python >= 3.10"),
        *map(_package, PACKAGES),
        _pair(),
        _extension(),
        *_gpus(),
        _tokenizer(),
        *_operations(),
    ]
    ok = all(component["status"] != "missing" for component in components)
    return {"ok": ok, "rows": components, "parity": None}


def parity(report: Report) -> Report:
    """Adds to the report the figures of :mod:`slap_fast.diagnostics.parity` on the best device."""
    import torch

    from slap_fast.diagnostics import parity

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: list[Parity] = [
        Parity(
            operation=op,
            runs=impl,
            case=case,
            figure=figure.name,
            found=figure.value,
            allowed=figure.allowed,
            status="ok" if figure.passed else "wrong",
        )  # fmt: skip
        for op, impl, case, figure in parity.run(device)
    ]
    ok = report["ok"] and all(figure["status"] == "ok" for figure in figures)
    return {**report, "ok": ok, "parity": figures}


def exit_code(report: Report) -> int:
    """0, or 1 when something that is needed is missing."""
    return 0 if report["ok"] else 1


def render(report: Report) -> None:
    """Prints the report as a table, and the remedies below it."""
    from rich.table import Column, Table
    from rich.text import Text

    colours = {"ok": "green", "missing": "red", "optional": "yellow"}
    console = make_console(json=False)
    table = Table("", "found", "status")
    for component in report["rows"]:
        status = Text(component["status"], colours[component["status"]])
        table.add_row(component["name"], Text(component["found"]), status)
    console.print(table)
    for component in report["rows"]:
        if component["todo"]:
            # Not wrapped, so that a command can be copied whole.
            console.print(Text(f"{component['name']}: {component['todo']}"), soft_wrap=True)
    if any("pip install" in component["todo"] for component in report["rows"]):
        console.print(Text(OFFLINE), soft_wrap=True)
    figures = report["parity"]
    if not figures:
        if figures is not None:
            console.print("Nothing to compare: everything runs the reference here.")
        return
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("found", "allowed"))
    columns = ("operation", "runs", "case", "figure", *numbers, Column("status", no_wrap=True))
    table = Table(*columns, title="against the reference in fp64")
    for figure in figures:
        names = (figure["operation"], figure["runs"], figure["case"], figure["figure"])
        status = Text(figure["status"], "green" if figure["status"] == "ok" else "red")
        table.add_row(*names, f"{figure['found']:.2g}", f"{figure['allowed']:.2g}", status)
    console.print(table)
    wrong = sorted({figure["operation"] for figure in figures if figure["status"] == "wrong"})
    todo = "wrong here: please report it with this table, and use impl='reference'"
    for operation in wrong:
        console.print(Text(f"{operation}: {todo}"), soft_wrap=True)
    if not wrong:
        console.print(f"All {len(figures)} figures are within what rounding allows.")


def _component(
    name: str, found: str, ok: bool = True, todo: str = "", otherwise: Status = "missing"
) -> Component:
    status = "ok" if ok else otherwise
    return {"name": name, "found": found, "status": status, "todo": "" if ok else todo}


def _package(package: Package) -> Component:
    needed = package.extra is None and (package.name != "triton" or sys.platform == "linux")
    todo = f"pip install '{package.name}>={package.minimum}'"
    if package.extra:
        todo += f" for {package.purpose}"
    elif not needed:
        todo = "only on Linux; the reference runs"
    try:
        import_module(package.module)
        found = version(package.name)
        ok = _numbers(found) >= _numbers(package.minimum)
    except Exception as error:  # a broken package raises anything, OSError too
        found, ok = _load_failure(error, package.module), False
    else:
        found += "" if ok else ", too old"
    return _component(package.name, found, ok, todo, "missing" if needed else "optional")


def _pair() -> Component:
    """Whether the tests have run with this torch and this triton together."""
    try:
        pair = version("torch"), version("triton")
    except Exception:  # their own rows have the reason
        return _component("torch and triton", "not both installed", True)
    found, tested = " and ".join(pair), " or ".join(" and ".join(pair) for pair in TESTED)
    ok = tuple(".".join(map(str, _numbers(name)[:2])) for name in pair) in TESTED
    todo = f"tested together: {tested}; slap-fast doctor --parity compares what runs here"
    return _component("torch and triton", found, ok, todo, "optional")


def _load_failure(error: Exception, module: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        return "not installed"
    text = str(error).strip().split("\n")[0]
    return f"does not load: {type(error).__name__}: {text}"


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in release.group().split(".")) if release else ()


def _extension() -> Component:
    try:
        path = import_module("slap_fast._C").__file__
        return _component("slap_fast._C", f"built: {Path(str(path)).name}")
    except ImportError as error:
        found = _load_failure(error, "slap_fast._C")
    if found == "not installed":
        found = _why_not_built()
    todo = f"the slower reference runs; for C++: {COMPILER.get(platform.system(), 'a compiler')}"
    return _component("slap_fast._C", found, False, f"{todo}; then {REBUILD}", "optional")


def _why_not_built() -> str:
    if others := sorted(Path(__file__).parents[1].glob("_C.*")):
        return f"built for another Python: {others[0].name}"
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "cl").split()[0]
    if shutil.which(compiler) is None:
        return f"not built: no C++ compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "not built: no Python headers (Python.h)"
    return f"not built: pip install -v shows why ({compiler} exists)"


def _gpus() -> list[Component]:
    cpu = "not needed: everything runs on the CPU"
    try:
        import torch

        if not torch.cuda.is_available():
            built = torch.version.cuda or torch.version.hip
            found = "none" if built else "none: this torch is a CPU build"
            return [_component("GPU", found, False, cpu, "optional")]
        components = []
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            gib = gpu.total_memory / 2**30
            found = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gib:.0f} GiB"
            todo = "the kernels need capability 8.0"
            components.append(_component(f"GPU {i}", found, gpu.major >= 8, todo, "optional"))
        return components
    except Exception as error:
        return [_component("GPU", _load_failure(error, "torch"), False, cpu, "optional")]


def _tokenizer() -> Component:
    try:
        from slap_fast.models.tokenizer import CaptionTokenizer

        tokenizer = CaptionTokenizer.load(None, max_tokens=256)
        return _component("tokenizer", f"{tokenizer.vocab_size} tokens")
    except Exception as error:
        return _component("tokenizer", _load_failure(error, ""), False, REINSTALL)


def _operations() -> list[Component]:
    try:
        import torch

        from slap_fast.ops.dispatch import which

        device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = which(device=device).items()
        return [_component(f"ops.{op}", f"{runs} ({device})") for op, runs in chosen]
    except Exception as error:
        return [_component("ops", _load_failure(error, ""), False, REINSTALL)]
