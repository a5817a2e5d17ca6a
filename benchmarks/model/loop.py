"""A CLAP loop padded and packed: `python -m benchmarks.model.loop [--rounds STEPS] [--json FILE]`.

The loops are examples/clap_before.py and examples/clap_after.py, unchanged, on the same batches
of built-in sounds, 1 to 30 s log-uniform, from the same weights; a step of one, then of the other.
A step is all of it: collate, log-mel, both towers, loss, backward, optimiser. The losses must agree
at every step. Speed is audio over time, both of all steps together; once with clips as they come
and once sorted by length, the kindest to padding.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks import harness
from benchmarks.examples import clap_after, clap_before, padded, sounds

BATCH = 16
TOLERANCE = 1e-3
"""Of the losses, relative: two fp32 runs part slowly as they train."""


def same_start(*settings: Any) -> padded.PaddedAudioTower:
    """The padded tower with the weights that the packed one starts from."""
    weights = clap_after.AudioTower(*settings).state_dict()
    tower = padded.PaddedAudioTower(*settings)
    tower.load_state_dict(weights)
    return tower


def race(clips: list[Any], steps: int) -> dict[str, list[float]]:
    """Seconds of each step of both loops, in turn, after one that does not count."""
    loops = {"padded": clap_before.train(clips, BATCH), "packed": clap_after.train(clips, BATCH)}
    taken: dict[str, list[float]] = {name: [] for name in loops}
    for step in range(steps + 1):
        losses = {}
        for name, loop in loops.items():
            started = time.perf_counter()
            losses[name] = next(loop)
            taken[name].append(time.perf_counter() - started)
        expected, ours = losses["padded"], losses["packed"]
        assert abs(expected - ours) <= TOLERANCE * expected, f"step {step}: {expected} {ours}"
    return {name: seconds[1:] for name, seconds in taken.items()}


def rows_of(order: str, clips: list[Any], steps: int) -> Iterator[dict[str, Any]]:
    """One row per loop."""
    audio = sum(len(waveform) for waveform, _ in clips[BATCH:]) / 16_000
    taken = race(clips, steps)
    for name, seconds in taken.items():
        yield {
            "variant": name,
            "clips": order,
            "steps": steps,
            **harness.summary(seconds),
            "audio s/s": audio / sum(seconds),
            "times_packed": sum(seconds) / sum(taken["packed"]),
        }


def main() -> int:
    """Prints the table."""
    parser = harness.arguments(__doc__.splitlines()[0])
    options = parser.parse_args()
    longest = max(1.0, 30.0 * (options.scale or 1.0))
    clips = sounds.captioned_sounds(BATCH * (options.rounds + 1), longest)
    clap_before.PaddedAudioTower = same_start
    orders = {"as they come": clips, "sorted by length": sorted(clips, key=lambda c: len(c[0]))}
    parts = {
        order: partial(rows_of, order, ordered, options.rounds) for order, ordered in orders.items()
    }
    title = f"a CLAP training loop, padded and packed, clips up to {longest:g} s"
    harness.finish(parts, title, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
