"""Small inputs for somebody else's model, made from its forward's signature and its config.

Random, of two samples, the second of them padded where the model takes a mask. Only what a model
runs on is used: of each input several shapes are tried, since no interface names the right one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 12
SHORT = 7
"""Real tokens of the second sample."""

Inputs = dict[str, Tensor]


def probe_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Yields inputs that the model runs on: padded at the right, at the left, and not padded.

    ``model`` is a transformers model in eval mode. Nothing is yielded for one that takes something
    else than text, pixels or audio.
    """
    names = inspect.signature(type(model).forward).parameters
    shapes = {name: list(make(model)) for name, make in _MAKERS.items() if name in names}
    shapes = {name: tensors for name, tensors in shapes.items() if tensors}
    main = {name: shapes[name] for name in _main_names(model) if name in shapes}
    for chosen in (shapes, main):
        for choice in product(*chosen.values()):
            inputs = dict(zip(chosen, choice, strict=True))
            if inputs and _runs(model, inputs):
                yield from _with_masks(model, inputs, names)
                return


def is_left_padded(inputs: Inputs) -> bool:
    """Whether the second sample begins with padding."""
    return _mask_of_tokens(inputs) and not inputs["attention_mask"][1, 0]


def is_right_padded(inputs: Inputs) -> bool:
    """Whether the second sample ends with padding."""
    return _mask_of_tokens(inputs) and not inputs["attention_mask"][1, -1]


def _mask_of_tokens(inputs: Inputs) -> bool:
    return "attention_mask" in inputs and inputs["attention_mask"].ndim == 2


def _main_names(model: Any) -> list[str]:
    return [model.main_input_name, "decoder_input_ids", "encoder_hidden_states"]


def _with_masks(model: nn.Module, inputs: Inputs, names: Any) -> Iterator[Inputs]:
    yield inputs
    if "attention_mask" not in names:
        return
    for mask in _masks_of_pairs(model):
        if _runs(model, {**inputs, "attention_mask": mask}):
            yield {**inputs, "attention_mask": mask}
            return
    for mask in _masks(next(iter(inputs.values()))):
        padded = {**inputs, "attention_mask": mask}
        if "input_ids" in inputs:
            pad_id = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
            padded["input_ids"] = inputs["input_ids"].where(mask.bool(), pad_id)
        if "encoder_hidden_states" in inputs:
            # Fewer than the queries' own, or a mix-up of the two masks would not show.
            padded["encoder_attention_mask"] = torch.ones_like(mask)
            padded["encoder_attention_mask"][1, 3:] = 0
        if _runs(model, padded):
            yield padded
            if "decoder_input_ids" in inputs:
                shorter = inputs["decoder_input_ids"][:, :-3]
                yield {**padded, "decoder_input_ids": shorter}


def _masks(main: Tensor) -> Iterator[Tensor]:
    """[2, positions]: the second sample padded at the right, then at the left."""
    length = main.shape[1] if main.ndim < 4 else 0
    real = length * SHORT // TOKENS
    at_right = torch.ones(2, length, dtype=torch.long, device=main.device)
    at_right[1, real:] = 0
    if length:
        yield at_right
        if not main.is_floating_point():  # audio and frames are padded at the right
            yield at_right.flip(1)


def _masks_of_pairs(model: Any) -> Iterator[Tensor]:
    """[2, 1, positions, positions], added to the scores: what the audio encoders of language models
    take, whose inputs have one length."""
    length = getattr(model.config, "max_source_positions", None)
    if length is not None and model.main_input_name == "input_features":
        mask = torch.zeros(2, 1, length, length, device=model.device)
        mask[1, :, :, length * SHORT // TOKENS :] = torch.finfo(mask.dtype).min
        yield mask


@torch.no_grad()
def _runs(model: nn.Module, inputs: Inputs) -> bool:
    try:
        model(**inputs)
    except Exception:  # whatever a model raises: it does not take these
        return False
    return True


def _ids(model: Any) -> Iterator[Tensor]:
    config = model.config.get_text_config()
    vocab_size = getattr(config, "vocab_size", 0)
    if vocab_size > 8:
        # Above the ids that mean padding, begin and end.
        yield torch.randint(4, vocab_size, (2, TOKENS), generator=_generator()).to(model.device)


def _pixels(model: Any) -> Iterator[Tensor]:
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    image = getattr(config, "num_channels", 3), height, width
    yield _noise(model, 2, *image)
    if hasattr(config, "num_frames"):
        yield _noise(model, 2, config.num_frames, *image)


def _values(model: Any) -> Iterator[Tensor]:
    config = model.config
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):  # AST
        yield _noise(model, 2, config.max_length, config.num_mel_bins)
    for num_samples in (1_600, 8_000):
        yield _noise(model, 2, num_samples)
        yield _noise(model, 2, 1, num_samples)


def _features(model: Any) -> Iterator[Tensor]:
    config = getattr(model.config, "audio_config", model.config)
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):  # Whisper
        yield _noise(model, 2, config.num_mel_bins, 2 * config.max_source_positions)
    for name in ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins"):
        if hasattr(config, name):
            yield _noise(model, 2, 40, getattr(config, name))


def _encoder_states(model: Any) -> Iterator[Tensor]:
    if getattr(model.config, "add_cross_attention", False):
        yield _noise(model, 2, TOKENS, model.config.hidden_size)


_MAKERS: dict[str, Callable[[Any], Iterator[Tensor]]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_values": _values,
    "input_features": _features,
    "decoder_input_ids": _ids,
    "encoder_hidden_states": _encoder_states,
}


def _noise(model: Any, *shape: int) -> Tensor:
    noise = torch.randn(shape, generator=_generator())
    return noise.to(model.device, next(model.parameters()).dtype)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
