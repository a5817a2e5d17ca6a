"""Captioned clips for the examples: the built-in sounds, 1 to 30 s log-uniform, as tensors."""

import torch

from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.data.sources.builtin import BuiltinClips
from slap_fast.models.tokenizer import CaptionTokenizer


def captioned_sounds(count, max_seconds=30.0):
    """[(waveform [num_samples], caption ids [L])]; 0 is the padding id."""
    clips = BuiltinClips(SoundSet("train", count, max_seconds=max_seconds))
    words = CaptionTokenizer.load(None, max_tokens=64)
    return [
        (
            torch.from_numpy(clips.audio(i).waveform),
            torch.tensor(words.encode(clips.captions(i))[0]),
        )
        for i in range(count)
    ]
