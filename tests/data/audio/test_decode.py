"""Every accepted format against what was written, and every bad file against its code."""

from __future__ import annotations

import io
import pickle
import sys

import numpy as np
import pytest
import soundfile
import soxr

from slap_fast.data.audio.decode import decode, probe, stream
from slap_fast.data.audio.track import AudioError
from tests.helpers.audio_files import RATE, encode, patched, tones


def code_of(source, **options) -> str:
    with pytest.raises(AudioError) as caught:
        decode(source, **options)
    message = str(caught.value)
    assert caught.value.code in message and "expected" in message and "\n" not in message
    return caught.value.code


LOSSLESS = {
    "PCM_U8": ("WAV", 1 / 128),
    "PCM_16": ("WAV", 2**-15),
    "PCM_24": ("WAV", 2**-23),
    "PCM_32": ("WAV", 2**-23),
    "FLOAT": ("WAV", 2**-23),
    "DOUBLE": ("WAV", 2**-23),
    "ULAW": ("WAV", 0.02),
    "ALAW": ("WAV", 0.02),
    "PCM_16 rf64": ("RF64", 2**-15),
    "PCM_16 wavex": ("WAVEX", 2**-15),
    "PCM_16 flac": ("FLAC", 2**-15),
    "PCM_16 aiff": ("AIFF", 2**-15),
    "PCM_16 caf": ("CAF", 2**-15),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_decoding_equals_what_was_written(name):
    kind, step = LOSSLESS[name]
    signal = tones(3_000)
    audio = decode(encode(signal, format=kind, subtype=name.split()[0]))
    assert audio.waveform.dtype == np.float32 and audio.seconds == 3_000 / RATE
    np.testing.assert_allclose(audio.waveform, signal[:, 0], rtol=0, atol=step)


@pytest.mark.parametrize("channels", [1, 2, 6, 8])
def test_channels_are_averaged(channels):
    signal = tones(3_000, channels)
    wave = decode(encode(signal, subtype="FLOAT")).waveform
    np.testing.assert_allclose(wave, signal.mean(1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_resampling_equals_soxr_on_the_whole_signal(rate):
    signal = np.random.default_rng(rate).normal(0, 0.1, (rate * 3 + 7, 2)).astype(np.float32)
    expected = soxr.resample(signal.astype(np.float64).mean(1), rate, RATE, "HQ")
    wave = decode(encode(signal, rate, subtype="FLOAT")).waveform
    assert len(wave) == len(expected)
    np.testing.assert_allclose(wave, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["MP3", "OGG"])
def test_lossy_formats_equal_libsndfile_and_are_not_clipped(kind):
    signal = np.sign(tones(30_000)) * 0.99
    data = encode(signal, format=kind)
    expected = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    wave = decode(data).waveform
    assert np.abs(wave).max() > 1
    np.testing.assert_array_equal(wave, expected)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF"])
def test_a_path_the_bytes_and_a_file_are_the_same(kind, tmp_path):
    data = encode(tones(20_000, 2, 44_100), 44_100, kind)
    path = tmp_path / "clip.raw"
    path.write_bytes(data)
    with path.open("rb") as file:
        file.seek(100)
        waves = [decode(source).waveform for source in (path, str(path), data, io.BytesIO(data))]
        with pytest.raises(TypeError):
            soundfile.read(file)  # why _View exists
    assert all(np.array_equal(wave, waves[0]) for wave in waves)
    info = probe(path)
    assert (info.sample_rate, info.channels, info.format) == (44_100, 2, kind)
    assert info.seconds == pytest.approx(20_000 / 44_100, abs=1e-9)


def test_start_and_end_cut_the_file():
    signal = tones(RATE)
    data = encode(signal, subtype="FLOAT")
    audio = decode(data, start=0.25, end=0.5)
    np.testing.assert_array_equal(audio.waveform, signal[4_000:8_000, 0].astype(np.float32))
    assert audio.warnings == ("W_CROPPED",)
    assert decode(data, end=1.0).warnings == ()
    assert len(decode(data, start=0.75, end=9.0).waveform) == 4_000
    assert code_of(data, start=1.5) == "E_TOO_SHORT"


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_crop_is_resampled_to_its_own_length(kind):
    data = encode(tones(88_200, 1, 44_100), 44_100, kind)
    assert len(decode(data, start=0.5, end=1.25).waveform) == 12_000


@pytest.mark.parametrize(
    "span", [(-1.0, None), (2.0, 1.0), (1.0, 1.0), (float("nan"), None)], ids=str
)
def test_an_invalid_span_is_refused(span):
    with pytest.raises(ValueError, match="start, end: found"):
        decode(encode(tones(RATE)), start=span[0], end=span[1])


def test_stream_reads_blocks_and_stops_at_the_end():
    class Counting(io.BytesIO):
        largest = total = 0

        def readinto(self, buffer):
            count = super().readinto(buffer)
            self.largest, self.total = max(self.largest, count), self.total + count
            return count

    file = Counting(encode(np.zeros((20 * 48_000, 2)) + 0.1, 48_000, subtype="PCM_16"))
    blocks = list(stream(file))
    assert sum(map(len, blocks)) == 20 * RATE and len(blocks) > 5
    assert max(map(len, blocks)) <= 1 << 18
    file.total = 0
    assert sum(map(len, stream(file, end=1.0))) == RATE
    assert file.total < 2 << 20


WAV = encode(tones(RATE), subtype="PCM_16")
FLAC = encode(tones(RATE), format="FLAC")
LONG = np.random.default_rng(0).normal(0, 0.1, 4 * RATE)
BAD = {
    "empty": (b"", "E_FORMAT"),
    "one_byte": (b"R", "E_FORMAT"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>" * 9, "E_FORMAT"),
    "random": (np.random.default_rng(2).bytes(5_000), "E_FORMAT"),
    "big_endian_wav": (b"RIFX" + WAV[4:], "E_FORMAT"),
    "aac_frames": (b"\xff\xf1\x50\x80" * 500, "E_FORMAT"),
    "wav_codec_tag": (patched(WAV, 20, "<H", 0x161), "E_FORMAT"),
    "wavex_codec": (patched(encode(tones(RATE), format="WAVEX"), 44, "<H", 0x161), "E_FORMAT"),
    "wav_without_fmt": (WAV[:12] + WAV[36:], "E_FORMAT"),
    "no_channels": (patched(WAV, 22, "<H", 0), "E_CHANNELS"),
    "65535_channels": (patched(WAV, 22, "<H", 65_535), "E_CHANNELS"),
    "9_channels": (encode(tones(RATE, 9)), "E_CHANNELS"),
    "0_hz": (patched(WAV, 24, "<I", 0), "E_SAMPLE_RATE"),
    "1_hz": (patched(WAV, 24, "<I", 1), "E_SAMPLE_RATE"),
    "4_ghz": (patched(WAV, 24, "<I", 0xFFFFFFFF), "E_SAMPLE_RATE"),
    "flac_2_khz": (encode(tones(RATE), 2_000, "FLAC"), "E_SAMPLE_RATE"),
    "header_only": (encode(np.zeros((0, 1))), "E_TOO_SHORT"),
    "one_sample": (encode(tones(1)), "E_TOO_SHORT"),
    "399_samples": (encode(tones(399)), "E_TOO_SHORT"),
    "wav_cut": (WAV[:-2_000], "E_TRUNCATED"),
    "wav_cut_slightly": (WAV[:-10], "E_TRUNCATED"),
    "wav_data_claims_2_gb": (patched(patched(WAV, 4, "<I", 0), 40, "<I", 0x7FFF_0000),
                             "E_TRUNCATED"),
    "rf64_cut": (encode(tones(RATE), format="RF64")[:-2_000], "E_TRUNCATED"),
    "aiff_cut": (encode(tones(RATE), format="AIFF")[:-2_000], "E_TRUNCATED"),
    "caf_cut": (encode(tones(RATE), format="CAF")[:-2_500], "E_TRUNCATED"),
    "ogg_cut": (encode(LONG, format="OGG")[:-3_000], "E_TRUNCATED"),
    "mp3_cut": (encode(LONG, format="MP3")[:-3_000], "E_TRUNCATED"),
    "mp3_44_khz_cut": (encode(LONG, 44_100, "MP3")[:-3_000], "E_TRUNCATED"),
    "mp3_with_id3_cut": (b"ID3\x04\0\0\0\0\x02\x00" + b"\0" * 256
                         + encode(LONG, format="MP3")[:-3_000], "E_TRUNCATED"),
    "flac_cut": (encode(LONG, format="FLAC")[:-20_000], "E_DECODE"),
    "flac_claims_2_36_frames": (patched(FLAC, 21, "5B", FLAC[21] | 15, *[255] * 4),
                                "E_TRUNCATED"),
    "flac_header_garbage": (FLAC[:4] + b"\xff" * 200, "E_DECODE"),
    "nan": (encode(np.r_[tones(RATE)[:, 0], np.nan], subtype="FLOAT"), "E_NONFINITE"),
    "infinity": (encode(np.r_[tones(RATE)[:, 0], -np.inf], subtype="FLOAT"), "E_NONFINITE"),
    "huge": (encode(np.r_[tones(RATE)[:, 0], -4e29], subtype="FLOAT"), "E_RANGE"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_have_their_code(name):
    data, code = BAD[name]
    assert code_of(data) == code


@pytest.mark.parametrize("riff", [0, 0xFFFFFFFF])
def test_an_unknown_wav_size_is_read_to_the_end(riff):
    data = patched(patched(WAV, 4, "<I", riff), 40, "<I", 0xFFFFFFFF)
    assert len(decode(data).waveform) == RATE


def test_an_unknown_flac_length_is_read_to_the_end():
    data = patched(FLAC, 21, "BBBBB", FLAC[21] & 0xF0, 0, 0, 0, 0)
    assert np.array_equal(decode(data).waveform, decode(FLAC).waveform)
    assert probe(data).seconds == 1.0


def test_short_mp3s_are_not_taken_for_truncated():
    for num_samples in (2_000, 5_000, 20_000):
        for rate in (16_000, 44_100):
            wave = decode(encode(tones(num_samples), rate, "MP3"), sample_rate=rate).waveform
            assert len(wave) == num_samples


def test_a_forgotten_pad_byte_is_no_truncation():
    data = encode(tones(4_001), subtype="PCM_U8")
    assert len(data) == 44 + 4_002
    assert len(decode(data[:-1]).waveform) == 4_001


def test_a_crop_before_the_cut_is_good():
    assert len(decode(WAV[: len(WAV) // 2], end=0.25).waveform) == 4_000


def test_a_missing_file_and_a_folder(tmp_path):
    assert code_of(tmp_path / "none.wav") == "E_MISSING"
    assert code_of(tmp_path) == "E_MISSING"
    with pytest.raises(ValueError, match="source: found int"):
        decode(3)


def test_too_long_is_detected_while_reading():
    data = encode(np.zeros(60 * RATE) + 0.1, format="FLAC")
    assert code_of(data, max_seconds=30.0) == "E_TOO_LONG"
    assert decode(data, max_seconds=30.0, end=20.0).seconds == 20.0


def test_min_seconds_is_after_resampling():
    data = encode(tones(1_103, 1, 44_100), 44_100)
    assert len(decode(data).waveform) == 400
    assert code_of(data, min_seconds=0.026) == "E_TOO_SHORT"


def test_warnings(tmp_path):
    assert decode(encode(np.zeros(RATE))).warnings == ("W_SILENT",)
    assert decode(encode(np.full(RATE, 0.25), 44_100)).warnings == ("W_SILENT",)
    for name, warnings in (("a.mp3", ("W_EXT_MISMATCH",)), ("a.WAV", ()), ("a.dat", ())):
        (tmp_path / name).write_bytes(WAV)
        assert decode(tmp_path / name).warnings == warnings


def test_an_error_travels_between_processes():
    with pytest.raises(AudioError) as caught:
        decode("nowhere.wav")
    back = pickle.loads(pickle.dumps(caught.value))
    assert (back.code, back.path, str(back)) == ("E_MISSING", "nowhere.wav", str(caught.value))


@pytest.mark.parametrize("head", [b"\0\0\0\x20ftypM4A ", b"\x1a\x45\xdf\xa3"], ids=["m4a", "webm"])
def test_without_pyav_the_message_names_the_extra(head, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"E_FORMAT.*pip install slap-fast\[av\]"):
        decode(head + b"\0" * 100)


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [("MP4", "aac", {}), ("WEBM", "libopus", {}), ("WEBM", "libopus", {"live": "1"})],
    ids=["m4a", "webm", "webm_without_a_duration"],
)
def test_pyav_decodes(kind, codec, options):
    av = pytest.importorskip("av")
    file, signal = io.BytesIO(), tones(96_000, 1, 48_000)[:, 0].astype(np.float32)
    with av.open(file, "w", format=kind.lower(), options=options) as out:
        track = out.add_stream(codec, rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(signal[None], format="fltp", layout="mono")
        frame.rate = 48_000
        for packet in (*track.encode(frame), *track.encode(None)):
            out.mux(packet)
    data = file.getvalue()
    wave, expected = decode(data).waveform, soxr.resample(signal, 48_000, RATE)
    assert probe(data).format == kind and probe(data).seconds == pytest.approx(2.0, abs=0.05)
    assert abs(len(wave) - len(expected)) < 0.05 * RATE
    spectra = [np.abs(np.fft.rfft(x[8_000:24_000])) for x in (wave, expected)]
    assert np.argmax(spectra[0][20:]) == np.argmax(spectra[1][20:])
    crop = decode(data, start=0.5, end=1.0).waveform
    assert len(crop) == 8_000
    assert np.abs(crop[2_000:6_000] - wave[10_000:14_000]).max() < 1e-3
    assert code_of(data[:200]) == "E_DECODE"


def test_every_real_recording_decodes(shared_data):
    files = sorted(p for p in shared_data.rglob("*") if p.suffix in (".ogg", ".flac", ".wav"))
    assert len(files) == 984
    assert sum(decode(path).seconds for path in files) == pytest.approx(3_802, abs=1)
