"""Windows of long audio, for any size of the blocks it is read in."""

import numpy as np
import pytest

from slap_fast.inference.chunks import windows

RATE = 16_000


@pytest.mark.parametrize("seconds", [0.5, 30.0, 30.001, 45.0, 45.5, 61.7])
@pytest.mark.parametrize("block", [1_000, 70_000, 2_000_000])
def test_windows_cover_every_sample_and_end_where_the_audio_ends(seconds, block):
    wave = np.arange(round(seconds * RATE), dtype=np.float32)
    blocks = [wave[i : i + block] for i in range(0, len(wave), block)]
    parts = list(windows(blocks, RATE, 30.0, "x"))
    assert all(len(window) <= 30 * RATE for window in parts)
    assert all((np.diff(window) == 1).all() for window in parts)
    assert np.array_equal(np.unique(np.concatenate(parts)), wave)
    assert parts[-1][-1] == wave[-1]
