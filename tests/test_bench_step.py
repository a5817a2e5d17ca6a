"""The accounting of a step: its ways agree, and what they take adds up."""

import harness
import pytest
import runs
import step as bench
import torch

from slap_fast.config import override


@pytest.fixture
def uncompiled(monkeypatch):
    """A compiler takes minutes; the ways differ in more than that."""
    ways = {name: options | {"compiled": False} for name, options in bench.WAYS.items()}
    monkeypatch.setattr(bench, "WAYS", ways)


def test_the_ways_agree_and_are_accounted_for(uncompiled):
    config = override(runs.TINY, {"model.ssl.mask_clips": 1.0})
    found = bench.bench_step(config, 300, 2, runs.CPU)
    assert [row["way"] for row in found["rows"]] == ["reference", "compiled reference", "fused"]
    for row in found["rows"]:
        stages = sum(value for key, value in row.items() if key.endswith(" ms"))
        assert stages == pytest.approx(row["ms"], rel=0.5)
        assert row["tokens/s"] == pytest.approx(1e3 * found["tokens"] / row["ms"])
        assert row["MFU"] == pytest.approx(found["flops"] / row["ms"] * 1e3 / found["peak_flops"])
    parts = found["parts"]
    assert set(parts) == {"encoder", "text", "decoder", "teacher", "mel"}
    assert all(part["ms"] > 0 for part in parts.values())
    assert all(parts[name]["MFU"] > 0 for name in parts if name != "mel")


def test_ways_that_differ_are_not_timed(uncompiled, monkeypatch):
    textbook = bench.textbook_losses

    def wrong(*given):
        return {name: 1.01 * value for name, value in textbook(*given).items()}

    monkeypatch.setattr(bench, "textbook_losses", wrong)
    with pytest.raises(RuntimeError, match="fused: loss .*, the reference has"):
        bench.bench_step(runs.TINY, 300, 1, runs.CPU)


def test_the_peak_sees_what_is_freed_again():
    with harness.Peak(torch.device("cpu")) as peak:
        torch.ones(30_000_000).sum()
    assert 100e6 < peak.bytes < 150e6
