"""The built-in sound set: captioned scenes, made from (split, seed, index) alone.

A scene is one to three events (a source with a pitch, a tempo, a motion, ...), in order or
together, over a quiet background or none. Captions name what can be heard and nothing else; exact
pitch, timbre, rate, onset and gain are free. Duration is log-uniform, and only what a second or two
cannot hold (three events, slow repetitions in turn, fades) waits for a longer clip.

The splits differ in what meets: every event profile and every pair of sources belongs to one split.
A training scene holds training combinations only; a test scene holds at least one of the test's.
"""

from __future__ import annotations

import hashlib
import math
import random
from itertools import combinations, product
from typing import Literal, NamedTuple

import numpy as np

from slap_fast.data.builtin.synthesis import SAMPLE_RATE, SOURCES, hiss, render_event, rumble

LABELS: tuple[str, ...] = tuple(SOURCES)
"""The source classes as captions name them, article included."""
LABEL_TEMPLATE = "the sound of {}"
"""Turns a label into a zero-shot prompt; training captions start this way too."""
DISTINCT_SCENES = 500
"""The first so many scenes of validation and test differ pairwise in description."""


class Event(NamedTuple):
    """What can be heard of one event. A source without pitch has None; so has a plain motion."""

    source: str
    pitch: str | None
    tempo: str
    motion: str | None
    dynamics: str | None = None


class Scene(NamedTuple):
    """The meaning of a clip: equal scenes are equal descriptions."""

    events: tuple[Event, ...]
    relation: Literal["alone", "then", "together"] = "alone"
    louder: int | None = None
    """Of two events in order, the loud one; the other is 20 dB below. None: both alike."""
    background: Literal["hiss", "rumble"] | None = None


def _profiles(source: str) -> list[Event]:
    kind, dynamics = SOURCES[source], (None, "louder", "quieter")
    grid = product(kind.pitches, kind.patterns(), dynamics)
    return [Event(source, pitch, *pattern, dynamic) for pitch, pattern, dynamic in grid]


def _partition(keys: list) -> dict:
    """72 % of the keys to train, 10 % to validation, 18 % to test, in the order of their hashes."""
    order = sorted(keys, key=lambda key: hashlib.sha256(repr(key).encode()).digest())
    first, second = round(0.72 * len(keys)), math.ceil(0.82 * len(keys))
    splits = ["train"] * first + ["validation"] * (second - first)
    splits += ["test"] * (len(keys) - second)
    return dict(zip(order, splits, strict=True))


PROFILES = {source: _profiles(source) for source in LABELS}
SPLIT_OF = _partition(list(combinations(LABELS, 2)))
"""The split of every event profile and of every pair of sources."""
for _source in LABELS:
    SPLIT_OF |= _partition(PROFILES[_source])


def scene_combinations(scene: Scene) -> list:
    """The event profiles and the pairs of sources that meet in a scene, as keys of SPLIT_OF."""
    sources = sorted((event.source for event in scene.events), key=LABELS.index)
    return [*scene.events, *combinations(sources, 2)]


def _belongs(scene: Scene, split: str) -> bool:
    found = {SPLIT_OF[key] for key in scene_combinations(scene)}
    return split in found and found <= {"train", split}


def _needs(event: Event) -> float:
    """Seconds below which the event's words could not be heard."""
    if event.dynamics:
        return 1.5
    return 1.0 if event.tempo == "slow" or event.motion == "wobbling" else 0.5


def _fits(scene: Scene, seconds: float) -> bool:
    needs = [_needs(event) for event in scene.events]
    return seconds >= (sum(needs) if scene.relation == "then" else max(needs))


