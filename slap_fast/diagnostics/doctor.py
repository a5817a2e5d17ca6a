"""What this machine has, what runs on it, and what to do about the rest."""

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
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

if TYPE_CHECKING:
    import torch
    from rich.console import Console

Status = Literal["ok", "missing", "optional"]
REBUILD = "pip install --no-deps -e ."
COMPILER = {
    "Linux": "apt-get install g++ python3-dev, or your distribution's",
    "Darwin": "xcode-select --install",
    "Windows": "install the Visual Studio Build Tools",
}


class Row(TypedDict):
    """One line of the report."""

    name: str
    found: str
    """A version, a description, or why there is none."""
    status: Status
    """``missing``: needed, and it fails the report. ``optional``: absent or unfit, not needed."""
    todo: str
    """What to do about it, or what its absence means; empty when there is nothing to do."""


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
    rows: list[Row]
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
)
"""pyproject.toml's dependencies and extras; a test keeps the two the same."""


def report() -> Report:
    """Looks at the interpreter, the packages, the extension, the devices and the operations.

    Nothing that is broken raises: it becomes a row.
    """
    rows = [
        _row("Python", platform.python_version(), sys.version_info >= (3, 10), "Python >= 3.10"),
        *(_package(package) for package in PACKAGES),
        _extension(),
        *_gpus(),
        _tokenizer(),
        *_operations(),
    ]
    return {"ok": all(row["status"] != "missing" for row in rows), "rows": rows, "parity": None}


def parity(report: Report) -> Report:
    """The report with the figures of :mod:`slap_fast.diagnostics.parity` on the best device."""
    import torch

    from slap_fast.diagnostics import parity

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Parity] = [
        {
            "operation": row.op,
            "runs": row.impl,
            "case": row.case,
            "figure": row.figure.name,
            "found": row.figure.value,
            "allowed": row.figure.allowed,
            "status": "ok" if row.figure.passed else "wrong",
        }
        for row in parity.run(device)
    ]
    ok = report["ok"] and all(row["status"] == "ok" for row in rows)
    return {**report, "ok": ok, "parity": rows}


def exit_code(report: Report) -> int:
    """0, or 1 when something that is needed is missing."""
    return 0 if report["ok"] else 1


def render(report: Report) -> None:
    """Prints the report as a table, and below it what to do, on stderr: stdout is for results."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "missing": "red", "optional": "yellow"}
    console = Console(stderr=True)
    table = Table("", "found", "status")
    for row in report["rows"]:
        status = Text(row["status"], colours[row["status"]])
        table.add_row(row["name"], Text(row["found"]), status)
    console.print(table)
    for row in report["rows"]:
        if row["todo"]:
            # Not wrapped, so that a command can be copied whole.
            console.print(Text(f"{row['name']}: {row['todo']}"), soft_wrap=True)
    if report["parity"] is not None:
        _render_parity(report["parity"], console)


def _render_parity(rows: list[Parity], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    if not rows:
        console.print("Nothing to compare: everything runs the reference here.")
        return
    table = Table("operation", "runs", "case", "figure", title="against the reference in fp64")
    for name in ("found", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for row in rows:
        words = (row["operation"], row["runs"], row["case"], row["figure"])
        figures = (f"{row['found']:.2g}", f"{row['allowed']:.2g}")
        status = Text(row["status"], "green" if row["status"] == "ok" else "red")
        table.add_row(*words, *figures, status)
    console.print(table)
    wrong = sorted({row["operation"] for row in rows if row["status"] == "wrong"})
    for operation in wrong:
        todo = "wrong here: please report it with this table, and use impl='reference'"
        console.print(Text(f"{operation}: {todo}"), soft_wrap=True)
    if not wrong:
        console.print(f"All {len(rows)} figures are within what rounding allows.")


def _row(name: str, found: str, ok: bool, todo: str, otherwise: Status = "missing") -> Row:
    return {
        "name": name,
        "found": found,
        "status": "ok" if ok else otherwise,
        "todo": "" if ok else todo,
    }


def _package(package: Package) -> Row:
    needed = package.extra is None and (package.name != "triton" or sys.platform == "linux")
    wanted = f"'{package.name}>={package.minimum}'"
    if package.extra:
        todo = f"pip install {wanted} for {package.purpose}"
    elif needed:
        todo = f"pip install {wanted}"
    else:
        todo = "only on Linux; the reference runs"
    otherwise: Status = "missing" if needed else "optional"
    try:
        import_module(package.module)
        found = version(package.name)
    except Exception as error:  # a package that is there but broken raises anything, OSError too
        return _row(package.name, _why(error, package.module), False, todo, otherwise)
    if _numbers(found) < _numbers(package.minimum):
        return _row(package.name, f"{found}, too old", False, todo, otherwise)
    return _row(package.name, found, True, "")


def _why(error: Exception, module: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        return "not installed"
    text = str(error).strip().split("\n")[0]
    return f"does not load: {type(error).__name__}: {text}"


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in release.group().split(".")) if release else ()


def _extension() -> Row:
    try:
        path = import_module("slap_fast._C").__file__
        return _row("slap_fast._C", f"built: {Path(str(path)).name}", True, "")
    except ImportError as error:
        found = _why(error, "slap_fast._C")
    if found == "not installed":
        found = _why_not_built()
    todo = f"the slower reference runs; for C++: {COMPILER.get(platform.system(), 'a compiler')}"
    return _row("slap_fast._C", found, False, f"{todo}; then {REBUILD}", "optional")


def _why_not_built() -> str:
    others = sorted(Path(__file__).parents[1].glob("_C.*"))
    if others:
        return f"built for another Python: {others[0].name}"
    configured = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "cl"
    if shutil.which(configured.split()[0]) is None:
        return f"not built: no C++ compiler ({configured.split()[0]})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "not built: no Python headers (Python.h)"
    return f"not built: pip install -v shows why ({configured.split()[0]} is there)"


def _gpus() -> list[Row]:
    name, cpu = "GPU", "not needed: everything runs on the CPU"
    try:
        import torch

        if not torch.cuda.is_available():
            built = torch.version.cuda or torch.version.hip
            found = "none" if built else "none: this torch is a CPU build"
            return [_row(name, found, False, cpu, "optional")]
        return [
            _gpu(f"{name} {i}", torch.cuda.get_device_properties(i))
            for i in range(torch.cuda.device_count())
        ]
    except Exception as error:
        return [_row(name, _why(error, "torch"), False, cpu, "optional")]


def _gpu(name: str, device: torch.cuda._CudaDeviceProperties) -> Row:
    gib = device.total_memory / 2**30
    found = f"{device.name}, capability {device.major}.{device.minor}, {gib:.0f} GiB"
    return _row(name, found, device.major >= 8, "the kernels need capability 8.0", "optional")


def _tokenizer() -> Row:
    try:
        from slap_fast.models.tokenizer import CaptionTokenizer

        found = f"{CaptionTokenizer.load(None, max_tokens=256).vocab_size} tokens"
        return _row("tokenizer", found, True, "")
    except Exception as error:
        return _row("tokenizer", _why(error, ""), False, f"reinstall slap-fast: {REBUILD}")


def _operations() -> list[Row]:
    try:
        import torch

        from slap_fast.ops.dispatch import which

        device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = which(device=device)
        return [_row(f"ops.{op}", f"{runs} ({device})", True, "") for op, runs in chosen.items()]
    except Exception as error:
        return [_row("ops", _why(error, ""), False, f"reinstall slap-fast: {REBUILD}")]
