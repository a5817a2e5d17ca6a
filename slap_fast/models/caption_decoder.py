"""The caption decoder: causal self-attention over the caption, cross-attention to the dense audio.

Packed and teacher-forced (arXiv 2601.12594, section 3); ``generate`` decodes with it.
"""

from __future__ import annotations

from torch import Tensor, nn

from slap_fast import ops
from slap_fast.config import CaptionDecoderConfig
from slap_fast.models.layers import (
    Attention,
    CrossAttention,
    RMSNorm,
    Segments,
    SwiGLU,
    init_weights,
)
from slap_fast.packed import PackedText


class CaptionBlock(nn.Module):
    """Self-attention, cross-attention and SwiGLU, each after an RMSNorm, with a residual."""

    def __init__(self, config: CaptionDecoderConfig, context_size: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(size, eps)
        self.attention = Attention(size, config.num_heads, causal=True)
        self.cross_norm = RMSNorm(size, eps)
        self.cross_attention = CrossAttention(size, context_size, config.num_heads)
        self.mlp_norm = RMSNorm(size, eps)
        self.mlp = SwiGLU(size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        segments: Segments,
        keys_values: tuple[Tensor, Tensor],
        context: Segments,
    ) -> Tensor:
        """x [T, C] -> [T, C]."""
        x = x + self.attention(self.attention_norm(x), rope, segments)
        x = x + self.cross_attention(self.cross_norm(x), segments, keys_values, context)
        return x + self.mlp(self.mlp_norm(x))


class CaptionDecoder(nn.Module):
    """Predicts each caption token from the ones before it and the clip's dense features.

    The output projection is the token embedding (tied).
    """

    def __init__(self, config: CaptionDecoderConfig, vocab_size: int, context_size: int) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            CaptionBlock(config, context_size) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        init_weights(self, config.num_layers)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.config.hidden_size // self.config.num_heads

    def forward(self, text: PackedText, audio_features: Tensor, context: Segments) -> Tensor:
        """text with T tokens, audio_features [Tk, context_size] -> hidden [T, C].

        The logits are hidden @ token_embedding.weight.T; losses.caption_loss makes them in chunks.
        """
        x = self.token_embedding(text.ids)
        rope = ops.rope_tables(text.positions, self.head_dim, self.config.rope_theta)
        segments = Segments.scheduled(text.cu_seqlens, text.max_seqlen, x.shape[0])
        for layer in self.layers:
            keys_values = layer.cross_attention.keys_values(audio_features)
            x = layer(x, rope, segments, keys_values, context)
        return self.norm(x)
