"""The PyTorch engine of mel_patches against the reference, and its memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from slap_fast.config import MelConfig
from slap_fast.ops import torch_mel_patches
from slap_fast.reference import mel_patches as reference
from tests.helpers.mel_signals import noise

PRESETS = ("kaldi", "torchaudio")
DTYPES = [torch.float32, torch.float64, torch.int16]
LENGTHS = (1, 0, 300, 16_000, 160 * torch_mel_patches.BLOCK_FRAMES * 3 + 77, 401, 7_000, 0, 24_000)
GRIDS = {
    "default": {},
    "8kHz": {
        "sample_rate": 8_000, "n_fft": 256, "win_length": 200, "hop_length": 100, "n_mels": 24,
        "f_max": 4_000.0, "patch_time": 10, "patch_freq": 8,
    },
    "n_fft_400": {"n_fft": 400},
    "column_over_a_block": {"patch_time": 200},
}  # fmt: skip
MASKS = torch.tensor([[3, 0, 5, 40], [4, 1, 2, 9], [6, 0, 30, 2**31 - 1], [0, 1, 0, 1]]).int()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masks", [None, MASKS], ids=["plain", "masked"])
def test_equals_the_reference(preset, grid, dtype, masks):
    config = MelConfig(preset=preset, **GRIDS[grid])
    waveform, cu_samples = noise(*LENGTHS, dtype=dtype)
    patches, *layout = torch_mel_patches.mel_patches(waveform, cu_samples, config, masks)
    expected, *expected_layout = reference.mel_patches(waveform, cu_samples, config, masks)
    assert patches.dtype == expected.dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert (patches - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(patches == 0, expected == 0)
    assert layout[-1] == expected_layout[-1]
    for x, y in zip(layout[:2], expected_layout[:2], strict=True):
        assert x.dtype == y.dtype == torch.int32 and torch.equal(x, y)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pack_equals_its_clips_bitwise(preset, dtype):
    config = MelConfig(preset=preset)
    waveform, cu_samples = noise(*LENGTHS, dtype=dtype)
    packed = torch_mel_patches.mel_patches(waveform, cu_samples, config)[0]
    alone = [
        torch_mel_patches.mel_patches(waveform[a:b], torch.tensor([0, b - a]), config)[0]
        for a, b in itertools.pairwise(cu_samples.tolist())
    ]
    assert torch.equal(packed, torch.cat(alone))


@pytest.mark.parametrize("preset", PRESETS)
def test_int16_is_divided_by_32768(preset):
    config = MelConfig(preset=preset)
    waveform, cu_samples = noise(300, 9_000, dtype=torch.int16)
    patches = torch_mel_patches.mel_patches(waveform, cu_samples, config)[0]
    as_float = torch_mel_patches.mel_patches(waveform.float() / 32_768, cu_samples, config)[0]
    assert torch.equal(patches, as_float)


@pytest.mark.parametrize("preset", PRESETS)
def test_silence_is_the_floor_exactly(preset):
    config = MelConfig(preset=preset, mean=0.0, std=1.0)
    patches = torch_mel_patches.mel_patches(torch.zeros(6_000), torch.tensor([0, 6_000]), config)[0]
    assert torch.equal(patches, torch.full_like(patches, config.log_floor))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_fourier_transform_is_of_one_block(preset, monkeypatch):
    """The memory beside the result does not grow with the clip."""
    shapes, rfft = [], torch.fft.rfft

    def recorded(frames, n_fft):
        shapes.append(tuple(frames.shape))
        return rfft(frames, n_fft)

    monkeypatch.setattr(torch.fft, "rfft", recorded)
    waveform, cu_samples = noise(300_000, 9)
    torch_mel_patches.mel_patches(waveform, cu_samples, MelConfig(preset=preset))
    assert len(shapes) > 3 and set(shapes) == {(torch_mel_patches.BLOCK_FRAMES, 400)}


@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]], ids=["no_clips", "one", "two"])
def test_no_samples_give_no_patches(bounds):
    patches, coords, cu_seqlens, max_seqlen = torch_mel_patches.mel_patches(
        torch.zeros(0), torch.tensor(bounds), MelConfig()
    )
    assert patches.shape == (0, 256) and coords.shape == (0, 2)
    assert cu_seqlens.tolist() == bounds and max_seqlen == 0
