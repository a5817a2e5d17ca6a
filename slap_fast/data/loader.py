"""Steps of packed batches from a source, in an order that depends on (seed, epoch, index) alone.

One dataset item is one optimiser step, so a run resumes at any step, with any number of workers, on
the very batches it would have seen.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import heapq
import multiprocessing
import os
import signal
import threading
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from slap_fast import ops
from slap_fast.config import MelConfig, TrainConfig
from slap_fast.data.audio.decode import AudioError
from slap_fast.data.augment import mask_indices, spec_augment
from slap_fast.data.order import Order
from slap_fast.data.patches import clip_patches, pack_patches
from slap_fast.data.source import BadClip, ClipSource, bad_clip
from slap_fast.data.sources.mixture import MixedClips
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.packed import PackedBatch, PackedText


class StepData(NamedTuple):
    """One optimiser step."""

    batches: list[PackedBatch]
    """Forward passes of at most ``max_tokens`` each; together the step's clips."""
    seen: int
    """Clips drawn, good and bad."""
    bad: list[BadClip]
    """Clips left out, each with its reason."""
    warned: list[str]
    """Warnings about the other clips, W_... of :class:`slap_fast.data.audio.decode.Audio`."""


class _Clip(NamedTuple):
    patches: Tensor
    caption: str
    meanings: list[Hashable]
    """Of all the clip's captions, that of the chosen one first."""
    mask: np.ndarray
    warnings: tuple[str, ...]


class TrainSteps(Dataset):
    """Steps ``0 .. config.steps - 1`` of a run as a map-style dataset."""

    def __init__(
        self,
        source: ClipSource,
        tokenizer: CaptionTokenizer,
        config: TrainConfig,
        cache: PatchCache | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """With several ranks, item ``i`` is this rank's share of step ``i``."""
        if not len(source):
            raise ValueError("source: found no clips, expected at least one to train on")
        mel = config.model.mel
        longest = min(config.data.max_seconds, source.longest_seconds())
        tokens = mel.num_patches(round(longest * mel.sample_rate))
        if tokens > config.max_tokens:
            raise ValueError(
                f"max_tokens: found {config.max_tokens}, expected at least {tokens}, the tokens of "
                f"one clip of {longest:.1f} s; or lower data.max_seconds"
            )
        self.source, self.tokenizer, self.config, self.cache = source, tokenizer, config, cache
        self.batch_size = min(config.batch_size, len(source))
        parts = source.parts if isinstance(source, MixedClips) else [(len(source), 1.0)]
        self._order = Order(config.seed, *zip(*parts, strict=True))
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.config.steps

    def clips_of(self, step: int) -> list[tuple[int, int]]:
        """(epoch, index) of the step's clips: one random order after the other, end to end."""
        return self._order.draw(step * self.batch_size, self.batch_size)

    def share_of(self, step: int) -> list[tuple[int, int]]:
        """This rank's clips of the step, in the step's order.

        The longest clip left goes to the rank with the fewest seconds: every rank comes to the same
        split by itself, and the shares of all ranks are the step.
        """
        clips = self.clips_of(step)
        seconds = [min(self.source.seconds(i), self.config.data.max_seconds) for _, i in clips]
        loads = [(0.0, rank) for rank in range(self.world_size)]
        mine = []
        for place in sorted(range(len(clips)), key=lambda place: -seconds[place]):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + seconds[place], rank))
            if rank == self.rank:
                mine.append(place)
        return [clips[place] for place in sorted(mine)]

    def __getitem__(self, step: int) -> StepData:
        clips, bad, share = [], [], self.share_of(step)
        for epoch, index in share:
            try:
                clips.append(self._clip(epoch, index))
            except AudioError as error:
                bad.append(bad_clip(self.source, index, error))
        bins = ops.pack([len(clip.patches) for clip in clips], self.config.max_tokens)
        batches = [self._batch([clips[i] for i in sorted(members)]) for members in bins]
        warned = [code for clip in clips for code in clip.warnings]
        return StepData(batches, len(share), bad, warned)

    def _clip(self, epoch: int, index: int) -> _Clip:
        config, mel = self.config, self.config.model.mel
        rng = np.random.default_rng((config.seed, epoch, index))
        captions = self.source.captions(index)
        caption = captions[rng.integers(len(captions))]
        start, end = _crop(self.source.seconds(index), config.data.max_seconds, rng)
        kept = self.cache.get(index) if self.cache is not None and end is None else None
        patches, warnings = kept or _patches(self.source, mel, index, start, end)
        one = pack_patches([patches], mel)
        augmented = spec_augment(
            one.patches,
            one.coords,
            one.cu_seqlens,
            mel,
            time_masks=config.data.time_masks,
            time_mask_share=config.data.time_mask_share,
            freq_masks=config.data.freq_masks,
            freq_mask_bins=config.data.freq_mask_bins,
            rng=rng,
        )
        mask = np.zeros(0, dtype=np.int64)
        ssl = config.model.ssl
        if config.loss.ssl and rng.random() < ssl.mask_clips:
            mask = mask_indices(one.cu_seqlens, ssl.mask_ratio, rng)
        meanings = dict.fromkeys(self.source.meaning(index, text) for text in (caption, *captions))
        return _Clip(augmented, caption, list(meanings), mask, warnings)

    def _batch(self, clips: list[_Clip]) -> PackedBatch:
        clips = sorted(clips, key=lambda clip: len(clip.mask) == 0)
        audio = pack_patches([clip.patches for clip in clips], self.config.model.mel)
        text = PackedText.from_ids(self.tokenizer.encode([clip.caption for clip in clips]))
        groups = [[_number(meaning) for meaning in clip.meanings] for clip in clips]
        most = max(map(len, groups))
        groups = [row + row[:1] * (most - len(row)) for row in groups]
        starts = audio.cu_seqlens.tolist()
        masks = [
            torch.as_tensor(clip.mask) + start for clip, start in zip(clips, starts, strict=False)
        ]
        masked_clips = sum(len(clip.mask) > 0 for clip in clips)
        return PackedBatch(
            audio,
            text,
            text.next_token_labels(),
            torch.tensor(groups),
            torch.cat(masks),
            masked_clips,
            starts[masked_clips],
        )


