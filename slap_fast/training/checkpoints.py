"""The checkpoints that a run writes as it trains."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from slap_fast import atomic_files, distributed
from slap_fast.checkpoint.format import write_files
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.training.state import TrainState, snapshot


class Checkpoints:
    """``last/``, with the one before it as ``last.old/``, and ``best/``, written by rank 0.

    A context that waits at its end for what is still being written. All ranks call the methods.

    Args:
        state: the run; what it is now needs no saving.
        tokenizer: the captions' tokenizer.
        out: the run's folder.
        run: the content of ``run.json``.
    """

    def __init__(
        self, state: TrainState, tokenizer: CaptionTokenizer, out: Path, run: dict[str, Any]
    ) -> None:
        self._state, self._tokenizer, self._out, self._run = state, tokenizer, out, run
        self._writer = atomic_files.BackgroundWriter(state.config.saving == "background")
        self._saved = self._progress()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.__exit__(*exception)

    def save_best(self, card: dict[str, Any]) -> None:
        """Saves the model with the evaluation's ``card`` as the best one."""
        self._write("best", card)

    def save_last(self, card: dict[str, Any] | None = None) -> None:
        """Saves the run, unless nothing has changed since the last time."""
        if self._progress() != self._saved:
            self._write("last", card or {})
            self._saved = self._progress()

    def _progress(self) -> tuple[int, int]:
        return self._state.step, self._state.evaluated

    def _write(self, name: str, card: dict[str, Any]) -> None:
        writes = distributed.rank() == 0
        if not writes and self._state.config.ranks != "fsdp":
            return  # rank 0 holds all of the state
        files = snapshot(self._state, self._tokenizer, card, self._run)
        fill = functools.partial(write_files, files=files)
        path, keep_old = self._out / name, name == "last"
        if writes:
            self._writer.submit(lambda: atomic_files.write_folder(path, fill, keep_old=keep_old))