def _draw(rng: random.Random, split: str, seconds: float) -> Scene:
    """A random scene of the split that fits in the time."""
    while True:  # three slow events, say, never fit in two seconds: another kind after 40 tries
        count, relation = rng.choices(
            ((1, "alone"), (2, "then"), (2, "together"), (3, "then")), (50, 24, 12, 14)
        )[0]
        for _ in range(40):
            sources = rng.sample(LABELS, count)
            events = [rng.choice(PROFILES[source]) for source in sources]
            louder = None
            if count > 1:
                events = [event._replace(dynamics=None) for event in events]
                louder = rng.choice((None, 0, 1)) if (count, relation) == (2, "then") else None
            if relation == "together":
                events.sort(key=lambda event: LABELS.index(event.source))
            quiet_share = 0.5 if count == 1 else 0.8
            background = None
            if rng.random() > quiet_share and "a noise" not in sources:
                background = rng.choice(("hiss", "rumble"))
            scene = Scene(tuple(events), relation, louder, background)
            if _fits(scene, seconds) and _belongs(scene, split):
                return scene


_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # source: (nouns, what it does)
    "a pure tone": (("pure tone", "sine tone"), ("sounding", "beeping")),
    "a buzzer": (("buzzer", "buzzing alarm"), ("sounding", "buzzing")),
    "a motor": (("motor", "rattling engine"), ("running", "rattling")),
    "a whistling wind": (("whistling wind", "wind"), ("blowing", "whistling")),
    "a voice singing ah": (("voice singing ah", "singer singing ah"), ("",)),
    "a voice singing ee": (("voice singing ee", "singer singing ee"), ("",)),
    "a bell": (("bell", "metal bell"), ("ringing", "chiming")),
    "a plucked string": (("plucked string", "guitar string"), ("playing", "sounding")),
    "a wooden block": (("wooden block", "wood block"), ("knocking", "tapping")),
    "a drum": (("drum", "beaten drum"), ("beating", "pounding")),
    "a ticking clock": (("ticking clock", "clock"), ("ticking", "clicking")),
    "a cymbal": (("cymbal", "brass cymbal"), ("crashing", "clashing")),
    "a crackling fire": (("crackling fire", "burning fire"), ("popping", "crackling")),
    "a bird": (("bird", "small bird"), ("chirping", "tweeting")),
    "a noise": (("noise",), ("",)),
}
_PITCH = {"low": ("low", "deep"), "middle": ("middle", "medium"), "high": ("high", "bright")}
_COLOUR = {"low": ("rumbling", "rolling"), "high": ("hissing", "sizzling")}
_ADVERB = {
    "steady": ("steadily", "continuously"),
    "slow": ("slowly", "at a slow pace"),
    "fast": ("quickly", "at a fast pace"),
}
_ADJECTIVE = {"steady": ("steady", "constant"), "slow": ("slow",), "fast": ("fast", "rapid")}
_MOTION = {
    "rising": ("rising in pitch", "sliding up"),
    "falling": ("falling in pitch", "sliding down"),
    "wobbling": ("wobbling in pitch", "wavering up and down"),
}
_DYNAMICS = {
    "louder": ("growing louder", "swelling"),
    "quieter": ("fading away", "getting quieter"),
}
_TEMPLATES = {
    (1, "alone"): ("{}", "the sound of {}", "{} can be heard", "a recording of {}", "we hear {}"),
    (2, "then"): (
        "{}, then {}",
        "the sound of {}, then {}",
        "{} followed by {}",
        "first {}, then {}",
        "{1} after {0}",
        "{} before {}",
    ),
    (2, "together"): (
        "{} together with {}",
        "{} and {} at the same time",
        "both {} and {} at once",
    ),
    (3, "then"): (
        "{}, then {}, then {}",
        "the sound of {}, then {}, then {}",
        "{} followed by {} and finally {}",
        "first {}, next {} and last {}",
    ),
}
_BACKGROUND = (
    "{} with a quiet {} in the background",
    "{} over a quiet {}",
    "{} and a faint background {}",
)


