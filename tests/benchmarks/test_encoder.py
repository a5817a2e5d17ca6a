"""The encoder's variants are the same network, and a different one is not timed."""

from __future__ import annotations

import types

import pytest
import torch
from torch.nn import functional as F

from benchmarks import cases, harness
from benchmarks.model import encoder as benchmark

CASE = cases.packs()[0]._replace(lengths=[25, 7])


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(harness, "device", lambda: torch.device("cpu"))


def notes(rows):
    return {row["variant"]: row["note"] for row in rows if "note" in row}


def test_ligers_layers_make_the_same_network(monkeypatch):
    calls = []

    def liger_rms_norm(x, weight, eps, in_place):
        assert not in_place
        calls.append("norm")
        return F.rms_norm(x, weight.shape, weight, eps)

    def liger_swiglu(gate, up):
        calls.append("swiglu")
        return F.silu(gate) * up

    functional = types.SimpleNamespace(liger_rms_norm=liger_rms_norm, liger_swiglu=liger_swiglu)
    monkeypatch.setattr(harness, "load", lambda name: functional)
    variants = {name: benchmark.VARIANTS[name] for name in ("slap-fast", "Liger layers")}
    monkeypatch.setattr(benchmark, "VARIANTS", variants)
    rows = list(benchmark.rows_of(CASE, rounds=1))
    assert {row["variant"] for row in rows} == set(variants) and not notes(rows)
    assert all(row["error"] < 1e-5 for row in rows)
    assert calls.count("norm") > calls.count("swiglu") > 0


@pytest.mark.parametrize("error", [RuntimeError("no kernel image\nmore"), KeyError()])
def test_a_variant_that_fails_or_needs_a_gpu_has_a_note(monkeypatch, error):
    def broken(patches):
        raise error

    def other(encoder, case, device):
        encode = benchmark.packed(encoder, case, device)
        return lambda patches: 1.01 * encode(patches)

    variants = {
        "slap-fast": benchmark.packed,
        "broken": lambda *_: broken,
        "other": other,
        "slap-fast, compiled": benchmark.compiled,
    }
    monkeypatch.setattr(benchmark, "VARIANTS", variants)
    assert notes(benchmark.rows_of(CASE, rounds=1)) == {
        "broken": "fails: " + (str(error).split("\n")[0] or "KeyError"),
        "other": "fails: differs from slap-fast by 0.01",
        "slap-fast, compiled": "needs a GPU",
    }
