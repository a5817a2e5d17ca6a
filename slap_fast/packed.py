"""Packed clips and captions, the input of a step, and where each token is inside its sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


def starts_of(lengths: Sequence[int] | Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """Lengths of B sequences -> [B + 1], where each begins and the last ends (``cu_seqlens``)."""
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    return F.pad(lengths.cumsum(0), (1, 0)).to(dtype)


def positions(lengths: Sequence[int] | Tensor) -> Tensor:
    """Lengths of B sequences -> int64 [T], the position of each token inside its sequence."""
    starts = starts_of(lengths, torch.int64)
    token = torch.arange(int(starts[-1]), device=starts.device)
    return token - starts[:-1].repeat_interleave(starts.diff())


def patch_coords(lengths: Sequence[int] | Tensor, patches_per_column: int) -> Tensor:
    """Lengths of B clips, in patches -> int32 [T, 2], the (time, freq) of each patch."""
    return column_and_band(positions(lengths), patches_per_column)


def column_and_band(position: Tensor, patches_per_column: int) -> Tensor:
    """Positions of patches inside their clips [T] -> int32 [T, 2], their (time, freq)."""
    return torch.stack([position // patches_per_column, position % patches_per_column], 1).int()


class PackedPatches(NamedTuple):
    """Audio clips as one packed run of log-mel patches."""

    patches: Tensor
    """float32 [T, patch_dim]. A patch is its 16 frames x 16 bins, frame-major; a clip's patches
    come column by column, lowest bins first."""
    coords: Tensor
    """int32 [T, 2], the patch's (time, freq) inside its clip."""
    cu_seqlens: Tensor
    """int32 [B + 1], where each clip begins."""
    max_seqlen: int
    """Patches of the longest clip."""


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
        lengths = list(map(len, captions))
        ids = torch.tensor([token for caption in captions for token in caption], dtype=torch.int64)
        position = positions(lengths).int()[:, None]
        return cls(ids, position, starts_of(lengths), max(lengths, default=0))

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor) -> PackedText:
        """Packs the batch of a tokenizer that pads, such as transformers' with ``padding=True``.

        Args:
            input_ids: integers [B, L], a caption per row; padding may be on either side.
            attention_mask: [B, L], 1 or True at real tokens.

        Raises:
            ValueError: the two differ in the number of captions.
        """
        rows = zip(input_ids, attention_mask.bool(), strict=True)
        return cls.from_ids([ids[is_real].tolist() for ids, is_real in rows])

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
    """int64 [B, M], the caption keys of each clip, its own caption's first. Clip i and caption j
    are a positive pair where ``groups[j, 0]`` is among ``groups[i]``, else a negative one."""
    mask_indices: Tensor
    """int64 [M], sorted: the patches that the student does not see."""
    masked_clips: int
    """Clips that have masked patches; they come first."""
    masked_tokens: int
    """Patches of those clips."""

    @classmethod
    def from_lengths(
        cls,
        patches: Tensor,
        lengths: Sequence[int],
        ids: Tensor,
        text_lengths: Sequence[int],
        *,
        patches_per_column: int = 4,
        groups: Tensor | None = None,
        mask_indices: Tensor | None = None,
    ) -> PackedBatch:
        """A batch from a loader of your own: clips and captions end to end, and their lengths.

        Args:
            patches: [T, patch_dim], B clips, each of whole columns.
            lengths: patches of each clip.
            ids: int64 [T of the text], B captions.
            text_lengths: tokens of each caption.
            patches_per_column: patches that cover the same frames.
            groups: as the field; None: a clip's only positive is its own caption.
            mask_indices: as the field; None: nothing is masked.

        Raises:
            ValueError: lengths that do not add up, or do not pair.
        """
        packs = ("lengths", patches, lengths), ("text_lengths", ids, text_lengths)
        for name, rows, parts in packs:
            if sum(parts) != len(rows):
                raise ValueError(f"{name}: found a sum of {sum(parts)}, expected {len(rows)} rows")
        if len(lengths) != len(text_lengths):
            captions = f"{len(text_lengths)} captions"
            raise ValueError(f"text_lengths: found {captions}, expected {len(lengths)}")
        text = PackedText.from_ids([part.tolist() for part in ids.split(list(text_lengths))])
        coords = patch_coords(lengths, patches_per_column)
        audio = PackedPatches(patches, coords, starts_of(lengths), max(lengths, default=0))
        if groups is None:
            groups = torch.arange(len(lengths))[:, None]
        masked = (mask_indices, len(lengths), len(patches))
        if mask_indices is None:
            masked = (torch.zeros(0, dtype=torch.int64), 0, 0)
        return cls(audio, text, text.next_token_labels(), groups, *masked)

    @classmethod
    def empty(cls, patch_dim: int) -> PackedBatch:
        """No clips: what a rank goes through while the others still have some."""
        text = PackedText.from_ids([])
        audio = PackedPatches(torch.zeros(0, patch_dim), patch_coords([], 1), starts_of([]), 0)
        nothing = torch.zeros(0, dtype=torch.int64)
        return cls(audio, text, nothing, nothing[:, None], nothing, 0, 0)

    @property
    def masked_audio(self) -> PackedPatches:
        """The clips that have masked patches, self-distillation's input."""
        patches, coords, cu_seqlens, max_seqlen = self.audio
        clips, tokens = self.masked_clips, self.masked_tokens
        return PackedPatches(patches[:tokens], coords[:tokens], cu_seqlens[: clips + 1], max_seqlen)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on another device."""

        def move(value):
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        audio, text = PackedPatches(*map(move, self.audio)), PackedText(*map(move, self.text))
        return PackedBatch(audio, text, *map(move, self[2:]))