def _patches(
    source: ClipSource, mel: MelConfig, index: int, start: float = 0.0, end: float | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """(patches [T, patch_dim], warnings) of a clip or its part. Raises AudioError."""
    audio = source.audio(index, start, end)
    return clip_patches(audio.waveform, mel).patches, audio.warnings


def _number(meaning: Hashable) -> int:
    """63 bits that are the same in every process, as Python's own hash of a string is not."""
    digest = hashlib.blake2b(repr(meaning).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _crop(
    seconds: float, max_seconds: float, rng: np.random.Generator
) -> tuple[float, float | None]:
    if seconds <= max_seconds:
        return 0.0, None
    start = rng.uniform(0.0, seconds - max_seconds)
    return start, start + max_seconds


class PatchCache:
    """Patches of the clips that need no random crop, computed once, in one shared block."""

    def __init__(self, tokens: int, patch_dim: int, *, whole: bool) -> None:
        """With room for ``tokens`` patches; ``whole``: of all the source's clips."""
        self.whole = whole
        # One block: a shared tensor per clip would hold a file descriptor each. Filled in place, as
        # clips put together at the end are there two or three times.
        self._patches = torch.empty(tokens, patch_dim).share_memory_()
        self._used = 0
        self._spans: dict[int, tuple[int, int, tuple[str, ...]]] = {}

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
        do not fit ``data.cache_gb``.

        A clip that cannot be decoded is left out: training meets it again, and counts it. So is one
        that is longer than the source says, where that leaves no room.
        """
        mel, data = config.model.mel, config.data
        if len(source) * mel.num_patches(1) * mel.patch_dim * 4 > data.cache_gb * 1e9:
            return None
        seconds = [source.seconds(i) for i in range(len(source))]
        keep = [i for i, s in enumerate(seconds) if s <= data.max_seconds]
        tokens = sum(mel.num_patches(round(seconds[i] * mel.sample_rate)) for i in keep)
        if not 0 < tokens * mel.patch_dim * 4 <= data.cache_gb * 1e9:
            return None
        loader = _loader(_Patches(source, mel, keep), workers)
        bar = tqdm(loader, desc="decoding", unit="clip", disable=not progress)
        cache = cls(tokens, mel.patch_dim, whole=len(keep) == len(source))
        for index, found in zip(keep, bar, strict=True):
            if found is not None:
                cache.add(index, *found)
        return cache


class _Patches(Dataset):
    def __init__(self, source: ClipSource, mel: MelConfig, keep: list[int]) -> None:
        self.source, self.mel, self.keep = source, mel, keep

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, item: int) -> tuple[Tensor, tuple[str, ...]] | None:
        try:
            return _patches(self.source, self.mel, self.keep[item])
        except AudioError:
            return None


def _loader(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    """Items one by one, from processes that end when this one does."""
    ending = multiprocessing.RawValue(ctypes.c_bool)
    # Before multiprocessing says goodbye to what is still there: SIGTERM, and waits for the end.
    atexit.register(setattr, ending, "value", True)
    begin = functools.partial(_begin_worker, ending)
    return DataLoader(
        dataset, batch_size=None, num_workers=workers, worker_init_fn=begin, **options
    )


def _begin_worker(ending: Any, _: int) -> None:
    # Ctrl-C, torchrun and SLURM signal the whole process group; the main process saves, and ends
    # the workers itself. Where one of them dies, DataLoader raises in the middle of that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    # DataLoader's own watch asks for the parent's number, which under forkserver (the default on
    # Linux from Python 3.14 on) is that of the server, and the server waits for its workers.
    multiprocessing.parent_process().join()
    os._exit(1)


def steps_from(
    data: TrainSteps, first: int, workers: int, device: torch.device | None = None
) -> Iterator[StepData]:
    """The run's steps from ``first`` on, prefetched by ``workers`` processes (0: in this one).

    For a GPU in pinned memory. For a CPU, where all patches are cached, this process makes the
    steps, as a worker would only copy them through shared memory; a GPU would wait for that.
    """
    on_gpu = device is not None and device.type == "cuda"
    if data.cache is not None and data.cache.whole and not on_gpu:
        workers = 0
    return iter(
        _loader(
            data,
            workers,
            sampler=range(first, len(data)),
            pin_memory=on_gpu,
            # Its own: a start draws from it, and a run is saved with torch's.
            generator=torch.Generator(),
        )
    )
