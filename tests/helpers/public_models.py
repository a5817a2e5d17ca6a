"""Small models of other people's kinds with random weights, saved as their hub folders are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = ["a", "the", "this", "is", "sound", "of", "dog", "barks", "rain", "roof", "bell", "."]


def save_clap(folder: Path, *, fused: bool = False) -> Path:
    """A ClapModel of 4 blocks, with its processor."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor

    torch.manual_seed(0)
    fusion: dict[str, Any] = {"enable_fusion": True, "fusion_type": "aff_2d"} if fused else {}
    audio = {
        "patch_embeds_hidden_size": 16,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "hidden_size": 128,
        **fusion,
    }
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 34,
    }
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=24)
    ClapModel(config).save_pretrained(folder)
    extractor = ClapFeatureExtractor(truncation="fusion" if fused else "rand_trunc")
    ClapProcessor(extractor, tokenizer()).save_pretrained(folder)
    return folder


def save_pe_audio(folder: Path) -> Path:
    """A PeAudioModel of 2 layers on a small DAC encoder, with its processor."""
    from transformers import PeAudioConfig, PeAudioFeatureExtractor, PeAudioModel, PeAudioProcessor

    torch.manual_seed(0)
    config = PeAudioConfig(text_config=_text_config(), audio_config=_pe_audio_config())
    model = PeAudioModel(config)
    with torch.no_grad():  # 0 in a new model: all logits would be 0
        model.text_audio_logit_scale.fill_(10.0)
        model.text_audio_logit_bias.fill_(-1.0)
    model.save_pretrained(folder)
    PeAudioProcessor(PeAudioFeatureExtractor(), tokenizer()).save_pretrained(folder)
    return folder


def save_pe_audio_video(folder: Path) -> Path:
    """The same as the audio part of a PeAudioVideoModel's folder.

    The part that sees is left out: it needs timm. Text weights are stored once, at the root, as
    PeAudioVideoModel ties them.
    """
    import json

    from safetensors.torch import load_file, save_file

    save_pe_audio(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name if name.startswith("text_model.") else f"audio_model.{name}": tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "pe_audio_video",
        "architectures": ["PeAudioVideoModel"],
        "text_config": _text_config(),
        "audio_video_config": {
            "model_type": "pe_audio_video_encoder",
            "audio_config": {"model_type": "pe_audio_encoder", **_pe_audio_config()},
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _text_config() -> dict[str, Any]:
    return {
        "model_type": "modernbert",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "cls_token_id": 0,
        "bos_token_id": 0,
        "sep_token_id": 2,
        "eos_token_id": 2,
    }


def _pe_audio_config() -> dict[str, Any]:
    return {
        "dac_config": {
            "model_type": "dac",
            "encoder_hidden_size": 4,
            "downsampling_ratios": [2, 8, 10, 12],
            "codebook_dim": 8,
            "n_codebooks": 1,
        },
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }


def tokenizer() -> Any:
    """Words, with the special tokens of RoBERTa at its ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=32,
    )
