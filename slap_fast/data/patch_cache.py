"""Patches of a source's clips: decoded on request, or kept in memory for all epochs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from slap_fast.config import MelConfig, TrainConfig
from slap_fast.console import Progress
from slap_fast.data.audio.track import AudioError
from slap_fast.data.patches import clip_patches
from slap_fast.data.source import ClipSource
from slap_fast.data.workers import shared_memory_has, worker_loader


def decode_patches(
    source: ClipSource, mel: MelConfig, index: int, start: float = 0.0, end: float | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Patches [T, patch_dim] and warnings of a clip or a part of it.

    Raises AudioError; ValueError where the source has another sample rate than the mel.
    """
    audio = source.audio(index, start, end)
    rate = round(len(audio.waveform) / audio.seconds) if audio.seconds else mel.sample_rate
    if rate != mel.sample_rate:
        raise ValueError(
            f"source: found audio at {rate} Hz, expected model.mel.sample_rate {mel.sample_rate}"
        )
    return clip_patches(audio.waveform, mel).patches, audio.warnings


class PatchCache:
    """Patches of the clips that need no random crop, computed once, in one shared block."""

    def __init__(self, tokens: int, patch_dim: int, *, is_complete: bool) -> None:
        """With room for ``tokens`` patches; ``is_complete``: it is to hold all clips."""
        self.is_complete = is_complete
        # One block: a shared tensor per clip would hold a file descriptor each. Filled in place:
        # concatenating clips at the end would take two or three times the memory.
        self._patches = torch.empty(tokens, patch_dim)
        if shared_memory_has(self._patches.nbytes):
            self._patches.share_memory_()
        self._used = 0
        self._spans: dict[int, tuple[int, int, tuple[str, ...]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Forked workers have the block anyway. One that is sent would pass through the shared
        # memory that has no room for it, so these workers decode.
        if self._patches.is_shared():
            return self.__dict__
        return {**self.__dict__, "_patches": self._patches[:0].clone(), "_spans": {}}

    def add(self, index: int, patches: Tensor, warnings: tuple[str, ...]) -> None:
        """Keeps a copy of a clip's patches, [T, patch_dim], where there is room for them."""
        start, end = self._used, self._used + len(patches)
        if end <= len(self._patches):
            self._patches[start:end] = patches
            self._spans[index] = start, end, warnings
            self._used = end

    def get(self, index: int) -> tuple[Tensor, tuple[str, ...]] | None:
        """([T, patch_dim] float32, not to be written to; warnings), None for a clip not kept."""
        if index not in self._spans:
            return None
        start, end, warnings = self._spans[index]
        return self._patches[start:end], warnings

    @classmethod
    def build(
        cls, source: ClipSource, config: TrainConfig, workers: int, progress: bool
    ) -> PatchCache | None:
        """Decodes the clips of at most ``data.max_seconds``; None when there are none, or when they
        exceed ``data.cache_gb``.

        A clip that cannot be decoded is left out: training meets it again, and counts it. So is one
        that is longer than the source declares, where there is no room for it.
        """
        mel, data = config.model.mel, config.data
        if len(source) * mel.num_patches(1) * mel.patch_dim * 4 > data.cache_gb * 1e9:
            return None
        seconds = [source.seconds(i) for i in range(len(source))]
        keep = [i for i, s in enumerate(seconds) if s <= data.max_seconds]
        tokens = sum(mel.num_patches(round(seconds[i] * mel.sample_rate)) for i in keep)
        if not 0 < tokens * mel.patch_dim * 4 <= data.cache_gb * 1e9:
            return None
        longest = max(mel.num_patches(round(seconds[i] * mel.sample_rate)) for i in keep)
        item_bytes = longest * mel.patch_dim * 4
        clips = _UncroppedClips(source, mel, keep)
        loader = worker_loader(clips, workers, item_bytes=item_bytes)
        bar = Progress(loader, desc="decoding", unit="clip", show=progress)
        cache = cls(tokens, mel.patch_dim, is_complete=len(keep) == len(source))
        for index, entry in zip(keep, bar, strict=True):
            if entry is not None:
                cache.add(index, *entry)
        return cache


class _UncroppedClips(Dataset):
    def __init__(self, source: ClipSource, mel: MelConfig, keep: list[int]) -> None:
        self.source, self.mel, self.keep = source, mel, keep

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, item: int) -> tuple[Tensor, tuple[str, ...]] | None:
        try:
            return decode_patches(self.source, self.mel, self.keep[item])
        except AudioError:
            return None
