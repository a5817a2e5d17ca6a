"""Random calls of the C++ of mel_patches under the compiler's sanitizers."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.helpers.paths import ROOT

COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_random_calls_are_clean(sanitizers, tmp_path, figure):
    """K12: 10,000 calls of both sanitizers."""
    if COMPILER is None:
        pytest.skip("no g++ and no clang++")
    program = tmp_path / "fuzz"
    sources = [ROOT / "tests/csrc/fuzz_mel_patches.cpp", *sorted(ROOT.glob("csrc/mel_*.cpp"))]
    options = f"-std=c++17 -O1 -g -pthread -fsanitize={sanitizers} -fno-sanitize-recover=all"
    subprocess.run([COMPILER, *options.split(), *sources, "-o", program], check=True)
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as fuzz:
        for seed in figure("K12", ci=5_000, soak=1_000_000):
            fuzz.stdin.write(f"{seed}\n")
            fuzz.stdin.flush()
            answer = fuzz.stdout.readline()
            assert answer == "ok\n", f"seed {seed}: {answer}{'' if answer else fuzz.stderr.read()}"
        _, errors = fuzz.communicate()
        assert fuzz.returncode == 0, errors
