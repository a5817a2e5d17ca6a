"""Every setting of the model, the data and a run, as frozen dataclasses; recipes return them.

A run is a recipe plus overrides: ``override(slap_tiny(), {"steps": 200, "loss.ssl": 0.0})``. This
room imports nothing of ours, so anything may import it.
"""

from slap_fast.config.model import (
    AudioEncoderConfig,
    CaptionDecoderConfig,
    MelConfig,
    ModelConfig,
    SelfDistillationConfig,
    TextEncoderConfig,
)
from slap_fast.config.parsing import by_name, derived, from_dict, override, to_dict
from slap_fast.config.recipes import RECIPES, slap_base, slap_tiny
from slap_fast.config.training import DataConfig, LossConfig, TrainConfig

__all__ = [
    "RECIPES",
    "AudioEncoderConfig",
    "CaptionDecoderConfig",
    "DataConfig",
    "LossConfig",
    "MelConfig",
    "ModelConfig",
    "SelfDistillationConfig",
    "TextEncoderConfig",
    "TrainConfig",
    "by_name",
    "derived",
    "from_dict",
    "override",
    "slap_base",
    "slap_tiny",
    "to_dict",
]
