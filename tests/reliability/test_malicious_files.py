"""Malicious files run no code and write nothing outside their own folder."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest

from tests.helpers.attacks import data, models, settings
from tests.helpers.attacks.place import CANARY, Place, pickled

ATTACKS = {**models.ATTACKS, **settings.ATTACKS, **data.ATTACKS}

EXECUTES = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen",
    "pickle.find_class", "socket.connect", "socket.getaddrinfo", "os.fork",
}  # fmt: skip
"""Audit events of running code; a name stands for all that begin with it."""

watching: dict[str, Path | list[str]] = {}
"""While an attack runs: its ``root`` and the events ``seen``."""


def watch(event: str, args: tuple) -> None:
    """Audit hook: notes code that runs, and files opened for writing outside the attack's root."""
    if not watching:
        return
    if event in EXECUTES:
        watching["seen"].append(f"{event}{args}")
    elif event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.abspath(args[0])
        if not path.startswith(str(watching["root"])) and path != os.devnull:
            watching["seen"].append(f"write {path}")


@pytest.fixture(scope="module", autouse=True)
def audit() -> None:
    sys.addaudithook(watch)  # it cannot be removed


def outside(tmp_path: Path, root: Path) -> set[Path]:
    return {path for path in tmp_path.rglob("*") if root not in path.parents}


def attacked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs an attack; returns what it ran, imported or wrote outside its root."""
    root = tmp_path / name / "a" / "b"
    root.mkdir(parents=True)
    place = Place(root, tmp_path / CANARY)
    monkeypatch.chdir(root)
    before = outside(tmp_path, root)
    watching.update(root=root, seen=[])
    try:
        ATTACKS[name](place)
    except RecursionError:
        raise
    except (ValueError, RuntimeError, OSError):
        pass  # refused; any other type of error fails the test
    finally:
        seen = list(watching["seen"])
        watching.clear()
    stray = [module for module in ("modeling_evil", "configuration_evil", "antigravity")
             if module in sys.modules]  # fmt: skip
    return seen + stray + [str(path) for path in outside(tmp_path, root) - before]


def test_malicious_files_run_and_write_nothing(tmp_path, monkeypatch, figure, capsys):
    assert len(ATTACKS) >= 40
    # Modules loaded on first use write their bytecode.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = list(ATTACKS)
    for seed in figure("A6", ci=len(names), soak=len(names)):
        assert not attacked(names[seed], tmp_path, monkeypatch), names[seed]


@pytest.mark.parametrize("attack", ["system", "unpickle", "write"])
def test_a_working_attack_is_detected(attack, tmp_path, monkeypatch):
    def write(place: Place) -> None:
        (place.root.parent / "stray").write_text("x")

    works = {
        "system": lambda place: os.system("true"),
        "unpickle": lambda place: pickle.loads(pickled(place)),
        "write": write,
    }
    monkeypatch.setitem(ATTACKS, attack, works[attack])
    assert attacked(attack, tmp_path, monkeypatch)
