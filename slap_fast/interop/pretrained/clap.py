"""LAION's CLAP (arXiv 2211.06687), fused or not, as transformers has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import ClapFeatureExtractor, ClapModel

from slap_fast.interop.pretrained.transformers_model import (
    TransformersModel,
    read_pretrained,
    read_processor,
)


class Clap(TransformersModel):
    """A ClapModel. It hears 10 s: longer audio in windows, never in a random crop.

    Of a fused checkpoint a window is what its processor makes of it alone: marked as longer than
    10 s. In a batch the processor would mark one window, drawn at random.
    """

    kind = "CLAP"
    default_template = "This is a sound of {}"
    """As in experiment_scripts/esc50_api.py of github.com/LAION-AI/CLAP."""

    @classmethod
    def from_folder(cls, folder: Path, name: str, device: str | torch.device) -> Clap:
        """Loads a folder as save_pretrained writes it. Raises CheckpointError."""
        model = read_pretrained(ClapModel, folder)
        return cls(model.to(device), *read_processor(ClapFeatureExtractor, folder), name)

    @property
    def window_seconds(self) -> float:
        return float(self.feature_extractor.max_length_s)

    @property
    def max_text_tokens(self) -> int:
        config = self.model.config.text_config
        # RoBERTa's positions start after the padding id.
        positions = config.max_position_embeddings - config.pad_token_id - 1
        return min(self.tokenizer.model_max_length, positions)

    @property
    def embed_dim(self) -> int:
        return self.model.config.projection_dim

    @property
    def _logit_scale(self) -> float:
        return self.model.logit_scale_a.exp().item()

    def _prepare(self, waveform: np.ndarray) -> tuple[Tensor, Tensor]:
        features = self.feature_extractor(
            waveform, sampling_rate=self.sample_rate, return_tensors="pt"
        )
        return features["input_features"], features["is_longer"]

    def _audio_features(self, prepared: list[tuple[Tensor, Tensor]]) -> Tensor:
        input_features, is_longer = (
            torch.cat(parts).to(self.model.device) for parts in zip(*prepared, strict=True)
        )
        output = self.model.get_audio_features(input_features=input_features, is_longer=is_longer)
        return output.pooler_output

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.model.get_text_features(**self._tokens(texts)).pooler_output
