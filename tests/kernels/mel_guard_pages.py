"""Runs mel_patches on tensors that end, then begin, at memory that nobody may touch.

What it allocates starts as NaN, or -1, so that a gap shows. ``guard_pages`` says the rest.
"""

from __future__ import annotations

import itertools

import torch
from guard_pages import guarded


def main() -> None:
    import pytest
    from mel_signals import noise
    from test_mel_safety import LENGTHS, arguments

    from slap_fast.config import MelConfig
    from slap_fast.kernels import mel_patches as kernel

    kernel.LAUNCH = {128: kernel.Launch(64, 128, 128, 4, 1)}
    new_empty = torch.Tensor.new_empty
    odd = {"win_length": 511, "hop_length": 97, "n_mels": 30, "patch_freq": 10, "patch_time": 10}
    for preset, dtype, grid in itertools.product(
        ("kaldi", "torchaudio"), (torch.float32, torch.int16), ({}, odd)
    ):
        config = MelConfig(preset=preset, **grid)
        call = arguments(*noise(*LENGTHS, dtype=dtype), config)
        want = kernel._forward(*call)
        for at_end in (True, False):

            def empty(x, *size, dtype=None, at_end=at_end, **interpreters):
                if interpreters:
                    return new_empty(x, *size, **interpreters)
                dtype = dtype or x.dtype
                fill = float("nan") if dtype.is_floating_point else -1
                return guarded(torch.full(size, fill, dtype=dtype), at_end=at_end)

            given = [guarded(x, at_end=at_end) if torch.is_tensor(x) else x for x in call]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "new_empty", empty)
                found = kernel._forward(*given)
            assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
    print("no access outside")


if __name__ == "__main__":
    import os
    import sys
    from pathlib import Path

    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
