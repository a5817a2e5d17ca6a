"""Captions of scenes: lower case, of few words, each of one scene, in the order of the events."""

from __future__ import annotations

import re

from slap_fast.data.builtin.scenes import LABELS
from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.inference.slap import Slap


def test_captions_are_many_lower_case_and_of_few_words(wordings):
    captions = {text for text, _ in wordings}
    words = {word for text in captions for word in text.replace(",", "").split()}
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert len(captions) > 8000
    assert 100 <= len(words) <= 200


def test_labels_read_like_captions(wordings):
    starts = [text for text, _ in wordings if text.startswith("the sound of a")]
    assert len(starts) > 500
    words = {word for text, _ in wordings for word in text.replace(",", "").split()}
    for label in LABELS:
        article, noun = label.split(" ", 1)
        assert any(noun in text for text in starts)
        assert set(Slap.default_template.format(label).split()) <= words
        assert Slap.default_template.format(label).startswith(f"the sound of {article} ")


def test_a_caption_describes_one_scene(wordings):
    """No wording of one scene is a wording of another, so a caption decides its scene."""
    scene_of = {}
    for text, scene in wordings:
        assert scene_of.setdefault(text, scene) == scene, text


def test_every_wording_names_the_events_in_their_order(wordings):
    counts = {"after": 0, "before": 0, "then": 0, "followed": 0}
    for text, scene in wordings:
        sources = {event.source for event in scene.events}
        if scene.relation == "then" and sources <= {"a bird", "a motor", "a bell", "a cymbal"}:
            nouns = {"bird": "bird", "motor": "motor|engine", "bell": "bell", "cymbal": "cymbal"}
            where = [re.search(nouns[e.source.split()[1]], text).start() for e in scene.events]
            assert where == sorted(where, reverse=" after " in text), text
            for word in counts:
                counts[word] += f" {word} " in text
    assert min(counts.values()) > 0


def test_a_single_source_is_also_called_by_its_name_alone():
    sounds, prompts = SoundSet("train", 3000), set()
    for i in range(3000):
        label, wordings = sounds.label(i), sounds.captions(i)
        for text in wordings[3:]:
            assert len(text.split()) <= 8
            prompts.add((text, label))
    texts = [text for text, _ in prompts]
    assert len(texts) == len(set(texts))  # a name belongs to one label
    assert {(Slap.default_template.format(label), label) for label in LABELS} <= prompts


def test_hard_negatives_are_never_captions_of_the_scene():
    sounds = SoundSet("test", 500)
    for i in range(500):
        negatives = sounds.hard_negatives(i)
        assert len(set(negatives)) == len(negatives) >= 2
        assert not set(negatives) & set(sounds.captions(i))
