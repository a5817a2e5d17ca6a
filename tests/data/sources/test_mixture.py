"""Mixes of sources: drawn by weight, refused where the file is wrong."""

from __future__ import annotations

import json

import pytest

from slap_fast.config import override, slap_tiny
from slap_fast.data.loader import TrainSteps
from slap_fast.data.open import open_source
from slap_fast.data.sources.mixture import MixedClips, read_mix
from tests.helpers.shards import contents_by_captions, tokenizer, trained

CONFIG = override(slap_tiny(), {"steps": 15, "batch_size": 16})


def test_a_mix_draws_by_weight_and_reads_from_both(manifest, packed, tmp_path):
    entries = [{"data": str(manifest), "weight": 3}, {"data": str(packed)}]
    (tmp_path / "mix.yaml").write_text(json.dumps(entries))
    mix = open_source(tmp_path / "mix.yaml", "train", fallback="train")
    assert isinstance(mix, MixedClips) and len(mix) == 60
    assert (
        contents_by_captions(mix)
        == contents_by_captions(mix.sources[0])
        == contents_by_captions(mix.sources[1])
    )
    assert mix.total_seconds() == pytest.approx(2 * mix.sources[0].total_seconds())
    assert mix.name(30).endswith("/000000000") and mix.seconds(30) == mix.sources[1].seconds(0)
    data = TrainSteps(mix, tokenizer(), CONFIG)
    for step in range(15):
        assert sum(index < 30 for _, index in data.clips_of(step)) == 12
    assert trained(data[0]) == 16


def test_a_mix_counts_paths_from_its_own_folder(manifest):
    mix = manifest.parent / "mix.yml"
    mix.write_text("- data: m.jsonl\n- data: builtin\n  weight: 0.5\n")
    assert [(p.data, p.weight) for p in read_mix(mix)] == [(str(manifest), 1), ("builtin", 0.5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no list"),
        ("data: a.csv", "found no list"),
        ("- a.csv", "expected data and weight"),
        ("- data: a.csv\n  wieght: 1", "expected data and weight"),
        ("- data: 3", "found data 3"),
        ("- data: other.yaml", "found data 'other.yaml'"),
        ("- {data: a.csv, weight: 0}", "found weight 0, expected a number > 0"),
        ("- {data: a.csv, weight: .nan}", "found weight nan"),
        ("- {data: a.csv, weight: heavy}", "found weight 'heavy'"),
        ("- !!python/object/apply:os.system [id]", "cannot be read"),
        ("- {", "cannot be read"),
    ],
)
def test_a_mix_that_is_wrong_is_refused(text, message, tmp_path):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mix(tmp_path / "mix.yaml")
