"""The accounting of a step: its ways agree, and what they take adds up."""

import copy

import pytest
import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.model import step as bench
from benchmarks.report import tables
from slap_fast.config import override, slap_base
from slap_fast.diagnostics.memory import estimate_memory
from slap_fast.models.slap import SlapModel
from slap_fast.training import loop as train
from slap_fast.training import state as runstate
from tests.helpers import runs


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
    assert set(found["first_loss"]) == set(bench.WAYS)
    for row in found["rows"]:
        assert row["steps"] == 2
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


def test_the_fused_step_changes_the_model_as_the_trainers_does():
    same_all_along = {"warmup_steps": 0, "ema_momentum": 0.99, "precision": "fp32"}
    ssl = {"mask_clips": 1.0, "teacher_temperature_warmup": 0.0}
    ssl["teacher_temperature_start"] = runs.TINY.model.ssl.teacher_temperature
    changed = same_all_along | {f"model.ssl.{name}": value for name, value in ssl.items()}
    config = override(runs.TINY, changed)
    *_, batch = bench.make_batch(config, 300)
    way = bench.Way(config, runs.CPU, compiled=False, fused=True)
    torch.manual_seed(0)
    state = runstate.new_state(config, SlapModel(config.model), runs.CPU)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    loss = way.step(batch, lambda stage: None)
    torch.testing.assert_close(loss, train.train_step(state, [batch])["loss"])
    moved = 0
    for part in ("model", "teacher"):
        ours, theirs = getattr(way.state, part).state_dict(), getattr(state, part).state_dict()
        torch.testing.assert_close(ours, theirs)
        moved += sum(not torch.equal(ours[name], before[name]) for name in ours if name in before)
    assert moved > len(before)


@pytest.mark.parametrize("step", [2, 5], ids=["warming up", "counted"])
def test_a_way_without_room_is_told_so_and_left_out(uncompiled, monkeypatch, step):
    timed, calls = bench.Way.timed, []

    def full(way, batch):
        calls.append(way.fused)
        if calls.count(False) == 2 * step and not way.fused:  # the compiled reference's
            raise torch.OutOfMemoryError("full")
        return timed(way, batch)

    monkeypatch.setattr(bench.Way, "timed", full)
    monkeypatch.setattr(bench, "_parts", lambda *_: [])
    *_, found = bench.bench_step(runs.TINY, 300, 2, runs.CPU)
    reference, compiled, fused = found["rows"]
    assert compiled == {"way": "compiled reference", "note": "out of memory"}
    assert reference["steps"] == fused["steps"] == 2
    assert "note" not in reference and "note" not in fused
    assert set(found["first_loss"]) == set(bench.WAYS)
    console = Console(record=True, width=120)
    bench.render(found, console)
    assert "out of memory" in console.export_text()
    shown = tables.columns({"way": "", "ms": "ms", "peak MB": "peak, MB"})(found)
    assert shown.count("out of memory") == 1


def test_the_fused_way_without_room_raises(uncompiled, monkeypatch):
    def full(way, batch):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(bench.Way, "timed", full)
    with pytest.raises(torch.OutOfMemoryError):
        list(bench.bench_step(runs.TINY, 300, 1, runs.CPU))


def test_the_fused_way_may_be_timed_alone(uncompiled, monkeypatch):
    monkeypatch.setattr(bench, "_parts", lambda *_: [])
    *_, found = bench.bench_step(runs.TINY, 300, 2, runs.CPU, ["fused"])
    assert [row["way"] for row in found["rows"]] == ["fused"] == list(found["first_loss"])


def test_a_slow_way_takes_fewer_steps(uncompiled, monkeypatch):
    def slow(way, batch):
        return bench.Taken(1.0, {"all": 1.0 if way.fused else 20.0}, 1000)

    monkeypatch.setattr(bench.Way, "timed", slow)
    monkeypatch.setattr(bench, "_parts", lambda *_: [])
    *_, found = bench.bench_step(runs.TINY, 300, 9, runs.CPU)
    assert [row["steps"] for row in found["rows"]] == [3, 3, 9]
    assert [row["times_fused"] for row in found["rows"]] == [20.0, 20.0, 1.0]


def test_tokens_leave_room_for_three_models_and_as_much_again():
    for memory in (150e9, 85e9):
        alone = estimate_memory(slap_base(), memory)
        kept = {name: size for name, size in alone["fixed_bytes"].items() if name != "reserved"}
        per_token = sum(alone["bytes_per_token"].values())
        tokens = bench.default_tokens(slap_base(), memory)
        assert 0.9 < (3 * sum(kept.values()) + 2 * tokens * per_token) / memory < 0.95
    assert bench.default_tokens(slap_base(), 1e9) == 0


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
