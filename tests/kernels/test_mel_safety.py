"""Triton's mel_patches: accesses out of bounds, large offsets, program order, neighbours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from slap_fast.config import MelConfig
from tests.helpers import guard_pages
from tests.helpers.mel_calls import LENGTHS, MASKS, arguments
from tests.helpers.mel_signals import noise

pytest.importorskip("triton")
from slap_fast.kernels import mel_patches as kernel  # noqa: E402

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="only the interpreter's memory and order are ours to choose"
)


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, an operation on a block costs the same whatever the block."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(kernel, "LAUNCH", {128: kernel.Launch(64, 128, 128, 4, 1)})


@pytest.mark.parametrize("preset", ["kaldi", "torchaudio"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=["fp32", "int16"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("lengths", [LENGTHS, (3_000,)], ids=["clips", "one"])
@pytest.mark.slow
def test_opcheck(figure, preset, dtype, masked, lengths):
    if masked and len(lengths) < 4:
        pytest.skip("the masks are of four clips")
    for seed in figure("K6", ci=1, soak=3):
        torch.manual_seed(seed)
        call = arguments(*noise(*lengths, dtype=dtype), MelConfig(preset=preset), masked)
        torch.library.opcheck(torch.ops.slap_fast.mel_patches.default, tuple(call))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=["fp32", "int16"])
def test_the_order_of_programs_changes_nothing(monkeypatch, figure, dtype):
    from triton.runtime import interpreter

    call = arguments(*noise(*LENGTHS, dtype=dtype), MelConfig())
    expected = kernel._forward(*call)
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx
    for seed in figure("K8", ci=10, soak=100):
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []

        def permuted(x, y, z, generator=generator, order=order):
            if not order:
                order += torch.randperm(builder.grid_dim[0], generator=generator).tolist()
            place(order[x], y, z)

        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", permuted)
            actual = kernel._forward(*call)
        assert len(order) > 3
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_the_launch_is_on_the_tensors_device(monkeypatch):
    inside = []

    class Guard:
        def __init__(self, x):
            self.device = x.device

        def __enter__(self):
            inside.append(self.device)

        def __exit__(self, *_):
            inside.clear()

    class Kernel:
        def __getitem__(self, grid):
            def launch(waveform, *_, **__):
                assert inside == [waveform.device]

            return launch

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(kernel, "_mel_kernel", Kernel())
    kernel._forward(*arguments(*noise(*LENGTHS), MelConfig()))
    assert not inside


def test_numbers_that_change_from_pack_to_pack_recompile_nothing():
    program = (
        "from slap_fast.kernels.mel_patches import _mel_kernel as k; "
        "print(*(p.name for p in k.params if p.do_not_specialize))"
    )
    compiled = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=compiled, capture_output=True, text=True
    )
    assert done.stdout.split() == ["num_samples", "num_clips", "total"], done.stderr


@interpreted
def test_guard_pages(figure):
    for first in figure("K4", ci=10, soak=510, batch=10):
        assert not guard_pages.invalid_accesses("mel_guard_pages", first, 10)


def assert_offsets_past_2_32(monkeypatch):
    """The same clip, masks and patches, far into tensors that exist only where they are touched."""
    from triton.runtime import interpreter

    config = MelConfig()
    waveform, cu_samples = noise(12_000, dtype=torch.int16)
    near = arguments(waveform, cu_samples, config, masked=False)
    near[6], near[7] = MASKS[2:].int(), torch.tensor([0, 2], dtype=torch.int32)
    expected = kernel._forward(*near)

    sample, mask, token = 2**32 + 5, 2**30 + 8, 2**31 - 4_096
    far = list(near)
    far[0] = guard_pages.lazy((sample + len(waveform),), torch.int16)
    far[0][sample:] = waveform
    far[1] = cu_samples + sample
    far[2] = near[2] + token
    far[6] = guard_pages.lazy((mask + 2, 4), torch.int32)
    far[6][mask:] = near[6]
    far[7] = near[7] + mask
    far[8] = token + near[8]
    new_empty = torch.Tensor.new_empty

    def lazy(x, *size, dtype=None, **interpreters):
        if interpreters:
            return new_empty(x, *size, **interpreters)
        return guard_pages.lazy(size, dtype or x.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", lazy)
    # The programs before the clip's own would do nothing, for days.
    first = token // (64 // config.patch_time * config.patches_per_column)
    programs, launch = near[8] // 16 + 1, kernel._mel_kernel
    builder = interpreter.interpreter_builder

    def late(x, y, z):
        builder.grid_idx = first + x, y, z

    monkeypatch.setattr(builder, "set_grid_idx", late)

    class Late:
        def __getitem__(self, grid):
            assert grid == (first + programs,)
            return launch[(programs,)]

    monkeypatch.setattr(kernel, "_mel_kernel", Late())
    actual = kernel._forward(*far)
    assert all(torch.equal(x[token:], y) for x, y in zip(actual, expected, strict=True))


@interpreted
def test_offsets_past_2_32(figure, monkeypatch):
    for _ in figure("K5", ci=1, soak=1):
        assert_offsets_past_2_32(monkeypatch)
