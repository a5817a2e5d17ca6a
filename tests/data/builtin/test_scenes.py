"""The built-in sounds: determinism, held-out combinations, captions that the waveform bears out."""

import hashlib
import pickle
import re
import subprocess
import sys
import time
from itertools import combinations

import numpy as np
import pytest

from slap_fast.data.builtin.scenes import LABELS, PROFILES, Event, Scene, near_misses
from slap_fast.data.builtin.sound_set import DISTINCT_SCENES, SoundSet
from slap_fast.data.builtin.synthesis import (
    PITCH_HZ,
    SAMPLE_RATE,
    SOURCES,
    UNITS_PER_SECOND,
    render_event,
)
from slap_fast.data.builtin.wording import caption
from slap_fast.inference.slap import DEFAULT_TEMPLATE

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def scenes():
    """The descriptions of every split, drawn once."""
    sizes = {"train": 4000, "validation": 1000, "test": 1500}
    sets = {split: SoundSet(split, size) for split, size in sizes.items()}
    return {split: [s.description(i) for i in range(len(s))] for split, s in sets.items()}


@pytest.fixture(scope="module")
def wordings(scenes):
    """(caption, scene) of the three full wordings of the first scenes of every split."""
    found = []
    for split, size in (("train", 2500), ("validation", 500), ("test", 500)):
        sounds = SoundSet(split, size)
        for i in range(size):
            own = sounds.captions(i)
            assert len(own) == len(set(own)) == (5 if sounds.label(i) else 3)
            found += [(text, scenes[split][i]) for text in own[:3]]
    return found


def met(scene):
    """What meets in a scene, restated: each event's attributes and each unordered source pair."""
    pairs = combinations(sorted(event.source for event in scene.events), 2)
    return {tuple(event) for event in scene.events} | set(pairs)


def fingerprint(sounds):
    """A hash over everything a set says about its first scenes."""
    digest = hashlib.sha256()
    for i in range(6):
        said = (sounds.description(i), sounds.captions(i), sounds.hard_negatives(i))
        digest.update(repr((sounds.seconds(i), sounds.label(i), said)).encode())
        digest.update(sounds.waveform(i).tobytes())
    return digest.hexdigest()