def _phrase(event: Event, loudness: str, rng: random.Random | None) -> str:
    """An event in words; without ``rng`` the first wording of everything."""

    def pick(words):
        return rng.choice(words) if rng else words[0]

    nouns, doing = _WORDS[event.source]
    words = [loudness] if loudness else []
    adjectives = _COLOUR if event.source == "a noise" else _PITCH
    pitch = [pick(adjectives[event.pitch])] if event.pitch else []
    motion = [pick(_MOTION[event.motion])] if event.motion else []
    dynamics = [pick(_DYNAMICS[event.dynamics])] if event.dynamics else []
    if pick((False, True)):
        words += [pick(_ADJECTIVE[event.tempo]), *pitch, pick(nouns)]
        after = " and ".join(motion + dynamics)
    else:
        words += [*pitch, pick(nouns), pick(doing), pick(_ADVERB[event.tempo])]
        after = " and ".join(["", *motion, *dynamics]).strip()
    return " ".join(word for word in ("a", *words, after) if word)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """A sentence for the scene, lower case: the canonical one, or a random wording."""
    loudness = [""] * len(scene.events)
    if scene.louder is not None:
        loudness = [rng.choice(("quiet", "soft")) if rng else "quiet"] * 2
        loudness[scene.louder] = "loud"
    phrases = [_phrase(*pair, rng) for pair in zip(scene.events, loudness, strict=True)]
    templates = _TEMPLATES[len(phrases), scene.relation]
    text = (rng.choice(templates) if rng else templates[0]).format(*phrases)
    if scene.background:
        background = rng.choice(_BACKGROUND) if rng else _BACKGROUND[0]
        text = background.format(text, scene.background)
    return text


def near_misses(scene: Scene) -> list[Scene]:
    """The scenes that differ in exactly one respect: the order, or one attribute of one event."""
    misses = []
    if scene.relation == "then":
        swapped = None if scene.louder is None else 1 - scene.louder
        order = (*scene.events[1::-1], *scene.events[2:])
        misses.append(scene._replace(events=order, louder=swapped))
    if len(scene.events) == 2 and scene.louder is None:
        together = tuple(sorted(scene.events, key=lambda event: LABELS.index(event.source)))
        if scene.relation == "then":
            misses.append(scene._replace(relation="together", events=together))
        else:
            misses.append(scene._replace(relation="then"))
    if scene.louder is not None:
        misses.append(scene._replace(louder=1 - scene.louder))
    for place, event in enumerate(scene.events):
        for other in PROFILES[event.source]:
            if len(scene.events) > 1 and other.dynamics:
                continue
            if sum(a != b for a, b in zip(event, other, strict=True)) == 1:
                events = (*scene.events[:place], other, *scene.events[place + 1 :])
                misses.append(scene._replace(events=events))
    if all(event.source != "a noise" for event in scene.events):
        others = {None, "hiss", "rumble"} - {scene.background}
        misses += [scene._replace(background=other) for other in sorted(others, key=str)]
    return misses


