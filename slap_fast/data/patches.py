"""Clips as packed log-mel patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from slap_fast import ops
from slap_fast.config import MelConfig
from slap_fast.packed import PackedPatches


def clip_patches(waveform: np.ndarray, mel: MelConfig) -> PackedPatches:
    """One clip's patches: waveform [num_samples] float32 or int16 -> a packed run of one."""
    cu_samples = torch.tensor([0, len(waveform)])
    return ops.mel_patches(torch.from_numpy(waveform), cu_samples, mel)


def pack_patches(clips: Sequence[torch.Tensor], mel: MelConfig) -> PackedPatches:
    """Clips [T_i, patch_dim], each whole columns, end to end."""
    lengths = torch.tensor([0, *map(len, clips)])
    starts = lengths.cumsum(0)
    token = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(lengths[1:])
    bands = mel.patches_per_column
    coords = torch.stack([token // bands, token % bands], dim=1).int()
    patches = torch.cat(list(clips)) if clips else torch.zeros(0, mel.patch_dim)
    return PackedPatches(patches, coords, starts.int(), int(lengths.max()))
