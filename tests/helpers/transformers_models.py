"""Small transformers models with random weights, and inputs that show what a patch gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TEXT = {**SIZES, "vocab_size": 64}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "attention_dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
DECODER = {"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
W2V_BERT = {**SIZES, "feature_projection_input_dim": 16, "attention_dropout": 0.0}

MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])


def ids() -> Tensor:
    return torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(3))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def text() -> Inputs:
    return {"input_ids": ids(), "attention_mask": MASK}


def pairs() -> Inputs:
    return {**text(), "decoder_input_ids": ids().flip(1)}


def crossing() -> Inputs:
    mask = torch.tensor([[1] * 9, [1] * 3 + [0] * 6])
    return {
        **text(),
        "encoder_hidden_states": noise(2, 9, 32),
        "encoder_attention_mask": mask,
    }


def frames() -> Inputs:
    mask = torch.tensor([[1] * 20, [1] * 12 + [0] * 8])
    return {"input_features": noise(2, 20, 16), "attention_mask": mask}


def pixels(size: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": noise(2, 3, size, size)}


# Name: (class, config's class, config, inputs).
MODELS: dict[str, tuple[str, str, dict[str, Any], Callable[[], Inputs]]] = {
    "bert": ("BertModel", "BertConfig", {**TEXT, **NO_DROPOUT}, text),
    "bert_decoder": (
        "BertLMHeadModel",
        "BertConfig",
        {**TEXT, **NO_DROPOUT, "is_decoder": True, "add_cross_attention": True},
        crossing,
    ),
    "bart": ("BartModel", "BartConfig", SEQ2SEQ, pairs),
    "marian": ("MarianModel", "MarianConfig", SEQ2SEQ, pairs),
    "t5": ("T5Model", "T5Config", {**T5, "decoder_start_token_id": 0}, pairs),
    "t5_encoder": ("T5EncoderModel", "T5Config", T5, text),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**TEXT, **DECODER}, text),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**TEXT, **DECODER, "num_local_experts": 2, "num_experts_per_tok": 1},
        text,
    ),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        {**TEXT, "num_key_value_heads": 1, "sliding_window": 4},
        text,
    ),
    "mamba2": (
        "Mamba2Model",
        "Mamba2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_heads": 4,
            "head_dim": 16,
            "vocab_size": 64,
            "state_size": 16,
            "n_groups": 1,
        },
        lambda: {"input_ids": ids()},
    ),
    "hiera": (
        "HieraModel",
        "HieraConfig",
        {"embed_dim": 16, "image_size": [64, 64], "depths": [1] * 4, "num_heads": [1, 1, 2, 2]},
        pixels(64),
    ),
    "swin": (
        "SwinModel",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        pixels(32),
    ),
    "beit": (
        "BeitModel",
        "BeitConfig",
        {
            **SIZES,
            **NO_DROPOUT,
            "image_size": 32,
            "patch_size": 8,
            "use_relative_position_bias": True,
        },
        pixels(32),
    ),
    "w2v_bert": ("Wav2Vec2BertModel", "Wav2Vec2BertConfig", W2V_BERT, frames),
}


def make(name: str) -> nn.Module:
    """The model in eval mode."""
    import transformers

    kind, config, settings, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs_of(name: str) -> Inputs:
    return MODELS[name][3]()


def output_of(model: nn.Module, name: str) -> Tensor:
    """Its main output, at the positions that are no padding."""
    inputs = inputs_of(name)
    with torch.no_grad():
        out = model(**inputs)
    value = out.logits if "logits" in out else out.last_hidden_state
    mask = inputs.get("attention_mask")
    if mask is None or "decoder_input_ids" in inputs or value.shape[:2] != mask.shape:
        return value
    return value[mask.bool()]