class SoundSet:
    """Captioned scenes of one split; every method is a pure function of (split, seed, index).

    Args:
        split: which combinations of attributes the scenes may hold.
        size: number of scenes. Scene i does not depend on it.
        seed: another seed, other scenes; the splits stay disjoint across seeds.
        min_seconds, max_seconds: range of the log-uniform duration, seconds; min_seconds >= 1.

    Raises ValueError for an unknown split, a negative size or seed, or an impossible range.
    """

    def __init__(
        self,
        split: Literal["train", "validation", "test"],
        size: int,
        seed: int = 0,
        min_seconds: float = 1.0,
        max_seconds: float = 30.0,
    ):
        splits = ("train", "validation", "test")
        if split not in splits:
            raise ValueError(f"split: found {split!r}, expected one of {splits}")
        if size < 0 or seed < 0:
            raise ValueError(f"size, seed: found {(size, seed)!r}, expected numbers >= 0")
        if not 1 <= min_seconds <= max_seconds:
            found = f"min_seconds, max_seconds: found {(min_seconds, max_seconds)!r}"
            raise ValueError(f"{found}, expected 1 <= min_seconds <= max_seconds")
        self.split, self.size, self.seed = split, size, seed
        self.min_seconds, self.max_seconds = min_seconds, max_seconds
        self._distinct: list[Scene] = []

    def __len__(self) -> int:
        return self.size

    def _rng(self, index: int, purpose: str) -> random.Random:
        if not 0 <= index < self.size:
            raise IndexError(f"index: found {index}, expected 0 .. {self.size - 1}")
        return random.Random(f"{self.split} {self.seed} {index} {purpose}")

    def _num_samples(self, index: int) -> int:
        low, high = math.log(self.min_seconds), math.log(self.max_seconds)
        seconds = math.exp(self._rng(index, "seconds").uniform(low, high))
        return round(seconds * SAMPLE_RATE)

    def seconds(self, index: int) -> float:
        """Duration of scene ``index``, known without synthesis."""
        return self._num_samples(index) / SAMPLE_RATE

    def description(self, index: int) -> Scene:
        """The canonical description: equal descriptions have equal meaning."""
        if self.split == "train" or index >= DISTINCT_SCENES:
            return _draw(self._rng(index, "scene"), self.split, self.seconds(index))
        for earlier in range(len(self._distinct), index + 1):
            rng, seconds = self._rng(earlier, "scene"), self.seconds(earlier)
            scene = _draw(rng, self.split, seconds)
            while scene in self._distinct:
                scene = _draw(rng, self.split, seconds)
            self._distinct.append(scene)
        return self._distinct[index]

    def label(self, index: int) -> str | None:
        """The source, one of LABELS, of a scene that has exactly one; else None."""
        events = self.description(index).events
        return events[0].source if len(events) == 1 else None

    def captions(self, index: int) -> tuple[str, ...]:
        """Three wordings of scene ``index``, the canonical one first; of a single source five.

        The fourth and fifth name the source and nothing else, as a label's prompt does: they are
        true of the scene, but not of it alone.
        """
        scene, rng = self.description(index), self._rng(index, "captions")
        wordings = {caption(scene): None}
        while len(wordings) < 3:
            wordings[caption(scene, rng)] = None
        while len(scene.events) == 1 and len(wordings) < 5:
            noun = rng.choice(_WORDS[scene.events[0].source][0])
            wordings[rng.choice(_TEMPLATES[1, "alone"]).format(f"a {noun}")] = None
        return tuple(wordings)

    def hard_negatives(self, index: int) -> tuple[str, ...]:
        """Canonical captions of the scene's near misses: each is wrong in one respect."""
        return tuple(caption(scene) for scene in near_misses(self.description(index)))

    def waveform(self, index: int) -> np.ndarray:
        """Scene ``index``, float32 [num_samples] at 16 kHz, peak below the full scale of 1."""
        scene, num_samples = self.description(index), self._num_samples(index)
        rng = np.random.default_rng(self._rng(index, "waveform").getrandbits(64))
        # A microphone is never silent: a floor 20 dB or more below the quiet backgrounds.
        out = hiss(num_samples, rng) * np.float32(10 ** rng.uniform(-4.0, -3.4))
        gains = [rng.uniform(0.7, 1.0) for _ in scene.events]
        if scene.louder is not None:
            gains[1 - scene.louder] *= 0.1
        for event, gain, span in zip(
            scene.events, gains, _spans(scene, num_samples, rng), strict=True
        ):
            part = out[span]
            part += render_event(*event, len(part), rng) * np.float32(gain)
        if scene.background:
            make = hiss if scene.background == "hiss" else rumble
            out += make(num_samples, rng) * np.float32(rng.uniform(0.012, 0.02))
        peak = max(out.max(), -out.min())
        return out * np.float32(rng.uniform(0.25, 0.9) / peak)


def _spans(scene: Scene, num_samples: int, rng: np.random.Generator) -> list[slice]:
    """Where each event sounds: the whole clip, or one stretch after the other with short gaps."""
    if scene.relation != "then":
        return [slice(0, num_samples)] * len(scene.events)
    needs = np.array([_needs(event) for event in scene.events]) * SAMPLE_RATE
    shares = rng.uniform(0.7, 1.3, len(needs))
    lengths = needs + (num_samples - needs.sum()) * shares / shares.sum()
    ends = np.cumsum(lengths).astype(int)
    starts = [0, *ends[:-1]]
    gap = SAMPLE_RATE // 20
    return [slice(start, end - gap) for start, end in zip(starts, ends, strict=True)]
