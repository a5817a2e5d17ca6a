"""Data loading and packing on a CPU: `python -m benchmarks.model.loading [--json FILE]`.

Loading: files decoded, resampled and turned into patches per second, by workers; without a manifest
the built-in sounds are written to FLAC files at 44.1 kHz first. Packing: tokens computed for each
token that is needed, and the time of one tiny encoder pass, packed beside padded to the longest of
a batch and padded within buckets of similar length.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from benchmarks import cases, harness
from slap_fast import ops
from slap_fast.config import MelConfig, slap_tiny
from slap_fast.data.builtin.sound_set import SoundSet
from slap_fast.data.open import open_source
from slap_fast.data.patches import clip_patches, pack_patches
from slap_fast.data.sources.builtin import BuiltinClips
from slap_fast.models.audio_encoder import AudioEncoder
from slap_fast.packed import PackedPatches

FILES = 200
CLIPS = 1_000_000
"""That the planner packs."""
BATCH = 64
BUCKETS = 8


class Patches(torch.utils.data.Dataset):
    """The patches of a source's first clips."""

    def __init__(self, source: Any, mel: MelConfig, files: int) -> None:
        self.source, self.mel, self.files = source, mel, files

    def __len__(self) -> int:
        return min(self.files, len(self.source))

    def __getitem__(self, index: int) -> torch.Tensor:
        return clip_patches(self.source.audio(index).waveform, self.mel).patches


def write_files(folder: Path, files: int) -> Path:
    """A manifest of built-in sounds as FLAC files at 44.1 kHz."""
    sounds = BuiltinClips(SoundSet("validation", files))
    lines = []
    for index in range(files):
        wave = soxr.resample(sounds.audio(index).waveform, 16_000, 44_100)
        soundfile.write(folder / f"{index}.flac", np.clip(wave, -1, 1), 44_100)
        lines.append(json.dumps({"path": f"{index}.flac", "caption": sounds.captions(index)[0]}))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def loading(manifest: Path, files: int) -> Iterator[dict[str, Any]]:
    """One row per number of workers."""
    source = open_source(str(manifest), None, fallback="train")
    data = Patches(source, MelConfig(), files)
    seconds_of_audio = sum(source.seconds(i) for i in range(len(data)))
    for workers in (0, 1, 2):
        started = time.perf_counter()
        for _ in DataLoader(data, batch_size=None, num_workers=workers):
            pass
        seconds = time.perf_counter() - started
        yield {
            "what": "loading",
            "variant": f"{workers} worker{'s' * (workers != 1)}",
            "files/s": len(data) / seconds,
            "audio s/s": seconds_of_audio / seconds,
        }


def packing(rounds: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """Packed, padded and bucketed batches of clips of log-uniform 1 to 30 s."""
    mel = MelConfig()
    config = slap_tiny().model
    encoder = AudioEncoder(config.audio, mel).eval()
    (case,) = (case for case in cases.packs(1.0) if case.name == "C3")
    lengths = case.lengths[:batch_size]
    clips = [torch.randn(length - length % 4 or 4, mel.patch_dim) for length in lengths]
    ordered = sorted(range(len(clips)), key=lambda i: len(clips[i]))
    size = len(clips) // BUCKETS
    groups = {
        "packed": [[i] for i in ordered],
        "padded to the longest": [ordered],
        f"padded in {BUCKETS} buckets": [
            ordered[i : i + size] for i in range(0, len(ordered), size)
        ],
    }
    useful = sum(map(len, clips))

    def batch(groups: list[list[int]]) -> PackedPatches:
        padded = []
        for group in groups:
            longest = max(len(clips[i]) for i in group)
            padded += [F.pad(clips[i], (0, 0, 0, longest - len(clips[i]))) for i in group]
        return pack_patches(padded, mel)

    batches = {name: batch(group) for name, group in groups.items()}

    def encode(audio: PackedPatches) -> harness.Variant:
        def call(_: int) -> torch.Tensor:
            with torch.no_grad():
                return encoder(audio)

        return call

    variants = {name: encode(audio) for name, audio in batches.items()}
    taken = harness.seconds(variants, torch.device("cpu"), rounds=rounds)
    fastest = harness.summary(taken["packed"])["ms"]
    for name, audio in batches.items():
        figures = harness.summary(taken[name])
        yield {
            "what": "packing",
            "variant": name,
            "tokens": len(audio.patches),
            "useful": useful / len(audio.patches),
            **figures,
            "times_packed": figures["ms"] / fastest,
        }


def planning(count: int) -> Iterator[dict[str, Any]]:
    """The planner: ``count`` lengths into packs of 262,144 tokens."""
    rng = np.random.default_rng(0)
    lengths = (25 * 30 ** rng.random(count)).astype(np.int64)
    started = time.perf_counter()
    bins = ops.pack(lengths, 262_144)
    seconds = time.perf_counter() - started
    yield {
        "what": "planning",
        "variant": f"{count:,} clips, first-fit decreasing",
        "useful": float(lengths.sum() / (len(bins) * 262_144)),
        "ms": 1e3 * seconds,
    }


def main() -> int:
    """Prints the table."""
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a manifest of audio files")
    options = parser.parse_args()
    scale = options.scale or 1.0
    with tempfile.TemporaryDirectory() as folder:
        files = max(2, round(FILES * scale))
        manifest = options.data or write_files(Path(folder), files)
        parts = {
            "loading": partial(loading, manifest, files),
            "packing": partial(
                packing, min(options.rounds, 10), max(BUCKETS, round(BATCH * scale))
            ),
            "planning": partial(planning, round(CLIPS * scale)),
        }
        harness.finish(parts, f"data loading and packing on a CPU, scale {scale:g}", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
