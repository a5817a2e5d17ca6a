"""Clips for the tests of mel_patches, and the accuracy required on them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from slap_fast.packed import starts_of
from slap_fast.reference import mel_patches as reference


def noise(*lengths: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """waveform and cu_samples of clips of these lengths."""
    bounds = starts_of(lengths, torch.int64)
    samples = np.random.default_rng(lengths).normal(0.02, 0.1, int(bounds[-1]))
    scale = 20_000 if dtype == torch.int16 else 1
    return torch.from_numpy(samples * scale).to(dtype), bounds


def hostile(n: int) -> dict[str, np.ndarray]:
    """Difficult signals of n samples (two are shorter)."""
    rng = np.random.default_rng(0)
    time = np.arange(n)
    steep = np.fft.rfft(rng.normal(size=n))
    steep /= np.maximum(np.arange(len(steep)), 1)
    steep = np.fft.irfft(steep, n)
    return {
        "silence": np.zeros(n),
        "constant": np.full(n, 0.3),
        "constant_1": np.ones(n),
        "full_scale": np.sign(np.sin(0.05 * time)),
        "sine": np.sin(2 * np.pi * 440 / 16_000 * time),
        "nyquist": 1.0 - 2.0 * (time % 2),
        "1_over_f_squared": steep / np.abs(steep).max(),
        "clicks": (time % 1_601 == 0).astype(float),
        "faint": 1e-20 * rng.normal(size=n),
        "whisper": 1e-5 * rng.normal(size=n),
        "offset": 0.9 + 1e-4 * rng.normal(size=n),
        "one_sample": np.ones(1),
        "short": 0.1 * rng.normal(size=min(n, 300)),
    }


def fp32_reference_patches(waveform, cu_samples, config) -> Iterator[torch.Tensor]:
    """The patches of the reference in fp32 with the frames at many places in n_fft.

    Their power is the same, the rounding in torch's FFT is not. The largest error of one draw
    varies at random.
    """
    rfft = torch.fft.rfft
    for shift in range(0, 256, 12):

        def shifted(frames, n_fft, shift=shift):
            return rfft(F.pad(frames, (0, n_fft - frames.shape[1])).roll(shift, 1))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.fft, "rfft", shifted)
            yield reference.mel_patches(waveform, cu_samples, config)[0]


def assert_accurate(actual: torch.Tensor, waveform, cu_samples, config) -> None:
    """In |d ln mel| against fp64, p99.9 and max are at most 1.5 times those of torch's fp32 FFT.

    The floor is 10 ulp of the largest |ln mel|.
    """
    scale = 2.0**-15 if waveform.dtype == torch.int16 else 1
    truth = reference.mel_patches(waveform.double() * scale, cu_samples, config)[0]

    def error(patches: torch.Tensor) -> np.ndarray:
        return ((patches.double() - truth).abs() * config.std).numpy()

    floor = 10 * 2.0**-23 * (truth * config.std + config.mean).abs().max().item()
    reference_errors = [
        error(patches) for patches in fp32_reference_patches(waveform, cu_samples, config)
    ]
    for what in (lambda x: np.quantile(x, 0.999), np.max):
        # Written so that a NaN fails.
        assert what(error(actual)) <= max(1.5 * what(reference_errors), floor)
