"""Scenes and captions that several tests read."""

from __future__ import annotations

import pytest

from slap_fast.data.builtin.sound_set import SoundSet


@pytest.fixture(scope="session")
def scenes():
    """The descriptions of every split, drawn once."""
    sizes = {"train": 4000, "validation": 1000, "test": 1500}
    sets = {split: SoundSet(split, size) for split, size in sizes.items()}
    return {split: [s.description(i) for i in range(len(s))] for split, s in sets.items()}


@pytest.fixture(scope="session")
def wordings(scenes):
    """(caption, scene) of the three full wordings of the first scenes of every split."""
    texts = []
    for split, size in (("train", 2500), ("validation", 500), ("test", 500)):
        sounds = SoundSet(split, size)
        for i in range(size):
            captions = sounds.captions(i)
            assert len(captions) == len(set(captions)) == (5 if sounds.label(i) else 3)
            texts += [(text, scenes[split][i]) for text in captions[:3]]
    return texts
