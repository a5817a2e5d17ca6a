"""An encoder for X-ARES: ``xares.run`` takes a file with these two lines.

    from slap_fast.interop.xares import SlapEncoder as Base
    class SlapEncoder(Base): folder = "runs/my/best"

X-ARES itself is not imported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slap_fast.interop.hear import load_model


class SlapEncoder(nn.Module):
    """Waveforms to dense features, one vector for each patch column."""

    folder = ""
    """A model's folder or hub id; set by a subclass."""

    def __init__(self, folder: str = "") -> None:
        super().__init__()
        self.model = load_model(folder or self.folder)
        mel = self.model.slap.config.mel
        self.sampling_rate = mel.sample_rate
        self.output_dim = self.model.timestamp_embedding_size
        self.hop_size_in_ms = 1000 * mel.patch_time * mel.hop_length / mel.sample_rate

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """audio [B, num_samples] -> [B, columns, output_dim]."""
        return self.model.columns(audio)
