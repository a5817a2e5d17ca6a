"""The Triton mel_patches against the reference: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from slap_fast import ops
from slap_fast.config import MelConfig
from slap_fast.data.audio.decode import decode
from slap_fast.data.augment import draw_masks
from slap_fast.ops.dispatch import DEFAULT_MEL
from slap_fast.packed import PackedPatches, starts_of
from slap_fast.reference import mel_patches as reference
from tests.helpers.mel_signals import assert_accurate, hostile, noise

pytest.importorskip("triton")
from slap_fast.kernels import mel_patches as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (0, 1, 300, 0, 401, 21_000)
GRIDS = {
    "default": {},
    "tiny": {"hop_length": 320},
    "odd": {"win_length": 511, "hop_length": 97, "n_mels": 30, "patch_freq": 10, "patch_time": 10},
    "wide": {"win_length": 512, "n_mels": 128, "patch_time": 64, "patch_freq": 32, "f_min": 0.0},
    "window_of_1": {"win_length": 1, "hop_length": 300},
}


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, an operation on a block costs the same whatever the block."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernel, "LAUNCH", {128: kernel.Launch(64, 128, 128, 4, 1)})


def run(waveform, cu_samples, config=DEFAULT_MEL, masks=None) -> PackedPatches:
    masks = None if masks is None else masks.to(DEVICE)
    actual = ops.mel_patches(
        waveform.to(DEVICE), cu_samples.to(DEVICE), config, masks=masks, impl="triton"
    )
    assert actual.patches.dtype == torch.float32
    return PackedPatches(*(x.cpu() for x in actual[:3]), actual.max_seqlen)


@pytest.mark.parametrize("preset", ["kaldi", "torchaudio"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=["fp32", "int16"])
def test_equals_the_reference(preset, grid, dtype):
    config = MelConfig(preset=preset, **GRIDS[grid])
    waveform, cu_samples = noise(*LENGTHS, dtype=dtype)
    actual = run(waveform, cu_samples, config)
    expected = reference.mel_patches(waveform, cu_samples, config)
    assert torch.equal(actual.coords, expected[1]) and actual.coords.dtype == torch.int32
    assert torch.equal(actual.cu_seqlens, expected[2]) and actual.cu_seqlens.dtype == torch.int32
    assert actual.max_seqlen == expected[3]
    assert_accurate(actual.patches, waveform, cu_samples, config)


@pytest.mark.parametrize("preset", ["kaldi", "torchaudio"])
def test_hostile_signals(preset):
    clips = [torch.from_numpy(clip).float() for clip in hostile(5_360).values()]
    waveform, cu_samples = torch.cat(clips), starts_of(list(map(len, clips)), torch.int64)
    config = MelConfig(preset=preset, mean=0.0, std=1.0)
    actual = run(waveform, cu_samples, config).patches
    assert actual.isfinite().all()
    assert_accurate(actual, waveform, cu_samples, config)
    silence = actual[: config.num_patches(5_360)]
    assert (silence - config.log_floor).abs().max() <= 2.0**-19


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["kaldi", "torchaudio"])
def test_real_recordings(preset, shared_data):
    # A million values: the largest error of fewer varies at random.
    paths = sorted(shared_data.glob("*/*.ogg"))[::12] + sorted(shared_data.glob("*/*.flac"))[::4]
    clips = [torch.from_numpy(decode(path, end=2.0).waveform) for path in paths]
    waveform, cu_samples = torch.cat(clips), starts_of(list(map(len, clips)), torch.int64)
    config = MelConfig(preset=preset, mean=0.0, std=1.0)
    assert_accurate(run(waveform, cu_samples, config).patches, waveform, cu_samples, config)


@pytest.mark.parametrize("n_mels", kernel.LAUNCH)
def test_the_settings_of_a_gpu(figure, n_mels, monkeypatch):
    for seed in figure("K7", ci=1, soak=5):
        torch.manual_seed(seed)
        monkeypatch.undo()
        config = MelConfig(n_mels=n_mels)
        waveform, cu_samples = noise(21_000, 3_000)
        waveform[21_000:] = 0.3  # less its mean, which is rounded, it must not overflow fp16
        assert_accurate(run(waveform, cu_samples, config).patches, waveform, cu_samples, config)


def test_a_clip_ignores_its_neighbours():
    waveform, cu_samples = noise(300, 0, 9_000, 1, 5_000)
    waveform[300:9_300] = float("nan")
    packed = run(waveform, cu_samples)
    alone = [
        run(waveform[a:b], torch.tensor([0, b - a])).patches
        for a, b in itertools.pairwise(cu_samples.tolist())
    ]
    assert torch.equal(torch.cat(alone).nan_to_num(9.0), packed.patches.nan_to_num(9.0))
    expected = reference.mel_patches(waveform, cu_samples, DEFAULT_MEL)[0]
    assert torch.equal(packed.patches.isnan(), expected.isnan())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("preset", ["kaldi", "torchaudio"])
def test_a_frame_with_a_sample_that_is_not_finite_is_nan(preset, value):
    config = MelConfig(preset=preset)
    waveform, cu_samples = noise(5_000)
    waveform[2_345] = value
    actual = run(waveform, cu_samples, config).patches
    expected = reference.mel_patches(waveform, cu_samples, config)[0]
    assert torch.equal(actual.isnan(), expected.isnan()) and expected.isnan().any()


def test_masks():
    waveform, cu_samples = noise(5_000, 0, 1, 25_000)
    plain = run(waveform, cu_samples)
    masks = draw_masks(
        plain.cu_seqlens, DEFAULT_MEL, time_masks=2, time_mask_share=0.4, freq_masks=2,
        freq_mask_bins=20, rng=np.random.default_rng(0),
    )  # fmt: skip
    masks = torch.from_numpy(masks)[torch.randperm(len(masks))]
    actual = run(waveform, cu_samples, masks=masks).patches
    expected = reference.mel_patches(waveform, cu_samples, DEFAULT_MEL, masks)[0]
    assert torch.equal(actual == 0, expected == 0)
    assert torch.equal(actual[expected != 0], plain.patches[expected != 0])


@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]], ids=["no_clips", "one", "two"])
def test_no_samples_give_no_patches(bounds):
    actual = run(torch.zeros(0), torch.tensor(bounds))
    assert actual.patches.shape == (0, 256) and actual.coords.shape == (0, 2)
    assert actual.cu_seqlens.tolist() == bounds and actual.max_seqlen == 0


def test_the_registered_operation_passes_opcheck():
    waveform, cu_samples = (x.to(DEVICE) for x in noise(400, 3_000))
    config, device = DEFAULT_MEL, waveform.device
    plain = run(waveform, cu_samples)
    masks = torch.empty(0, 4, dtype=torch.int32, device=device)
    starts = torch.zeros(3, dtype=torch.int32, device=device)
    tables = kernel._tables(config, reference.constants, device)
    arguments = (
        waveform, cu_samples, plain.cu_seqlens.to(device), tables[0], kernel._basis(device),
        tables[1], masks, starts, len(plain.patches), config.mean, 1 / config.std,
        *kernel._front_end(config),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.slap_fast.mel_patches.default, arguments)
