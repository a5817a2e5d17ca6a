"""The speed of a run: tokens and seconds of audio per second, and model FLOPs utilisation."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from slap_fast import distributed
from slap_fast.config import TrainConfig
from slap_fast.diagnostics import flops
from slap_fast.packed import PackedBatch
from slap_fast.training.step import uses_bf16


class Speed:
    """Counts tokens between two lines of metrics."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        mel = config.model.mel
        self.tokens = 0
        """Audio tokens of all ranks since the last figures."""
        self._config, self._since = config, time.perf_counter()
        column = mel.patch_time * mel.hop_length / mel.sample_rate
        self._seconds_per_token = column / mel.patches_per_column
        self._peak = None
        if device.type == "cuda" and uses_bf16(config, device):
            peak = flops.datasheet_peak(torch.cuda.get_device_name(device))
            self._peak = peak and peak * distributed.world_size()

    def figures(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """``tokens_per_second``, ``audio_seconds_per_second`` and, on a GPU whose peak is known,
        ``mfu``, of all ranks together; it starts to count again.

        Args:
            batches: this rank's in the last step, whose FLOPs per token stand for all.
        """
        now = time.perf_counter()
        speed = self.tokens / (now - self._since)
        self.tokens, self._since = 0, now
        figures = {
            "tokens_per_second": speed,
            "audio_seconds_per_second": speed * self._seconds_per_token,
        }
        tokens = sum(len(batch.audio.patches) for batch in batches)
        if self._peak is not None and tokens:
            shapes = [flops.StepShape.of(batch) for batch in batches]
            work = sum(flops.step(self._config.model, self._config.loss, x) for x in shapes)
            figures["mfu"] = work / tokens * speed / self._peak
        return figures
