"""What a step reads: packed audio, packed text, and what belongs to both. Nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slap_fast.ops import PackedPatches

IGNORE_INDEX = -100


class PackedText(NamedTuple):
    """Captions end to end, each with its [CLS] and [SEP]."""

    ids: Tensor
    """int64 [T]."""
    positions: Tensor
    """int32 [T, 1], the position inside the caption."""
    cu_seqlens: Tensor
    """int32 [B + 1]."""
    max_seqlen: int
    """Tokens of the longest caption."""

    @classmethod
    def from_ids(cls, captions: Sequence[Sequence[int]]) -> PackedText:
        """Packs token ids, one sequence per caption."""
        lengths = torch.tensor([0, *map(len, captions)])
        ids = torch.tensor([token for caption in captions for token in caption], dtype=torch.int64)
        starts = lengths.cumsum(0)
        positions = torch.arange(len(ids)) - starts[:-1].repeat_interleave(lengths[1:])
        return cls(
            ids, positions.int()[:, None], starts.int(), int(lengths.max()) if captions else 0
        )

    def next_token_labels(self) -> Tensor:
        """int64 [T]: the token that follows inside the caption; IGNORE_INDEX at each last one."""
        labels = torch.full_like(self.ids, IGNORE_INDEX)
        labels[:-1] = self.ids[1:]
        labels[self.cu_seqlens[1:].long() - 1] = IGNORE_INDEX
        return labels


class PackedBatch(NamedTuple):
    """One forward pass: B clips and their captions."""

    audio: PackedPatches
    """Patches of all clips."""
    text: PackedText
    """One caption per clip."""
    labels: Tensor
    """int64 [T of the text], the captions' next tokens."""
    groups: Tensor
    """int64 [B, M]: numbers of the meanings that are true of each clip, its caption's first, so
    that no clip is a negative of a caption that fits it."""
    mask_indices: Tensor
    """int64 [M], sorted: the patches that the student does not see."""
    masked_clips: int
    """Clips that have masked patches; they come first."""
    masked_tokens: int
    """Patches of those clips."""

    @property
    def masked_audio(self) -> PackedPatches:
        """The clips that have masked patches: all that self-distillation looks at."""
        patches, coords, cu_seqlens, max_seqlen = self.audio
        clips, tokens = self.masked_clips, self.masked_tokens
        return PackedPatches(patches[:tokens], coords[:tokens], cu_seqlens[: clips + 1], max_seqlen)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on another device."""

        def move(value):
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return PackedBatch(
            PackedPatches(*map(move, self.audio)),
            PackedText(*map(move, self.text)),
            *map(move, self[2:]),
        )
