"""The built-in sound set: determinism, durations, and waveforms that fit their captions."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from slap_fast.data.builtin.scenes import Event, Scene
from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.data.builtin.synthesis import (
    PITCH_HZ,
    SAMPLE_RATE,
)
from tests.helpers.sounds import fingerprint

SPLITS = ("train", "validation", "test")


def test_another_process_makes_the_same_scenes():
    code = (
        "from tests.helpers.sounds import SoundSet, fingerprint; "
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
    first, second = SoundSet("train", 40), SoundSet(other[0], 40, seed=other[1])
    same = sum(first.description(i) == second.description(i) for i in range(40))
    assert same <= 2
    assert not np.array_equal(first.waveform(0)[:100], second.waveform(0)[:100])


@pytest.mark.parametrize("split", SPLITS)
def test_waveforms_are_finite_float32_of_the_promised_length_below_full_scale(split):
    sounds = SoundSet(split, 25, max_seconds=6.0)
    for i in range(25):
        wave = sounds.waveform(i)
        assert wave.dtype == np.float32
        assert wave.shape == (round(sounds.seconds(i) * SAMPLE_RATE),)
        assert np.isfinite(wave).all()
        assert 0.2 < np.abs(wave).max() < 1.0


def test_durations_are_log_uniform():
    sounds = SoundSet("train", 4000)
    logs = np.log([sounds.seconds(i) for i in range(4000)]) / np.log(30.0)
    logs.sort()
    assert logs[0] >= -1e-4 and logs[-1] <= 1 + 1e-4
    # Kolmogorov-Smirnov: 1.63 / sqrt(n) is passed by one uniform sample in a hundred.
    assert np.abs(logs - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / np.sqrt(4000)


def test_synthesis_is_200_times_faster_than_real_time():
    sounds = SoundSet("train", 60)
    start = time.process_time()
    seconds = sum(len(sounds.waveform(i)) for i in range(60)) / SAMPLE_RATE
    assert seconds / (time.process_time() - start) > 200


def test_twenty_thousand_scenes_are_described_lazily():
    start = time.process_time()
    assert len(SoundSet("test", 20_000)) == 20_000
    assert time.process_time() - start < 0.05


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


def test_together_means_both_sources_sound_throughout(monkeypatch):
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
