"""The sound sources of the built-in set: an event (source, pitch, tempo, ...) becomes a waveform.

Everything is numpy at 16 kHz. A sustained source reads a band-limited wavetable with a phase that
is the running sum of its frequency; a struck source sums decaying partials. A repeated event
renders one unit and places it at its onsets, which makes long clips cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SAMPLE_RATE = 16_000
PITCH_HZ = {"low": (150.0, 200.0), "middle": (500.0, 680.0), "high": (1700.0, 2300.0)}
"""Range of an event's central frequency, Hz. A glide or a wobble stays between its neighbours."""
UNITS_PER_SECOND = {"slow": (1.5, 2.2), "fast": (6.0, 9.0)}
"""Repetitions per second."""
GLIDE = 1.45
"""A glide runs from the central frequency / GLIDE to x GLIDE, or back."""
FADE = 0.03
"""Gain at the quiet end of a fade."""

_TABLE = 2048
_HIGHEST_HZ = 7500.0
Render = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True, slots=True)
class Source:
    """How a source sounds, and which attribute values can be heard on it."""

    render: Render
    """(frequency [num_samples] in Hz, rng) -> waveform [num_samples] of one unit."""
    pitches: tuple[str | None, ...] = ("low", "middle", "high")
    """Bands; (None,) for a source without pitch. On a noise a band is its colour."""
    tempos: tuple[str, ...] = ("steady", "slow", "fast")
    """A struck source is never steady."""
    glides: bool = True
    """Rises and falls when repeated, wobbles when steady."""
    struck: bool = False
    """A unit starts at once and decays; otherwise it is faded in."""
    grains: int = 0
    """Above 0 the onsets are irregular, and there are this many per beat of the tempo."""

    def patterns(self) -> list[tuple[str, str | None]]:
        """The (tempo, motion) pairs that this source can have."""
        glides = {t: ("wobbling",) if t == "steady" else ("rising", "falling") for t in self.tempos}
        return [(t, m) for t in glides for m in (None, *(glides[t] if self.glides else ()))]


