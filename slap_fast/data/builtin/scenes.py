"""Scenes of the built-in sounds, and the split that each combination of attributes belongs to.

A scene is one to three events (a source with a pitch, a tempo, a motion, ...), in order or
together, over a quiet background or none. Only what a second or two cannot hold (three events, slow
repetitions in turn, fades) needs a longer clip.

The splits differ in combinations: every event profile and every pair of sources belongs to one
split. A training scene holds training combinations only; a test scene at least one of the test's.
"""

from __future__ import annotations

import hashlib
import math
import random
from itertools import combinations, product
from typing import Literal, NamedTuple

from slap_fast.data.builtin.synthesis import SOURCES

LABELS: tuple[str, ...] = tuple(SOURCES)
"""The source classes as captions name them, article included."""


class Event(NamedTuple):
    """What can be heard of one event. ``pitch`` is None for a source without one."""

    source: str
    pitch: str | None
    tempo: str
    motion: str | None
    dynamics: str | None = None


class Scene(NamedTuple):
    """What a clip holds, as far as captions describe it: also its captions' key."""

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


def _belongs(scene: Scene, split: str) -> bool:
    sources = sorted((event.source for event in scene.events), key=LABELS.index)
    splits = {SPLIT_OF[key] for key in (*scene.events, *combinations(sources, 2))}
    return split in splits and splits <= {"train", split}


def needed_seconds(event: Event) -> float:
    """Seconds below which the event's words could not be heard."""
    if event.dynamics:
        return 1.5
    return 1.0 if event.tempo == "slow" or event.motion == "wobbling" else 0.5


def draw_scene(rng: random.Random, split: str, seconds: float) -> Scene:
    """A random scene of the split that fits in the time."""
    while True:  # three slow events, say, never fit in two seconds: another kind after 40 tries
        kinds = ((1, "alone"), (2, "then"), (2, "together"), (3, "then"))
        count, relation = rng.choices(kinds, (50, 24, 12, 14))[0]
        for _ in range(40):
            sources = rng.sample(LABELS, count)
            events = [rng.choice(PROFILES[source]) for source in sources]
            louder = None
            if count > 1:
                events = [event._replace(dynamics=None) for event in events]
                louder = rng.choice((None, 0, 1)) if (count, relation) == (2, "then") else None
            if relation == "together":
                events.sort(key=lambda event: LABELS.index(event.source))
            background = None
            if rng.random() > (0.5 if count == 1 else 0.8) and "a noise" not in sources:
                background = rng.choice(("hiss", "rumble"))
            scene = Scene(tuple(events), relation, louder, background)
            needed = (sum if relation == "then" else max)(map(needed_seconds, events))
            if needed <= seconds and _belongs(scene, split):
                return scene


def near_misses(scene: Scene) -> list[Scene]:
    """The scenes that differ in exactly one respect: the order, or one attribute of one event."""
    misses = []
    if scene.relation == "then":
        swapped = None if scene.louder is None else 1 - scene.louder
        order = (*scene.events[1::-1], *scene.events[2:])
        misses.append(scene._replace(events=order, louder=swapped))
    if len(scene.events) == 2 and scene.louder is None:
        events = tuple(sorted(scene.events, key=lambda event: LABELS.index(event.source)))
        relation = "together" if scene.relation == "then" else "then"
        misses.append(scene._replace(relation=relation, events=events))
    if scene.louder is not None:
        misses.append(scene._replace(louder=1 - scene.louder))
    for place, event in enumerate(scene.events):
        for other in PROFILES[event.source]:
            differences = sum(a != b for a, b in zip(event, other, strict=True))
            if differences == 1 and (len(scene.events) == 1 or not other.dynamics):
                events = (*scene.events[:place], other, *scene.events[place + 1 :])
                misses.append(scene._replace(events=events))
    if all(event.source != "a noise" for event in scene.events):
        others = {None, "hiss", "rumble"} - {scene.background}
        misses += [scene._replace(background=other) for other in sorted(others, key=str)]
    return misses
