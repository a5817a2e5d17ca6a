"""What transformers' models of audio and text have in common here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from slap_fast.checkpoint.format import CheckpointError
from slap_fast.inference.embedder import Embedder, content_hash
from slap_fast.interop.pretrained.settings import read_settings

MAX_WINDOWS = 8
"""Of a forward pass: in fp32 a HTSAT's windows take about 100 MB each."""


class TransformersModel(Embedder):
    """A model with the feature extractor and the tokenizer of its checkpoint."""

    hears_whole = False
    max_size = MAX_WINDOWS
    kind: str

    def __init__(
        self,
        model: PreTrainedModel,
        feature_extractor: FeatureExtractionMixin,
        tokenizer: PreTrainedTokenizerBase,
        settings: str,
        name: str,
    ) -> None:
        self.model, self.name, self.settings = model.eval(), name, settings
        self.feature_extractor, self.tokenizer = feature_extractor, tokenizer

    @property
    def sample_rate(self) -> int:
        return self.feature_extractor.sampling_rate

    @property
    @abstractmethod
    def max_text_tokens(self) -> int:
        """Tokens of a text at most; the rest is cut off."""

    @cached_property
    def content_hash(self) -> str:
        return content_hash(self.model, self.settings)

    def facts(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "embed_dim": self.embed_dim,
            "sample_rate": self.sample_rate,
            "window_seconds": self.window_seconds,
            "preprocessing": type(self.feature_extractor).__name__,
            "content_hash": self.content_hash,
        }

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        tokens = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_text_tokens,
            return_tensors="pt",
        )
        return {
            name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")
        }


def read_pretrained(kind: type[PreTrainedModel], folder: Path, **options: Any) -> PreTrainedModel:
    """The model in a folder, in fp32. Raises CheckpointError: no safetensors, or not all of it."""
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: found no *.safetensors, expected the weights in that format; a pickle "
            "(pytorch_model.bin) is never read: save_pretrained of a recent transformers converts "
            "it, and many hub models have a revision such as refs/pr/1 that holds it converted"
        )
    try:
        with _no_bars():
            model, report = kind.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: damaged: {' '.join(str(error).split())}") from None
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder}: has no {missing[0]}, nor {len(missing) - 1} others")
    return model


def read_processor(
    kind: type[FeatureExtractionMixin], folder: Path
) -> tuple[FeatureExtractionMixin, PreTrainedTokenizerBase, str]:
    """The feature extractor, the tokenizer and the settings in a folder. Raises CheckpointError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        extractor = kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: its processor cannot be read: {message}") from None
    return extractor, tokenizer, read_settings(folder)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' bars, which it also writes where stderr is no terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
