"""Waveform to log-mel patches in plain PyTorch: the definition of right, and a fast CPU path.

    frames   400 samples every 160; kaldi: minus their mean, then x[i] - 0.97 x[max(i - 1, 0)]
    power    |rfft(frame * hann, 512)|^2
    log-mel  ln(max(power @ filterbank, floor)), then (. - mean) / std
    patch    16 frames x 16 bins, frame-major; of a clip: column by column, lowest bins first

Sources: Kaldi's fbank as in ``torchaudio.compliance.kaldi``, and torchaudio's ``MelSpectrogram``.
Frames pass through one block of fixed shape, whichever clips they belong to: memory is bounded for
a clip of any length, and a clip's bits do not depend on what is packed beside it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_FRAMES = 128
"""Frames at a time, rounded to whole patch columns: 0.2 MB, which stays in the cache."""

PREEMPHASIS = 0.97
"""Of the ``kaldi`` preset."""


@torch.no_grad()
def mel_patches(
    waveform: Tensor, cu_samples: Tensor, config: Any, masks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The log-mel patches of packed clips. Not differentiable.

    Args:
        waveform: [num_samples], all clips end to end; float32, float64 (computed in float64) or
            int16 (divided by 32768).
        cu_samples: int64 [B + 1], where each clip starts; its last entry is where the last ends.
        config: a ``slap_fast.config.MelConfig``.
        masks: int32 [M, 4] = (clip, axis, start, stop): frames (axis 0) or mel bins (axis 1)
            start .. stop - 1 of the clip become 0, the mean of the normalised log-mel. What lies
            past the clip's last column does nothing.

    Returns:
        patches [T, patch_dim] float32 (float64 for float64 input), coords int32 [T, 2] = (time
        column, frequency band), cu_seqlens int32 [B + 1], max_seqlen.

    A last incomplete column is filled with silence. A clip shorter than what its first frame needs
    is zero-padded to it: one window (kaldi), or the n_fft // 2 + 1 samples that reflect padding
    needs (torchaudio). A clip without samples has no patches.
    """
    dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
    device = waveform.device
    bounds = cu_samples.tolist()
    bands, patch_time = config.patches_per_column, config.patch_time
    lengths = [config.num_patches(end - begin) for begin, end in itertools.pairwise(bounds)]
    cu_seqlens = list(itertools.accumulate(lengths, initial=0))

    patches = torch.empty(cu_seqlens[-1], config.patch_dim, dtype=dtype, device=device)
    grid = patches.view(-1, bands, patch_time, config.patch_freq)
    rows = max(1, BLOCK_FRAMES // patch_time) * patch_time
    block = torch.empty(rows, config.win_length, dtype=dtype, device=device)
    column = 0
    for used in _fill_blocks(waveform, bounds, config, block):
        if waveform.dtype == torch.int16:
            block.mul_(2.0**-15)
        mel = _log_mel(block, config)[:used]
        filled = mel.view(-1, patch_time, bands, config.patch_freq).transpose(1, 2)
        grid[column : column + len(filled)] = filled
        column += len(filled)
    if masks is not None:
        _mask(grid, cu_seqlens, masks, config)

    return (
        patches,
        _coords(torch.tensor(lengths, dtype=torch.int64, device=device), bands),
        torch.tensor(cu_seqlens, dtype=torch.int32, device=device),
        max(lengths, default=0),
    )


def _fill_blocks(waveform: Tensor, bounds: list[int], config: Any, block: Tensor) -> Iterator[int]:
    """Fills ``block`` with frames again and again; yields how many of its rows are new.

    The frames that a clip's last column lacks are rows of zeros, which come out as silence.
    """
    used = 0
    for begin, end in itertools.pairwise(bounds):
        frames = _frames(waveform[begin:end], config)
        rows = -(-len(frames) // config.patch_time) * config.patch_time
        done = 0
        while done < rows:
            take = min(rows - done, len(block) - used)
            some = frames[done : done + take]
            block[used : used + len(some)] = some
            block[used + len(some) : used + take] = 0
            used, done = used + take, done + take
            if used == len(block):
                yield used
                used = 0
    if used:
        yield used


def _frames(clip: Tensor, config: Any) -> Tensor:
    """The analysis frames of one clip, a view [num_frames, win_length] in the clip's dtype."""
    num_frames = config.num_frames(len(clip))
    if config.preset == "torchaudio" and num_frames:
        half = config.n_fft // 2
        clip = F.pad(clip, (0, max(0, half + 1 - len(clip))))
        clip = torch.cat([clip[1 : half + 1].flip(0), clip, clip[-half - 1 : -1].flip(0)])
        # The window sits in the middle of n_fft; the power spectrum does not see the shift to 0.
        clip = clip[(config.n_fft - config.win_length) // 2 :]
    clip = F.pad(clip, (0, max(0, config.win_length - len(clip))))
    return clip.unfold(0, config.win_length, config.hop_length)[:num_frames]


def _log_mel(block: Tensor, config: Any) -> Tensor:
    """Normalised log-mel [frames, n_mels] of frames [frames, win_length]."""
    spectra = spectrum(block, config)
    power = spectra.real.square().addcmul_(spectra.imag, spectra.imag)
    filterbank = constants(config, block.dtype, block.device)[1]
    return (power @ filterbank).clamp_min_(config.floor).log_().sub_(config.mean).div_(config.std)


def spectrum(frames: Tensor, config: Any) -> Tensor:
    """[frames, win_length] -> complex [frames, n_fft // 2 + 1]; linear in each frame."""
    window = constants(config, frames.dtype, frames.device)[0]
    if config.preset == "kaldi":
        centred = frames - frames.mean(dim=1, keepdim=True)
        frames = torch.empty_like(centred)
        torch.sub(centred[:, 1:], centred[:, :-1], alpha=PREEMPHASIS, out=frames[:, 1:])
        frames[:, 0] = 0  # x[0] - 0.97 x[0], which the window weighs with 0
    return torch.fft.rfft(frames * window, config.n_fft)


def _mask(grid: Tensor, cu_seqlens: list[int], masks: Tensor, config: Any) -> None:
    """Fills spans of ``grid`` [columns, bands, patch_time, patch_freq] with 0."""
    bands, device = config.patches_per_column, grid.device
    for clip, axis, start, stop in masks.tolist():
        own = grid[cu_seqlens[clip] // bands : cu_seqlens[clip + 1] // bands]
        if axis == 0:
            frames = torch.arange(len(own) * config.patch_time, device=device)[start:stop]
            own[frames // config.patch_time, :, frames % config.patch_time] = 0
        else:
            bins = torch.arange(config.n_mels, device=device)[start:stop]
            own[:, bins // config.patch_freq, :, bins % config.patch_freq] = 0


def _coords(lengths: Tensor, bands: int) -> Tensor:
    """int32 [T, 2]: (time column, frequency band) of each patch of clips of these lengths."""
    starts = lengths.cumsum(0) - lengths
    token = torch.arange(int(lengths.sum()), device=lengths.device)
    token = token - starts.repeat_interleave(lengths)
    return torch.stack([token // bands, token % bands], dim=1).int()


@functools.lru_cache(maxsize=16)
def constants(config: Any, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """window [win_length] and filterbank [n_fft // 2 + 1, n_mels], made in float64.

    kaldi: triangles over the Kaldi mel scale and a symmetric Hann; torchaudio: triangles over Hz
    whose corners are even on the HTK scale, no norm, and a periodic Hann.
    """
    f64 = torch.float64
    kaldi = config.preset == "kaldi"
    scale = 1127.0 if kaldi else 2595.0 / torch.log(torch.tensor(10.0, dtype=f64)).item()
    freqs = torch.arange(config.n_fft // 2 + 1, dtype=f64) * config.sample_rate / config.n_fft
    low, high = (
        scale * torch.tensor([config.f_min, config.f_max], dtype=f64).div(700).log1p()
    ).tolist()
    corners = torch.linspace(low, high, config.n_mels + 2, dtype=f64)
    if kaldi:
        at = scale * torch.log1p(freqs / 700)
    else:
        at, corners = freqs, 700 * torch.expm1(corners / scale)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (at[:, None] - left) / (centre - left)
    falling = (right - at[:, None]) / (right - centre)
    filterbank = torch.minimum(rising, falling).clamp_min(0)
    window = torch.hann_window(config.win_length, periodic=not kaldi, dtype=f64)
    return window.to(device, dtype), filterbank.to(device, dtype)
