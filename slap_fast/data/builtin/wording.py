"""Captions of scenes: what can be heard and nothing else, in one or many wordings."""

from __future__ import annotations

import random
from operator import itemgetter

from slap_fast.data.builtin.scenes import Event, Scene

_SOURCE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # source: (nouns, verbs)
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
_FIRST = itemgetter(0)
"""Picks the canonical wording, in the place of ``rng.choice``."""


def _phrase(event: Event, loudness: str, rng: random.Random | None) -> str:
    """An event in words."""
    pick = rng.choice if rng else _FIRST
    nouns, verbs = _SOURCE[event.source]
    words = [loudness]
    adjectives = _COLOUR if event.source == "a noise" else _PITCH
    pitch = [pick(adjectives[event.pitch])] if event.pitch else []
    motion = [pick(_MOTION[event.motion])] if event.motion else []
    dynamics = [pick(_DYNAMICS[event.dynamics])] if event.dynamics else []
    if pick((False, True)):
        words += [pick(_ADJECTIVE[event.tempo]), *pitch, pick(nouns)]
        after = " and ".join(motion + dynamics)
    else:
        words += [*pitch, pick(nouns), pick(verbs), pick(_ADVERB[event.tempo])]
        after = " and ".join(["", *motion, *dynamics]).strip()
    return " ".join(word for word in ("a", *words, after) if word)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """A sentence for the scene, lower case: the canonical one, or a random wording."""
    pick = rng.choice if rng else _FIRST
    loudness = [""] * len(scene.events)
    if scene.louder is not None:
        loudness = [pick(("quiet", "soft"))] * 2
        loudness[scene.louder] = "loud"
    phrases = [_phrase(*pair, rng) for pair in zip(scene.events, loudness, strict=True)]
    text = pick(_TEMPLATES[len(phrases), scene.relation]).format(*phrases)
    return pick(_BACKGROUND).format(text, scene.background) if scene.background else text


def source_caption(source: str, rng: random.Random) -> str:
    """A random caption that names a source and nothing else, as a label's prompt does."""
    noun = rng.choice(_SOURCE[source][0])
    return rng.choice(_TEMPLATES[1, "alone"]).format(f"a {noun}")
