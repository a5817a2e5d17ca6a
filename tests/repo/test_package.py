"""What pip sees: metadata, constraints, builds with and without a compiler; and the doctor."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import slap_fast
from slap_fast.diagnostics import doctor
from tests.helpers.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NO_COMPILER = "/nonexistent/c++"


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def parse(lines: list[str]) -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return parse([line for line in lines if not line.startswith("#")])


def test_licence(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text


def test_nothing_but_lower_bounds(pyproject: dict[str, Any]) -> None:
    """An upper bound or a pin could change an installed torch or triton."""
    lines = pyproject["project"]["dependencies"] + pyproject["build-system"]["requires"]
    for extra in pyproject["project"]["optional-dependencies"].values():
        lines = lines + extra
    for line in lines:
        assert [bound.operator for bound in Requirement(line).specifier] == [">="], line


def test_supported_versions(pyproject: dict[str, Any]) -> None:
    needed = parse(pyproject["project"]["dependencies"])
    assert pyproject["project"]["requires-python"] == ">=3.10"
    assert str(needed["torch"].specifier) == ">=2.11"
    assert str(needed["triton"].specifier) == ">=3.6"
    assert [name for name, requirement in needed.items() if requirement.marker] == ["triton"]
    where = {p: needed["triton"].marker.evaluate({"sys_platform": p}) for p in ("linux", "darwin")}
    assert where == {"linux": True, "darwin": False}


def test_extras(pyproject: dict[str, Any]) -> None:
    extras = set(pyproject["project"]["optional-dependencies"])
    loops, adapters = (
        {"accelerate", "fabric", "trainer"},
        {"datasets", "sentence-transformers", "mteb"},
    )
    others = {"dev", "flash", "av", "webdataset", "tracking", "export"}
    assert extras == loops | adapters | others


def test_build_needs_no_torch(pyproject: dict[str, Any]) -> None:
    assert set(parse(pyproject["build-system"]["requires"])) == {"setuptools", "pybind11"}


def test_version_is_defined_once(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["version"] == slap_fast.__version__


def test_constraints_pin_all_that_make_installs(pyproject: dict[str, Any]) -> None:
    pins = constraints()
    project = pyproject["project"]
    asked = parse(project["dependencies"] + project["optional-dependencies"]["dev"])
    assert set(asked) <= set(pins)
    for name, pin in pins.items():
        (bound,) = pin.specifier
        assert bound.operator == "==", pin
        assert name not in asked or asked[name].specifier.contains(bound.version), pin
    exact = {name: str(pins[name].specifier) for name in ("torch", "triton")}
    assert exact == {"torch": "==2.13.0", "triton": "==3.7.1"}
    assert pins["numpy"].specifier.contains("2.4.6")


def test_extension_is_built_where_a_compiler_is() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert importlib.util.find_spec("slap_fast._C") is not None


def test_doctor_knows_the_dependencies(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    extras = {
        canonicalize_name(Requirement(line).name): (extra, Requirement(line))
        for extra in ("flash", "av", "webdataset", "tracking")
        for line in project["optional-dependencies"][extra]
    }
    needed = {name: (None, need) for name, need in parse(project["dependencies"]).items()}
    for line in project["optional-dependencies"]["dev"]:
        if canonicalize_name(Requirement(line).name) == "pybind11":
            extras["pybind11"] = ("dev", Requirement(line))
    packages = {canonicalize_name(p.name): (p.extra, f">={p.minimum}") for p in doctor.PACKAGES}
    assert packages == {
        name: (extra, str(need.specifier)) for name, (extra, need) in (needed | extras).items()
    }


def rows_by_name(report: doctor.Report) -> dict[str, doctor.Component]:
    return {row["name"]: row for row in report["rows"]}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """Modules whose import raises, by name."""
    errors: dict[str, Exception] = {}
    load = doctor.import_module

    def import_module(name: str) -> Any:
        if name in errors:
            raise errors[name]
        return load(name)

    monkeypatch.setattr(doctor, "import_module", import_module)
    return errors


def test_doctor_fails_on_a_needed_package_that_does_not_load(broken: dict[str, Exception]) -> None:
    broken["soundfile"] = OSError("libsndfile.so: cannot open\nmore")
    report = doctor.report()
    row = rows_by_name(report)["soundfile"]
    assert row["status"] == "missing" and doctor.exit_code(report) == 1
    assert row["found"] == "does not load: OSError: libsndfile.so: cannot open"
    assert "pip install 'soundfile>=" in row["todo"]


def test_doctor_does_without_extras_and_the_extension(broken: dict[str, Exception]) -> None:
    for name in ("av", "slap_fast._C"):
        broken[name] = ModuleNotFoundError(f"No module named {name!r}", name=name)
    report = doctor.report()
    rows = rows_by_name(report)
    assert rows["av"]["found"] == "not installed"
    assert "pip install --no-deps -e ." in rows["slap_fast._C"]["todo"]
    assert {rows[name]["status"] for name in ("av", "slap_fast._C")} == {"optional"}
    missing = [row for row in report["rows"] if row["status"] == "missing"]
    assert doctor.exit_code(report) == 0, missing


def test_doctor_sees_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1+cu128", "transformers": "5.0.0rc1", "numpy": "1.26"}
    monkeypatch.setattr(doctor, "version", lambda name: versions.get(name, "99"))
    rows = rows_by_name(doctor.report())
    assert rows["torch"]["status"] == "missing" and rows["torch"]["found"].endswith("too old")
    assert {rows[name]["status"] for name in ("transformers", "numpy")} == {"ok"}


def test_doctor_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[doctor.Component] = [
        {"name": "a", "found": "[bold]1", "status": "ok", "todo": ""},
        {"name": "b", "found": "none", "status": "missing", "todo": "do " + "this " * 40},
    ]
    doctor.render({"ok": False, "rows": rows, "parity": None})
    out, err = capsys.readouterr()
    assert not err
    assert "[bold]1" in out and "missing" in out and f"b: do {'this ' * 40}".strip() in out
    assert "pip download" not in out
    rows[1]["todo"] = "pip install b"
    doctor.render({"ok": False, "rows": rows, "parity": None})
    assert "--no-index --find-links wheels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("torch", "triton", "status"),
    [
        ("2.13.0+cpu", "3.7.1", "ok"),
        ("2.11.0", "3.6.0", "optional"),
        ("2.13.0", "3.6.0", "optional"),
        ("2.14.1", "3.8.0", "optional"),
    ],
)
def test_doctor_names_the_tested_pairs(
    torch: str, triton: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "version", {"torch": torch, "triton": triton}.__getitem__)
    row = doctor._pair()
    assert (row["found"], row["status"]) == (f"{torch} and {triton}", status)
    assert ("2.13 and 3.7" in row["todo"]) == (status != "ok")


def pip(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs pip with no index to ask, as on a machine with no network."""
    run = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run


