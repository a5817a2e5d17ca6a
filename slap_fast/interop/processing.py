"""transformers' feature extractor, processor and tokenizer for the model's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from slap_fast.config import MelConfig, from_dict, to_dict
from slap_fast.data.audio.decode import as_waveform
from slap_fast.data.patches import clip_patches
from slap_fast.models.tokenizer import END, START, CaptionTokenizer
from slap_fast.packed import starts_of


class SlapFeatureExtractor(FeatureExtractionMixin):
    """Waveforms to padded, or packed, log-mel patches."""

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(self, mel: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        config = MelConfig() if mel is None else from_dict(MelConfig, mel, "mel.")
        self.mel = to_dict(config)
        self.sampling_rate, self.feature_size = config.sample_rate, config.patch_dim
        self.padding_value, self.padding_side = 0.0, "right"  # pipelines pad batches by them

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        *,
        packed: bool = False,
        return_tensors: str | None = "pt",
        **_: Any,
    ) -> BatchFeature:
        """One waveform, [num_samples] float32 or int16, or a list of them.

        Args:
            raw_speech: mono; another rate than the model's is resampled.
            sampling_rate: Hz; None is the model's own.
            packed: ``input_features`` [T, patch_dim] and ``audio_cu_seqlens`` int32 [B + 1] instead
                of [B, L, patch_dim] and ``input_features_mask`` bool [B, L].
            return_tensors: as in transformers.

        Raises:
            slap_fast.AudioError: not finite, out of range, too short.
        """
        mel = from_dict(MelConfig, self.mel)
        clips = [raw_speech] if np.ndim(raw_speech[0]) == 0 else raw_speech
        rate = sampling_rate or mel.sample_rate
        waveforms = (as_waveform(clip, rate, sample_rate=mel.sample_rate) for clip in clips)
        patches = [clip_patches(waveform, mel).patches for waveform in waveforms]
        lengths = torch.tensor([len(clip) for clip in patches])
        if packed:
            data = {"input_features": torch.cat(patches), "audio_cu_seqlens": starts_of(lengths)}
        else:
            padded = nn.utils.rnn.pad_sequence(patches, batch_first=True)
            mask = torch.arange(padded.shape[1]) < lengths[:, None]
            data = {"input_features": padded, "input_features_mask": mask}
        if return_tensors == "pt":
            return BatchFeature(data)
        return BatchFeature({k: v.numpy() for k, v in data.items()}, tensor_type=return_tensors)


class SlapProcessor(ProcessorMixin):
    """The feature extractor and the tokenizer as one."""

    def __init__(self, feature_extractor: Any, tokenizer: Any) -> None:
        super().__init__(feature_extractor, tokenizer)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        *,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        **text_kwargs: Any,
    ) -> BatchFeature:
        """Texts, waveforms or both; texts are padded, and cut at the model's longest."""
        data: dict[str, Any] = {}
        if text is not None:
            options = {"padding": True, "truncation": True, **text_kwargs}
            data |= self.tokenizer(text, return_tensors=return_tensors, **options)
        if audio is not None:
            data |= self.feature_extractor(audio, sampling_rate, return_tensors=return_tensors)
        return BatchFeature(data)


def make_tokenizer(captions: CaptionTokenizer) -> PreTrainedTokenizerFast:
    """Converts the caption tokenizer to transformers' class; the ids stay."""
    tokenizer = Tokenizer.from_str(captions.to_json())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, captions.start_id), (END, captions.end_id)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=captions.max_tokens,
        cls_token=START,
        sep_token=END,
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )
