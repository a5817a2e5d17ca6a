"""The reference mel_patches against numpy, frame by frame, and against transformers' fbank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slap_fast.config import MelConfig
from slap_fast.reference.mel_patches import mel_patches

PRESETS = ("kaldi", "torchaudio")
LENGTHS = (1, 100, 256, 257, 399, 400, 401, 559, 560, 2_800, 2_801, 5_360, 16_000, 33_333)


def raw(preset: str) -> MelConfig:
    return MelConfig(preset=preset, mean=0.0, std=1.0)


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, num_samples)).normal(0.02, 0.1, num_samples)


def run(clips: list[np.ndarray], config: MelConfig, dtype=torch.float64):
    bounds = torch.tensor([0, *map(len, clips)]).cumsum(0)
    return mel_patches(torch.from_numpy(np.concatenate(clips)).to(dtype), bounds, config)


def triangle(at: float, left: float, centre: float, right: float) -> float:
    if left < at <= centre:
        return (at - left) / (centre - left)
    return (right - at) / (right - centre) if centre < at < right else 0.0


def filters(preset: str) -> np.ndarray:
    """[64, 257], one triangle at a time."""
    if preset == "kaldi":
        to_mel, to_hz = lambda f: 1127 * np.log(1 + f / 700), None
    else:
        to_mel = lambda f: 2595 * np.log10(1 + f / 700)  # noqa: E731
        to_hz = lambda m: 700 * (10 ** (m / 2595) - 1)  # noqa: E731
    corners = np.linspace(to_mel(20.0), to_mel(8000.0), 66)
    axis = np.arange(257) * 31.25
    axis, corners = (to_mel(axis), corners) if to_hz is None else (axis, to_hz(corners))
    return np.array([[triangle(a, *corners[m : m + 3]) for a in axis] for m in range(64)])


def log_mel(clip: np.ndarray, preset: str) -> np.ndarray:
    """[frames, 64] of one clip in float64, a straight DFT of one frame after the other."""
    n = np.arange(400)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(257), n) / 512)
    if preset == "kaldi":
        clip = np.pad(clip, (0, max(0, 400 - len(clip))))
        starts = range(0, len(clip) - 399, 160)
        window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 399)
    else:
        starts = range(56, 56 + 160 * (len(clip) // 160 + 1), 160)
        clip = np.pad(np.pad(clip, (0, max(0, 257 - len(clip)))), 256, mode="reflect")
        window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 400)
    bank, rows = filters(preset), []
    for start in starts:
        frame = clip[start : start + 400]
        if preset == "kaldi":
            frame = frame - frame.mean()
            frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        mel = bank @ np.abs(dft @ (frame * window)) ** 2
        rows.append(np.log(np.maximum(mel, 2.0**-23 if preset == "kaldi" else 1e-10)))
    return np.array(rows)


def as_patches(mel: np.ndarray, floor: float) -> np.ndarray:
    """[T, 256] from [frames, 64] by index arithmetic."""
    columns = -(-len(mel) // 16)
    out = np.full((4 * columns, 256), floor)
    for frame, row in enumerate(mel):
        for bin_, value in enumerate(row):
            out[4 * (frame // 16) + bin_ // 16, 16 * (frame % 16) + bin_ % 16] = value
    return out


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("num_samples", LENGTHS)
def test_equals_numpy_frame_by_frame(preset, num_samples):
    config, clip = raw(preset), noise(num_samples)
    patches, _, cu_seqlens, max_seqlen = run([clip], config)
    expected = as_patches(log_mel(clip, preset), config.log_floor)
    assert patches.dtype == torch.float64
    assert patches.shape == expected.shape == (config.num_patches(num_samples), 256)
    assert cu_seqlens.tolist() == [0, len(expected)] and max_seqlen == len(expected)
    np.testing.assert_allclose(patches.numpy(), expected, rtol=0, atol=1e-9)


def test_equals_the_fbank_of_transformers():
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    bank = mel_filter_bank(
        257, 64, 20.0, 8000.0, 16_000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    clip = noise(16_000)
    expected = spectrogram(
        clip,
        window_function(400, "hann", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=bank,
        log_mel="log",
        mel_floor=2.0**-23,
        remove_dc_offset=True,
        dtype=np.float64,
    ).T
    config = raw("kaldi")
    patches = run([clip], config)[0].numpy()
    np.testing.assert_allclose(patches, as_patches(expected, config.log_floor), rtol=0, atol=1e-5)


def test_torchaudio_power_equals_torch_stft():
    clip, config = noise(8_000), raw("torchaudio")
    spectrum = torch.stft(
        torch.from_numpy(clip),
        512,
        160,
        400,
        torch.hann_window(400, dtype=torch.float64),
        return_complex=True,
    )
    mel = np.log(np.maximum(spectrum.abs().square().numpy().T @ filters("torchaudio").T, 1e-10))
    patches = run([clip], config)[0].numpy()
    np.testing.assert_allclose(patches, as_patches(mel, config.log_floor), rtol=0, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_normalises_and_fills_the_last_column_with_silence(preset):
    config = MelConfig(preset=preset, mean=-3.0, std=2.0)
    clip = noise(4_000)
    expected = as_patches((log_mel(clip, preset) + 3.0) / 2.0, (config.log_floor + 3.0) / 2.0)
    np.testing.assert_allclose(run([clip], config)[0].numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_silence_and_a_constant_are_finite(preset):
    config = raw(preset)
    patches = run([np.zeros(6_000)], config, torch.float32)[0]
    assert torch.equal(patches, torch.full_like(patches, config.log_floor))
    assert run([np.full(6_000, 0.5)], config, torch.float32)[0].isfinite().all()


def test_kaldi_removes_a_constant():
    config = raw("kaldi")
    patches = run([np.full(6_000, 0.5)], config, torch.float32)[0]
    assert torch.equal(patches, torch.full_like(patches, config.log_floor))


@pytest.mark.parametrize("preset", PRESETS)
def test_coords_and_lengths_of_a_pack(preset):
    config = raw(preset)
    lengths = [0, 1, 2_800, 0, 9_000]
    patches, coords, cu_seqlens, max_seqlen = run([noise(n) for n in lengths], config)
    expected = [
        (column, band)
        for n in lengths
        for column in range(-(-config.num_frames(n) // 16))
        for band in range(4)
    ]
    assert coords.tolist() == [list(pair) for pair in expected]
    tokens = [config.num_patches(n) for n in lengths]
    assert cu_seqlens.tolist() == np.cumsum([0, *tokens]).tolist() and max_seqlen == max(tokens)
    assert (coords.dtype, cu_seqlens.dtype) == (torch.int32, torch.int32)
    assert len(patches) == sum(tokens)


@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]], ids=["no_clips", "one", "two"])
def test_no_samples_give_no_patches(bounds):
    patches, coords, cu_seqlens, max_seqlen = mel_patches(
        torch.zeros(0), torch.tensor(bounds), MelConfig()
    )
    assert patches.shape == (0, 256) and coords.shape == (0, 2)
    assert cu_seqlens.tolist() == bounds and max_seqlen == 0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16], ids=str)
def test_a_pack_is_its_clips_end_to_end(preset, dtype):
    scale = 30_000 if dtype == torch.int16 else 1
    clips = [scale * noise(n, seed) for seed, n in enumerate((1, 0, 300, 16_000, 401, 0, 24_000))]
    packed = run(clips, MelConfig(preset=preset), dtype)[0]
    alone = [run([clip], MelConfig(preset=preset), dtype)[0] for clip in clips]
    assert torch.equal(packed, torch.cat(alone))


@pytest.mark.parametrize("preset", PRESETS)
def test_masks_are_spans_of_the_log_mel_of_a_clip(preset):
    config, clips = raw(preset), [noise(n) for n in (9_000, 0, 4_000, 5_000)]
    masks = torch.tensor([[2, 0, 3, 19], [2, 1, 60, 99], [3, 0, 30, 2**31 - 1], [0, 1, 5, 5]])
    bounds = torch.tensor([0, *map(len, clips)]).cumsum(0)
    patches = mel_patches(torch.from_numpy(np.concatenate(clips)), bounds, config, masks.int())[0]
    expected = [log_mel(clip, preset) if len(clip) else np.zeros((0, 64)) for clip in clips]
    filled = [np.full((-len(mel) % 16, 64), config.log_floor) for mel in expected]
    expected = [np.concatenate(pair) for pair in zip(expected, filled, strict=True)]
    expected[2][3:19], expected[2][:, 60:], expected[3][30:] = 0, 0, 0
    expected = np.concatenate([as_patches(mel, 0.0) for mel in expected])
    np.testing.assert_allclose(patches.numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_int16_is_divided_by_32768(preset):
    config = raw(preset)
    clip = torch.from_numpy(noise(9_000) * 20_000).to(torch.int16)
    bounds = torch.tensor([0, 300, 9_000])
    int16 = mel_patches(clip, bounds, config)[0]
    assert torch.equal(int16, mel_patches(clip.float() / 32768, bounds, config)[0])


@pytest.mark.parametrize("preset", PRESETS)
def test_float32_is_close_to_float64(preset):
    clips = [noise(n) for n in (300, 16_000, 40_000)]
    single = run(clips, raw(preset), torch.float32)[0]
    double = run(clips, raw(preset), torch.float64)[0]
    assert single.dtype == torch.float32
    assert (single.double() - double).norm() <= 1e-6 * double.norm()


def test_other_grids_follow_the_config():
    config = MelConfig(
        sample_rate=8_000, n_fft=256, win_length=200, hop_length=100, n_mels=24, f_max=4_000.0,
        patch_time=10, patch_freq=8, mean=0.0, std=1.0,
    )  # fmt: skip
    patches, coords, *_ = run([noise(5_000)], config)
    assert patches.shape == (config.num_patches(5_000), 80) and int(coords[:, 1].max()) == 2
    tone = np.sin(2 * np.pi * 3_500 * np.arange(5_000) / 8_000)
    by_band = run([tone], config)[0].view(-1, 3, 80)[:4].mean((0, 2))
    assert by_band.argmax() == 2
