"""mel_patches in C++, on each instruction set, against the reference; and what callers rely on.

That is borders, masks, the bits of a clip, threads, and samples that are not finite."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch

from slap_fast import ops
from slap_fast.config import MelConfig
from slap_fast.data.audio.decode import decode
from slap_fast.data.augment import draw_masks, spec_augment
from slap_fast.ops import dispatch, torch_mel_patches
from slap_fast.ops.mel_patches import cpp_engine
from slap_fast.packed import PackedPatches, starts_of
from slap_fast.reference import mel_patches as reference
from tests.helpers.mel_signals import assert_accurate, hostile, noise

if dispatch.EXTENSION is None:
    # tests/repo/test_package.py fails where a compiler exists and the extension does not.
    pytest.skip("slap_fast._C is not built: slap-fast doctor says why", allow_module_level=True)

INSTRUCTION_SETS = dispatch.EXTENSION.mel_instruction_sets()
PRESETS = ("kaldi", "torchaudio")
LENGTHS = (0, 1, 3, 255, 256, 257, 399, 400, 401, 559, 560, 2_800, 2_801, 0, 16_000, 33_333, 1)
GRIDS = {
    "default": {},
    "tiny": {"hop_length": 320},
    "8kHz": {
        "sample_rate": 8_000, "n_fft": 256, "win_length": 200, "hop_length": 100, "n_mels": 24,
        "f_max": 4_000.0, "patch_time": 10, "patch_freq": 8,
    },
    "1024": {"n_fft": 1_024, "win_length": 1_001, "hop_length": 480},
    "whole": {"n_fft": 128, "win_length": 128, "hop_length": 11, "n_mels": 6, "patch_freq": 3},
    "window_of_3": {"n_fft": 4, "win_length": 3, "hop_length": 7, "n_mels": 16},
}  # fmt: skip
NO_MASKS = np.zeros((0, 4), np.int32)


def run(instruction_set, waveform, cu_samples, config, masks=NO_MASKS, num_threads=1):
    mel = cpp_engine(config, instruction_set)
    arrays = mel(waveform.numpy(), cu_samples.numpy(), masks, num_threads)
    return PackedPatches(*map(torch.from_numpy, arrays[:3]), arrays[3])


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_portable_path_is_always_available():
    assert INSTRUCTION_SETS[-1] == "portable"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=["fp32", "int16"])
def test_equals_the_reference(instruction_set, preset, grid, dtype):
    config = MelConfig(preset=preset, **GRIDS[grid])
    waveform, cu_samples = noise(*LENGTHS, dtype=dtype)
    actual = run(instruction_set, waveform, cu_samples, config)
    expected = reference.mel_patches(waveform, cu_samples, config)
    assert torch.equal(actual.coords, expected[1]) and actual.coords.dtype == torch.int32
    assert torch.equal(actual.cu_seqlens, expected[2]) and actual.cu_seqlens.dtype == torch.int32
    assert actual.max_seqlen == expected[3] and actual.patches.dtype == torch.float32
    assert_accurate(actual.patches, waveform, cu_samples, config)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("signal", hostile(1))
def test_hostile_signals(instruction_set, preset, signal):
    waveform = torch.from_numpy(hostile(32_000)[signal]).float()
    cu_samples = torch.tensor([0, len(waveform)])
    for config in (MelConfig(preset=preset), MelConfig(preset=preset, mean=0.0, std=1.0)):
        patches = run(instruction_set, waveform, cu_samples, config).patches
        assert patches.isfinite().all()
        assert_accurate(patches, waveform, cu_samples, config)


@pytest.mark.parametrize("preset", PRESETS)
def test_real_recordings(instruction_set, preset, shared_data):
    paths = [
        *sorted(shared_data.glob("*/*.ogg"))[::90],
        *sorted(shared_data.glob("*/*.flac"))[::20],
    ]
    clips = [torch.from_numpy(decode(path, sample_rate=16_000).waveform) for path in paths]
    cu_samples = starts_of(list(map(len, clips)), torch.int64)
    waveform, config = torch.cat(clips), MelConfig(preset=preset, mean=0.0, std=1.0)
    actual = run(instruction_set, waveform, cu_samples, config).patches
    assert_accurate(actual, waveform, cu_samples, config)


@pytest.mark.parametrize("preset", PRESETS)
def test_silence_is_the_floor_exactly(instruction_set, preset):
    config = MelConfig(preset=preset, mean=0.0, std=1.0)
    actual = run(instruction_set, torch.zeros(9_000), torch.tensor([0, 9_000]), config).patches
    assert torch.equal(actual, torch.full_like(actual, config.log_floor))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=["fp32", "int16"])
def test_bits_depend_on_neither_threads_nor_neighbours(instruction_set, preset, dtype):
    config = MelConfig(preset=preset)
    waveform, cu_samples = noise(300, 0, 400_000, 1, 20_000, 160 * 1_024 + 240, dtype=dtype)
    packed = run(instruction_set, waveform, cu_samples, config).patches
    for num_threads in (2, 7):
        again = run(instruction_set, waveform, cu_samples, config, num_threads=num_threads)
        assert torch.equal(again.patches, packed)
    alone = [
        run(instruction_set, waveform[a:b], torch.tensor([0, b - a]), config).patches
        for a, b in itertools.pairwise(cu_samples.tolist())
    ]
    assert torch.equal(torch.cat(alone), packed)


@pytest.mark.parametrize("preset", PRESETS)
def test_int16_is_divided_by_32768(instruction_set, preset):
    config = MelConfig(preset=preset)
    waveform, cu_samples = noise(300, 9_000, dtype=torch.int16)
    int16 = run(instruction_set, waveform, cu_samples, config).patches
    assert torch.equal(int16, run(instruction_set, waveform / 32_768, cu_samples, config).patches)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_frame_with_a_sample_that_is_not_finite_is_nan(instruction_set, preset, value):
    config = MelConfig(preset=preset, f_min=0.0, n_mels=128)  # with filters that hold no bin
    waveform, cu_samples = noise(16_000, 700, 16_000)
    waveform[5_000] = waveform[16_000] = waveform[-1] = value
    actual = run(instruction_set, waveform, cu_samples, config).patches
    expected = reference.mel_patches(waveform, cu_samples, config)[0]
    assert torch.equal(actual.isnan(), expected.isnan()) and expected.isnan().any()


def masks_of(config: MelConfig, lengths: tuple[int, ...], seed: int) -> np.ndarray:
    starts = np.cumsum([0, *map(config.num_patches, lengths)])
    return draw_masks(
        starts, config, time_masks=3, time_mask_share=0.4, freq_masks=2, freq_mask_bins=20,
        rng=np.random.default_rng(seed),
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["torch", "reference", "cpp"])
@pytest.mark.parametrize("grid", ["default", "8kHz", "whole"])
def test_masks_are_those_of_spec_augment(impl, grid):
    config, lengths = MelConfig(**GRIDS[grid]), (5_000, 0, 1, 180_000, 300)
    waveform, cu_samples = noise(*lengths)
    plain = ops.mel_patches(waveform, cu_samples, config, impl=impl)
    for seed in range(5):
        masks = torch.from_numpy(masks_of(config, lengths, seed))
        masked = ops.mel_patches(waveform, cu_samples, config, masks=masks, impl=impl)
        expected = spec_augment(
            plain.patches, plain.coords, plain.cu_seqlens, config,
            time_masks=3, time_mask_share=0.4, freq_masks=2, freq_mask_bins=20,
            rng=np.random.default_rng(seed),
        )  # fmt: skip
        assert torch.equal(masked.patches, expected) and not torch.equal(expected, plain.patches)
        order = torch.randperm(len(masks))
        shuffled = ops.mel_patches(waveform, cu_samples, config, masks=masks[order], impl=impl)
        assert torch.equal(shuffled.patches, expected)


@pytest.mark.parametrize("impl", ["torch", "reference", "cpp"])
def test_masks_end_where_their_clip_ends(impl):
    waveform, cu_samples = noise(5_000, 5_000, 5_000)
    plain = ops.mel_patches(waveform, cu_samples, impl=impl).patches.view(3, -1)
    for axis in (0, 1):
        masks = torch.tensor([[1, axis, 0, 2**31 - 1], [0, axis, 1_000, 2_000]], dtype=torch.int32)
        masked = ops.mel_patches(waveform, cu_samples, masks=masks, impl=impl).patches.view(3, -1)
        assert not masked[1].any()
        assert torch.equal(masked[::2], plain[::2])


def test_the_default_follows_the_configuration():
    waveform, cu_samples = noise(4_000)
    assert dispatch.which("mel_patches")["mel_patches"].startswith("cpp: ")
    actual = ops.mel_patches(waveform, cu_samples)
    assert torch.equal(actual.patches, ops.mel_patches(waveform, cu_samples, impl="cpp").patches)
    odd = MelConfig(n_fft=400)
    assert dispatch.which("mel_patches", mel=odd)["mel_patches"] == (
        "torch: triton runs on a GPU, not on cpu; "
        "cpp takes an n_fft that is a power of two, not 400"
    )
    actual = ops.mel_patches(waveform, cu_samples, odd).patches
    assert torch.equal(actual, torch_mel_patches.mel_patches(waveform, cu_samples, odd)[0])
    with pytest.raises(NotImplementedError, match="'cpp', which takes an n_fft that is a power"):
        ops.mel_patches(waveform, cu_samples, odd, impl="cpp")


def test_runs_beside_other_threads():
    # The GIL is released: eight callers share one plan, each with threads of its own.
    config = MelConfig()
    waveform, cu_samples = noise(20_000, 7, 9_000, dtype=torch.int16)
    expected = run(None, waveform, cu_samples, config).patches
    equal = []

    def call() -> None:
        for _ in range(20):
            actual = run(None, waveform, cu_samples, config, num_threads=2).patches
            equal.append(torch.equal(actual, expected))

    callers = [threading.Thread(target=call) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(equal) == 160 and all(equal)


@pytest.mark.parametrize("bounds", [[], [1, 9], [0, 5, 4], [0, 101], [0, -1], [0, 2**62]], ids=str)
def test_the_extension_refuses_bounds_outside_the_waveform(bounds):
    mel = cpp_engine(MelConfig())
    with pytest.raises(ValueError, match="cu_samples: expected 0 first"):
        mel(np.zeros(100, np.float32), np.array(bounds, np.int64), NO_MASKS, 1)


@pytest.mark.parametrize("impl", [None, "torch", "reference", "cpp"])
def test_a_gradient_is_refused(impl):
    waveform, cu_samples = noise(4_000)
    waveform.requires_grad_()
    with pytest.raises(ValueError, match="waveform: found requires_grad, expected data"):
        ops.mel_patches(waveform, cu_samples, impl=impl)
    with torch.no_grad():
        assert not ops.mel_patches(waveform, cu_samples, impl=impl).patches.requires_grad
