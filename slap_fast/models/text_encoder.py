"""The text tower: transformers' ModernBERT, packed through its attention interface.

transformers is imported when a tower is built, never on import of this package. The rotary
embedding stays ModernBERT's: the interface receives rotated queries and keys.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from slap_fast.config import TextEncoderConfig
from slap_fast.models import hf_attention
from slap_fast.packed import PackedText

if TYPE_CHECKING:
    from transformers import ModernBertConfig


# Sizes of TextEncoderConfig by their names in a ModernBertConfig.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "local_attention": "local_attention",
}
# Settings of a checkpoint that TextEncoderConfig does not hold: they must equal this tower's.
_FIXED = ("hidden_activation", "norm_eps", "norm_bias", "attention_bias", "mlp_bias")
_FIXED += ("layer_types", "rope_parameters")
# All that is read from a config.json. Others name code to fetch and run (auto_map, and
# _attn_implementation_internal in CVE-2026-4372) or do not affect the maths.
_READ = {*_FIXED, *_SIZES.values(), "global_attn_every_n_layers"}
_READ |= {"global_rope_theta", "local_rope_theta"}


class TextEncoder(nn.Module):
    """Packed captions to dense features."""

    def __init__(self, config: TextEncoderConfig) -> None:
        from transformers import ModernBertModel

        super().__init__()
        hf_attention.register()
        self.model = ModernBertModel(modernbert_config(config))
        self.model.set_attn_implementation(hf_attention.NAME)

    def load_pretrained(self, name: str) -> None:
        """Loads the weights of a ModernBERT folder or hub id, whose sizes the config must have.

        Reads ``model.safetensors`` and nothing else; the weights of a head are left out.
        """
        path = _fetch(name, "model.safetensors")
        try:
            weights = {key.removeprefix("model."): value for key, value in load_file(path).items()}
            names = self.model.state_dict().keys() & weights.keys()
            self.model.load_state_dict({name: weights[name] for name in names})
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"text.pretrained: {path}: {error}") from None

    def forward(self, text: PackedText) -> Tensor:
        """text with T tokens -> dense features [T, C]."""
        ids, positions = text.ids, text.positions
        if not len(ids):  # transformers fails on no tokens; one past cu_seqlens[-1] is legal
            ids, positions = ids.new_zeros(1), positions.new_zeros(1, 1)
        out = self.model(
            input_ids=ids[None],
            position_ids=positions.T,
            # transformers uses a mapping as it is: packed attention needs no mask, none is built.
            attention_mask={"full_attention": None, "sliding_attention": None},
            cu_seq_lens_q=text.cu_seqlens,
            max_length_q=text.max_seqlen,
        )
        return out.last_hidden_state[0, : len(text.ids)]


def modernbert_config(config: TextEncoderConfig) -> ModernBertConfig:
    """The transformers configuration of a tower of these sizes."""
    from transformers import ModernBertConfig

    return ModernBertConfig(
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        global_attn_every_n_layers=config.global_every,
        # ModernBERT's 0.02 is for its width of 768; a narrower tower scales by 1 / sqrt(width).
        initializer_range=0.02 * (768 / config.hidden_size) ** 0.5,
        **{f"{token}_token_id": None for token in ("pad", "bos", "eos", "cls", "sep")},
    )


def _fetch(name: str, file: str) -> Path:
    """The path of a file in a folder or a hub repository. Raises ValueError with the remedy."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    path = Path(name) / file
    if path.is_file():
        return path
    try:
        return Path(hf_hub_download(name, file))
    except (HFValidationError, OSError) as error:
        raise ValueError(
            f"text.pretrained: cannot read {file} of {name!r}: {type(error).__name__}. "
            "Give a folder with config.json and model.safetensors, go online once, or set "
            "model.text.pretrained=none to start from random weights"
        ) from None


def _read_config(name: str) -> ModernBertConfig:
    from transformers import ModernBertConfig

    path = _fetch(name, "config.json")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        model_type = stored.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"text.pretrained: {path}: cannot be read: {error}") from None
    if model_type != "modernbert":
        raise ValueError(f"text.pretrained: {name!r} is a {model_type!r}, expected a 'modernbert'")
    try:
        return ModernBertConfig(**{key: stored[key] for key in _READ if key in stored})
    except Exception as error:  # transformers raises errors of several types
        raise ValueError(f"text.pretrained: {path}: {' '.join(str(error).split())}") from None


def resolve_pretrained(config: TextEncoderConfig) -> TextEncoderConfig:
    """The config with the sizes of the ModernBERT checkpoint it names.

    Raises ValueError when the checkpoint cannot be read or is not a ModernBERT this tower can hold.
    """
    if config.pretrained is None:
        return config
    pretrained = _read_config(config.pretrained)
    full = [i for i, kind in enumerate(pretrained.layer_types) if kind == "full_attention"]
    config = dataclasses.replace(
        config,
        **{ours: getattr(pretrained, theirs) for ours, theirs in _SIZES.items()},
        global_every=full[1] - full[0] if len(full) > 1 else pretrained.num_hidden_layers,
    )
    own = modernbert_config(config)
    for key in _FIXED:
        value, expected = getattr(pretrained, key), getattr(own, key)
        if value != expected:
            raise ValueError(
                f"text.pretrained: {config.pretrained!r} has {key} {value!r}, expected {expected!r}"
            )
    return config
