"""The planner in C++ and in Python, against first-fit decreasing written out plainly."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from slap_fast.reference import packing as reference

Pack = Callable[[np.ndarray, int], list[list[int]]]

TOKENS_PER_SECOND = 25
BUDGET = 16_384


@pytest.fixture(params=["reference", "cpp"])
def pack(request: pytest.FixtureRequest) -> Pack:
    if request.param == "reference":
        return reference.pack
    return cpp_pack()


def cpp_pack() -> Pack:
    # tests/repo/test_package.py fails where a compiler exists and the extension does not.
    if importlib.util.find_spec("slap_fast._C") is None:
        pytest.skip("slap_fast._C is not built: slap-fast doctor says why")
    from slap_fast import _C

    return _C.pack


def first_fit_decreasing(lengths: list[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for length, index in sorted((-length, index) for index, length in enumerate(lengths)):
        loads = [sum(lengths[i] for i in b) for b in bins]
        fitting = [b for b, load in enumerate(loads) if load - length <= max_tokens]
        if fitting:
            bins[fitting[0]].append(index)
        else:
            bins.append([index])
    return bins


def log_uniform(n: int, seed: int = 0) -> np.ndarray:
    """Tokens of clips of 1 to 30 s."""
    seconds = np.exp(np.random.default_rng(seed).uniform(0, np.log(30), n))
    return (TOKENS_PER_SECOND * seconds).astype(np.int64)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        pytest.param([], 8, [], id="empty"),
        pytest.param([8], 8, [[0]], id="exactly_full"),
        pytest.param([3, 8, 3, 5], 8, [[1], [3, 0], [2]], id="longest_first"),
        pytest.param([4, 4, 4], 8, [[0, 1], [2]], id="ties_by_index"),
        pytest.param([6, 5, 2, 3], 8, [[0, 2], [1, 3]], id="back_to_an_earlier_bin"),
        pytest.param([0, 8, 0, 8], 8, [[1, 0, 2], [3]], id="nothing_fits_in_a_full_bin"),
        pytest.param([0, 0], 8, [[0, 1]], id="only_zeros"),
        pytest.param([0, 0], 0, [[0, 1]], id="no_budget_needed"),
    ],
)
def test_small_cases(
    pack: Pack, lengths: list[int], max_tokens: int, expected: list[list[int]]
) -> None:
    assert pack(np.array(lengths, np.int64), max_tokens) == expected


@pytest.mark.parametrize("high", [3, 40, 100], ids=["many_ties", "short", "up_to_the_budget"])
def test_is_first_fit_decreasing(pack: Pack, high: int) -> None:
    generator = np.random.default_rng(high)
    for n in (1, 2, 3, 7, 64, 65, 150):
        lengths = generator.integers(0, high + 1, n)
        assert pack(lengths, 100) == first_fit_decreasing(lengths.tolist(), 100)


def test_cpp_equals_the_reference() -> None:
    lengths = log_uniform(5_000, seed=1)
    assert cpp_pack()(lengths, BUDGET) == reference.pack(lengths.tolist(), BUDGET)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "message"),
    [
        pytest.param([8, 8, 9], 8, "lengths[2]: found 9, expected 0 .. max_tokens = 8", id="long"),
        pytest.param(
            [1, -2], 8, "lengths[1]: found -2, expected 0 .. max_tokens = 8", id="negative"
        ),
        pytest.param(
            [9, -1], 8, "lengths[0]: found 9, expected 0 .. max_tokens = 8", id="the_first"
        ),
        pytest.param([0], -1, "lengths[0]: found 0, expected 0 .. max_tokens = -1", id="budget"),
    ],
)
def test_bad_lengths(pack: Pack, lengths: list[int], max_tokens: int, message: str) -> None:
    with pytest.raises(ValueError) as error:
        pack(np.array(lengths, np.int64), max_tokens)
    assert str(error.value) == message


def test_cpp_takes_int64_alone() -> None:
    """A silent cast would cut 1.9 to 1, and 2^32 + 1 to 1."""
    pack = cpp_pack()
    for wrong in (np.array([1.9]), np.array([1], np.int32), [1]):
        with pytest.raises(TypeError):
            pack(wrong, 8)
    with pytest.raises(ValueError, match="2 axes, expected 1"):
        pack(np.ones((1, 1), np.int64), 8)


def test_wastes_under_two_percent(pack: Pack) -> None:
    lengths = log_uniform(10_000)
    bins = pack(lengths, BUDGET)
    assert sorted(index for b in bins for index in b) == list(range(len(lengths)))
    assert max(int(lengths[b].sum()) for b in bins) <= BUDGET
    assert int(lengths.sum()) >= 0.98 * BUDGET * len(bins)


def test_a_million_lengths_take_under_a_second() -> None:
    pack, lengths = cpp_pack(), log_uniform(1_000_000)
    # Processor time, so that a busy machine does not fail it: pack is one thread.
    start = time.process_time()
    pack(lengths, BUDGET)
    assert time.process_time() - start < 1.0


def test_cpp_releases_the_gil() -> None:
    """Another thread runs while the planner works."""
    pack, lengths = cpp_pack(), np.random.default_rng(0).integers(8_193, BUDGET, 300_000)
    done, ticks = threading.Event(), []

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    pack(lengths, BUDGET)
    stop = time.perf_counter()
    done.set()
    thread.join()
    # With the GIL held all along there is no tick in between.
    assert sum(start < t < stop for t in ticks) >= 5
