"""The mel of the default implementation against libraries with the same definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slap_fast import ops
from slap_fast.config import MelConfig
from tests.helpers.mel_signals import noise

TOLERANCE = 2e-3
"""Of ln(mel): both sides are fp32, and noise has bins with little power."""


def log_mel(clip: torch.Tensor, preset: str) -> np.ndarray:
    """[frames, 64], not normalised."""
    config = MelConfig(preset=preset, mean=0.0, std=1.0)
    patches = ops.mel_patches(clip, torch.tensor([0, len(clip)]), config).patches
    grid = patches.view(-1, 4, 16, 16).transpose(1, 2).reshape(-1, 64)
    return grid[: config.num_frames(len(clip))].numpy()


@pytest.mark.parametrize("num_samples", [400, 4_000, 33_333])
def test_kaldi_native_fbank(num_samples):
    peer = pytest.importorskip("kaldi_native_fbank")
    options = peer.FbankOptions()
    options.frame_opts.dither, options.frame_opts.samp_freq = 0.0, 16_000
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins, options.mel_opts.high_freq = 64, 8_000.0
    clip, _ = noise(num_samples)
    online = peer.OnlineFbank(options)
    online.accept_waveform(16_000, clip.numpy())
    expected = np.array([online.get_frame(i) for i in range(online.num_frames_ready)])
    np.testing.assert_allclose(log_mel(clip, "kaldi"), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_samples", [400, 4_000, 33_333])
def test_librosa(num_samples):
    librosa = pytest.importorskip("librosa", exc_type=ImportError)
    clip, _ = noise(num_samples)
    mel = librosa.feature.melspectrogram(
        y=clip.numpy(), sr=16_000, n_fft=512, hop_length=160, win_length=400, n_mels=64, fmin=20.0,
        fmax=8_000.0, htk=True, norm=None, pad_mode="reflect",
    )  # fmt: skip
    expected = np.log(np.maximum(mel, 1e-10)).T
    np.testing.assert_allclose(log_mel(clip, "torchaudio"), expected, rtol=0, atol=TOLERANCE)


def test_transformers():
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    bank = mel_filter_bank(
        257, 64, 20.0, 8000.0, 16_000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    clip, _ = noise(16_000)
    expected = spectrogram(
        clip.numpy(), window_function(400, "hann", periodic=False), frame_length=400,
        hop_length=160, fft_length=512, power=2.0, center=False, preemphasis=0.97,
        mel_filters=bank, log_mel="log", mel_floor=2.0**-23, remove_dc_offset=True,
    )  # fmt: skip
    np.testing.assert_allclose(log_mel(clip, "kaldi"), expected.T, rtol=0, atol=TOLERANCE)


def test_torchaudio():
    try:
        from torchaudio.compliance import kaldi
        from torchaudio.transforms import MelSpectrogram
    except Exception as error:  # beside another build of torch it raises OSError
        pytest.skip(f"torchaudio does not load: {error}")
    clip, _ = noise(16_000)
    expected = kaldi.fbank(clip[None], num_mel_bins=64, window_type="hanning")
    np.testing.assert_allclose(log_mel(clip, "kaldi"), expected.numpy(), rtol=0, atol=TOLERANCE)
    mel = MelSpectrogram(16_000, 512, 400, 160, f_min=20.0, f_max=8_000.0, n_mels=64)(clip)
    expected = mel.clamp_min(1e-10).log().T
    np.testing.assert_allclose(
        log_mel(clip, "torchaudio"), expected.numpy(), rtol=0, atol=TOLERANCE
    )
