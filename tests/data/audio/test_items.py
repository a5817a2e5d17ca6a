"""Audio items of Hugging Face's packages."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slap_fast.data.audio.decode import as_waveform
from slap_fast.data.audio.items import audio_item

STEREO = np.array([[16_384, -32_768, 0] * 400, [0, -32_768, 8_192] * 400], dtype=np.int16)
MONO = (STEREO / 32_768).mean(0)


@pytest.mark.parametrize(
    "array", [STEREO, torch.from_numpy(STEREO), STEREO / 32_768, np.float32(STEREO / 32_768), MONO]
)
def test_channels_are_averaged_at_full_scale_one(array):
    decoded = SimpleNamespace(data=array, sample_rate=16_000)
    items = [{"array": array, "sampling_rate": 16_000}]
    items.append(SimpleNamespace(get_all_samples=lambda: decoded))
    for item in items:
        np.testing.assert_allclose(as_waveform(*audio_item(item)), MONO, atol=1e-6)
