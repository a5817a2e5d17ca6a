"""Small transformers models of every kind with random weights, and batches for them.

For the compatibility table and the tests of ``patch()``: the kinds, not the checkpoints. A model
has two layers and 64 ids; its batch has two samples, of which the second is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.transformers_batches import (
    Inputs,
    captioned,
    crossing,
    film,
    frames,
    ids,
    noise,
    pairs,
    pixels,
    samples,
    spectrogram,
    spoken,
    text,
)

Settings = dict[str, Any]

SIZES: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TEXT: Settings = {**SIZES, "vocab_size": 64}
NO_DROPOUT: Settings = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
NO_IDS: Settings = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
BERT = {**TEXT, **NO_DROPOUT}
SEQ2SEQ: Settings = {
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
GROUPED: Settings = {**TEXT, **NO_IDS, "num_key_value_heads": 1, "head_dim": 16}
EXPERTS: Settings = {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}
QWEN_EXPERTS: Settings = {
    **GROUPED,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
GPT: Settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64}
GPT |= NO_IDS
T5: Settings = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
T5 |= {"vocab_size": 64, "decoder_start_token_id": 0}
VISION: Settings = {**SIZES, **NO_DROPOUT, "image_size": 32, "patch_size": 8}
CLIP: Settings = {**SIZES, "vocab_size": 64, "projection_dim": 16, "eos_token_id": 63}
CONVOLUTION: Settings = {
    "conv_dim": [16],
    "conv_kernel": [4],
    "conv_stride": [4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32,
}
AUDIO: Settings = {
    **SIZES,
    **CONVOLUTION,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "mask_time_prob": 0.0,
}
WHISPER: Settings = {
    **SEQ2SEQ,
    "num_mel_bins": 8,
    "max_source_positions": 24,
    "max_target_positions": 32,
}
SWIN: Settings = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}

STAGES: Settings = {
    "image_size": 64,
    "depths": [1] * 4,
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
}
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


class Kind(NamedTuple):
    """A model to build."""

    group: str
    """text, audio, vision, encoder-decoder, causal or two towers."""
    model: str
    """Its class in transformers."""
    config: str
    settings: Settings
    inputs: Callable[[], Inputs]


def _kinds(
    group: str, inputs: Callable[[], Inputs], settings: Settings, **names: Settings
) -> dict[str, Kind]:
    """Kinds named for their classes, e.g. ``Bert_Model``: BertConfig and BertModel, with the
    settings that one has beside those of all."""
    kinds = {}
    for name, more in names.items():
        family, _, tail = name.partition("_")
        config = more.get("config", f"{family}Config")
        own = {key: value for key, value in more.items() if key != "config"}
        kinds[family + tail] = Kind(group, family + tail, config, {**settings, **own}, inputs)
    return kinds


KINDS: dict[str, Kind] = {
    **_kinds(
        "text",
        text,
        BERT,
        Bert_Model={},
        Roberta_Model={},
        RobertaPreLayerNorm_Model={},
        XLMRoberta_Model={},
        XLMRobertaXL_Model={},
        Camembert_Model={},
        Data2VecText_Model={},
        Electra_Model={},
        Ernie_Model={},
        MegatronBert_Model={},
        Albert_Model={"embedding_size": 16},
        DistilBert_Model={"attention_dropout": 0.0, "dropout": 0.0},
        Esm_Model={"pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"},
        RoFormer_Model={},
        NomicBert_Model={},
        JinaEmbeddingsV3_Model={},
        RemBert_Model={},
        ConvBert_Model={},
        MPNet_Model={},
        DebertaV2_Model={"relative_attention": True, "pos_att_type": "p2c|c2p"},
        Deberta_Model={"relative_attention": True, "pos_att_type": "p2c|c2p"},
        BigBird_Model={"attention_type": "original_full"},
        Longformer_Model={"attention_window": 4},
        Splinter_Model={},
        SqueezeBert_Model={"embedding_size": 32},
        MobileBert_Model={"embedding_size": 16, "intra_bottleneck_size": 16, **NO_DROPOUT},
        Luke_Model={"entity_vocab_size": 8},
        IBert_Model={},
        Canine_Model={"num_hash_buckets": 16},
        FNet_Model={},
        XLNet_Model={"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48, "dropout": 0.0},
        GPT2_ForSequenceClassification={**GPT, "attn_pdrop": 0.0, "pad_token_id": 0},
        ModernBert_Model={
            **NO_IDS,
            "cls_token_id": None,
            "sep_token_id": None,
            "num_hidden_layers": 4,
            "local_attention": 6,
        },
        EuroBert_Model={**GROUPED, "mask_token_id": 3},
        CLIPText_Model=CLIP,
        SiglipText_Model={"config": "SiglipTextConfig"},
        T5_EncoderModel=T5,
        UMT5_EncoderModel=T5,
    ),
    **_kinds(
        "audio",
        samples,
        AUDIO,
        Wav2Vec2_Model={},
        Hubert_Model={},
        WavLM_Model={"num_buckets": 8},
        UniSpeech_Model={},
        UniSpeechSat_Model={},
        Data2VecAudio_Model={"conv_pos_kernel_size": 3},
        SEW_Model={"squeeze_factor": 1},
        SEWD_Model={"squeeze_factor": 1},
        Wav2Vec2Conformer_Model={"position_embeddings_type": "rotary"},
    ),
    **_kinds(
        "audio",
        frames,
        {**SIZES, "attention_dropout": 0.0},
        Wav2Vec2Bert_Model={"feature_projection_input_dim": 16},
        Parakeet_Encoder={"config": "ParakeetEncoderConfig", "num_mel_bins": 16},
    ),
    **_kinds(
        "audio",
        spectrogram,
        WHISPER,
        Qwen2Audio_Encoder={"config": "Qwen2AudioEncoderConfig"},
        Voxtral_Encoder={**SIZES, "config": "VoxtralEncoderConfig"},
    ),
    **_kinds(
        "audio",
        lambda: {**spectrogram(), "input_features_mask": torch.ones(2, 48, dtype=torch.long)},
        {**SIZES, "num_mel_bins": 8, "max_source_positions": 24},
        AudioFlamingo3_Encoder={"config": "AudioFlamingo3EncoderConfig"},
    ),
    **_kinds(
        "audio",
        lambda: {"input_values": noise(2, 64, 32)},
        {**SIZES, **NO_DROPOUT},
        AST_Model={"max_length": 64, "num_mel_bins": 32},
    ),
    **_kinds(
        "vision",
        pixels(32),
        VISION,
        ViT_Model={},
        DeiT_Model={},
        ViTMSN_Model={},
        IJepa_Model={},
        Beit_Model={"use_relative_position_bias": True},
        Data2VecVision_Model={},
        Dinov2_Model={},
        Dinov2WithRegisters_Model={},
        DINOv3ViT_Model={},
        Pixio_Model={},
        Yolos_Model={"image_size": [32, 32]},
        CLIPVision_Model={},
        SiglipVision_Model={},
        MLCD_VisionModel={"config": "MLCDVisionConfig"},
        Aimv2_VisionModel={"config": "Aimv2VisionConfig"},
        ViTMAE_Model={"mask_ratio": 0.0},
        VitDet_Model={},
        PoolFormer_Model={},
        ResNet_Model={"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]},
    ),
    **_kinds("vision", pixels(32), {}, Swin_Model=SWIN, Swinv2_Model=SWIN),
    **_kinds("vision", pixels(64), {}, Segformer_Model=STAGES, Pvt_Model=STAGES),
    **_kinds(
        "vision",
        pixels(64),
        {"embed_dim": 16, "image_size": [64, 64], "depths": [1] * 4, "num_heads": [1, 1, 2, 2]},
        Hiera_Model={},
    ),
    **_kinds(
        "vision",
        film,
        {**VISION, "num_frames": 2, "tubelet_size": 2},
        VideoMAE_Model={},
        Vivit_Model={"tubelet_size": [2, 8, 8]},
        Timesformer_Model={},
    ),
    **_kinds(
        "encoder-decoder",
        pairs,
        SEQ2SEQ,
        Bart_Model={},
        MBart_Model={},
        Marian_Model={},
        Pegasus_Model={},
        PegasusX_Model={"block_size": 4},
        Blenderbot_Model={},
        BlenderbotSmall_Model={},
        M2M100_Model={},
        NllbMoe_Model={"num_experts": 2, "expert_capacity": 64},
        PLBart_Model={},
        Mvp_Model={},
        LED_Model={"attention_window": 4},
        BigBirdPegasus_Model={"attention_type": "original_full"},
    ),
    **_kinds(
        "encoder-decoder",
        pairs,
        {"hidden_size": 32, "vocab_size": 64, "decoder_start_token_id": 2},
        ProphetNet_Model={
            f"num_{side}_{part}": 2
            for side in ("encoder", "decoder")
            for part in ("layers", "attention_heads")
        },
    ),
    **_kinds(
        "encoder-decoder",
        pairs,
        T5,
        T5_Model={},
        MT5_Model={},
        LongT5_Model={},
        SwitchTransformers_Model={"num_experts": 2},
    ),
    **_kinds(
        "encoder-decoder",
        spoken,
        WHISPER,
        Whisper_Model={},
        Speech2Text_Model={"config": "Speech2TextConfig", "input_feat_per_channel": 48},
    ),
    **_kinds(
        "encoder-decoder",
        lambda: {"input_values": noise(2, 2_000), "decoder_input_ids": ids()[:, :5]},
        {**TEXT, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2},
        Moonshine_Model={"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2},
    ),
    **_kinds(
        "causal",
        text,
        GROUPED,
        Llama_ForCausalLM={},
        Mistral_ForCausalLM={"sliding_window": 4},
        Ministral_ForCausalLM={"sliding_window": 4},
        Mixtral_ForCausalLM=EXPERTS,
        Qwen2_ForCausalLM={},
        Qwen3_ForCausalLM={},
        Qwen2Moe_ForCausalLM=QWEN_EXPERTS,
        Qwen3Moe_ForCausalLM=QWEN_EXPERTS,
        Gemma_ForCausalLM={},
        Gemma2_ForCausalLM={"sliding_window": 4},
        Gemma3_ForCausalLM={"config": "Gemma3TextConfig", "sliding_window": 4},
        Phi_ForCausalLM={},
        Phi3_ForCausalLM={},
        GptOss_ForCausalLM=EXPERTS,
        StableLm_ForCausalLM={},
        Starcoder2_ForCausalLM={},
        Olmo_ForCausalLM={},
        Olmo2_ForCausalLM={},
        Olmo3_ForCausalLM={"sliding_window": 4},
        Cohere_ForCausalLM={},
        Cohere2_ForCausalLM={"sliding_window": 4},
        Granite_ForCausalLM={},
        SmolLM3_ForCausalLM={},
        Helium_ForCausalLM={},
        Nemotron_ForCausalLM={},
        Persimmon_ForCausalLM={},
        Exaone4_ForCausalLM={"sliding_window": 4},
        Glm_ForCausalLM={},
        Glm4_ForCausalLM={},
        Arcee_ForCausalLM={},
        Apertus_ForCausalLM={},
        DiffLlama_ForCausalLM={"num_key_value_heads": 2},
        ModernBertDecoder_ForCausalLM=dict.fromkeys(_IDS, 0),
        Bamba_ForCausalLM={"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
        Lfm2_ForCausalLM={"layer_types": ["conv", "full_attention"]},
    ),
    **_kinds(
        "causal",
        text,
        GPT,
        GPT2_LMHeadModel={"attn_pdrop": 0.0},
        GPTJ_ForCausalLM={"rotary_dim": 8},
        CodeGen_ForCausalLM={"rotary_dim": 8, "n_head": 4},
        GPTBigCode_ForCausalLM={},
        GPTNeo_ForCausalLM={
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        GPTNeoX_ForCausalLM=TEXT,
        OPT_ForCausalLM={**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
        Bloom_ForCausalLM={"hidden_size": 32},
        Falcon_ForCausalLM={**TEXT, "alibi": False},
        Mpt_ForCausalLM={"d_model": 32, "n_layers": 2, "n_heads": 2},
        BioGpt_ForCausalLM={**TEXT, "pad_token_id": 1},
        XGLM_ForCausalLM={"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 48},
        CTRL_LMHeadModel={"dff": 48},
        Mamba_ForCausalLM={"hidden_size": 32, "num_hidden_layers": 1},
    ),
    **_kinds(
        "two towers",
        captioned,
        {},
        CLIP_Model={"text_config": CLIP, "vision_config": VISION},
        Siglip_Model={"text_config": CLIP, "vision_config": VISION},
        AltCLIP_Model={"text_config": {**BERT, "project_dim": 16}, "vision_config": VISION},
        VisionTextDualEncoder_Model={
            "text_config": {**BERT, "model_type": "bert"},
            "vision_config": {**VISION, "model_type": "vit"},
        },
    ),
    "BertLMHeadModel": Kind(
        "causal",
        "BertLMHeadModel",
        "BertConfig",
        {**BERT, "is_decoder": True, "add_cross_attention": True},
        crossing,
    ),
    "Mamba2Model": Kind(
        "causal",
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
}


def make(name: str) -> nn.Module:
    """The model in eval mode, with weights large enough for every part to show."""
    import transformers

    kind = KINDS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind.config)(**kind.settings)
    model = getattr(transformers, kind.model)(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs_of(name: str) -> Inputs:
    """A padded batch for the model."""
    kind = KINDS[name]
    inputs = kind.inputs()
    if "input_ids" in inputs and "attention_mask" in inputs:  # some pool where padding begins
        pad_id = kind.settings.get("pad_token_id") or 0
        inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), pad_id)
    return inputs
