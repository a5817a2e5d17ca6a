"""Every source gives audio at the model's sample rate, and clips of at least data.min_seconds."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from slap_fast.config import override, slap_tiny
from slap_fast.data.audio.track import AudioError
from slap_fast.data.manifest import read_manifest
from slap_fast.data.open import open_source
from slap_fast.data.patch_cache import decode_patches
from slap_fast.data.shards.writer import write_shards
from slap_fast.data.sources.shards import ShardClips

RATE = 32_000


def peak_hz(waveform, rate):
    spectrum = np.abs(np.fft.rfft(waveform))
    return np.fft.rfftfreq(len(waveform), 1 / rate)[spectrum.argmax()]


def longest(source):
    """Its index among the first few; shards have an order of their own."""
    return max(range(3), key=source.seconds)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """A tone of 12 kHz, which audio at 16 kHz cannot hold, and clips of 0.3 and 0.01 s."""
    folder = tmp_path_factory.mktemp("tones")
    lines = ["path,caption"]
    for i, seconds in enumerate((1.0, 0.3, 0.01)):
        time = np.arange(round(48_000 * seconds)) / 48_000
        soundfile.write(folder / f"{i}.wav", 0.5 * np.sin(2 * np.pi * 12_000 * time), 48_000)
        lines.append(f"{i}.wav,a tone")
    (folder / "m.csv").write_text("\n".join(lines) + "\n")
    write_shards(read_manifest(folder / "m.csv", None), folder / "shards")
    mix = f"- data: {folder / 'm.csv'}\n  weight: 1\n- data: {folder / 'shards'}\n  weight: 1\n"
    (folder / "mix.yaml").write_text(mix)
    return folder


@pytest.mark.parametrize("kind", ["m.csv", "shards", "mix.yaml"])
def test_files_come_at_the_rate_that_is_asked_for(kind, collection):
    source = open_source(collection / kind, None, fallback="train", sample_rate=RATE)
    audio = source.audio(longest(source))
    assert len(audio.waveform) == RATE and audio.seconds == 1
    assert peak_hz(audio.waveform, RATE) == pytest.approx(12_000, abs=2)


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_built_in_sounds_are_resampled(rate):
    native, other = (
        open_source("builtin", "test", fallback="test", sample_rate=r) for r in (16_000, rate)
    )
    for index in range(3):
        audio, expected = other.audio(index), native.audio(index)
        assert audio.seconds == pytest.approx(expected.seconds, abs=1e-3)
        assert len(audio.waveform) == pytest.approx(native.seconds(index) * rate, abs=1)
        part = other.audio(index, 0.25, 0.75)
        assert len(part.waveform) == pytest.approx(rate / 2, abs=1)
        waveform, its_rate = other.item(index)
        assert np.array_equal(waveform, expected.waveform) and its_rate == 16_000


@pytest.mark.parametrize("data", ["builtin", "m.csv", "shards"])
def test_another_rate_than_the_mel_s_is_an_error(data, collection):
    mel = override(slap_tiny(), {"model.mel.sample_rate": RATE}).model.mel
    path = data if data == "builtin" else collection / data
    with pytest.raises(ValueError, match="found audio at 16000 Hz, expected .* 32000"):
        source = open_source(path, None, fallback="train")
        decode_patches(source, mel, longest(source))
    right = open_source(path, None, fallback="train", sample_rate=RATE)
    index = longest(right)
    patches, _ = decode_patches(right, mel, index)
    assert len(patches) == mel.num_patches(round(right.seconds(index) * RATE))


@pytest.mark.parametrize("kind", ["m.csv", "shards", "mix.yaml"])
@pytest.mark.parametrize(("min_seconds", "good"), [(0.001, 3), (0.025, 2), (0.5, 1)])
def test_min_seconds_is_read_by_every_source(kind, min_seconds, good, collection):
    options = {"fallback": "train", "min_seconds": min_seconds}
    source = open_source(collection / kind, None, **options)
    codes = []
    for index in range(len(source) if kind != "mix.yaml" else 3):
        try:
            source.audio(index)
        except AudioError as error:
            codes.append(error.code)
    assert codes == ["E_TOO_SHORT"] * (3 - good)


def test_a_worker_s_copy_of_shards_keeps_min_seconds(collection):
    source = ShardClips(collection / "shards", min_seconds=0.5)
    make, options = source.__reduce__()
    assert make(*options).min_seconds == 0.5
