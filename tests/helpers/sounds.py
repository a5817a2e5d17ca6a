"""The built-in sounds as one hash."""

from __future__ import annotations

import hashlib

from slap_fast.data.builtin.sound_set import SoundSet


def fingerprint(sounds: SoundSet) -> str:
    """A hash of everything that a set gives for its first scenes."""
    digest = hashlib.sha256()
    for i in range(6):
        words = (sounds.description(i), sounds.captions(i), sounds.hard_negatives(i))
        digest.update(repr((sounds.seconds(i), sounds.label(i), words)).encode())
        digest.update(sounds.waveform(i).tobytes())
    return digest.hexdigest()
