"""The audio-text model of PE-AV (Perception Encoder, arXiv 2504.13181), as transformers has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PeAudioFeatureExtractor, PeAudioModel

from slap_fast.checkpoint.format import CheckpointError
from slap_fast.interop.pretrained.transformers_model import (
    TransformersModel,
    read_pretrained,
    read_processor,
)


class PeAudio(TransformersModel):
    """A PeAudioModel, of its own checkpoint or of an audio-video-text one.

    Its vectors have no unit norm and its loss is a sigmoid's: :meth:`classify` gives its own
    probabilities, which do not add up to 1; vectors here are its own, divided by their norm.
    """

    kind = "PE-AV"
    default_template = "{}"
    """A label as it is, as in the examples of its authors."""
    window_seconds = 30.0

    @classmethod
    def from_folder(cls, folder: Path, name: str, device: str | torch.device) -> PeAudio:
        """Loads a folder as save_pretrained writes it. Raises CheckpointError."""
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.architectures == ["PeAudioFrameLevelModel"]:
            raise CheckpointError(f"{folder}: has vectors of frames, expected vectors of clips")
        if config.model_type == "pe_audio_video":
            config = config.audio_config
        model = read_pretrained(PeAudioModel, folder, config=config)
        return cls(model.to(device), *read_processor(PeAudioFeatureExtractor, folder), name)

    @property
    def max_text_tokens(self) -> int:
        # 512 as in core/audio_visual_encoder/transforms.py of its authors' perception_models.
        positions = self.model.config.text_config.max_position_embeddings
        return min(512, self.tokenizer.model_max_length, positions)

    @property
    def embed_dim(self) -> int:
        return self.model.config.text_config.hidden_size

    @property
    def _logit_scale(self) -> float:
        return self.model.text_audio_logit_scale.item()

    def _probabilities(self, audio: np.ndarray, labels: np.ndarray) -> np.ndarray:
        logits = torch.from_numpy(audio @ labels.T) * self._logit_scale
        return (logits + self.model.text_audio_logit_bias.item()).sigmoid().numpy()

    def _prepare(self, waveform: np.ndarray) -> Tensor:
        features = self.feature_extractor(
            waveform, sampling_rate=self.sample_rate, return_tensors="pt"
        )
        return features["input_values"]

    def _audio_features(self, prepared: list[Tensor]) -> Tensor:
        # Each alone: in a batch the convolutions of its codec hear the padding.
        return torch.cat(
            [self.model.get_audio_embeds(values.to(self.model.device)) for values in prepared]
        )

    def _text_features(self, texts: list[str]) -> Tensor:
        output = self.model.text_model(**self._tokens(texts), output_hidden_states=True)
        return self.model.text_audio_head(output.hidden_states[-1][:, 0])
