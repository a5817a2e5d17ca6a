"""The audio tower: a ViT over packed log-mel patches (arXiv 2601.12594, section 3).

Two layers in three see a window of patch columns, the third the whole clip; positions are 2-D
rotary angles over (time, frequency), so a clip of any length is one sequence of the packed run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slap_fast import ops
from slap_fast.config import AudioEncoderConfig, MelConfig
from slap_fast.models.layers import Attention, RMSNorm, Segments, SwiGLU, init_weights
from slap_fast.packed import PackedPatches
from slap_fast.precision import compute_dtype


class AudioBlock(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(self, config: AudioEncoderConfig, window_size: tuple[int, int]) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config.hidden_size, config.num_heads, window_size=window_size)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """x [T, C] -> [T, C]."""
        x = x + self.attention(self.attention_norm(x), rope, segments)
        return x + self.mlp(self.mlp_norm(x))


class AudioEncoder(nn.Module):
    """Packed patches to dense features."""

    def __init__(self, config: AudioEncoderConfig, mel: MelConfig) -> None:
        super().__init__()
        self.config = config
        # In tokens: a patch column is patches_per_column consecutive ones.
        local = config.local_window * mel.patches_per_column
        self.patch_embedding = nn.Linear(mel.patch_dim, config.hidden_size, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = nn.ModuleList(
            AudioBlock(config, (-1, -1) if (i + 1) % config.global_every == 0 else (local, local))
            for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        """Keep only each block's input for the backward, which runs the block again."""
        init_weights(self, config.num_layers)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, audio: PackedPatches, mask_indices: Tensor | None = None) -> Tensor:
        """audio with T patches, floating point -> dense features [T, C], normalised, in the
        parameters' dtype or autocast's; the learned mask token replaces the patches at
        ``mask_indices``, int64 [M]."""
        x = self.patch_embedding(audio.patches.to(compute_dtype(self.patch_embedding.weight)))
        if mask_indices is not None:
            token = self.mask_token.to(x.dtype).expand(len(mask_indices), -1)
            x = x.index_copy(0, mask_indices, token)
        head_dim = self.config.hidden_size // self.config.num_heads
        rope = ops.rope_tables(audio.coords, head_dim, self.config.rope_theta)
        segments = Segments.scheduled(audio.cu_seqlens, audio.max_seqlen, x.shape[0])
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, rope, segments, use_reentrant=False)
            else:
                x = layer(x, rope, segments)
        return self.norm(x)
