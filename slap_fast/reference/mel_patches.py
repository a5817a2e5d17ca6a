"""Log-mel patches in plain PyTorch (SLAP, arXiv 2601.12594, section 3): the definition of right.

    frames    400 samples every 160; kaldi: minus their mean, then x[i] - 0.97 x[max(i - 1, 0)]
    spectrum  rfft(frame * hann, 512)
    log-mel   ln(max(|spectrum|^2 @ filterbank, floor)), then (. - mean) / std
    patch     16 frames x 16 bins, frame-major; of a clip: column by column, lowest bins first

Sources: Kaldi's fbank as in ``torchaudio.compliance.kaldi``, and torchaudio's ``MelSpectrogram``.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PREEMPHASIS = 0.97
"""Of the ``kaldi`` preset."""


@torch.no_grad()
def mel_patches(
    waveform: Tensor, cu_samples: Tensor, config: Any, masks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The log-mel patches of packed clips, one clip after the other. Not differentiable.

    :func:`slap_fast.ops.mel_patches` documents the arguments. float64 is computed in float64; int16
    is divided by 32768. What a mask has past the clip's last column does nothing. Returns the
    fields of :class:`slap_fast.packed.PackedPatches`.

    A last incomplete column is filled with silence. A clip shorter than what its first frame needs
    is zero-padded to it: one window (kaldi), or the n_fft // 2 + 1 samples that reflect padding
    needs (torchaudio). A clip without samples has no patches.
    """
    dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
    scale = 2.0**-15 if waveform.dtype == torch.int16 else 1.0
    clips = [
        log_mel(waveform[start:stop].to(dtype) * scale, config)
        for start, stop in itertools.pairwise(cu_samples.tolist())
    ]
    for clip, axis, start, stop in [] if masks is None else masks.tolist():
        clips[clip].movedim(axis, 0)[start:stop] = 0

    bands = config.patches_per_column
    empty = waveform.new_empty(0, config.patch_dim, dtype=dtype)
    patches = [empty, *(patchify(clip, config) for clip in clips)]
    lengths = [len(clip) for clip in patches]
    token = torch.cat([torch.arange(length, device=waveform.device) for length in lengths])
    coords = torch.stack([token // bands, token % bands], dim=1).int()
    cu_seqlens = torch.tensor(lengths, device=waveform.device).cumsum(0).int()
    return torch.cat(patches), coords, cu_seqlens, max(lengths)


def log_mel(clip: Tensor, config: Any) -> Tensor:
    """Normalised log-mel [frames, n_mels] of one clip, the frames of whole patch columns."""
    if not len(clip):  # torch's FFT refuses to transform nothing
        return clip.new_empty(0, config.n_mels)
    windows = frames(clip, config)
    windows = F.pad(windows, (0, 0, 0, -len(windows) % config.patch_time))
    spectra = spectrum(windows, config)
    power = spectra.real.square() + spectra.imag.square()
    filterbank = constants(config, clip.dtype, clip.device)[1]
    return ((power @ filterbank).clamp_min(config.floor).log() - config.mean) / config.std


def frames(clip: Tensor, config: Any) -> Tensor:
    """The analysis frames of one clip [num_samples]: a view [num_frames, win_length]."""
    num_frames = config.num_frames(len(clip))
    if config.preset == "torchaudio" and num_frames:
        half = config.n_fft // 2
        clip = F.pad(clip, (0, max(0, half + 1 - len(clip))))
        clip = torch.cat([clip[1 : half + 1].flip(0), clip, clip[-half - 1 : -1].flip(0)])
        # The window sits in the middle of n_fft; the power spectrum does not see the shift to 0.
        clip = clip[(config.n_fft - config.win_length) // 2 :]
    clip = F.pad(clip, (0, max(0, config.win_length - len(clip))))
    return clip.unfold(0, config.win_length, config.hop_length)[:num_frames]


def spectrum(frames: Tensor, config: Any) -> Tensor:
    """[frames, win_length] -> complex [frames, n_fft // 2 + 1]; linear in each frame."""
    window = constants(config, frames.dtype, frames.device)[0]
    if config.preset == "kaldi":
        centred = frames - frames.mean(dim=1, keepdim=True)
        frames = torch.empty_like(centred)
        torch.sub(centred[:, 1:], centred[:, :-1], alpha=PREEMPHASIS, out=frames[:, 1:])
        frames[:, 0] = 0  # x[0] - 0.97 x[0], which the window weighs with 0
    return torch.fft.rfft(frames * window, config.n_fft)


def patchify(log_mel: Tensor, config: Any) -> Tensor:
    """[columns * patch_time, n_mels] -> [columns * patches_per_column, patch_dim]."""
    cells = log_mel.view(-1, config.patch_time, config.patches_per_column, config.patch_freq)
    return cells.transpose(1, 2).reshape(-1, config.patch_dim)


@functools.lru_cache(maxsize=16)
def constants(config: Any, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """window [win_length] and filterbank [n_fft // 2 + 1, n_mels], made in float64.

    kaldi: triangles over the Kaldi mel scale and a symmetric Hann; torchaudio: triangles over Hz
    whose corners are even on the HTK scale, no norm, and a periodic Hann.
    """
    f64 = torch.float64
    kaldi = config.preset == "kaldi"
    mel_scale = 1127.0 if kaldi else 2595.0 / math.log(10.0)
    freqs = torch.arange(config.n_fft // 2 + 1, dtype=f64) * config.sample_rate / config.n_fft
    limits = torch.tensor([config.f_min, config.f_max], dtype=f64)
    lowest, highest = (mel_scale * torch.log1p(limits / 700)).tolist()
    corners = torch.linspace(lowest, highest, config.n_mels + 2, dtype=f64)
    if kaldi:
        freqs = mel_scale * torch.log1p(freqs / 700)
    else:
        corners = 700 * torch.expm1(corners / mel_scale)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (freqs[:, None] - left) / (centre - left)
    falling = (right - freqs[:, None]) / (right - centre)
    filterbank = torch.minimum(rising, falling).clamp_min(0)
    window = torch.hann_window(config.win_length, periodic=not kaldi, dtype=f64)
    return window.to(device, dtype), filterbank.to(device, dtype)
