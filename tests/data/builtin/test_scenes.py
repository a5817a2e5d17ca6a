"""Scenes of the built-in sounds: held-out combinations, durations, near misses."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from slap_fast.data.builtin.scenes import LABELS, Event, Scene, near_misses
from slap_fast.data.builtin.sound_set import DISTINCT_SCENES, SoundSet
from slap_fast.data.builtin.wording import caption


def combinations_of(scene):
    """Each event's attributes and each unordered pair of sources, without the code under test."""
    pairs = combinations(sorted(event.source for event in scene.events), 2)
    return {tuple(event) for event in scene.events} | set(pairs)


def test_held_out_scenes_hold_combinations_that_training_never_has(scenes):
    trained = set().union(*(combinations_of(scene) for scene in scenes["train"]))
    for split in ("validation", "test"):
        assert all(combinations_of(scene) - trained for scene in scenes[split])
    # A single source's profile itself is new; new combinations of one split are not in the other.
    new = {split: set() for split in ("validation", "test")}
    for split in new:
        for scene in scenes[split]:
            new[split] |= combinations_of(scene) - trained
    # A training combination that 4,000 scenes happened to miss may appear in both: none does.
    assert not new["validation"] & new["test"]


def test_every_single_value_occurs_in_training(scenes):
    def values(split):
        seen = set()
        for scene in scenes[split]:
            seen |= {("count", len(scene.events)), scene[1:2], scene[2:3], scene[3:]}
            for event in scene.events:
                seen |= set(zip(event._fields, event, strict=True))
        return seen

    assert values("test") <= values("train")
    assert {event.source for s in scenes["train"] for event in s.events} == set(LABELS)
    crowds = [s for s in scenes["train"] if len(s.events) > 1]
    assert {event.source for s in crowds for event in s.events} == set(LABELS)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_first_held_out_scenes_differ_pairwise(split, scenes):
    first = scenes[split][:DISTINCT_SCENES]
    assert len(set(first)) == DISTINCT_SCENES == 500
    assert len({caption(scene) for scene in first}) == DISTINCT_SCENES


@pytest.mark.parametrize("split,least", [("train", 0.4), ("test", 0.28)], ids=["train", "test"])
def test_a_good_share_of_the_scenes_has_one_source_and_a_label(split, least, scenes):
    sounds = SoundSet(split, 500)
    labels = [sounds.label(i) for i in range(500)]
    single = [len(scene.events) == 1 for scene in scenes[split][:500]]
    assert [label is not None for label in labels] == single
    assert least <= np.mean(single) <= 0.55
    assert {label for label in labels if label} == set(LABELS)


def test_duration_leaves_the_kind_of_scene_open(scenes):
    sounds, single = SoundSet("train", 4000), {False: [], True: []}
    for i, scene in enumerate(scenes["train"]):
        single[sounds.seconds(i) > 8].append(len(scene.events) == 1)
    assert abs(np.mean(single[True]) - np.mean(single[False])) < 0.1


def respects(one: Scene, other: Scene) -> list[str]:
    """Number of differences of two scenes of the same sources, without the code under test."""
    differing = [
        name for name in ("relation", "background") if getattr(one, name) != getattr(other, name)
    ]
    loud = [None if s.louder is None else s.events[s.louder].source for s in (one, other)]
    differing += ["loudness"] if loud[0] != loud[1] else []
    mine, theirs = ({event.source: event for event in s.events} for s in (one, other))
    assert mine.keys() == theirs.keys()
    for source in mine:
        pairs = zip(Event._fields, mine[source], theirs[source], strict=True)
        differing += [f"{source} {name}" for name, a, b in pairs if a != b]
    in_order = one.relation == other.relation == "then"
    differing += ["order"] if in_order and list(mine) != list(theirs) else []
    return differing


def test_hard_negatives_are_wrong_in_exactly_one_respect(scenes):
    kinds = set()
    for scene in scenes["test"][:500]:
        misses = near_misses(scene)
        assert len(misses) >= 2
        assert len(set(misses)) == len(misses)
        for miss in misses:
            (respect,) = respects(scene, miss)
            kinds.add(respect.rsplit(" ", 1)[-1])
    words = "order relation loudness background pitch tempo motion dynamics"
    assert kinds == set(words.split())
