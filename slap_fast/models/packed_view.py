"""A padded batch as one packed run: where its tokens are, and which may see which."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slap_fast.packed import starts_of


class PackedView(NamedTuple):
    """A padded [B, L] batch as one packed run: the real tokens first, then the padding."""

    order: Tensor | None
    """int64 [B x L], the position in the batch of each token of the run; None: no padding."""
    cu_seqlens: Tensor
    """int32 [B + 1]."""
    max_seqlen: int
    """L, which no sequence exceeds."""

    @classmethod
    def unpadded(cls, batch_size: int, length: int, device: torch.device) -> PackedView:
        """B sequences of L tokens each."""
        starts = torch.arange(batch_size + 1, device=device, dtype=torch.int32) * length
        return cls(None, starts, length)

    @classmethod
    def from_mask(cls, mask: Tensor) -> PackedView:
        """B sequences of the tokens where ``mask``, bool [B, L], is true; left or right padded."""
        starts = starts_of(mask.sum(1))
        # A stable sort, not nonzero, whose shape would depend on values: a sync, a graph break.
        order = (~mask).flatten().to(torch.uint8).argsort(stable=True)
        return cls(order, starts, mask.shape[1])

    @classmethod
    def from_sequence_numbers(cls, numbers: Tensor) -> PackedView:
        """Several sequences in each of B lines: runs of equal numbers in int [B, L]."""
        first = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
        starts = F.pad(first.flatten().nonzero().flatten(), (0, 1), value=numbers.numel())
        return cls(None, starts.int(), numbers.shape[1])

    def places(self, batch_size: int, length: int) -> tuple[Tensor, Tensor]:
        """Of each position of the batch, two int64 [B, L]: the number of its sequence, and how far
        it is from that sequence's end. All padding has one number, one more than the last."""
        ends = self.cu_seqlens[1:].long()
        if self.order is None:
            token = torch.arange(batch_size * length, device=ends.device)
        else:
            token = self.order.argsort()
        number = torch.searchsorted(ends, token, right=True)
        from_end = ends[number.clamp(max=len(ends) - 1)] - token
        return number.view(batch_size, length), from_end.view(batch_size, length)

    def num_tokens(self) -> int | None:
        """Of the real tokens, read back from the device; None where all are."""
        count = int(self.cu_seqlens[-1])
        return None if self.order is None or count == len(self.order) else count

    def unpad(self, x: Tensor) -> Tensor:
        """[B, H, L, D] -> [B x L, H, D]."""
        tokens = x.transpose(1, 2).flatten(0, 1)
        return tokens if self.order is None else tokens.index_select(0, self.order)

    def pad(self, tokens: Tensor, batch_size: int) -> Tensor:
        """[B x L, H, D] -> [B, L, H, D], 0 at the padding."""
        if self.order is not None:
            tokens = tokens.index_select(0, self.order.argsort())
        return tokens.unflatten(0, (batch_size, -1))


class PackedMask(NamedTuple):
    """What stands in for an attention mask."""

    queries: PackedView
    """The view of the queries' tokens."""
    keys: PackedView
    """The view of the keys': the same, or longer by what a cache holds."""
    causal: bool | None
    """No key after the query's position; None: the attention module decides."""
    windowed: bool
    """The layer has a sliding window, whose size the attention module passes."""
    num_tokens: int | None = None
    """The real tokens of a batch with padding, where they were counted."""
    padded: PackedMask | None = None
    """Of a batch without its padding: the mask that it had with it."""

    @classmethod
    def from_keys(cls, mask: Tensor) -> PackedMask | None:
        """A mask [B, 1, L or 1, L], bool or added to the scores, that hides the same keys from
        every query; None for any other. Reads values back from the device."""
        if mask.dtype != torch.bool:
            if ((mask != 0) & (mask > -1e4)).any():
                return None
            mask = mask == 0
        if mask.shape[1] != 1 or (mask != mask[:, :, :1]).any():
            return None
        view = PackedView.from_mask(mask[:, 0, 0])
        return cls(view, view, False, False, view.num_tokens())

    def without_padding(self) -> PackedMask:
        """The mask of the real tokens as one row, B = 1."""
        _, starts, longest = self.queries
        row = PackedView(None, starts, longest)
        return PackedMask(row, row, self.causal, self.windowed, padded=self)
