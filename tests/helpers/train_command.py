"""``slap-fast train`` on a few sounds, for the tests of its options and its ends."""

from __future__ import annotations

from pathlib import Path

import soundfile

from slap_fast.cli import main
from tests.helpers import runs

WORDS = [
    "model.audio.hidden_size=16", "model.audio.num_heads=2", "model.audio.intermediate_size=16",
    "model.text.hidden_size=16", "model.text.num_heads=2", "model.text.num_layers=1",
    "model.caption.hidden_size=16", "model.caption.num_heads=2", "model.ssl.prototypes=16",
    "batch_size=7", "log_every=1",
]  # fmt: skip
SETTINGS = [word for setting in WORDS for word in ("--set", setting)]


def write_sounds(folder: Path, count: int) -> None:
    """Sounds of half a second, ``0.wav`` and so on, and their manifest ``m.csv``."""
    folder.mkdir(exist_ok=True)
    rows = ["path,caption"]
    for i in range(count):
        waveform = runs.clips(5).audio(i % 5).waveform[:8_000]
        soundfile.write(folder / f"{i}.wav", waveform, 16_000)
        rows.append(f"{i}.wav,sound {i}")
    (folder / "m.csv").write_text("\n".join(rows) + "\n")


def train(folder: Path, *words: str) -> int:
    """The exit code of ``slap-fast train --out FOLDER/run`` with these words."""
    return main(["train", "--out", str(folder / "run"), "--workers", "0", *words])


def start(folder: Path, steps: int, *words: str) -> int:
    """The exit code of a new run on ``FOLDER/m.csv``."""
    data = ["--data", str(folder / "m.csv"), "--set", f"steps={steps}"]
    return train(folder, *data, *SETTINGS, *words)