def hiss(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of the treble, float32 [num_samples], RMS 1: white noise differenced twice."""
    noise = np.diff(rng.random(num_samples + 2, dtype=np.float32), 2)
    return noise / np.float32(0.7071)  # variance of the second difference: 6 x 1/12


def rumble(num_samples: int, rng: np.random.Generator, factor: int = 32) -> np.ndarray:
    """Noise of the bass, float32 [num_samples], RMS about 1: knots joined by straight lines.

    One knot every ``factor`` samples, so the noise lies below half of 16 kHz / factor.
    """
    knots = rng.standard_normal(num_samples // factor + 2, dtype=np.float32)
    ramp = np.arange(factor, dtype=np.float32) / factor
    lines = knots[:-1, None] + (knots[1:] - knots[:-1])[:, None] * ramp
    return lines.reshape(-1)[:num_samples] * np.float32(1.22)  # a line averages a variance of 2/3


def _cycles(frequency: np.ndarray) -> np.ndarray:
    """Phase in cycles, float64: fp32 would drift over half a minute."""
    return np.cumsum(frequency, dtype=np.float64) / SAMPLE_RATE


def _sine(cycles: np.ndarray) -> np.ndarray:
    return np.sin(((cycles % 1.0) * (2 * np.pi)).astype(np.float32))


def _wavetable(frequency: np.ndarray, amplitude: np.ndarray, rng: np.random.Generator):
    """A periodic wave of peak 1 whose k-th harmonic is ``amplitude[k - 1]``, without aliases."""
    spectrum = np.zeros(_TABLE // 2 + 1, np.complex64)
    count = max(1, min(len(amplitude), int(_HIGHEST_HZ / frequency.max())))
    spectrum[1 : count + 1] = amplitude[:count] * np.exp(2j * np.pi * rng.random(count))
    table = np.fft.irfft(spectrum).astype(np.float32)
    table /= np.abs(table).max()
    return table[(_cycles(frequency) * _TABLE).astype(np.int32) & (_TABLE - 1)]


def _partials(frequency, ratios, amplitudes, decays):
    """Decaying sines: partial i at ``ratios[i]`` x frequency falls to 1/e in ``decays[i]`` s."""
    cycles = _cycles(frequency)
    seconds = np.arange(len(frequency), dtype=np.float32) / SAMPLE_RATE
    out = np.zeros(len(frequency), np.float32)
    for ratio, amplitude, decay in zip(ratios, amplitudes, decays, strict=True):
        if ratio * frequency.max() < _HIGHEST_HZ:
            out += amplitude * _sine(cycles * ratio) * np.exp(seconds / np.float32(-decay))
    return out


def _tone(frequency, rng):
    return _sine(_cycles(frequency))


def _buzzer(frequency, rng):
    return _wavetable(frequency, np.arange(1, 60) ** -rng.uniform(0.3, 0.6), rng)


def _motor(frequency, rng):
    # Chugs: 17 to 20 times a second a burst of noise and of the buzz, each dead before the next.
    n, rate = len(frequency), rng.uniform(17.0, 20.0)
    chug = np.exp(-((np.arange(n, dtype=np.float32) * np.float32(rate / SAMPLE_RATE)) % 1) * 6)
    return (_buzzer(frequency, rng) + rumble(n, rng, factor=3) * np.float32(0.03)) * chug


def _wind(frequency, rng):
    # Slow noise times a sine: a noise band around the frequency, about half of it wide.
    band = rumble(len(frequency), rng, factor=int(SAMPLE_RATE / (0.45 * frequency.mean())))
    return band * _tone(frequency, rng)


def _voice(formants: tuple[float, ...]) -> Render:
    def render(frequency, rng):
        # The formants stay where they are while the pitch moves, so they filter the finished buzz.
        n = len(frequency)
        size = 1 << (n - 1).bit_length()
        hertz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32)
        response = np.float32(0.03) / (1 + (hertz / 3500) ** 4)
        for centre in formants:
            response += 1 / (1 + ((hertz - centre * rng.uniform(0.95, 1.05)) / 120) ** 2)
        spectrum = np.fft.rfft(_wavetable(frequency, np.ones(60), rng), size)
        return np.fft.irfft(spectrum * response, size)[:n].astype(np.float32)

    return render


def _bell(frequency, rng):
    # Bright and long where a plucked string is dull and short: in 64 mel bins, few partials and
    # many look alike. The sheen of the rim stays where it is whatever the pitch.
    decays = rng.uniform(0.28, 0.34) * np.array([1.0, 0.9, 0.8, 0.7])
    ring = _partials(frequency, (1.0, 2.76, 5.4, 8.93), (1.0, 0.85, 0.85, 0.75), decays)
    rim = np.full(len(frequency), rng.uniform(4700, 5300), np.float32)
    sheen = _partials(rim, (1.0, 1.17, 1.37), (0.3, 0.3, 0.3), (0.25, 0.2, 0.15))
    strike = hiss(len(frequency), rng) * _decay(len(frequency), 0.015)
    return ring + sheen + np.float32(0.5) * strike


def _string(frequency, rng):
    harmonics = np.arange(1, 25)
    decays = rng.uniform(0.08, 0.11) / (1 + 0.3 * harmonics)
    return _partials(frequency, harmonics, harmonics**-1.6, decays)


def _block(frequency, rng):
    decays = rng.uniform(0.012, 0.018) * np.array([1.0, 0.6])
    return _partials(frequency, (1.0, 2.6), (1.0, 0.5), decays)


def _decay(num_samples: int, seconds: float) -> np.ndarray:
    return np.exp(np.arange(num_samples, dtype=np.float32) / np.float32(-seconds * SAMPLE_RATE))


def _drum(frequency, rng):
    n = len(frequency)
    if frequency[0] < 400:  # a bass drum: a thump that falls to 50 Hz
        thump = _sine(_cycles(50 + 130 * _decay(n, 0.03))) * _decay(n, rng.uniform(0.1, 0.16))
        return thump + 0.1 * hiss(n, rng) * _decay(n, 0.008)
    rattle = rumble(n, rng, factor=2) * _decay(n, rng.uniform(0.05, 0.08))  # a snare
    return _sine(_cycles(frequency * 0 + 330)) * _decay(n, 0.05) + 0.5 * rattle


def _clock(frequency, rng):
    click = np.zeros(len(frequency), np.float32)
    width = min(len(click), int(rng.integers(16, 40)))
    click[:width] = hiss(width, rng) + rumble(width, rng, factor=2)
    return click


def _cymbal(frequency, rng):
    n = len(frequency)
    metal = _partials(frequency, rng.uniform(1.7, 3.2, 5), np.full(5, 0.5), np.full(5, 0.15))
    return metal + 0.4 * hiss(n, rng) * _decay(n, rng.uniform(0.12, 0.2))


def _fire(frequency, rng):
    n = min(len(frequency), SAMPLE_RATE // 50)
    return rumble(n, rng, factor=3) * _decay(n, rng.uniform(0.003, 0.006))


def _bird(frequency, rng):
    n = len(frequency)
    sweeps = max(1, round(n / SAMPLE_RATE / 0.09))
    arch = np.abs(_sine(np.arange(n) * (0.5 * sweeps / n)))  # up and down again, once per sweep
    return _sine(_cycles(rng.uniform(2600, 3000) * (1 + arch))) * arch


def _noise(frequency, rng):
    return (hiss if frequency[0] > 400 else rumble)(len(frequency), rng)


_REPEATED = ("slow", "fast")
SOURCES: dict[str, Source] = {
    "a pure tone": Source(_tone),
    "a buzzer": Source(_buzzer),
    "a motor": Source(_motor),
    "a whistling wind": Source(_wind, ("middle", "high")),
    "a voice singing ah": Source(_voice((730.0, 1090.0)), ("low", "middle")),
    "a voice singing ee": Source(_voice((270.0, 2290.0, 3010.0)), ("low", "middle")),
    "a bell": Source(_bell, tempos=_REPEATED, struck=True),
    "a plucked string": Source(_string, tempos=_REPEATED, struck=True),
    "a wooden block": Source(_block, tempos=_REPEATED, glides=False, struck=True),
    "a drum": Source(_drum, ("low", "high"), _REPEATED, glides=False, struck=True),
    "a ticking clock": Source(_clock, (None,), _REPEATED, glides=False, struck=True),
    "a cymbal": Source(_cymbal, (None,), _REPEATED, glides=False, struck=True),
    "a crackling fire": Source(_fire, (None,), _REPEATED, glides=False, struck=True, grains=3),
    "a bird": Source(_bird, (None,), _REPEATED, glides=False),
    "a noise": Source(_noise, ("low", "high"), glides=False),
}


def render_event(
    source: str,
    pitch: str | None,
    tempo: str,
    motion: str | None,
    dynamics: str | None,
    num_samples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """One event, float32 [num_samples], peak 1; what the words leave open is drawn from ``rng``.

    ``motion`` is a glide of every unit ("rising", "falling") or a wobble of the steady sound;
    ``dynamics`` ("louder", "quieter") a fade of 30 dB that starts again every three seconds or so.
    """
    kind = SOURCES[source]
    low, high = PITCH_HZ[pitch or "high"]
    centre = low * (high / low) ** rng.random()
    if tempo == "steady":
        out = kind.render(_frequency(centre, motion, num_samples, num_samples, rng), rng)
        _ramp_ends(out)
    else:
        period = int(SAMPLE_RATE / rng.uniform(*UNITS_PER_SECOND[tempo]))
        length = int(period * (0.75 if kind.struck else rng.uniform(0.5, 0.6)))
        unit = kind.render(_frequency(centre, motion, length, int(0.8 * length), rng), rng)
        _ramp_ends(unit, attack=not kind.struck)
        if kind.grains:
            onsets = rng.integers(0, num_samples, kind.grains * max(2, num_samples // period))
            gains = rng.uniform(0.2, 1.0, len(onsets))
        else:
            beats = np.arange(max(1, (num_samples - length // 2) // period + 1))
            onsets = ((beats + rng.uniform(0, 0.02, len(beats))) * period).astype(int)
            gains = rng.uniform(0.8, 1.0, len(onsets))
        out = np.zeros(num_samples, np.float32)
        for onset, gain in zip(onsets.tolist(), gains.tolist(), strict=True):
            target = out[onset : onset + len(unit)]
            target += unit[: len(target)] * np.float32(gain)
        if kind.grains:  # the roar under the crackle
            out *= 1 / np.abs(out).max()
            out += 0.04 * rumble(num_samples, rng, factor=12)
    if dynamics is not None:
        out *= _fade(dynamics, num_samples, rng)
    return out / max(out.max(), -out.min())


def _frequency(centre, motion, num_samples, glide_samples, rng) -> np.ndarray:
    """Instantaneous frequency, Hz, float32 [num_samples]; a glide is over after glide_samples."""
    if motion == "wobbling":
        cycles = np.arange(num_samples) * (rng.uniform(2.5, 4.0) / SAMPLE_RATE) + rng.random()
        return centre * np.exp2(np.float32(0.4) * _sine(cycles))
    if motion is None:
        return np.full(num_samples, centre, np.float32)
    exponent = np.linspace(-1, 2 * num_samples / glide_samples - 1, num_samples, dtype=np.float32)
    sign = 1 if motion == "rising" else -1
    return np.float32(centre) * np.float32(GLIDE) ** (sign * np.minimum(exponent, 1))


def _ramp_ends(unit: np.ndarray, attack: bool = True) -> None:
    """Fades the last 8 ms out, and the first in, so that an end is no click of its own."""
    ramp = np.linspace(0, 1, min(128, len(unit) // 4), dtype=np.float32)
    if attack:
        unit[: len(ramp)] *= ramp
    unit[-len(ramp) :] *= ramp[::-1]


def _fade(dynamics, num_samples, rng) -> np.ndarray:
    bouts = max(1, round(num_samples / SAMPLE_RATE / rng.uniform(2.5, 4.0)))
    falling = (np.arange(num_samples, dtype=np.float32) * (bouts / num_samples)) % 1
    return np.float32(FADE) ** (1 - falling if dynamics == "louder" else falling)
