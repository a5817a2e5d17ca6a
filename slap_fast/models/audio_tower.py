"""Waveforms to embeddings: a replacement for the audio branch of another CLAP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slap_fast import ops
from slap_fast.config import AudioEncoderConfig, MelConfig
from slap_fast.models.audio_encoder import AudioEncoder
from slap_fast.models.layers import MAPHead, init_weights
from slap_fast.packed import starts_of


class AudioTower(nn.Module):
    """Log-mel patches, an :class:`AudioEncoder` and a :class:`MAPHead`; nothing is padded."""

    def __init__(
        self,
        config: AudioEncoderConfig | None = None,
        mel: MelConfig | None = None,
        embed_dim: int | None = None,
    ) -> None:
        """``embed_dim`` adds a projection; None keeps the encoder's width."""
        super().__init__()
        config, self.mel = config or AudioEncoderConfig(), mel or MelConfig()
        size = config.hidden_size
        self.encoder = AudioEncoder(config, self.mel)
        self.head = MAPHead(size, config.num_heads, 4 * size)
        init_weights(self.head, 1)
        self.projection = nn.Identity()
        if embed_dim is not None:
            self.projection = nn.Linear(size, embed_dim, bias=False)

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """waveform [num_samples] float32 in -1 .. 1 or int16, all clips end to end, and lengths
        int64 [B], samples of each clip -> embeddings [B, E], unit norm."""
        audio = ops.mel_patches(waveform, starts_of(lengths, torch.int64), self.mel)
        pooled = self.head(self.encoder(audio), audio.cu_seqlens)
        return F.normalize(self.projection(pooled), dim=-1)
