"""The compile report: it tells a good kernel from one that spills and one that does not compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
TOY = """
import sys
sys.path.insert(0, {benchmarks!r})
import json
import compile_report  # before triton: it turns the interpreter off
import triton
import triton.language as tl

@triton.jit
def matmul(x_ptr, stride, ROWS: tl.constexpr, SUM: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + i)
    y = tl.dot(x, tl.trans(x))
    if SUM:
        y = y.no_such_method()
    if ROWS == 256:  # a second accumulator, for which sm_100 has no tensor memory left
        z = y * 0
        for _ in range(stride):
            y = tl.dot(x, tl.trans(x), y)
            z = tl.dot(x, tl.trans(x), z)
        y = y * z
    j = tl.arange(0, ROWS)
    tl.store(x_ptr + j[:, None] * stride + j[None, :], y.to(tl.bfloat16))

def case(rows, warps=4, wrong=False):
    signature = {{"x_ptr": "*bf16", "stride": "i64", "ROWS": "constexpr", "SUM": "constexpr"}}
    return compile_report.Case("toy", matmul, signature, dict(ROWS=rows, SUM=wrong), warps, 2, True)

rows = [compile_report.compile_case(case(64), target) for target in compile_report.TARGETS]
rows.append(compile_report.compile_case(case(128, warps=1), "sm_90"))
rows.append(compile_report.compile_case(case(64, wrong=True), "sm_90"))
rows.append(compile_report.compile_case(case(256), "sm_100"))
compile_report.SHARED["sm_90"] = 1_000
rows.append(compile_report.compile_case(case(64), "sm_90"))
print(json.dumps([row._asdict() | {{"fails": row.fails}} for row in rows]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )


def test_a_good_a_spilling_a_wrong_and_two_too_large_ones(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY.format(benchmarks=str(ROOT / "benchmarks")))
    done = run(str(script))
    assert done.returncode == 0, done.stderr
    *good, spilling, wrong, trap, too_much = json.loads(done.stdout)
    assert [row["products"] for row in good] == ["mma.sync", "wgmma", "tcgen05.mma", "v_mfma"]
    assert all(row["registers"] > 0 and row["shared"] > 0 for row in good)
    assert not any(row["fails"] for row in good)
    assert spilling["spilled"] > 0 and spilling["fails"]
    assert "no_such_method" in wrong["error"] and wrong["fails"]
    assert trap["error"] == "compiles to a trap" and trap["fails"]
    assert "bytes of shared memory, sm_90 has 1000" in too_much["error"] and too_much["fails"]


@pytest.mark.slow
def test_what_the_tables_select_compiles_for_hopper_and_does_not_spill():
    done = run("benchmarks/compile_report.py", "--selected", "--targets", "sm_90")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
