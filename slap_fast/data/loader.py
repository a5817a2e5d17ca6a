"""Steps of packed batches from a source, in an order that depends on (seed, epoch, index) alone.

One dataset item is one optimiser step, so a run resumes at any step, with any number of workers, on
the very batches it would have seen.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from slap_fast import ops
from slap_fast.config import TrainConfig
from slap_fast.data.audio.track import AudioError
from slap_fast.data.augment import mask_indices, spec_augment
from slap_fast.data.order import Order
from slap_fast.data.patch_cache import PatchCache, decode_patches
from slap_fast.data.patches import pack_patches
from slap_fast.data.source import BadClip, ClipSource, bad_clip
from slap_fast.data.sources.mixture import MixedClips
from slap_fast.data.workers import worker_loader
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
    bad_indices: list[int]
    """Their indices in the source."""
    warned: list[str]
    """Warnings about the other clips, W_... of :class:`slap_fast.data.audio.decode.Audio`."""


class _Clip(NamedTuple):
    patches: Tensor
    caption: str
    caption_keys: list[Hashable]
    """Of all the clip's captions, that of ``caption`` first."""
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

    def most_bytes(self) -> int:
        """Of this rank's patches in a step, if all of its clips were the longest."""
        mel = self.config.model.mel
        longest = min(self.config.data.max_seconds, self.source.longest_seconds())
        tokens = mel.num_patches(round(longest * mel.sample_rate))
        return -(-self.batch_size // self.world_size) * tokens * mel.patch_dim * 4

    def clips_of(self, step: int) -> list[tuple[int, int]]:
        """(epoch, index) of the step's clips, drawn from one random order after the other."""
        return self._order.draw(step * self.batch_size, self.batch_size)

    def share_of(self, step: int) -> list[tuple[int, int]]:
        """This rank's clips of the step, in the step's order.

        The longest clip left goes to the rank with the fewest seconds: every rank computes the same
        split by itself, and the shares of all ranks together are the step.
        """
        clips = self.clips_of(step)
        seconds = [min(self.source.seconds(i), self.config.data.max_seconds) for _, i in clips]
        loads = [(0.0, rank) for rank in range(self.world_size)]
        share = []
        for position in sorted(range(len(clips)), key=lambda position: -seconds[position]):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + seconds[position], rank))
            if rank == self.rank:
                share.append(position)
        return [clips[position] for position in sorted(share)]

    def __getitem__(self, step: int) -> StepData:
        clips, bad, bad_indices, share = [], [], [], self.share_of(step)
        for epoch, index in share:
            try:
                clips.append(self._clip(epoch, index))
            except AudioError as error:
                bad.append(bad_clip(self.source, index, error))
                bad_indices.append(index)
        bins = ops.pack([len(clip.patches) for clip in clips], self.config.max_tokens)
        batches = [self._batch([clips[i] for i in sorted(members)]) for members in bins]
        warned = [code for clip in clips for code in clip.warnings]
        return StepData(batches, len(share), bad, bad_indices, warned)

    def _clip(self, epoch: int, index: int) -> _Clip:
        config, data = self.config, self.config.data
        mel, ssl = config.model.mel, config.model.ssl
        rng = np.random.default_rng((config.seed, epoch, index))
        captions = self.source.captions(index)
        if not captions:
            raise AudioError("E_PAIR", self.source.name(index), "no caption", "one to train on")
        caption = captions[rng.integers(len(captions))]
        seconds, start, end = self.source.seconds(index), 0.0, None
        if seconds > data.max_seconds:
            start = rng.uniform(0.0, seconds - data.max_seconds)
            end = start + data.max_seconds
        cached = self.cache.get(index) if self.cache is not None and end is None else None
        patches, warnings = cached or decode_patches(self.source, mel, index, start, end)
        packed = pack_patches([patches], mel)
        augmented = spec_augment(
            *packed[:3],
            mel,
            time_masks=data.time_masks,
            time_mask_share=data.time_mask_share,
            freq_masks=data.freq_masks,
            freq_mask_bins=data.freq_mask_bins,
            rng=rng,
        )
        mask = np.zeros(0, dtype=np.int64)
        if config.loss.ssl and rng.random() < ssl.mask_clips:
            mask = mask_indices(packed.cu_seqlens, ssl.mask_ratio, rng)
        keys = dict.fromkeys(self.source.caption_key(index, text) for text in (caption, *captions))
        return _Clip(augmented, caption, list(keys), mask, warnings)

    def _batch(self, clips: list[_Clip]) -> PackedBatch:
        clips = sorted(clips, key=lambda clip: len(clip.mask) == 0)
        audio = pack_patches([clip.patches for clip in clips], self.config.model.mel)
        text = PackedText.from_ids(self.tokenizer.encode([clip.caption for clip in clips]))
        groups = [[_number(key) for key in clip.caption_keys] for clip in clips]
        width = max(map(len, groups))
        groups = torch.tensor([keys + keys[:1] * (width - len(keys)) for keys in groups])
        starts = audio.cu_seqlens.tolist()
        masks = [clip.mask + start for clip, start in zip(clips, starts, strict=False)]
        masked = torch.from_numpy(np.concatenate(masks))
        masked_clips = sum(len(clip.mask) > 0 for clip in clips)
        counts = masked_clips, starts[masked_clips]
        return PackedBatch(audio, text, text.next_token_labels(), groups, masked, *counts)


def _number(caption_key: Hashable) -> int:
    """A hash of 63 bits that is the same in every process, unlike Python's own of a string."""
    digest = hashlib.blake2b(repr(caption_key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def steps_from(
    data: TrainSteps, first: int, workers: int, device: torch.device | None = None
) -> Iterator[StepData]:
    """The run's steps from ``first`` on, prefetched by ``workers`` processes (0: by this one).

    For a GPU in pinned memory. For a CPU, where all patches are cached, this process makes the
    steps: a worker would only copy them through shared memory. A GPU would wait for this process.
    """
    on_gpu = device is not None and device.type == "cuda"
    if data.cache is not None and data.cache.is_complete and not on_gpu:
        workers = 0
    options = {"sampler": range(first, len(data)), "pin_memory": on_gpu}
    options["item_bytes"] = data.most_bytes()
    # Starting draws a number, and torch's own generator belongs to the training state.
    return iter(worker_loader(data, workers, generator=torch.Generator(), **options))
