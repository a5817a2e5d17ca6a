"""Shuffling without memory: each pass has every clip once, and the mix has its weights."""

from __future__ import annotations

import numpy as np
import pytest

from slap_fast.data.order import Order, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 64, 99, 100, 101, 1000, 4097])
def test_permute_is_a_permutation(size):
    for key in range(5):
        assert sorted(permute(np.arange(size), size, (key,))) == list(range(size))


def test_a_subset_is_permuted_as_in_the_full_range():
    everything = permute(np.arange(1000), 1000, (3, 1))
    some = np.array([7, 999, 0, 500])
    np.testing.assert_array_equal(permute(some, 1000, (3, 1)), everything[some])


@pytest.mark.parametrize("size", [3, 7, 30])
def test_every_clip_is_equally_likely_at_every_position(size):
    """Chi-square of position x clip counts over many keys; 6 standard deviations are allowed."""
    draws = 300 * size
    counts = np.zeros((size, size))
    for key in range(draws):
        counts[np.arange(size), permute(np.arange(size), size, (key,))] += 1
    expected = draws / size
    chi2 = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert chi2 < freedom + 6 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours():
    steps = np.diff(permute(np.arange(10_000), 10_000, (0,)))
    assert np.mean(np.abs(steps) < 100) < 0.03
    assert len(np.unique(steps)) > 5_000


def test_passes_differ_and_have_every_clip_once():
    order = Order(0, [50], [1.0])
    drawn = order.draw(0, 150)
    passes = [[index for lap, index in drawn if lap == number] for number in range(3)]
    assert all(sorted(p) == list(range(50)) for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert [lap for lap, _ in drawn] == sorted(lap for lap, _ in drawn)
    assert Order(1, [50], [1.0]).draw(0, 50) != drawn[:50]


def test_a_draw_does_not_depend_on_where_drawing_starts():
    order = Order(5, [70, 9, 400], [3, 1, 2.5])
    all_draws = order.draw(0, 5_000)
    assert [order.draw(i, 1)[0] for i in (0, 777, 4_999)] == [all_draws[i] for i in (0, 777, 4_999)]
    assert order.draw(1_000, 500) == all_draws[1_000:1_500]


def test_a_mix_has_its_weights_in_every_window_and_whole_passes():
    sizes, weights = [100, 10, 1_000], [5, 2, 1]
    drawn = Order(0, sizes, weights).draw(0, 8_192)
    source = np.searchsorted(np.cumsum(sizes), [index for _, index in drawn], side="right")
    for first in range(0, 8_000, 64):
        counts = np.bincount(source[first : first + 64], minlength=3)
        assert np.abs(counts - [40, 16, 8]).max() <= 2
    times = np.bincount([index for _, index in drawn], minlength=1_110)
    for low, high in ((0, 100), (100, 110), (110, 1_110)):
        assert np.ptp(times[low:high]) <= 1


def test_a_far_position_of_a_large_set_is_a_single_evaluation():
    size = 109_000_000
    (lap, index), *others = Order(0, [size], [1]).draw(3 * size - 1, 3)
    assert lap == 2 and [pair[0] for pair in others] == [3, 3]
    assert 0 <= index < size


@pytest.mark.parametrize("weights", [[1, 1e-4], [1, 0]])
def test_a_source_without_a_draw_is_refused(weights):
    with pytest.raises(ValueError, match="weights: found"):
        Order(0, [5, 5], weights)


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="no empty source"):
        Order(0, [5, 0], [1, 1])
