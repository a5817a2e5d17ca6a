"""Recipes: functions that return the settings of a run."""

from __future__ import annotations

from slap_fast.config.model import (
    AudioEncoderConfig,
    CaptionDecoderConfig,
    MelConfig,
    ModelConfig,
    SelfDistillationConfig,
    TextEncoderConfig,
)
from slap_fast.config.training import TrainConfig


def slap_base() -> TrainConfig:
    """The paper's configuration (arXiv 2601.12594, section 3), with ModernBERT-base for text."""
    text = TextEncoderConfig(pretrained="answerdotai/ModernBERT-base")
    return TrainConfig(model=ModelConfig(text=text))


def slap_tiny() -> TrainConfig:
    """A model of the same shape that learns the built-in sounds on two CPU cores in minutes.

    A run this short cannot spend what the paper's can: frames are 20 ms apart, which halves the
    tokens, and a quarter of the clips are masked.
    """
    size = {"hidden_size": 128, "num_heads": 4}
    model = ModelConfig(
        mel=MelConfig(hop_length=320),
        audio=AudioEncoderConfig(**size, num_layers=3, intermediate_size=256),
        text=TextEncoderConfig(
            **size, vocab_size=2048, num_layers=3, intermediate_size=192, max_tokens=96
        ),
        caption=CaptionDecoderConfig(**size, num_layers=2, intermediate_size=256),
        ssl=SelfDistillationConfig(
            mask_clips=0.25, prototypes=256, head_hidden_size=256, bottleneck_size=64
        ),
    )
    return TrainConfig(
        model=model,
        steps=360,
        batch_size=64,
        max_tokens=65_536,
        lr=1.2e-3,
        warmup_steps=40,
        eval_every=0,
        save_every=200,
    )


RECIPES = {"base": slap_base, "tiny": slap_tiny}
