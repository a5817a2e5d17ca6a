"""What training hides from the student: SpecAugment spans, and the patches of the masked loss."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

from slap_fast.config import MelConfig

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def spec_augment(
    patches: Array,
    coords: np.ndarray | torch.Tensor,
    cu_seqlens: np.ndarray | torch.Tensor,
    config: MelConfig,
    *,
    time_masks: int,
    time_mask_share: float,
    freq_masks: int,
    freq_mask_bins: int,
    rng: np.random.Generator,
    value: float = 0.0,
) -> Array:
    """Packed patches with spans of frames and mel bins filled, per clip (arXiv 1904.08779).

    Args:
        patches: [T, patch_dim] floating; rows past ``cu_seqlens[-1]`` stay as they are.
        coords: integers [T, 2] = (time column, frequency band).
        cu_seqlens: integers [B + 1].
        time_masks: spans of frames in a clip, 0 .. ``time_mask_share`` of the clip's frames long.
        freq_masks: spans of mel bins in a clip, 0 .. ``freq_mask_bins`` long.
        rng: decides the lengths and places, uniformly.
        value: what fills a span; 0 is the mean of the normalised log-mel.

    Returns a copy of the same kind and dtype, on the same device.
    """
    lengths, bands = np.diff(_numpy(cu_seqlens)), config.patches_per_column
    clip = np.repeat(np.arange(len(lengths)), lengths)
    column, band = _numpy(coords)[: len(clip)].T
    spans = draw_masks(
        cu_seqlens,
        config,
        time_masks=time_masks,
        time_mask_share=time_mask_share,
        freq_masks=freq_masks,
        freq_mask_bins=freq_mask_bins,
        rng=rng,
    )
    frames = np.zeros((len(lengths), lengths.max(initial=0) // bands, config.patch_time), bool)
    bins = np.zeros((len(lengths), bands, config.patch_freq), bool)
    for i, axis, start, stop in spans:
        (bins if axis else frames)[i].reshape(-1)[start:stop] = True
    hidden = frames[clip, column][:, :, None] | bins[clip, band][:, None, :]
    out = torch.as_tensor(patches).clone()
    out[: len(clip)].masked_fill_(torch.from_numpy(hidden).flatten(1).to(out.device), value)
    return out if isinstance(patches, torch.Tensor) else out.numpy()


def draw_masks(
    cu_seqlens: np.ndarray | torch.Tensor,
    config: MelConfig,
    *,
    time_masks: int,
    time_mask_share: float,
    freq_masks: int,
    freq_mask_bins: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """The spans of :func:`spec_augment`, as ``masks`` of :func:`slap_fast.ops.mel_patches`.

    Returns int32 [M, 4] = (clip, axis, start, stop); axis 0 is time, in frames, 1 is mel bins.
    """
    lengths = np.diff(_numpy(cu_seqlens))
    frames = -(-lengths // config.patches_per_column) * config.patch_time
    bins = np.full(len(lengths), config.n_mels)
    in_time = _spans(0, frames, (time_mask_share * frames).astype(np.int64), time_masks, rng)
    in_freq = _spans(1, bins, np.minimum(bins, freq_mask_bins), freq_masks, rng)
    return np.concatenate([in_time, in_freq])


def mask_indices(
    cu_seqlens: np.ndarray | torch.Tensor, ratio: float, rng: np.random.Generator
) -> np.ndarray:
    """The patches that the student does not see: int64 positions in the pack, ascending.

    Of a clip of L patches, ``round(ratio * L)`` chosen at random: at least 1 where L >= 2, never
    all. ``cu_seqlens`` is [B + 1] integers.
    """
    bounds = _numpy(cu_seqlens).astype(np.int64)
    lengths = np.diff(bounds)
    counts = np.clip(np.rint(ratio * lengths).astype(np.int64), 1, np.maximum(lengths - 1, 0))
    clip = np.repeat(np.arange(len(lengths)), lengths)
    shuffled = np.argsort(clip + rng.random(len(clip)))
    rank = np.arange(len(clip)) - bounds[:-1][clip]
    return np.sort(shuffled[rank < counts[clip]])


def _spans(
    axis: int, sizes: np.ndarray, longest: np.ndarray, num_spans: int, rng: np.random.Generator
) -> np.ndarray:
    """int32 [num_spans * B, 4] = (clip, axis, start, stop), within 0 .. sizes [B]."""
    spans = np.empty((num_spans, len(sizes), 4), np.int32)
    for span in spans:
        length = rng.integers(0, longest, endpoint=True)
        start = rng.integers(0, sizes - length, endpoint=True)
        span.T[:] = np.broadcast_arrays(np.arange(len(sizes)), axis, start, start + length)
    return spans.reshape(-1, 4)


def _numpy(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
