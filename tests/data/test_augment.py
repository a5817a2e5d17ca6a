"""Spans and masked patches: where they may lie, how long they are, and what stays untouched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slap_fast.config import MelConfig
from slap_fast.data.augment import mask_indices, spec_augment
from slap_fast.packed import starts_of

COLUMNS = [25, 0, 1, 63, 7]
DEFAULTS = {"time_masks": 2, "time_mask_share": 0.2, "freq_masks": 2, "freq_mask_bins": 8}


def pack(columns=COLUMNS, tail=0):
    """patches of ones, coords, cu_seqlens."""
    coords = np.array([(c, b) for n in columns for c in range(n) for b in range(4)], np.int32)
    cu_seqlens = np.cumsum([0, *(4 * n for n in columns)]).astype(np.int32)
    pad = np.zeros((tail, 2), np.int32)
    return np.ones((len(coords) + tail, 256), np.float32), np.concatenate([coords, pad]), cu_seqlens


def spectrograms(patches, columns=COLUMNS):
    """The clips [frames, 64] of a pack, by index arithmetic."""
    start = 0
    for n in columns:
        clip = np.empty((16 * n, 64), patches.dtype)
        for token in range(4 * n):
            time, freq = 16 * (token // 4), 16 * (token % 4)
            clip[time : time + 16, freq : freq + 16] = patches[start + token].reshape(16, 16)
        yield clip
        start += 4 * n


def augment(seed=0, patches=None, **changes):
    ones, coords, cu_seqlens = pack()
    patches = ones if patches is None else patches
    rng = np.random.default_rng(seed)
    return spec_augment(
        patches, coords, cu_seqlens, MelConfig(), rng=rng, **{**DEFAULTS, **changes}
    )


def runs(mask) -> list[int]:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.r_[0, mask.astype(int), 0]))
    return (edges[1::2] - edges[::2]).tolist()


def test_spans_are_whole_frames_and_whole_bins_of_one_clip():
    for seed in range(30):
        for clip in spectrograms(augment(seed)):
            hidden = clip == 0
            frames, bins = hidden.all(1), hidden.all(0)
            np.testing.assert_array_equal(hidden, frames[:, None] | bins[None, :])


def test_time_spans_have_any_length_up_to_the_share_and_reach_both_ends():
    counts, starts, ends = set(), set(), np.zeros(2, bool)
    for seed in range(300):
        _, _, short, long, _ = spectrograms(augment(seed, time_masks=1, freq_masks=0))
        hidden = (short == 0).all(1)
        counts.add(int(hidden.sum()))
        starts.add(int(hidden.argmax()))
        ends |= hidden[[0, -1]]
        spans = runs((long == 0).all(1))
        assert len(runs(hidden)) <= 1 and len(spans) <= 1 and sum(spans) <= int(0.2 * 63 * 16)
    assert counts == {0, 1, 2, 3} and ends.all() and starts == set(range(16))


def test_bin_spans_have_any_length_up_to_the_limit_and_reach_both_ends():
    counts, ends = set(), np.zeros(2, bool)
    for seed in range(300):
        clip = next(spectrograms(augment(seed, time_masks=0, freq_masks=1)))
        hidden = (clip == 0).all(0)
        assert len(runs(hidden)) <= 1
        counts.add(int(hidden.sum()))
        ends |= hidden[[0, -1]]
    assert counts == set(range(9)) and ends.all()


def test_clips_have_spans_of_their_own():
    a, _, _, b, _ = ((clip == 0).all(0) for clip in spectrograms(augment(time_masks=0)))
    assert not np.array_equal(a, b)


def test_numpy_and_torch_agree_and_the_input_is_left_alone():
    ones = pack()[0]
    out = augment(3)
    assert isinstance(out, np.ndarray) and (ones == 1).all()
    tensor = torch.from_numpy(ones)
    result = augment(3, tensor)
    assert torch.equal(result, torch.from_numpy(out)) and bool((tensor == 1).all())
    assert augment(3, tensor.to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_same_generator_gives_the_same_and_value_fills():
    np.testing.assert_array_equal(augment(5), augment(5))
    assert not np.array_equal(augment(5), augment(6))
    np.testing.assert_array_equal(augment(5, value=-2.5) == -2.5, augment(5) == 0)


def test_no_masks_and_rows_past_the_end_change_nothing():
    none = {"time_masks": 0, "time_mask_share": 0.2, "freq_masks": 0, "freq_mask_bins": 8}
    np.testing.assert_array_equal(augment(**none), pack()[0])
    patches, coords, cu_seqlens = pack(tail=3)
    out = spec_augment(
        patches, coords, cu_seqlens, MelConfig(), rng=np.random.default_rng(0), **DEFAULTS
    )
    assert out.shape == patches.shape and (out[-3:] == 1).all() and (out == 0).any()


def test_an_empty_pack():
    rng = np.random.default_rng(0)
    out = spec_augment(
        np.ones((0, 256)), np.zeros((0, 2), int), np.zeros(1, int), MelConfig(), rng=rng, **DEFAULTS
    )
    assert out.shape == (0, 256)
    assert len(mask_indices(np.zeros(1, int), 0.5, rng)) == 0


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.99])
def test_masked_patches_per_clip(ratio):
    lengths = [0, 1, 2, 3, 5, 8, 100, 1, 252]
    cu_seqlens = starts_of(lengths)
    for seed in range(20):
        masked = mask_indices(cu_seqlens, ratio, np.random.default_rng(seed))
        assert masked.dtype == np.int64 and (np.diff(masked) > 0).all()
        for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
            count = int(((masked >= start) & (masked < start + length)).sum())
            expected = min(max(round(ratio * length), 1), length - 1) if length > 1 else 0
            assert count == expected


def test_every_patch_is_masked_equally_often():
    cu_seqlens, hits = np.array([0, 8, 20]), np.zeros(20)
    rng = np.random.default_rng(0)
    for _ in range(2_000):
        hits[mask_indices(cu_seqlens, 0.5, rng)] += 1
    # 4.5 standard deviations of a fair draw
    assert np.abs(hits - 1_000).max() < 4.5 * np.sqrt(2_000 * 0.25)


def test_masks_depend_on_the_generator_alone():
    one, two, other = (
        mask_indices(np.array([0, 100]), 0.5, np.random.default_rng(s)) for s in (1, 1, 2)
    )
    assert np.array_equal(one, two) and not np.array_equal(one, other)
