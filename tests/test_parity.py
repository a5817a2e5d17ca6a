"""The tolerance rule fails what is wrong, and the parity command finds a wrong kernel."""

from __future__ import annotations

import math

import pytest
import torch

from slap_fast import doctor, ops, parity

CPU = torch.device("cpu")


def passed(actual, eager, truth, **options):
    rows = parity.checks(actual, eager, truth, operands=(torch.ones(1),), **options)
    return all(row.passed for row in rows)


def test_fp32_may_be_a_millionth_off_and_its_gradient_ten():
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    eager = truth.float()
    for share, out, gradient in ((5e-7, True, True), (5e-6, False, True), (5e-5, False, False)):
        actual = (truth * (1 + share)).float()
        assert passed(actual, eager, truth) == out
        assert passed(actual, eager, truth, gradient=True) == gradient


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


def test_what_is_not_finite_must_be_so_where_the_truth_is():
    truth = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    eager = truth.float()
    assert passed(eager, eager, truth)
    for wrong in ([1.0, math.inf], [1.0, 0.0], [math.nan, -math.inf], [1.0, math.nan]):
        assert not passed(torch.tensor(wrong), eager, truth)
    nothing = torch.full((3,), -math.inf, dtype=torch.float64)
    assert passed(nothing.float(), nothing.float(), nothing)


def test_a_wrong_operation_is_found(monkeypatch):
    right = ops.attention_qkvpacked
    error = 0.0

    def wrong(*arguments, impl, **options):
        out = right(*arguments, impl="reference", **options)
        return out if impl else out * (1 + error)

    monkeypatch.setattr(ops, "attention_qkvpacked", wrong)
    monkeypatch.setattr(
        parity, "_chosen", lambda op, *_: "triton" if op == "attention" else "reference"
    )
    rows = list(parity.run(CPU))
    assert len(rows) == 3 * 2 * 2 and all(row.check.passed for row in rows)
    error = 1e-4
    assert not doctor.parity({"ok": True, "rows": []})["ok"]


def test_what_runs_here_agrees_with_the_reference():
    report = doctor.parity({"ok": True, "rows": []})
    assert report["ok"], [row for row in report["rows"] if row["status"] != "ok"]
