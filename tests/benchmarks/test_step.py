"""The step benchmark: its variants agree, and their times add up."""

import copy

import pytest
import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.model import step, step_variants
from benchmarks.report import tables
from slap_fast.config import override, slap_base
from slap_fast.diagnostics.memory import estimate_memory
from slap_fast.models.slap import SlapModel
from slap_fast.training.state import new_state
from slap_fast.training.step import train_step
from tests.helpers import runs


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling takes minutes, and the variants differ in more than that."""
    variants = {name: it | {"compiled": False} for name, it in step.VARIANTS.items()}
    monkeypatch.setattr(step, "VARIANTS", variants)


def test_the_variants_agree_and_their_times_add_up(uncompiled):
    config = override(runs.TINY, {"model.ssl.mask_clips": 1.0})
    early, *_, record = map(copy.deepcopy, step.bench_step(config, 300, 2, runs.CPU))
    assert early["rounds"] == 1 and set(early["parts"]) == {"mel"} and len(early["rows"]) == 3
    assert record["rounds"] == 2
    assert [row["way"] for row in record["rows"]] == ["reference", "compiled reference", "fused"]
    assert set(record["first_loss"]) == set(step.VARIANTS)
    for row in record["rows"]:
        assert row["steps"] == 2
        stages = sum(value for key, value in row.items() if key.endswith(" ms"))
        assert stages == pytest.approx(row["ms"], rel=0.5)
        assert row["tokens/s"] == pytest.approx(1e3 * record["tokens"] / row["ms"])
        assert row["MFU"] == pytest.approx(record["flops"] / row["ms"] * 1e3 / record["peak_flops"])
    parts = record["parts"]
    assert set(parts) == {"encoder", "text", "decoder", "teacher", "mel"}
    assert all(part["ms"] > 0 for part in parts.values())
    assert all(parts[name]["MFU"] > 0 for name in parts if name != "mel")


def test_each_round_has_another_batch_of_as_many_tokens(uncompiled, monkeypatch):
    config = override(runs.TINY, {"model.ssl.mask_clips": 1.0})
    timed, seen = step_variants.StepVariant.timed, []

    def spy(variant, batch):
        seen.append(batch)
        return timed(variant, batch)

    monkeypatch.setattr(step_variants.StepVariant, "timed", spy)
    monkeypatch.setattr(step, "_parts", lambda *_: [])
    list(step.bench_step(config, 600, 4, runs.CPU))
    size = len(step.VARIANTS)
    turns = [seen[at : at + size] for at in range(0, len(seen), size)]
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
    *_, batch = step.make_batch(config, 300)
    variant = step_variants.StepVariant(config, runs.CPU, compiled=False, fused=True)
    torch.manual_seed(0)
    state = new_state(config, SlapModel(config.model), runs.CPU)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    loss = variant.step(batch, lambda stage: None)
    torch.testing.assert_close(loss, train_step(state, [batch])["loss"])
    moved = 0
    for part in ("model", "teacher"):
        ours, theirs = getattr(variant.state, part).state_dict(), getattr(state, part).state_dict()
        torch.testing.assert_close(ours, theirs)
        moved += sum(not torch.equal(ours[name], before[name]) for name in ours if name in before)
    assert moved > len(before)


@pytest.mark.parametrize("round_", [2, 5], ids=["warming up", "counted"])
def test_a_variant_out_of_memory_is_left_out_with_a_note(uncompiled, monkeypatch, round_):
    timed, calls = step_variants.StepVariant.timed, []

    def full(variant, batch):
        calls.append(variant.fused)
        if calls.count(False) == 2 * round_ and not variant.fused:  # the compiled reference's
            raise torch.OutOfMemoryError("full")
        return timed(variant, batch)

    monkeypatch.setattr(step_variants.StepVariant, "timed", full)
    monkeypatch.setattr(step, "_parts", lambda *_: [])
    *_, record = step.bench_step(runs.TINY, 300, 2, runs.CPU)
    reference, compiled, fused = record["rows"]
    assert compiled == {"way": "compiled reference", "note": "out of memory"}
    assert reference["steps"] == fused["steps"] == 2
    assert "note" not in reference and "note" not in fused
    assert set(record["first_loss"]) == set(step.VARIANTS)
    console = Console(record=True, width=120)
    step.render(record, console)
    assert "out of memory" in console.export_text()
    shown = tables.columns({"way": "", "ms": "ms", "peak MB": "peak, MB"})(record)
    assert shown.count("out of memory") == 1


def test_the_fused_variant_out_of_memory_raises(uncompiled, monkeypatch):
    def full(variant, batch):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(step_variants.StepVariant, "timed", full)
    with pytest.raises(torch.OutOfMemoryError):
        list(step.bench_step(runs.TINY, 300, 1, runs.CPU))


def test_the_fused_variant_can_be_timed_alone(uncompiled, monkeypatch):
    monkeypatch.setattr(step, "_parts", lambda *_: [])
    *_, record = step.bench_step(runs.TINY, 300, 2, runs.CPU, ["fused"])
    assert [row["way"] for row in record["rows"]] == ["fused"] == list(record["first_loss"])


def test_a_slow_variant_takes_fewer_steps(uncompiled, monkeypatch):
    def slow(variant, batch):
        return step_variants.StepResult(1.0, {"all": 1.0 if variant.fused else 20.0}, 1000)

    monkeypatch.setattr(step_variants.StepVariant, "timed", slow)
    monkeypatch.setattr(step, "_parts", lambda *_: [])
    *_, record = step.bench_step(runs.TINY, 300, 9, runs.CPU)
    assert [row["steps"] for row in record["rows"]] == [3, 3, 9]
    assert [row["times_fused"] for row in record["rows"]] == [20.0, 20.0, 1.0]


def test_tokens_leave_room_for_three_models_and_as_much_again():
    for size in (150e9, 85e9):
        alone = estimate_memory(slap_base(), size)
        kept = {name: size for name, size in alone["fixed_bytes"].items() if name != "reserved"}
        per_token = sum(alone["bytes_per_token"].values())
        tokens = step.default_tokens(slap_base(), size)
        assert 0.9 < (3 * sum(kept.values()) + 2 * tokens * per_token) / size < 0.95
    assert step.default_tokens(slap_base(), 1e9) == 0


def test_variants_that_differ_are_not_timed(uncompiled, monkeypatch):
    textbook = step_variants.textbook_losses

    def wrong(*arguments):
        return {name: 1.01 * value for name, value in textbook(*arguments).items()}

    monkeypatch.setattr(step_variants, "textbook_losses", wrong)
    with pytest.raises(RuntimeError, match="fused: loss .*, the reference has"):
        list(step.bench_step(runs.TINY, 300, 1, runs.CPU))


def test_the_peak_counts_memory_that_was_freed():
    with harness.Peak(torch.device("cpu")) as peak:
        torch.ones(30_000_000).sum()
    assert 100e6 < peak.bytes < 150e6
