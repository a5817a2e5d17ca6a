"""The compatibility table: what it compares, and that a fault in a patch shows."""

import pytest
import torch

from benchmarks import machine
from benchmarks.report import compatibility
from benchmarks.transformers_models import KINDS

PARTS = {
    "LlamaForCausalLM": {"unpadded", "padded", "packed", "past", "gradients", "undone"},
    "BertModel": {"unpadded", "padded", "gradients", "undone"},
    "BartModel": {"unpadded", "padded", "cross", "gradients", "undone"},
    "ViTModel": {"unpadded", "gradients", "undone"},
}


@pytest.mark.parametrize("name", PARTS)
def test_a_model_is_compared_in_every_way_it_can_be_called(name):
    rows = list(compatibility.rows_of(name))
    changed = [row for row in rows if row["changed"]]
    assert changed and not any(map(compatibility.fails, rows))
    for row in changed:
        assert {call for call in compatibility.CALLS if row[call] is not None} == PARTS[name]
    assert all(row["why"] for row in rows)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BartModel"])
def test_a_patch_that_changes_numbers_fails(name, monkeypatch):
    patch = compatibility.slap_fast.patch

    def spoiled(model):
        report = patch(model)
        with torch.no_grad():
            next(model.parameters()).mul_(1.001)
        return report

    monkeypatch.setattr(compatibility.slap_fast, "patch", spoiled, raising=False)
    rows = [row for row in compatibility.rows_of(name) if row["changed"]]
    assert rows and all(map(compatibility.fails, rows))
    assert all(row["undone"] > compatibility.MOST for row in rows)


def test_what_a_model_raises_is_a_row_that_fails(monkeypatch):
    monkeypatch.setattr(compatibility, "make", lambda name: 1 / 0)
    (row,) = compatibility.rows_of("BertModel")
    assert row["option"] == "raised" and row["why"] == "ZeroDivisionError: division by zero"
    assert compatibility.fails(row)


def test_the_page_is_written_between_its_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "KINDS", {k: KINDS[k] for k in ("BertModel", "ViTModel")})
    monkeypatch.setattr("sys.argv", ["compatibility", "--root", str(tmp_path)])
    page = tmp_path / "docs" / "compatibility.md"
    page.parent.mkdir()
    page.write_text(f"before\n{compatibility.BEGIN}\nold\n{compatibility.END}\nafter\n")
    assert compatibility.main() == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "## text: 1 of 1 models changed" in text and "## vision: 1 of 1" in text
    assert "| BertModel | 2 x BertSelfAttention | attention | yes | " in text
    record = compatibility.json.loads(
        (tmp_path / "benchmarks" / "results" / "compatibility.json").read_text()
    )
    assert not list(machine.complaints(record))
