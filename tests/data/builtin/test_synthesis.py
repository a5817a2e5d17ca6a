"""Synthesis of events: pitch, motion, tempo and fades can be measured in the waveform."""

from __future__ import annotations

import numpy as np
import pytest

from slap_fast.data.builtin.scenes import LABELS, PROFILES
from slap_fast.data.builtin.synthesis import (
    PITCH_HZ,
    SAMPLE_RATE,
    SOURCES,
    UNITS_PER_SECOND,
    render_event,
)


@pytest.mark.parametrize("source", LABELS)
def test_every_profile_of_a_source_sounds_throughout(source):
    # A peak of 1, and sound in the first and in the last second.
    for number, event in enumerate(PROFILES[source]):
        wave = render_event(*event, SAMPLE_RATE * 3, np.random.default_rng(number))
        assert np.abs(wave).max() == pytest.approx(1.0, abs=1e-6), event
        for part in (wave[:SAMPLE_RATE], wave[-SAMPLE_RATE:]):
            assert np.abs(part).max() > (0.02 if event.dynamics else 0.2), event


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
def test_glides_have_their_direction(pitch, tempo, motion, sign):
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
def test_fades_have_their_direction(dynamics, sign):
    event = ("a buzzer", "middle", "steady", None, dynamics)
    wave = render_event(*event, SAMPLE_RATE * 2, np.random.default_rng(0))
    levels = 20 * np.log10(np.abs(wave).reshape(10, -1).max(1))
    assert (np.diff(levels) * sign > 1).all()
    assert abs(levels[-1] - levels[0]) > 20
