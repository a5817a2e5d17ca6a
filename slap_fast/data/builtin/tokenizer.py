"""The bundled tokenizer: ``python -m slap_fast.data.builtin.tokenizer`` retrains it."""

from __future__ import annotations

from collections.abc import Iterator

from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.models.tokenizer import BUNDLED, train_tokenizer


def corpus() -> Iterator[str]:
    """Captions of the built-in training sounds, and general English: Python's own help pages."""
    from pydoc_data.topics import topics

    sounds = SoundSet("train", 10_000)
    for i in range(len(sounds)):
        yield from sounds.captions(i)
    for page in topics.values():
        yield from page.lower().splitlines()


if __name__ == "__main__":
    train_tokenizer(corpus(), 2048).save(str(BUNDLED))
