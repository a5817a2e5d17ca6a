"""Files with a fixed outcome: each container, codec, rate and fault, and files without audio."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import soxr

from slap_fast.data.audio.decode import decode, probe
from slap_fast.data.audio.integrity import ogg_checksum
from slap_fast.data.audio.mp3 import mp3_frame_bytes
from slap_fast.data.audio.track import AudioError
from tests.helpers.audio_files import RATE, encode, patched, tones
from tests.helpers.fuzz_audio import wav_of_mp3

LOSSLESS = {
    "wav_u8": ("WAV", "PCM_U8", 2**-7),
    "wav_16": ("WAV", "PCM_16", 2**-15),
    "wav_24": ("WAV", "PCM_24", 2**-23),
    "wav_32": ("WAV", "PCM_32", 2**-23),
    "wav_float": ("WAV", "FLOAT", 2**-23),
    "wav_double": ("WAV", "DOUBLE", 2**-23),
    "wav_ulaw": ("WAV", "ULAW", 0.02),
    "wav_alaw": ("WAV", "ALAW", 0.02),
    "wav_ima_adpcm": ("WAV", "IMA_ADPCM", None),
    "wav_ms_adpcm": ("WAV", "MS_ADPCM", None),
    "w64": ("W64", "PCM_16", 2**-15),
    "w64_float": ("W64", "FLOAT", 2**-23),
    "au": ("AU", "PCM_16", 2**-15),
    "au_ulaw": ("AU", "ULAW", 0.02),
    "wavex": ("WAVEX", "PCM_16", 2**-15),
    "rf64": ("RF64", "PCM_24", 2**-23),
    "aiff_s8": ("AIFF", "PCM_S8", 2**-7),
    "aiff": ("AIFF", "PCM_16", 2**-15),
    "aiff_float": ("AIFF", "FLOAT", 2**-23),
    "caf": ("CAF", "PCM_24", 2**-23),
    "caf_alac": ("CAF", "ALAC_16", 2**-15),
    "flac_8": ("FLAC", "PCM_S8", 2**-7),
    "flac_16": ("FLAC", "PCM_16", 2**-15),
    "flac_24": ("FLAC", "PCM_24", 2**-23),
}
"""(container, codec, how far a sample may be off: ADPCM is far off at first)"""
LOSSY = {"ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"), "mp3": ("MP3", None)}
REFUSED = (
    ("VOC", "PCM_16"), ("PAF", "PCM_16"), ("SVX", "PCM_16"),
    ("NIST", "PCM_16"), ("IRCAM", "PCM_16"), ("MAT4", "PCM_16"), ("MAT5", "PCM_16"),
    ("PVF", "PCM_16"), ("AVR", "PCM_16"), ("MPC2K", "PCM_16"),
    ("WAV", "GSM610"), ("WAV", "G721_32"),
)  # fmt: skip
NO_AUDIO = {
    "empty": b"",
    "one_byte": b"R",
    "zeros": bytes(5_000),
    "ones": b"\xff" * 5_000,
    "random": np.random.default_rng(2).bytes(5_000),
    "text": b"a dog barks\n" * 50,
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "json": b'{"error": "rate limited"}' * 20,
    "xml": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "playlist": b"#EXTM3U\n#EXTINF:10,\na.ts\n",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(500),
    "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(500),
    "gif": b"GIF89a" + bytes(500),
    "webp": b"RIFF\x24\0\0\0WEBPVP8 " + bytes(500),
    "avi": b"RIFF\x24\0\0\0AVI LIST" + bytes(500),
    "big_endian_wav": b"RIFX\x24\0\0\0WAVEfmt " + bytes(500),
    "pdf": b"%PDF-1.7\n" + bytes(500),
    "zip": b"PK\3\4" + bytes(500),
    "gzip": b"\x1f\x8b\x08" + bytes(500),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(500),
    "elf": b"\x7fELF\2\1\1" + bytes(500),
    "sqlite": b"SQLite format 3\0" + bytes(500),
    "npy": b"\x93NUMPY\1\0" + bytes(500),
    "midi": b"MThd\0\0\0\6\0\1\0\1" + bytes(500),
    "flv": b"FLV\1\5\0\0\0\x09" + bytes(500),
    "asf": bytes.fromhex("3026b2758e66cf11") + bytes(500),
    "amr": b"#!AMR\n" + bytes(500),
    "ac3": b"\x0b\x77" + bytes(500),
    "aac": b"\xff\xf1\x50\x80\x1f\xfc" * 100,
    "mpeg_ts": (b"\x47\x40\0\x10" + bytes(184)) * 5,
}


def noisy_tones(num_samples: int, channels: int = 1, rate: int = RATE) -> np.ndarray:
    """float64 [num_samples, channels]: a tone each and a constant, with hiss for the encoders."""
    hiss = np.random.default_rng(0).normal(0, 0.02, (num_samples, channels))
    return tones(num_samples, channels, rate, 0.3) + hiss


def pages(ogg: bytes) -> list[int]:
    """Where the pages of an Ogg file start."""
    return [i for i in range(len(ogg)) if ogg.startswith(b"OggS", i)]


def corpus() -> dict[str, tuple[bytes, str]]:
    """{name: (the file, a code or "ok")}; a code that starts with W_ is a warning beside audio."""
    files: dict[str, tuple[bytes, str]] = {}
    every = {name: entry[:2] for name, entry in LOSSLESS.items()} | LOSSY
    second = {
        name: encode(noisy_tones(RATE), RATE, kind, subtype)
        for name, (kind, subtype) in every.items()
    }
    for name, (kind, subtype) in every.items():
        for rate, channels in ((8_000, 2), (16_000, 1), (48_000, 1)):
            data = encode(noisy_tones(rate // 2, channels, rate), rate, kind, subtype)
            files[f"{name}_{rate}_{channels}"] = data, "ok"
        data = second[name]
        for percent in (30, 60, 85):
            code = "E_DECODE" if name.startswith("flac") else "E_TRUNCATED"
            files[f"{name}_cut_{percent}"] = data[: len(data) * percent // 100], code
        files[f"{name}_late"] = b"\0\1\2\3" + data, "E_FORMAT"
        if subtype not in ("IMA_ADPCM", "MS_ADPCM"):  # fills its last block
            files[f"{name}_short"] = encode(noisy_tones(350), RATE, kind, subtype), "E_TOO_SHORT"
    for kind, subtype in REFUSED:
        files[f"{kind}_{subtype}"] = (
            encode(noisy_tones(RATE // 2, 1, 8_000), 8_000, kind, subtype),
            "E_FORMAT",
        )
    files |= {f"no_audio_{name}": (data, "E_FORMAT") for name, data in NO_AUDIO.items()}

    wav, flac, ogg, mp3 = (second[name] for name in ("wav_16", "flac_16", "ogg", "mp3"))
    for channels in (3, 4, 5, 6, 7, 8):
        files[f"wav_{channels}_channels"] = encode(noisy_tones(8_000, channels)), "ok"
    for channels in (0, 9, 255, 65_535):
        files[f"wav_says_{channels}_channels"] = patched(wav, 22, "<H", channels), "E_CHANNELS"
    files["wav_9_channels"] = encode(noisy_tones(8_000, 9)), "E_CHANNELS"
    files["wavex_16_channels"] = encode(noisy_tones(8_000, 16), format="WAVEX"), "E_CHANNELS"
    for rate, code in (
        (0, "E_SAMPLE_RATE"), (1, "E_SAMPLE_RATE"), (3_999, "E_SAMPLE_RATE"), (4_000, "ok"),
        (384_000, "ok"), (384_001, "E_SAMPLE_RATE"), (2**32 - 1, "E_SAMPLE_RATE"),
    ):  # fmt: skip
        files[f"wav_says_{rate}_hz"] = patched(wav, 24, "<I", rate), code
    for kind in ("FLAC", "AIFF", "CAF"):
        files[f"{kind}_2000_hz"] = encode(noisy_tones(RATE), 2_000, kind), "E_SAMPLE_RATE"
        files[f"{kind}_one_frame"] = encode(noisy_tones(1), RATE, kind), "E_TOO_SHORT"
        files[f"{kind}_silent"] = encode(np.zeros(RATE), RATE, kind), "W_SILENT"
    for kind, subtype in (("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("AIFF", "FLOAT"), ("CAF", "FLOAT")):
        for value, code in (
            (np.nan, "E_NONFINITE"), (np.inf, "E_NONFINITE"), (-np.inf, "E_NONFINITE"),
            (16.5, "E_RANGE"), (-4e29, "E_RANGE"), (15.9, "ok"),
        ):  # fmt: skip
            for at in (0, RATE // 2):
                signal = noisy_tones(RATE)
                signal[at] = value
                files[f"{kind}_{subtype}_{value}_at_{at}"] = (
                    encode(signal, RATE, kind, subtype),
                    code,
                )
    files["wav_dc"] = encode(np.full(RATE, 0.25)), "W_SILENT"
    files["wav_silent_stereo"] = encode(np.zeros((RATE, 2)), 44_100), "W_SILENT"
    files["wav_no_frames"] = encode(np.zeros((0, 1))), "E_TOO_SHORT"
    files["wav_header_of_wavs"] = wav[:44], "E_TRUNCATED"
    files["wav_half_a_header"] = wav[:30], "E_DECODE"
    files["aiff_no_frames"] = encode(np.zeros((0, 1)), RATE, "AIFF"), "E_TOO_SHORT"
    files["wav_without_fmt"] = wav[:12] + wav[36:], "E_FORMAT"
    for size, code in (
        (0x7FFFEFFF, "E_TRUNCATED"), (0x7FFFF000, "ok"), (0x80000000, "ok"), (0xFFFF0000, "ok"),
        (0, "ok"), (len(wav) - 43, "E_TRUNCATED"),
    ):  # fmt: skip
        files[f"wav_data_claims_{size:#x}"] = patched(wav, 40, "<I", size), code
    for outer in (0, 36, len(wav) + 8, 0x7FFFF024, 0x7FFFFFFF, 0xFFFFFFFF):
        files[f"wav_outer_{outer:#x}"] = patched(wav, 4, "<I", outer), "ok"
        files[f"aiff_outer_{outer:#x}"] = patched(second["aiff"], 4, ">I", outer), "ok"
    files["wav_size_unknown"] = (
        patched(patched(wav, 4, "<I", 0xFFFFFFFF), 40, "<I", 0xFFFFFFFF),
        "ok",
    )
    files["wav_size_zero"] = patched(patched(wav, 4, "<I", 0), 40, "<I", 0xFFFFFFFF), "ok"
    files["wav_with_junk_after"] = wav + bytes(1_000), "ok"
    note = b"LIST" + struct.pack("<I", 26) + b"INFOISFT\x0e\0\0\0Lavf60.16.100\0"
    files["wav_with_a_note"] = patched(wav + note, 4, "<I", len(wav + note) - 8), "ok"
    files["wav_note_cut"] = patched(wav + note[:10], 4, "<I", len(wav + note) - 8), "ok"
    files["wav_cut_by_10"] = wav[:-10], "E_TRUNCATED"
    files["wav_of_mp3"] = wav_of_mp3(mp3, RATE, 1), "ok"
    files["flac_length_unknown"] = patched(flac, 21, "5B", flac[21] & 0xF0, 0, 0, 0, 0), "ok"
    files["flac_says_2_36_frames"] = (
        patched(flac, 21, "5B", flac[21] | 15, *[255] * 4),
        "E_TRUNCATED",
    )
    files["flac_header_only"] = flac[:42], "E_DECODE"
    files["flac_garbage"] = flac[:4] + b"\xff" * 500, "E_DECODE"
    files["flac_frame_bit"] = (
        patched(flac, len(flac) // 2, "B", flac[len(flac) // 2] ^ 4),
        "E_DECODE",
    )
    files["ogg_last_page_bit"] = patched(ogg, len(ogg) - 9, "B", ogg[-9] ^ 1), "W_CORRUPT"
    long_ogg = encode(noisy_tones(40 * RATE), RATE, "OGG")
    middle = pages(long_ogg)[len(pages(long_ogg)) // 2]
    files["ogg_page_bit"] = (
        patched(long_ogg, middle + 99, "B", long_ogg[middle + 99] ^ 1),
        "W_CORRUPT",
    )
    files["ogg_junk_between_pages"] = long_ogg[:middle] + bytes(99) + long_ogg[middle:], "W_CORRUPT"
    files["ogg_cut_between_pages"] = long_ogg[:middle], "W_TRUNCATED"
    files["ogg_junk_after"] = long_ogg + bytes(99), "W_CORRUPT"
    files["ogg_header_page_only"] = ogg[: pages(ogg)[1]], "E_DECODE"
    tag = b"ID3\4\0\0\0\0\2\0" + bytes(256)
    files["mp3_after_a_tag"] = tag + mp3, "ok"
    files["mp3_before_a_tag"] = mp3 + b"TAG" + bytes(125), "ok"
    files["mp3_after_two_tags"] = tag + tag + mp3, "ok"
    files["mp3_after_a_padded_tag"] = tag + bytes(500) + mp3, "ok"
    for name in ("wav_16", "flac_16", "aiff", "ogg", "caf"):
        files[f"{name}_after_a_tag"] = tag + second[name], "ok"
        files[f"{name}_after_two_tags"] = tag + tag + second[name], "ok"
    other = encode(noisy_tones(44_100, 1, 44_100), 44_100, "MP3")
    files["mp3_joined_to_another_rate"] = mp3 + other, "W_UNREAD"
    files["ogg_joined_to_another_layout"] = (
        ogg + encode(noisy_tones(RATE, 2), RATE, "OGG"),
        "W_UNREAD",
    )
    files["mp3_tag_only"] = tag, "E_DECODE"
    long_mp3 = encode(noisy_tones(10 * RATE), RATE, "MP3")
    half = len(long_mp3) // 2
    files["mp3_junk_inside"] = long_mp3[:half] + bytes(500) + long_mp3[half:], "W_CORRUPT"
    files["mp3_hole"] = long_mp3[:half] + long_mp3[half + 333 :], "W_CORRUPT"
    return files


CORPUS = corpus()


def outcome(data: bytes) -> str:
    try:
        return "+".join(decode(data).warnings) or "ok"
    except AudioError as error:
        return error.code


def test_each_file_of_the_corpus_has_its_outcome(figure):
    names = list(CORPUS)
    assert len(names) >= 300
    for seed in figure("A2", ci=len(names), soak=len(names)):
        data, expected = CORPUS[names[seed]]
        assert outcome(data) == expected, names[seed]


def joined() -> dict[str, bytes]:
    """Files of 1 s and 2 s end to end, with what players and taggers put between."""
    parts = {
        name: [encode(noisy_tones(n * RATE), RATE, *kind) for n in (1, 2)]
        for name, kind in LOSSY.items()
    }
    first, second = parts["mp3"]
    bare = [data[mp3_frame_bytes(data[:4]) :] for data in (first, second)]  # without a count
    id3, id3v1 = b"ID3\4\0\0\0\0\2\0" + bytes(256), b"TAG" + bytes(125)
    return {
        "mp3": first + second,
        "mp3_tag_between": first + id3 + second,
        "mp3_old_tag_between": first + id3v1 + second + id3v1,
        "mp3_first_has_no_count": bare[0] + second,
        "mp3_second_has_no_count": first + bare[1],
        "mp3_without_counts": b"".join(bare),
        "ogg": b"".join(parts["ogg"]),
        "opus": b"".join(parts["opus"]),
    }


JOINED = joined()


@pytest.mark.parametrize("name", JOINED)
def test_files_joined_end_to_end_are_read_to_the_end(name):
    data = JOINED[name]
    audio = decode(data)
    assert audio.warnings == () and audio.seconds == pytest.approx(3, abs=0.2)
    assert probe(data).seconds == pytest.approx(audio.seconds, abs=0.01)
    part = decode(data, start=2.5).waveform  # a start in the second part
    np.testing.assert_allclose(part, audio.waveform[round(2.5 * RATE) :], atol=0.02)


def test_a_flac_after_a_tag_is_a_flac():
    tag = b"ID3\4\0\0\0\0\2\0" + bytes(256)
    for kind in ("FLAC", "WAV", "AIFF", "OGG"):
        assert probe(tag + encode(noisy_tones(RATE), RATE, kind)).format == kind


@pytest.mark.parametrize("name", [name for name in LOSSLESS if not name.endswith("adpcm")])
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_samples_equal_what_was_written(name, rate):
    kind, subtype, step = LOSSLESS[name]
    signal = noisy_tones(rate // 2, 2, rate)
    truth = soxr.resample(signal.mean(1), rate, RATE, "HQ") if rate != RATE else signal.mean(1)
    wave = decode(encode(signal, rate, kind, subtype)).waveform
    assert len(wave) == len(truth)
    np.testing.assert_allclose(wave, truth, rtol=0, atol=1.5 * step + 1e-4)


def test_the_checksum_is_that_of_rfc_3533():
    """Bit by bit, as in RFC 3533."""
    for data in (b"", b"OggS", bytes(range(256)), zlib.compress(b"x" * 999)):
        crc = 0
        for byte in data:
            crc ^= byte << 24
            for _ in range(8):
                crc = (crc << 1 ^ 0x04C11DB7 if crc & 1 << 31 else crc << 1) & 0xFFFFFFFF
        assert ogg_checksum(data) == crc
