"""Calls of the registered operation of Triton's mel_patches."""

from __future__ import annotations

import torch

from slap_fast.config import MelConfig
from slap_fast.kernels import mel_patches as kernel
from slap_fast.reference import mel_patches as reference

LENGTHS = (1, 0, 700, 12_000)
MASKS = torch.tensor([[0, 0, 0, 5], [2, 1, 3, 9], [3, 0, 20, 40], [3, 1, 60, 64]])


def arguments(
    waveform: torch.Tensor, cu_samples: torch.Tensor, config: MelConfig, masked: bool = True
) -> list:
    """Of the registered operation."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cu_seqlens = reference.mel_patches(waveform, cu_samples, config)[2]
    total = int(cu_seqlens[-1])
    masks = (MASKS if masked else MASKS[:0]).int()
    clips = torch.arange(len(cu_samples), dtype=torch.int32)
    mask_starts = torch.searchsorted(masks[:, 0].contiguous(), clips, out_int32=True)
    window, filterbank = kernel._tables(config, reference.constants, device)
    tensors = (waveform, cu_samples, cu_seqlens, window, kernel._basis(device), filterbank)
    tensors = [x.to(device) for x in (*tensors, masks, mask_starts)]
    return [*tensors, total, config.mean, 1 / config.std, *kernel._front_end(config)]
