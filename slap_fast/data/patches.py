"""Clips as packed log-mel patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from slap_fast import ops
from slap_fast.config import MelConfig
from slap_fast.packed import PackedPatches, patch_coords, starts_of


def clip_patches(waveform: np.ndarray, mel: MelConfig) -> PackedPatches:
    """One clip's patches: waveform [num_samples] float32 or int16 -> a packed run of one."""
    cu_samples = torch.tensor([0, len(waveform)])
    return ops.mel_patches(torch.from_numpy(waveform), cu_samples, mel)


def pack_patches(clips: Sequence[torch.Tensor], mel: MelConfig) -> PackedPatches:
    """Clips [T_i, patch_dim], each whole columns, end to end."""
    lengths = list(map(len, clips))
    patches = torch.cat(list(clips)) if clips else torch.zeros(0, mel.patch_dim)
    coords = patch_coords(lengths, mel.patches_per_column)
    return PackedPatches(patches, coords, starts_of(lengths), max(lengths, default=0))
