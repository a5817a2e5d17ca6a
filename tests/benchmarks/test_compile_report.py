"""The compile report: good kernels, and ones that spill or do not compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("triton")

TOY = """
import sys
sys.path.insert(0, {root!r})
import json
from benchmarks.report import compile_report  # before triton: it turns the interpreter off
import triton
import triton.language as tl

@triton.jit
def matmul(x_ptr, stride, ROWS: tl.constexpr, KIND: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + i)
    if KIND == "wrong":
        x = x.no_such_method()
    if KIND == "tf32":
        y = tl.dot(x.to(tl.float32), tl.trans(x).to(tl.float32), input_precision="tf32")
    else:
        y = tl.dot(x, tl.trans(x), input_precision="ieee")
    if KIND == "trap":
        word = tl.inline_asm_elementwise(
            "trap; mov.b32 $0, $1;", "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.store(x_ptr + i, word.to(tl.bfloat16))
    j = tl.arange(0, ROWS)
    tl.store(x_ptr + j[:, None] * stride + j[None, :], y.to(tl.bfloat16))

def row(target, rows=64, kind="", warps=4):
    signature = {{"x_ptr": "*bf16", "stride": "i32", "ROWS": "constexpr", "KIND": "constexpr"}}
    constants = {{"ROWS": rows, "KIND": kind}}
    case = compile_report.CompileCase("toy", matmul, signature, constants, warps, 2)
    return compile_report.compile_case(case, target)

rows = [row(target) for target in compile_report.TARGETS]
rows.append(row("sm_90", 128, warps=1))
rows.append(row("sm_90", kind="wrong"))
# Some releases of Triton make these by themselves, of kernels that later ones compile or refuse.
rows.append(row("sm_100", kind="trap"))
rows.append(row("sm_100", kind="tf32"))
compile_report.SHARED["sm_90"] = 1_000
rows.append(row("sm_90"))
print(json.dumps([row._asdict() | {{"fails": row.fails}} for row in rows]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )


def test_good_and_bad_kernels(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY.format(root=str(ROOT)))
    done = run(str(script))
    assert done.returncode == 0, done.stderr
    *good, spilling, wrong, trap, rounding, too_much = json.loads(done.stdout)
    assert [row["products"] for row in good] == ["mma.sync", "wgmma", "tcgen05.mma", "v_mfma"]
    assert all(row["registers"] > 0 and row["shared"] > 0 for row in good)
    assert not any(row["fails"] for row in good)
    assert spilling["spilled"] > 0 and spilling["fails"]
    assert "no_such_method" in wrong["error"] and wrong["fails"]
    assert trap["error"] == "compiles to a trap" and trap["fails"]
    assert rounding["error"] == "rounds fp32 products to tf32" and rounding["fails"]
    assert "bytes of shared memory, sm_90 has 1000" in too_much["error"] and too_much["fails"]


@pytest.mark.slow(minutes=2)
def test_every_setting_compiles_for_hopper_and_does_not_spill(figure, tmp_path):
    out = tmp_path / "report.json"
    options = ["--targets", "sm_90", "--out", str(out)]
    done = run("-m", "benchmarks.report.compile_report", *options)
    rows = json.loads(out.read_text())["rows"]
    for number in figure("K7", ci=len(rows), soak=len(rows)):
        row = rows[number]
        assert row["error"] is None and not row["spilled"], row
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
