"""Log-mel patches of packed clips: the arguments, the checks, and the choice of what runs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from slap_fast.config import MelConfig
from slap_fast.ops import dispatch, torch_mel_patches
from slap_fast.ops.dispatch import DEFAULT_MEL
from slap_fast.ops.validation import check_masks, check_starts, check_tensor
from slap_fast.packed import PackedPatches
from slap_fast.reference import mel_patches as reference


def mel_patches(
    waveform: Tensor,
    cu_samples: Tensor,
    config: MelConfig = DEFAULT_MEL,
    *,
    masks: Tensor | None = None,
    impl: str | None = None,
) -> PackedPatches:
    """Log-mel patches of packed clips (SLAP, arXiv 2601.12594, section 3). Not differentiable.

    Args:
        waveform: [num_samples] float32 in -1 .. 1 or int16, all clips end to end.
        cu_samples: int64 [B + 1], where each clip begins; its last entry is where the last ends.
        config: the front end.
        masks: int32 [M, 4] = (clip, axis, start, stop), SpecAugment's spans: frames (axis 0) or mel
            bins (axis 1) start .. stop - 1 of the clip become 0, the mean of the normalised
            log-mel. :func:`slap_fast.data.augment.draw_masks` draws them.
        impl: see the module.

    A clip without samples has no patches; any other has at least one column, filled with silence. A
    frame with a sample that is not finite is NaN, and no other frame is. A waveform that requires a
    gradient is refused: patches are data. On a GPU two numbers are read from the device, which
    syncs: how many patches there are, and the longest clip.
    """
    check_tensor("waveform", waveform, (torch.float32, torch.int16), ("num_samples",))
    check_starts("cu_samples", cu_samples, torch.int64, waveform, "waveform")
    if masks is not None:
        check_masks(masks, cu_samples)
    if waveform.requires_grad and torch.is_grad_enabled():
        raise ValueError("waveform: found requires_grad, expected data: patches carry no gradient")
    limits, clips = dispatch.mel_limits(config), (waveform, cu_samples, config)
    chosen = dispatch.choose("mel_patches", impl, waveform.device, waveform.dtype, limits)
    if chosen == "triton":
        from slap_fast.kernels import mel_patches as kernels

        return PackedPatches(*kernels.mel_patches(*clips, reference.constants, masks))
    if chosen == "cpp":
        masks = torch.empty(0, 4, dtype=torch.int32) if masks is None else masks.contiguous()
        arrays = (x.numpy() for x in (waveform.detach(), cu_samples, masks))
        *arrays, max_seqlen = cpp_engine(config)(*arrays, torch.get_num_threads())
        return PackedPatches(*map(torch.from_numpy, arrays), max_seqlen)
    engine = torch_mel_patches if chosen == "torch" else reference
    return PackedPatches(*engine.mel_patches(*clips, masks))


@functools.lru_cache(maxsize=16)
def cpp_engine(config: MelConfig, instruction_set: str | None = None) -> Any:
    """A ``_C.MelPatches``, by default for the best instruction set of this machine."""
    window, filterbank = reference.constants(config, torch.float32, torch.device("cpu"))
    names = ("n_fft", "hop_length", "patch_time", "patch_freq", "floor", "mean", "std")
    return dispatch.EXTENSION.MelPatches(
        **{name: getattr(config, name) for name in names},
        kaldi=config.preset == "kaldi",
        window=window.numpy(),
        filterbank=filterbank.numpy(),
        instruction_set=instruction_set or dispatch.EXTENSION.mel_instruction_sets()[0],
    )
