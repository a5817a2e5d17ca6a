"""The log of a run: ``metrics.jsonl``, ``bad_clips.jsonl``, and TensorBoard events by option.

A run that resumes from a checkpoint first cuts both files back to it, so that no step and no bad
clip is listed twice, and no line is incomplete.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slap_fast.atomic_files import replace_file


class RunLog:
    """Log files of a run, written by rank 0.

    Args:
        out: the run's folder.
        step: steps done so far.
        writes: False on ranks other than 0.
        tensorboard: also write TensorBoard events.
    """

    def __init__(self, out: Path, step: int, *, writes: bool, tensorboard: bool) -> None:
        self._metrics, self._bad = out / "metrics.jsonl", out / "bad_clips.jsonl"
        self._writes, self._board = writes, None
        if writes:
            for path in (self._metrics, self._bad):
                _cut_back(path, step)
        if writes and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError(
                    "--tensorboard: found no package tensorboard, expected it: pip install "
                    "tensorboard"
                ) from None
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def metrics(self, metrics: dict[str, float]) -> None:
        """Writes a step's metrics."""
        self._append(self._metrics, [metrics])
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, metrics["step"])

    def validation(self, step: int, card: dict[str, Any]) -> None:
        """Writes the figures of an evaluation after step ``step``, a line of their own, under names
        such as ``validation/score`` and ``validation/retrieval/t2a/R@1``."""
        self.metrics({"step": step, **_numbers(card, "validation/")})

    def bad_clips(self, step: int, clips: Sequence[dict[str, str]]) -> None:
        """Lists the clips that step ``step`` (from 1) left out."""
        self._append(self._bad, [{"step": step, **clip} for clip in clips])

    def _append(self, path: Path, entries: Sequence[dict[str, Any]]) -> None:
        if self._writes and entries:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def left_out(out: Path) -> dict[str, str]:
    """Code of each clip in a run's ``bad_clips.jsonl``, by its name."""
    path = out / "bad_clips.jsonl"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8") as file:
        clips = map(json.loads, file)
        return {str(Path(clip["shard"]) / clip["key"]): clip["code"] for clip in clips}


def _numbers(card: dict[str, Any], prefix: str) -> dict[str, float]:
    """The numbers in a card by their path; what chance reaches is left out."""
    numbers: dict[str, float] = {}
    for name, value in card.items():
        if isinstance(value, dict) and name != "chance":
            numbers |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            numbers[f"{prefix}{name}"] = value
    return numbers


def _cut_back(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        replace_file(path, "".join(kept))
