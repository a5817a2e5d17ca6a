"""A process that decodes damaged audio: `FIRST COUNT` per line in, one JSON line of outcomes out.

An item that takes 5 s of processor time ends the process, like a crash.
"""

from __future__ import annotations

import io
import json
import signal
import struct
import sys
from collections import Counter
from functools import cache

import numpy as np
import soundfile

from slap_fast.data.audio.decode import decode
from slap_fast.data.audio.track import AudioError

ENCODINGS = (
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAV", "ALAW"),
    ("WAV of MP3", None), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("AIFF", "PCM_16"), ("CAF", "ALAC_16"),
)  # fmt: skip
"""libsndfile's names of formats and subtypes."""


@cache
def intact(kind: int, other: bool) -> bytes:
    """A good file: 0.1 s mono at 16 kHz, or 0.2 s stereo at 8 kHz."""
    rate, channels, seconds = (8_000, 2, 0.2) if other else (16_000, 1, 0.1)
    noise = np.random.default_rng(kind).normal(0, 0.1, (round(rate * seconds), channels))
    name, subtype = ENCODINGS[kind]
    file = io.BytesIO()
    soundfile.write(file, noise, rate, format=name.split()[-1], subtype=subtype)
    return wav_of_mp3(file.getvalue(), rate, channels) if " of " in name else file.getvalue()


def wav_of_mp3(mp3: bytes, rate: int, channels: int) -> bytes:
    """An MP3 under a WAV header of tag 0x55, which libsndfile reads and does not write."""
    head = struct.pack("<HHIIHHH", 0x55, channels, rate, 4_000, 1, 0, 12)
    head += struct.pack("<HIHHH", 1, 2, 288, 1, 0)
    chunks = b"fmt " + struct.pack("<I", len(head)) + head
    chunks += b"data" + struct.pack("<I", len(mp3)) + mp3 + bytes(len(mp3) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def damaged(seed: int) -> bytes:
    """A good file after 1 to 4 changes, half of them in its first 100 bytes."""
    rng = np.random.default_rng((1, seed))
    data = bytearray(intact(int(rng.integers(len(ENCODINGS))), bool(rng.integers(2))))
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(min(100, len(data)) if rng.integers(2) else len(data)))
        change = rng.integers(7)
        if change == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif change == 1:
            data[at] = int(rng.integers(256))
        elif change == 2:
            data[at : at + 4] = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)[rng.integers(4)].to_bytes(4, "big")
        elif change == 3:
            del data[max(8, at) :]
        elif change == 4:
            del data[at : at + int(rng.integers(1, 50))]
        elif change == 5:
            data[at:at] = rng.bytes(int(rng.integers(1, 50)))
        else:
            other = int(rng.integers(len(data)))
            data[at : at + 64] = data[other : other + 64]
        if len(data) < 8:
            break
    return bytes(data)


def outcome(data: bytes) -> str:
    """A code, or "ok" for a waveform that is one."""
    try:
        wave = decode(data, end=30.0).waveform
    except AudioError as error:
        return error.code
    assert wave.dtype == np.float32 and wave.ndim == 1 and 400 <= len(wave) <= 480_001
    assert np.isfinite(wave).all()
    return "ok"


def peak_mb() -> int:
    """Peak resident memory of this process; 0 where there is no /proc."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))


def main() -> None:
    for line in sys.stdin:
        first, count = map(int, line.split())
        outcomes: Counter[str] = Counter()
        for seed in range(first, first + count):
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_PROF, 5.0)  # its signal ends a process
            outcomes[outcome(damaged(seed))] += 1
        print(json.dumps({"outcomes": outcomes, "peak_mb": peak_mb()}), flush=True)


if __name__ == "__main__":
    main()
