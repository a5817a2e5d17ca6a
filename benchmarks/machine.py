"""The form of a record: what was measured, beside the machine, versions and commit it ran on.

Every JSON file in benchmarks/results is one: ``schema``, ``machine``, and one of ``rows`` (a
benchmark), ``card`` (an evaluation), ``figures`` (reliability) and ``steps`` (the suite). A test
checks every committed record with :func:`complaints`.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from slap_fast.atomic_files import write_json

SCHEMA = 1
PACKAGES = ("torch", "triton", "transformers", "numpy", "slap-fast")
PEERS = (
    "flash-attn",
    "flash-attn-4",
    "nvidia-cudnn-frontend",
    "liger-kernel",
    "cut-cross-entropy",
    "torchao",
    "torchaudio",
    "librosa",
    "kaldi-native-fbank",
)
"""Their versions are in a record where they are installed."""
BODIES = ("rows", "card", "figures", "steps")
FACTS = {
    "device": (str,),
    "driver": (str, type(None)),
    "threads": (int,),
    "python": (str,),
    "versions": (dict,),
    "commit": (str,),
    "date": (str,),
}


def facts() -> dict[str, Any]:
    """Device, driver, versions, commit and date, as JSON values.

    SLAP_FAST_COMMIT names the commit where the files came without their repository.
    """
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {
            name: installed
            for name in PACKAGES + PEERS
            if (installed := _version(name)) != "not installed" or name in PACKAGES
        },
        "commit": os.environ.get("SLAP_FAST_COMMIT") or _commit() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def record(**content: Any) -> dict[str, Any]:
    """A record of this machine with what was measured."""
    return {"schema": SCHEMA, "machine": facts(), **content}


def write(path: Path, record: dict[str, Any]) -> None:
    """Writes a record in one rename, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record, indent=1, ensure_ascii=True)


def complaints(record: dict[str, Any]) -> Iterator[str]:
    """Where it breaks the schema."""
    if record.get("schema") != SCHEMA:
        yield f"schema: found {record.get('schema')!r}, expected {SCHEMA}"
    machine = record.get("machine", {})
    for name, kinds in FACTS.items():
        if type(machine.get(name, ...)) not in kinds:
            yield f"machine: found {machine.get(name)!r} as {name}"
    if missing := set(PACKAGES) - set(machine.get("versions", ())):
        yield f"machine: found no version of {', '.join(sorted(missing))}"
    bodies = [name for name in BODIES if name in record]
    if len(bodies) != 1:
        yield f"body: found {bodies}, expected one of {', '.join(BODIES)}"
    for number, row in enumerate(record.get("rows", ())):
        for name, value in row.items():
            scalar = value is None or isinstance(value, (str, int, float))
            if not scalar or isinstance(value, float) and not math.isfinite(value):
                yield f"rows[{number}]: found {value!r} as {name}, expected a finite scalar"
        if "cases" in record and row["case"] not in record["cases"]:
            yield f"rows[{number}]: found case {row['case']}, expected one of the record's"


def _commit() -> str | None:
    """The commit, with -dirty where tracked files other than the records differ from it."""
    name = _first_line("git", "describe", "--always")
    tracked = "git", "status", "--porcelain", "--untracked-files=no"
    changed = _first_line(*tracked, "--", ":/", ":(top,exclude)benchmarks/results")
    return f"{name}-dirty" if changed else name


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _first_line(*command: str) -> str | None:
    """The first line that a program prints; None where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None
