"""Batches of two samples for small transformers models, the second one padded where it can be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Inputs = dict[str, Tensor]

MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])


def ids() -> Tensor:
    return torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(3))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def text() -> Inputs:
    return {"input_ids": ids(), "attention_mask": MASK}


def pairs() -> Inputs:
    return {**text(), "decoder_input_ids": ids().flip(1)}


def crossing() -> Inputs:
    mask = torch.tensor([[1] * 9, [1] * 3 + [0] * 6])
    return {
        **text(),
        "encoder_hidden_states": noise(2, 9, 32),
        "encoder_attention_mask": mask,
    }


def frames() -> Inputs:
    mask = torch.tensor([[1] * 20, [1] * 12 + [0] * 8])
    return {"input_features": noise(2, 20, 16), "attention_mask": mask}


def samples() -> Inputs:
    mask = torch.tensor([[1] * 80, [1] * 48 + [0] * 32])
    return {"input_values": noise(2, 80), "attention_mask": mask}


def spectrogram() -> Inputs:
    return {"input_features": noise(2, 8, 48)}


def spoken() -> Inputs:
    return {**spectrogram(), "decoder_input_ids": ids()[:, :5]}


def pixels(size: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": noise(2, 3, size, size)}


def captioned() -> Inputs:
    return {**text(), **pixels(32)()}


def film() -> Inputs:
    return {"pixel_values": noise(2, 2, 3, 32, 32)}