def test_another_process_makes_the_same_scenes():
    code = (
        "from tests.data.builtin.test_scenes import SoundSet, fingerprint; "
        "print(fingerprint(SoundSet('test', 9, seed=5)))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint(SoundSet("test", 9, seed=5))


def test_a_scene_depends_on_neither_the_size_nor_the_order_of_calls():
    small, large = SoundSet("test", 30), SoundSet("test", 900)
    backwards = [large.description(i) for i in reversed(range(30))]
    assert backwards[::-1] == [small.description(i) for i in range(30)]
    assert np.array_equal(pickle.loads(pickle.dumps(large)).waveform(3), small.waveform(3))


@pytest.mark.parametrize("other", [("train", 1), ("test", 0)], ids=["seed", "split"])
def test_another_seed_or_split_gives_other_scenes(other):
    here, there = SoundSet("train", 40), SoundSet(other[0], 40, seed=other[1])
    same = sum(here.description(i) == there.description(i) for i in range(40))
    assert same <= 2
    assert not np.array_equal(here.waveform(0)[:100], there.waveform(0)[:100])


@pytest.mark.parametrize("split", SPLITS)
def test_waveforms_are_finite_float32_of_the_promised_length_below_full_scale(split):
    sounds = SoundSet(split, 25, max_seconds=6.0)
    for i in range(25):
        wave = sounds.waveform(i)
        assert wave.dtype == np.float32
        assert wave.shape == (round(sounds.seconds(i) * SAMPLE_RATE),)
        assert np.isfinite(wave).all()
        assert 0.2 < np.abs(wave).max() < 1.0


@pytest.mark.parametrize("source", LABELS)
def test_every_profile_of_a_source_sounds_over_its_whole_time(source):
    # A peak of 1, and something to hear in the first and in the last second.
    for number, event in enumerate(PROFILES[source]):
        wave = render_event(*event, SAMPLE_RATE * 3, np.random.default_rng(number))
        assert np.abs(wave).max() == pytest.approx(1.0, abs=1e-6), event
        for part in (wave[:SAMPLE_RATE], wave[-SAMPLE_RATE:]):
            assert np.abs(part).max() > (0.02 if event.dynamics else 0.2), event


def test_durations_are_log_uniform():
    sounds = SoundSet("train", 4000)
    logs = np.log([sounds.seconds(i) for i in range(4000)]) / np.log(30.0)
    logs.sort()
    assert logs[0] >= -1e-4 and logs[-1] <= 1 + 1e-4
    # Kolmogorov-Smirnov: 1.63 / sqrt(n) is passed by one uniform sample in a hundred.
    assert np.abs(logs - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / np.sqrt(4000)


def test_duration_leaves_the_kind_of_scene_open(scenes):
    sounds, single = SoundSet("train", 4000), {False: [], True: []}
    for i, scene in enumerate(scenes["train"]):
        single[sounds.seconds(i) > 8].append(len(scene.events) == 1)
    assert abs(np.mean(single[True]) - np.mean(single[False])) < 0.1


def test_synthesis_is_200_times_faster_than_real_time():
    sounds = SoundSet("train", 60)
    start = time.process_time()
    seconds = sum(len(sounds.waveform(i)) for i in range(60)) / SAMPLE_RATE
    assert seconds / (time.process_time() - start) > 200


def test_twenty_thousand_scenes_are_described_lazily():
    start = time.process_time()
    assert len(SoundSet("test", 20_000)) == 20_000
    assert time.process_time() - start < 0.05


def test_held_out_scenes_hold_combinations_that_training_never_has(scenes):
    trained = set().union(*(met(scene) for scene in scenes["train"]))
    for split in ("validation", "test"):
        assert all(met(scene) - trained for scene in scenes[split])
    # Alone, the profile itself is new; and what is new in one held-out split is not in the other.
    new = {split: set() for split in ("validation", "test")}
    for split in new:
        for scene in scenes[split]:
            new[split] |= met(scene) - trained
    # A training combination that 4,000 scenes happened to miss may appear in both: none does.
    assert not new["validation"] & new["test"]


def test_every_single_value_occurs_in_training(scenes):
    def values(split):
        found = set()
        for scene in scenes[split]:
            found |= {("count", len(scene.events)), scene[1:2], scene[2:3], scene[3:]}
            for event in scene.events:
                found |= set(zip(event._fields, event, strict=True))
        return found

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
        assert set(DEFAULT_TEMPLATE.format(label).split()) <= words
        assert DEFAULT_TEMPLATE.format(label).startswith(f"the sound of {article} ")


def test_a_caption_means_one_scene(wordings):
    """No wording of one scene is a wording of another, so a caption decides its scene."""
    meaning = {}
    for text, scene in wordings:
        assert meaning.setdefault(text, scene) == scene, text


def test_every_wording_names_the_events_in_their_order(wordings):
    seen = {"after": 0, "before": 0, "then": 0, "followed": 0}
    for text, scene in wordings:
        sources = {event.source for event in scene.events}
        if scene.relation == "then" and sources <= {"a bird", "a motor", "a bell", "a cymbal"}:
            nouns = {"bird": "bird", "motor": "motor|engine", "bell": "bell", "cymbal": "cymbal"}
            where = [re.search(nouns[e.source.split()[1]], text).start() for e in scene.events]
            assert where == sorted(where, reverse=" after " in text), text
            for word in seen:
                seen[word] += f" {word} " in text
    assert min(seen.values()) > 0


def test_a_single_source_is_also_called_by_its_name_alone():
    sounds, prompts = SoundSet("train", 3000), set()
    for i in range(3000):
        label, wordings = sounds.label(i), sounds.captions(i)
        for text in wordings[3:]:
            assert len(text.split()) <= 8
            prompts.add((text, label))
    texts = [text for text, _ in prompts]
    assert len(texts) == len(set(texts))  # a name stands for one label
    assert {(DEFAULT_TEMPLATE.format(label), label) for label in LABELS} <= prompts


def respects(one: Scene, other: Scene) -> list[str]:
    """In what two scenes of the same sources differ, counted without the code under test."""
    found = [
        name for name in ("relation", "background") if getattr(one, name) != getattr(other, name)
    ]
    loud = [None if s.louder is None else s.events[s.louder].source for s in (one, other)]
    found += ["loudness"] if loud[0] != loud[1] else []
    mine, theirs = ({event.source: event for event in s.events} for s in (one, other))
    assert mine.keys() == theirs.keys()
    for source in mine:
        pairs = zip(Event._fields, mine[source], theirs[source], strict=True)
        found += [f"{source} {name}" for name, a, b in pairs if a != b]
    in_order = one.relation == other.relation == "then"
    found += ["order"] if in_order and list(mine) != list(theirs) else []
    return found


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


def test_hard_negatives_never_say_what_a_caption_of_the_scene_says():
    sounds = SoundSet("test", 500)
    for i in range(500):
        negatives = sounds.hard_negatives(i)
        assert len(set(negatives)) == len(negatives) >= 2
        assert not set(negatives) & set(sounds.captions(i))


def peak_hz(wave):
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return spectrum.argmax() * SAMPLE_RATE / len(wave)


@pytest.mark.parametrize("pitch", PITCH_HZ)
@pytest.mark.parametrize("source", ["a pure tone", "a bell", "a wooden block"])
def test_pitch_lies_in_its_band(source, pitch):
    low, high = PITCH_HZ[pitch]
    tempo = SOURCES[source].tempos[0]
    for seed in range(6):
        wave = render_event(
            source, pitch, tempo, None, None, SAMPLE_RATE, np.random.default_rng(seed)
        )
        assert low * 0.95 < peak_hz(wave) < high * 1.05


def test_pitch_bands_leave_gaps_that_glides_do_not_close():
    for pitch in PITCH_HZ:
        for motion, tempo in (("rising", "slow"), ("falling", "slow"), ("wobbling", "steady")):
            wave = render_event(
                "a pure tone", pitch, tempo, motion, None, SAMPLE_RATE, np.random.default_rng(3)
            )
            power = np.abs(np.fft.rfft(wave)) ** 2
            hertz = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
            nearest = min(PITCH_HZ, key=lambda name: abs(np.log(peak_hz(wave) / PITCH_HZ[name][0])))
            assert nearest == pitch
            for other, (low, high) in PITCH_HZ.items():
                inside = power[(hertz >= low) & (hertz <= high)].sum() / power.sum()
                assert other == pitch or inside < 0.02


@pytest.mark.parametrize("motion,sign", [("rising", 1), ("falling", -1)])
@pytest.mark.parametrize("tempo", ["slow", "fast"])
@pytest.mark.parametrize("pitch", PITCH_HZ)
def test_glides_go_where_they_say(pitch, tempo, motion, sign):
    # Zero crossings in the two halves of every unit; pauses between units are silent.
    wave = render_event(
        "a pure tone", pitch, tempo, motion, None, SAMPLE_RATE * 3, np.random.default_rng(1)
    )
    sounding = np.abs(wave).reshape(-1, 40).max(1) > 0
    edges = np.flatnonzero(np.diff(sounding.astype(int), prepend=0)) * 40
    units = [wave[start:end] for start, end in zip(edges[::2], edges[1::2], strict=False)]
    assert len(units) >= 4
    for unit in units:
        crossings = np.flatnonzero((unit[:-1] < 0) & (unit[1:] > 0))
        later = (crossings > len(unit) / 2).sum()
        assert np.sign(2 * later - len(crossings)) == sign


@pytest.mark.parametrize("source", ["a buzzer", "a bell", "a drum", "a ticking clock", "a noise"])
@pytest.mark.parametrize("tempo", UNITS_PER_SECOND)
def test_repetitions_per_second_match_the_tempo(source, tempo):
    low, high = UNITS_PER_SECOND[tempo]
    for seed in range(4):
        event = (source, SOURCES[source].pitches[-1], tempo, None, None)
        wave = render_event(*event, SAMPLE_RATE * 8, np.random.default_rng(seed))
        envelope = np.abs(wave).reshape(-1, 80).max(1)  # 200 per second
        envelope = np.convolve(envelope, np.ones(5) / 5, "same")
        onsets = (np.diff((envelope > envelope.mean()).astype(int), prepend=0) > 0).sum()
        assert low * 8 * 0.95 - 1 <= onsets <= high * 8 * 1.05 + 1


def test_a_slow_repetition_repeats_even_in_the_shortest_event():
    for seed in range(20):
        shortest = int(0.95 * SAMPLE_RATE)
        event = ("a ticking clock", None, "slow", None, None)
        wave = render_event(*event, shortest, np.random.default_rng(seed))
        clicks = np.abs(wave).reshape(-1, 80).max(1) > 0.2
        assert (np.diff(clicks.astype(int), prepend=0) > 0).sum() >= 2


@pytest.mark.parametrize("dynamics,sign", [("louder", 1), ("quieter", -1)])
def test_fades_go_where_they_say(dynamics, sign):
    event = ("a buzzer", "middle", "steady", None, dynamics)
    wave = render_event(*event, SAMPLE_RATE * 2, np.random.default_rng(0))
    levels = 20 * np.log10(np.abs(wave).reshape(10, -1).max(1))
    assert (np.diff(levels) * sign > 1).all()
    assert abs(levels[-1] - levels[0]) > 20


ORDERED = [("a pure tone", "high"), ("a drum", "low")]


@pytest.mark.parametrize("louder", [None, 0, 1])
@pytest.mark.parametrize("swap", [False, True], ids=["tone-drum", "drum-tone"])
def test_events_come_in_the_order_of_the_caption(swap, louder, monkeypatch):
    sounds = SoundSet("train", 8)
    events = [Event(*ORDERED[0], "steady", None), Event(*ORDERED[1], "fast", None)]
    scene = Scene(tuple(events[::-1] if swap else events), "then", louder)
    monkeypatch.setattr(SoundSet, "description", lambda self, index: scene)
    assert ("tone" in sounds.captions(0)[0].split(", then ")[0]) is not swap
    for i in range(8):
        wave = sounds.waveform(i)
        half = len(wave) // 2
        first, last = wave[: half * 7 // 10], wave[-half * 7 // 10 :]
        share = []
        for part in (first, last):
            power = np.abs(np.fft.rfft(part)) ** 2
            hertz = np.fft.rfftfreq(len(part), 1 / SAMPLE_RATE)
            share.append(power[hertz > 1200].sum() / power.sum())
        assert (share[0] < share[1]) == swap
        assert max(share) > 0.9 and min(share) < 0.5
        if louder is not None:
            peaks = [np.abs(first).max(), np.abs(last).max()]
            assert peaks[louder] > 5 * peaks[1 - louder]


def test_together_means_both_at_all_times(monkeypatch):
    events = (
        Event("a pure tone", "high", "steady", None),
        Event("a buzzer", "low", "fast", None),
    )
    monkeypatch.setattr(SoundSet, "description", lambda self, index: Scene(events, "together"))
    wave = SoundSet("train", 1, min_seconds=4, max_seconds=4).waveform(0)
    for part in wave.reshape(4, -1):
        power = np.abs(np.fft.rfft(part)) ** 2
        hertz = np.fft.rfftfreq(len(part), 1 / SAMPLE_RATE)
        for low, high in (PITCH_HZ["high"], PITCH_HZ["low"]):
            assert power[(hertz >= low) & (hertz <= high)].sum() > 0.002 * power.sum()


def test_backgrounds_are_quiet_and_of_their_colour(monkeypatch):
    event = Event("a ticking clock", None, "slow", None)
    for background, low, high in (("hiss", 4000, 8000), ("rumble", 20, 400)):
        scene = Scene((event,), "alone", None, background)
        monkeypatch.setattr(SoundSet, "description", lambda self, index, scene=scene: scene)
        wave = SoundSet("train", 1, min_seconds=4, max_seconds=4).waveform(0)
        quiet = np.sort(np.abs(wave))[: len(wave) // 2]
        assert 0.001 < quiet[-1] / np.abs(wave).max() < 0.05
        pause = wave.reshape(-1, 800)[np.abs(wave.reshape(-1, 800)).max(1).argsort()[:20]]
        power = (np.abs(np.fft.rfft(pause, axis=1)) ** 2).sum(0)
        hertz = np.fft.rfftfreq(800, 1 / SAMPLE_RATE)
        assert power[(hertz >= low) & (hertz < high)].sum() > 0.8 * power.sum()


@pytest.mark.parametrize(
    "arguments,name",
    [
        ({"split": "dev"}, "split"),
        ({"size": -1}, "size"),
        ({"min_seconds": 0.5}, "min_seconds"),
        ({"min_seconds": 9.0, "max_seconds": 3.0}, "max_seconds"),
    ],
    ids=["split", "size", "too short", "empty range"],
)
def test_a_bad_argument_is_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        SoundSet(**{"split": "train", "size": 1, **arguments})


def test_an_index_past_the_end_raises():
    with pytest.raises(IndexError, match="found 3, expected 0 .. 2"):
        SoundSet("train", 3).waveform(3)
