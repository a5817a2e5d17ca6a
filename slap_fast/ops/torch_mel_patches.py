"""Log-mel patches by PyTorch's own operations: what a CPU without the C++ extension runs.

The formulas are those of :mod:`slap_fast.reference.mel_patches`. Frames pass through one block of
fixed shape, whichever clips they belong to: memory is bounded for a clip of any length, and a
clip's bits do not depend on what is packed beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slap_fast.config import MelConfig
from slap_fast.packed import patch_coords, starts_of
from slap_fast.reference.mel_patches import constants, frames, spectrum

BLOCK_FRAMES = 128
"""Frames at a time, rounded to whole patch columns: 0.2 MB, which stays in the cache."""


@torch.no_grad()
def mel_patches(
    waveform: Tensor, cu_samples: Tensor, config: MelConfig, masks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Arguments and results are those of :func:`slap_fast.reference.mel_patches.mel_patches`."""
    dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
    device, bounds = waveform.device, cu_samples.tolist()
    bands, patch_time = config.patches_per_column, config.patch_time
    lengths = [config.num_patches(stop - start) for start, stop in itertools.pairwise(bounds)]

    patches = torch.empty(sum(lengths), config.patch_dim, dtype=dtype, device=device)
    grid = patches.view(-1, bands, patch_time, config.patch_freq)
    filterbank = constants(config, dtype, device)[1]
    rows = max(1, BLOCK_FRAMES // patch_time) * patch_time
    block = torch.empty(rows, config.win_length, dtype=dtype, device=device)
    column = 0
    for used in _fill_blocks(waveform, bounds, config, block):
        if waveform.dtype == torch.int16:
            block.mul_(2.0**-15)
        spectra = spectrum(block, config)
        power = spectra.real.square().addcmul_(spectra.imag, spectra.imag)
        log_mel = (power @ filterbank).clamp_min_(config.floor).log_()
        log_mel = log_mel.sub_(config.mean).div_(config.std)[:used]
        filled = log_mel.view(-1, patch_time, bands, config.patch_freq).transpose(1, 2)
        grid[column : column + len(filled)] = filled
        column += len(filled)
    if masks is not None:
        _mask(grid.split([length // bands for length in lengths]), masks, config)

    num_patches = torch.tensor(lengths, dtype=torch.int64, device=device)
    coords, cu_seqlens = patch_coords(num_patches, bands), starts_of(num_patches)
    return patches, coords, cu_seqlens, max(lengths, default=0)


def _fill_blocks(
    waveform: Tensor, bounds: list[int], config: MelConfig, block: Tensor
) -> Iterator[int]:
    """Fills ``block`` with frames again and again; yields how many of its rows are new.

    The frames that a clip's last column lacks are rows of zeros, which come out as silence.
    """
    used = 0
    for start, stop in itertools.pairwise(bounds):
        clip_frames = frames(waveform[start:stop], config)
        rows = -(-len(clip_frames) // config.patch_time) * config.patch_time
        done = 0
        while done < rows:
            count = min(rows - done, len(block) - used)
            copied = clip_frames[done : done + count]
            block[used : used + len(copied)] = copied
            block[used + len(copied) : used + count] = 0
            used, done = used + count, done + count
            if used == len(block):
                yield used
                used = 0
    if used:
        yield used


def _mask(clips: Sequence[Tensor], masks: Tensor, config: MelConfig) -> None:
    """Fills spans of clips, each [columns, bands, patch_time, patch_freq], with 0."""
    for clip, axis, start, stop in masks.tolist():
        cells, device = clips[clip], masks.device
        if axis == 0:
            frames = torch.arange(len(cells) * config.patch_time, device=device)[start:stop]
            cells[frames // config.patch_time, :, frames % config.patch_time] = 0
        else:
            bins = torch.arange(config.n_mels, device=device)[start:stop]
            cells[:, bins // config.patch_freq, :, bins % config.patch_freq] = 0
