"""The common API of the HEAR benchmark: ``hear-validator slap_fast.interop.hear -m runs/my/best``.

Source: https://hearbenchmark.com/hear-api.html. It needs no package.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slap_fast.inference.slap import Slap
from slap_fast.models.slap import SlapModel
from slap_fast.ops import mel_patches
from slap_fast.packed import PackedPatches


class HearModel(nn.Module):
    """A trained model with the attributes that HEAR requires."""

    def __init__(self, slap: SlapModel) -> None:
        super().__init__()
        self.slap = slap
        mel, audio = slap.config.mel, slap.config.audio
        self.sample_rate = mel.sample_rate
        self.scene_embedding_size = slap.config.embed_dim or audio.hidden_size
        self.timestamp_embedding_size = mel.patches_per_column * audio.hidden_size

    def patches(self, audio: Tensor) -> PackedPatches:
        """audio [N, num_samples] float32 in -1 .. 1 -> N clips, packed, where the model is."""
        device = self.slap.log_logit_scale.device
        starts = torch.arange(len(audio) + 1, device=device) * audio.shape[1]
        return mel_patches(audio.to(device).float().flatten(), starts, self.slap.config.mel)

    def columns(self, audio: Tensor) -> Tensor:
        """audio [N, num_samples] -> dense features [N, columns, bands x C], lowest bins first."""
        features = self.slap.audio_encoder(self.patches(audio))
        return features.reshape(len(audio), -1, self.timestamp_embedding_size)


def load_model(model_file_path: str = "") -> HearModel:
    """The model of a folder or a hub id, on the CPU."""
    return HearModel(Slap.from_pretrained(model_file_path).model).eval()


@torch.no_grad()
def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """audio [N, num_samples] -> [N, scene_embedding_size], unit norm."""
    return model.slap.embed_audio(model.patches(audio)).float()


@torch.no_grad()
def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """audio [N, num_samples] -> (embeddings [N, columns, timestamp_embedding_size], milliseconds
    [N, columns] of the middle of each column)."""
    mel, embeddings = model.slap.config.mel, model.columns(audio).float()
    step = mel.patch_time * mel.hop_length
    # The middle of a column's frames; torchaudio's frame i is centred at i x hop_length.
    width = mel.win_length if mel.preset == "kaldi" else 0
    middle = ((mel.patch_time - 1) * mel.hop_length + width) / 2
    samples = torch.arange(embeddings.shape[1], device=embeddings.device) * step + middle
    return embeddings, (1000 * samples / mel.sample_rate).expand(len(audio), -1)
