"""Runs mel_patches on guarded tensors, see :mod:`guard_pages`; its results are unchanged."""

from __future__ import annotations

import pytest
import torch

from slap_fast.config import MelConfig
from slap_fast.kernels import mel_patches as kernel
from tests.helpers import guard_pages
from tests.helpers.mel_calls import LENGTHS, arguments
from tests.helpers.mel_signals import noise

ODD = {"win_length": 511, "hop_length": 97, "n_mels": 30, "patch_freq": 10, "patch_time": 10}


def trial(seed: int) -> None:
    at_end = seed % 2 == 0
    grid = ODD if seed // 4 % 2 else {}
    config = MelConfig(preset=["kaldi", "torchaudio"][seed // 2 % 2], **grid)
    lengths = [LENGTHS, torch.randint(0, 6_000, (len(LENGTHS),)).tolist()][seed % 3 > 0]
    dtype = [torch.float32, torch.int16][seed // 3 % 2]
    call = arguments(*noise(*lengths, dtype=dtype), config)
    expected = kernel._forward(*call)
    guarded = [guard_pages.guarded(x, at_end=at_end) if torch.is_tensor(x) else x for x in call]
    with pytest.MonkeyPatch.context() as patch:
        guard_pages.guard_allocations(patch, at_end=at_end)
        actual = kernel._forward(*guarded)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


if __name__ == "__main__":
    kernel.LAUNCH = {128: kernel.Launch(64, 128, 128, 4, 1)}
    guard_pages.main(trial)
