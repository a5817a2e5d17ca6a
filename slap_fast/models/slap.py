"""The SLAP model: two towers, a caption decoder, a prototype head, and the EMA teacher.

It turns a packed batch into the inputs of ``slap_fast.losses``; it computes no loss itself.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slap_fast.config import LossConfig, ModelConfig, SelfDistillationConfig
from slap_fast.distributed import local
from slap_fast.models.audio_encoder import AudioEncoder
from slap_fast.models.caption_decoder import CaptionDecoder
from slap_fast.models.layers import MAPHead, Segments, init_weights
from slap_fast.models.text_encoder import TextEncoder
from slap_fast.packed import PackedBatch, PackedPatches, PackedText

ALL_LOSSES = LossConfig()


class PrototypeHead(nn.Module):
    """An MLP to a unit-norm bottleneck, and the prototypes it is scored against (DINO)."""

    def __init__(self, hidden_size: int, config: SelfDistillationConfig) -> None:
        super().__init__()
        width = config.head_hidden_size
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, width, bias=False),
            nn.GELU(),
            nn.Linear(width, width, bias=False),
            nn.GELU(),
            nn.Linear(width, config.bottleneck_size, bias=False),
        )
        self.weight = nn.Parameter(torch.empty(config.prototypes, config.bottleneck_size))
        init_weights(self, 1)

    @property
    def prototypes(self) -> Tensor:
        """[K, bottleneck], unit norm."""
        return F.normalize(self.weight, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, C] -> features [M, bottleneck], unit norm; scores are features @ prototypes.T."""
        return F.normalize(self.mlp(x), dim=-1)


class SlapOutput(NamedTuple):
    """What the losses read; None where a loss has no weight."""

    audio_features: Tensor | None
    """[B, E], unit norm."""
    text_features: Tensor | None
    """[B, E], unit norm."""
    logit_scale: Tensor
    """Scalar."""
    logit_bias: Tensor
    """Scalar, of the sigmoid loss."""
    caption_hidden: Tensor | None
    """[T of the text, C]; caption logits are caption_hidden @ caption_weight.T."""
    caption_weight: Tensor | None
    """[V, C]."""
    student_features: Tensor | None
    """[M, bottleneck] at the masked patches, unit norm."""
    prototypes: Tensor | None
    """[K, bottleneck], unit norm."""


class SlapModel(nn.Module):
    """The student: everything that is trained by gradient."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        audio, text = config.audio.hidden_size, config.text.hidden_size
        self.audio_encoder = AudioEncoder(config.audio, config.mel)
        self.audio_head = MAPHead(audio, config.audio.num_heads, 4 * audio)
        self.text_encoder = TextEncoder(config.text)
        self.text_head = MAPHead(text, config.text.num_heads, 4 * text)
        for head in (self.audio_head, self.text_head):
            init_weights(head, 1)
        self.audio_projection = self.text_projection = nn.Identity()
        if config.embed_dim is not None:
            self.audio_projection = nn.Linear(audio, config.embed_dim, bias=False)
            self.text_projection = nn.Linear(text, config.embed_dim, bias=False)
        self.caption_decoder = CaptionDecoder(config.caption, config.text.vocab_size, audio)
        self.prototype_head = PrototypeHead(audio, config.ssl)
        # One element, not a scalar: FSDP2 shards the first axis.
        self.log_logit_scale = nn.Parameter(torch.tensor([math.log(config.logit_scale)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))

    @property
    def logit_scale(self) -> Tensor:
        """The learned scale, 0-d, at most ``config.logit_scale_max``."""
        return self.log_logit_scale[0].clamp(max=math.log(self.config.logit_scale_max)).exp()

    def freeze_unused(self, loss: LossConfig) -> None:
        """Freezes the parameters that only losses of weight 0 use."""
        self.prototype_head.requires_grad_(loss.ssl > 0)
        self.caption_decoder.requires_grad_(loss.caption > 0)
        self.audio_encoder.mask_token.requires_grad_(loss.ssl > 0)
        contrastive = loss.contrastive > 0
        for part in (self.audio_head, self.audio_projection, self.log_logit_scale):
            part.requires_grad_(contrastive)
        for part in (self.text_encoder, self.text_head, self.text_projection):
            part.requires_grad_(contrastive)
        self.logit_bias.requires_grad_(contrastive and loss.contrastive_kind == "sigmoid")

    def pool_audio(self, features: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Dense features [T, C] -> embeddings [B, E], unit norm."""
        return F.normalize(self.audio_projection(self.audio_head(features, cu_seqlens)), dim=-1)

    def pool_text(self, features: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Dense features [T, C] -> embeddings [B, E], unit norm."""
        return F.normalize(self.text_projection(self.text_head(features, cu_seqlens)), dim=-1)

    def embed_audio(self, audio: PackedPatches) -> Tensor:
        """Patches of B clips -> embeddings [B, E], unit norm."""
        return self.pool_audio(self.audio_encoder(audio), audio.cu_seqlens)

    def embed_text(self, text: PackedText) -> Tensor:
        """B captions -> embeddings [B, E], unit norm."""
        return self.pool_text(self.text_encoder(text), text.cu_seqlens)

    def forward(self, batch: PackedBatch, loss: LossConfig = ALL_LOSSES) -> SlapOutput:
        """One student pass over a packed batch: what every loss with a weight needs."""
        audio, text = batch.audio, batch.text
        embeddings = caption = student = None, None
        shared = self.config.ssl.student_pass == "shared"
        if loss.ssl:
            masked = self.audio_encoder(audio if shared else batch.masked_audio, batch.mask_indices)
            head = self.prototype_head
            student = head(masked[batch.mask_indices]), head.prototypes
        if loss.contrastive or loss.caption:
            features = masked if shared and loss.ssl else self.audio_encoder(audio)
        if loss.contrastive:
            embeddings = self.pool_audio(features, audio.cu_seqlens), self.embed_text(text)
        if loss.caption:
            context = Segments.scheduled(audio.cu_seqlens, audio.max_seqlen, features.shape[0])
            hidden = self.caption_decoder(text, features, context)
            # A view: FSDP hooks the outputs of a forward, and a parameter would keep every hook.
            weight = self.caption_decoder.token_embedding.weight
            caption = hidden, weight.view_as(weight)
        return SlapOutput(*embeddings, self.logit_scale, self.logit_bias[0], *caption, *student)


class Teacher(nn.Module):
    """The exponential moving average of the student's audio encoder and prototype head.

    It sees every patch of the clips that have masks, carries no gradient, and keeps fp32 weights.
    """

    def __init__(self, student: SlapModel) -> None:
        super().__init__()
        self.audio_encoder = copy.deepcopy(student.audio_encoder)
        self.prototype_head = copy.deepcopy(student.prototype_head)
        self.register_buffer("center", torch.zeros(student.config.ssl.prototypes))
        self.requires_grad_(False)

    @torch.no_grad()
    def update(self, student: SlapModel, momentum: float) -> None:
        """teacher <- momentum x teacher + (1 - momentum) x student."""
        teacher = [*self.audio_encoder.parameters(), *self.prototype_head.parameters()]
        trained = [*student.audio_encoder.parameters(), *student.prototype_head.parameters()]
        torch._foreach_lerp_([*map(local, teacher)], [*map(local, trained)], 1.0 - momentum)

    @torch.no_grad()
    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Features [M, bottleneck] at the student's masked patches, and prototypes [K, bottleneck],
        both unit norm; scores are features @ prototypes.T."""
        features = self.audio_encoder(batch.masked_audio)[batch.mask_indices]
        return self.prototype_head(features), self.prototype_head.prototypes
