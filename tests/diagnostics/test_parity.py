"""The tolerance rule rejects wrong results, and the parity command detects a wrong kernel."""

from __future__ import annotations

import math

import pytest
import torch

from slap_fast import ops
from slap_fast.diagnostics import doctor, parity
from slap_fast.ops import dispatch

CPU = torch.device("cpu")
NOTHING = {"ok": True, "rows": [], "parity": None}


def passed(actual, eager, truth, **options):
    figures = parity.compare(actual, eager, truth, operands=(torch.ones(1),), **options)
    return all(figure.passed for figure in figures)


def test_fp32_tolerances_are_1e_6_and_1e_5_for_gradients():
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    eager = truth.float()
    for share, out, gradient in ((5e-7, True, True), (5e-6, False, True), (5e-5, False, False)):
        actual = (truth * (1 + share)).float()
        assert passed(actual, eager, truth) == out
        assert passed(actual, eager, truth, gradient=True) == gradient


def test_cancellation_may_leave_rounding_errors():
    truth, eps = torch.zeros(100, dtype=torch.float64), torch.finfo(torch.float32).eps
    for share, out, gradient in ((0.9, True, True), (7, False, True), (9, False, False)):
        actual = torch.full((100,), share * eps)
        assert passed(actual, truth.float(), truth) == out
        assert passed(actual, truth.float(), truth, gradient=True) == gradient


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_may_be_twice_as_far_off_as_eager(dtype):
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    ulp = torch.finfo(dtype).eps
    eager = (truth * (1 + 4 * ulp)).to(dtype)
    assert passed(eager, eager, truth)
    assert not passed((truth * (1 + 6 * ulp)).to(dtype), eager, truth)  # the mean
    one = eager.clone()
    one[50] += 32 * ulp
    assert not passed(one, eager, truth)  # the largest


def test_non_finite_values_must_match_the_truth():
    truth = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    eager = truth.float()
    assert passed(eager, eager, truth)
    for wrong in ([1.0, math.inf], [1.0, 0.0], [math.nan, -math.inf], [1.0, math.nan]):
        assert not passed(torch.tensor(wrong), eager, truth)
    nothing = torch.full((3,), -math.inf, dtype=torch.float64)
    assert passed(nothing.float(), nothing.float(), nothing)


def test_a_wrong_operation_is_detected(monkeypatch, capsys):
    right = ops.attention_qkvpacked
    error = 0.0

    def wrong(*arguments, impl, **options):
        out = right(*arguments, impl="reference", **options)
        return out if impl == "reference" else out * (1 + error)

    monkeypatch.setattr(ops, "attention_qkvpacked", wrong)
    monkeypatch.setattr(
        parity, "_compared_impls", lambda op, *_: ["triton"] if op == "attention" else []
    )
    rows = list(parity.run(CPU))
    assert len(rows) == 3 * 2 and all(row.figure.passed for row in rows)
    error = 1e-4
    report = doctor.parity(NOTHING)
    assert not report["ok"]
    doctor.render(report)
    assert "attention: wrong here: please report it" in capsys.readouterr().out


def test_available_variants_agree_with_the_reference(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    report = doctor.parity(NOTHING)
    assert report["ok"], [row for row in report["parity"] if row["status"] != "ok"]
    doctor.render(report)
    doctor.render({**report, "parity": []})
    printed = capsys.readouterr().out
    assert f"All {len(report['parity'])} figures are within" in printed
    assert "attention" in {row["operation"] for row in report["parity"]}
    assert "Nothing to compare" in printed


@pytest.mark.slow
def test_interpreted_kernels_are_listed_as_such():
    if not dispatch.INTERPRETED:
        pytest.skip("a GPU runs the kernels themselves")
    report = doctor.parity(NOTHING)
    assert report["ok"], [row for row in report["parity"] if row["status"] != "ok"]
    runs = {(row["operation"], row["runs"]) for row in report["parity"]}
    interpreted = {(op, "triton, interpreted") for op in ("attention", "map_pool", "mel_patches")}
    assert interpreted <= runs <= interpreted | {("attention", "torch"), ("mel_patches", "cpp")}