def python(code: str, *folders: Path, **environment: str) -> str:
    """Runs code that sees ``folders`` as site directories, then the packages of this environment,
    but not the slap-fast installed there."""
    program = f"""
import site, sys
for folder in {[str(folder) for folder in folders]}:
    site.addsitedir(folder)
sys.path.append({sysconfig.get_path("purelib")!r})
{code}
"""
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a clone has of the package, so that a build leaves nothing in this one."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "kernels", "slap_fast"):
        built = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    return folder


INSTALL = ("install", "--no-build-isolation", "--no-deps", "--ignore-installed")

DESCRIBE_INSTALLATION = """
import json
import slap_fast._C, slap_fast.kernels
from importlib.metadata import distribution
from pathlib import Path
package = Path(slap_fast.__file__).parent
print(json.dumps({
    "files": [slap_fast.__file__, slap_fast._C.__file__, slap_fast.kernels.__file__],
    "tokenizer": (package / "models" / "tokenizer.json").is_file(),
    "licence": distribution("slap-fast").metadata["License-Expression"],
    "scripts": [e.value for e in distribution("slap-fast").entry_points],
    "torch": "torch" in sys.modules,
}))
"""


@pytest.mark.slow
def test_installs_from_its_sdist_with_no_network(checkout: Path, tmp_path: Path) -> None:
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, check=True, capture_output=True)
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    target = tmp_path / "target"
    pip(*INSTALL, "--target", target, sdist)
    installed = json.loads(python(DESCRIBE_INSTALLATION, target))
    assert all(Path(file).is_relative_to(target) for file in installed["files"]), installed["files"]
    assert installed["tokenizer"] and not installed["torch"]
    assert installed["licence"] == "Apache-2.0"
    assert installed["scripts"] == ["slap_fast.cli:main"]


@pytest.mark.slow
def test_installs_editable_with_no_network(checkout: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    pip(*INSTALL, "--prefix", prefix, "--editable", checkout)
    (metadata,) = prefix.rglob("*.dist-info")
    installed = json.loads(python(DESCRIBE_INSTALLATION, metadata.parent))
    folders = [Path(file).parent for file in installed["files"]]
    assert folders == [checkout / "slap_fast", checkout / "slap_fast", checkout / "kernels"]


@pytest.mark.slow
def test_installs_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    """The reference still runs, and the doctor names what is missing."""
    target = tmp_path / "target"
    machine = {"CC": NO_COMPILER, "CXX": NO_COMPILER, "PATH": str(tmp_path)}
    output = pip(*INSTALL, "-v", "--target", target, checkout, **machine)
    assert (output.stdout + output.stderr).count("slap-fast: slap_fast._C is not built") == 1
    code = """
import json
from slap_fast import ops
from slap_fast.diagnostics import doctor
row = next(row for row in doctor.report()["rows"] if row["name"] == "slap_fast._C")
print(json.dumps([ops.__file__, ops.pack([3, 8, 3, 5], 8), row]))
"""
    where, bins, row = json.loads(python(code, target, **machine))
    assert Path(where).is_relative_to(target)
    assert bins == [[1], [3, 0], [2]]
    assert row["status"] == "optional"
    assert row["found"] == f"not built: no C++ compiler ({NO_COMPILER})"


@pytest.mark.slow
def test_changes_nothing_that_is_installed(checkout: Path) -> None:
    """With its dependencies looked at, pip would install slap-fast here and nothing else."""
    arguments = ("install", "--dry-run", "--quiet", "--no-build-isolation", "--report", "-")
    report = json.loads(pip(*arguments, checkout).stdout)
    assert [item["metadata"]["name"] for item in report["install"]] == ["slap-fast"]
