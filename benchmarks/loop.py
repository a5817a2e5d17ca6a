"""A CLAP loop padded and packed: `python benchmarks/loop.py [--rounds STEPS] [--json FILE]`.

The loops are examples/clap_before.py and examples/clap_after.py as they stand, on the same batches
of built-in sounds, 1 to 30 s log-uniform, from the same weights; a step of one, then of the other.
A step is all of it: collate, log-mel, both towers, loss, backward, optimiser. The losses must agree
at every step; speeds and ratios are medians over steps. The third row is the padded loop on clips
sorted by length, the kindest to padding.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import harness

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import clap_after
import clap_before
from padded import PaddedAudioTower
from sounds import captioned_sounds

BATCH = 16
TOLERANCE = 1e-3
"""Of the losses, relative: two fp32 runs part slowly as they train."""


def same_start(*settings: Any) -> PaddedAudioTower:
    """The padded tower with the weights that the packed one starts from."""
    weights = clap_after.AudioTower(*settings).state_dict()
    tower = PaddedAudioTower(*settings)
    tower.load_state_dict(weights)
    return tower


def main() -> int:
    """Prints the table."""
    parser = harness.arguments(__doc__.splitlines()[0])
    options = parser.parse_args()
    steps = options.rounds
    longest = 30.0 * (options.scale or 1.0)
    clips = captioned_sounds(BATCH * (steps + 1), max(1.0, longest))
    clap_before.PaddedAudioTower = same_start
    ordered = sorted(clips, key=lambda clip: len(clip[0]))
    loops = {
        "padded": clap_before.train(clips, BATCH),
        "packed": clap_after.train(clips, BATCH),
        "padded, sorted by length": clap_before.train(ordered, BATCH),
    }
    taken: dict[str, list[float]] = {name: [] for name in loops}
    for step in range(steps + 1):
        losses = {}
        for name, loop in loops.items():
            started = time.perf_counter()
            losses[name] = next(loop)
            if step:  # the first warms up
                taken[name].append(time.perf_counter() - started)
        padded, packed = losses["padded"], losses["packed"]
        assert abs(padded - packed) <= TOLERANCE * padded, f"step {step}: {padded} {packed}"
    rows = []
    for name, seconds in taken.items():
        used = ordered if "sorted" in name else clips
        audio = [
            sum(len(waveform) for waveform, _ in used[BATCH * step : BATCH * (step + 1)]) / 16_000
            for step in range(1, steps + 1)
        ]
        speeds = [a / s for a, s in zip(audio, seconds, strict=True)]
        ratios = [s / packed for s, packed in zip(seconds, taken["packed"], strict=True)]
        rows.append(
            {
                "variant": name,
                "steps": steps,
                **harness.summary(seconds),
                "audio s/s": statistics.median(speeds),
            }
        )
        if "sorted" not in name:  # its steps hold other clips
            rows[-1]["times_packed"] = statistics.median(ratios)
    harness.finish(rows, "a CLAP training loop, padded and packed", options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
