"""The accounting of a step: its ways agree, and what they take adds up."""

import copy

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
    early, *_, found = map(copy.deepcopy, bench.bench_step(config, 300, 2, runs.CPU))
    assert early["rounds"] == 1 and set(early["parts"]) == {"mel"} and len(early["rows"]) == 3
    assert found["rounds"] == 2
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


def test_a_batch_is_another_of_as_many_tokens_each_round(uncompiled, monkeypatch):
    config = override(runs.TINY, {"model.ssl.mask_clips": 1.0})
    timed, seen = bench.Way.timed, []

    def spy(way, batch):
        seen.append(batch)
        return timed(way, batch)

    monkeypatch.setattr(bench.Way, "timed", spy)
    monkeypatch.setattr(bench, "_parts", lambda *_: [])
    list(bench.bench_step(config, 600, 4, runs.CPU))
    ways = len(bench.WAYS)
    turns = [seen[at : at + ways] for at in range(0, len(seen), ways)]
    assert all(batch is turn[0] for turn in turns for batch in turn)
    a, b, c = warm = [turn[0] for turn in turns[:3]]
    assert [id(turn[0]) for turn in turns[3:]] == [id(batch) for batch in (a, b, c, a)]
    assert len({len(batch.audio.patches) for batch in warm}) == 1
    assert len({len(batch.mask_indices) for batch in warm}) == 1
    assert not torch.equal(a.audio.patches, b.audio.patches)
    assert not torch.equal(b.text.ids, c.text.ids)


def test_ways_that_differ_are_not_timed(uncompiled, monkeypatch):
    textbook = bench.textbook_losses

    def wrong(*given):
        return {name: 1.01 * value for name, value in textbook(*given).items()}

    monkeypatch.setattr(bench, "textbook_losses", wrong)
    with pytest.raises(RuntimeError, match="fused: loss .*, the reference has"):
        list(bench.bench_step(runs.TINY, 300, 1, runs.CPU))


def test_the_peak_sees_what_is_freed_again():
    with harness.Peak(torch.device("cpu")) as peak:
        torch.ones(30_000_000).sum()
    assert 100e6 < peak.bytes < 150e6
