"""The caption loss's peers compute the same as ours, and one that does not is not timed."""

from __future__ import annotations

import types

import pytest
import torch
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.ops import caption_loss as benchmark


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(harness, "device", lambda: torch.device("cpu"))


def rows(rounds=1):
    return list(benchmark.rows_of(64, 16, 96, rounds))


def test_every_available_loss_is_right_and_timed():
    timed = {row["variant"]: row for row in rows() if "ms" in row}
    assert {"slap-fast", "whole logits"} <= timed.keys()
    assert ("F.linear_cross_entropy" in timed) == hasattr(F, "linear_cross_entropy")
    for row in timed.values():
        assert row["error"] < 1e-5
        assert row["TFLOP/s"] == 6 * 64 * 16 * 96 / row["ms"] / 1e9


def test_the_packages_get_their_arguments(monkeypatch):
    def of_liger(weight, hidden, labels):
        return F.cross_entropy(hidden @ weight.T, labels)

    def cut(e, c, targets, ignore_index=-100, filter_eps="high"):
        assert filter_eps is None
        return F.cross_entropy(e @ c.T, targets, ignore_index=ignore_index)

    modules = {
        "liger_kernel.transformers": {"LigerFusedLinearCrossEntropyLoss": lambda: of_liger},
        "cut_cross_entropy": {"linear_cross_entropy": cut},
    }
    monkeypatch.setattr(harness, "load", lambda name: types.SimpleNamespace(**modules[name]))
    assert {"Liger", "cut-cross-entropy"} <= {row["variant"] for row in rows() if "ms" in row}


def test_an_absent_or_wrong_peer_has_a_note(monkeypatch):
    def doubled():
        return lambda *arguments: 2 * benchmark.ours()(*arguments)

    variants = {"slap-fast": benchmark.ours, "double": doubled, "Liger": benchmark.liger}
    monkeypatch.setattr(benchmark, "VARIANTS", variants)
    notes = {row["variant"]: row["note"] for row in rows() if "note" in row}
    assert notes["double"] == "fails: wrong, error 1"
    assert notes["Liger"] in ("not installed", "needs a GPU")
