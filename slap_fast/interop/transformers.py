"""SLAP as transformers' classes: Auto classes, from_pretrained, pipelines, Trainer.

Importing this module registers the classes, after which ``AutoModel.from_pretrained`` and the
pipelines find them. Batches come padded, as everywhere in transformers, or packed; padded ones are
packed at the entrance, so both give the same numbers and padding costs nothing after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from slap_fast import losses
from slap_fast.checkpoint.model import read_model
from slap_fast.config import ModelConfig, from_dict, to_dict
from slap_fast.interop.model_card import model_card
from slap_fast.interop.processing import SlapFeatureExtractor, SlapProcessor, make_tokenizer
from slap_fast.models import slap as native
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.packed import PackedPatches, PackedText, column_and_band, positions, starts_of


class SlapConfig(transformers.PreTrainedConfig):
    """A :class:`slap_fast.config.ModelConfig` in transformers' form: one mapping, ``slap``."""

    model_type = "slap"

    def __init__(self, slap: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        model = ModelConfig() if slap is None else from_dict(ModelConfig, slap, "slap.")
        self.slap = to_dict(model)
        self.projection_dim = model.embed_dim or model.audio.hidden_size
        self.hidden_size, self.vocab_size = model.audio.hidden_size, model.text.vocab_size

    @property
    def model(self) -> ModelConfig:
        """The settings that the model is built from."""
        return from_dict(ModelConfig, self.slap, "slap.")


@dataclass
class SlapOutput(ModelOutput):
    """Output of a forward pass; the names are those of transformers' CLAP."""

    loss: Tensor | None = None
    """0-d, with ``return_loss``."""
    logits_per_audio: Tensor | None = None
    """[audio, text], scaled cosines."""
    logits_per_text: Tensor | None = None
    """[text, audio]."""
    text_embeds: Tensor | None = None
    """[text, E], unit norm."""
    audio_embeds: Tensor | None = None
    """[audio, E], unit norm."""
    text_model_output: BaseModelOutputWithPooling | None = None
    """Dense and pooled."""
    audio_model_output: BaseModelOutputWithPooling | None = None
    """Dense and pooled."""


class SlapModel(transformers.PreTrainedModel):
    """:class:`slap_fast.models.slap.SlapModel`, held as ``slap``.

    Padded inputs are [B, L, ...] with a mask, 1 where a token is real; packed ones have all clips
    (or captions) end to end and a ``cu_seqlens`` int32 [B + 1] instead.
    """

    config_class = SlapConfig
    config: SlapConfig
    main_input_name = "input_features"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AudioBlock", "CaptionBlock", "ModernBertEncoderLayer"]

    def __init__(self, config: SlapConfig) -> None:
        super().__init__(config)
        self.slap = native.SlapModel(config.model)
        self.card: dict[str, Any] = {}
        """Evaluation figures, for the model card."""
        self.post_init()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Parameters of losses that ``forward`` has not: DDP waits for no gradient of theirs."""
        slap = self.slap
        parts = (slap.caption_decoder, slap.prototype_head)
        unused = {parameter for part in parts for parameter in part.parameters()}
        unused |= {slap.audio_encoder.mask_token, slap.logit_bias}
        return [name for name, parameter in self.named_parameters() if parameter in unused]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the modules initialise themselves."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does, and writes a README.md unless there is one."""
        super().save_pretrained(save_directory, *args, **kwargs)
        readme = Path(save_directory) / "README.md"
        if not readme.exists():
            readme.write_text(model_card(self.config.model, self.card), encoding="utf-8")

    def get_audio_features(
        self,
        input_features: Tensor,
        input_features_mask: Tensor | None = None,
        audio_cu_seqlens: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Log-mel patches to embeddings.

        Args:
            input_features: [B, L, patch_dim], or packed [T, patch_dim].
            input_features_mask: bool [B, L]; None: nothing is padded.
            audio_cu_seqlens: int32 [B + 1], of packed features.

        Returns:
            ``pooler_output`` [B, E], unit norm, and ``last_hidden_state``: [B, L, C], 0 at the
            padding, or [T, C].
        """
        run = _unpad("input_features", input_features, input_features_mask, audio_cu_seqlens, 2)
        coords = column_and_band(run.positions, self.config.model.mel.patches_per_column)
        patches = run.tokens.to(self.slap.audio_encoder.patch_embedding.weight.dtype)
        audio = PackedPatches(patches, coords, run.cu_seqlens, run.max_seqlen)
        features = self.slap.audio_encoder(audio)
        pooled = self.slap.pool_audio(features, run.cu_seqlens)
        return BaseModelOutputWithPooling(run.pad(features), pooled)

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        text_cu_seqlens: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Token ids to embeddings: int64 [B, L] with a mask [B, L], or packed [T]; see
        :meth:`get_audio_features`."""
        run = _unpad("input_ids", input_ids, attention_mask, text_cu_seqlens, 1)
        text = PackedText(run.tokens, run.positions.int()[:, None], run.cu_seqlens, run.max_seqlen)
        features = self.slap.text_encoder(text)
        pooled = self.slap.pool_text(features, run.cu_seqlens)
        return BaseModelOutputWithPooling(run.pad(features), pooled)

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        return_loss: bool | None = None,
        text_cu_seqlens: Tensor | None = None,
        audio_cu_seqlens: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SlapOutput | tuple[Any, ...]:
        """Encodes one side, or both with their similarity; ``return_loss`` adds the contrastive
        loss, clip i belonging to text i."""
        values: dict[str, Any] = {}
        if input_features is not None:
            audio = self.get_audio_features(input_features, input_features_mask, audio_cu_seqlens)
            values |= {"audio_embeds": audio.pooler_output, "audio_model_output": audio}
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask, text_cu_seqlens)
            values |= {"text_embeds": text.pooler_output, "text_model_output": text}
        if input_features is not None and input_ids is not None:
            pair, scale = (audio.pooler_output, text.pooler_output), self.slap.logit_scale
            logits = scale * pair[0] @ pair[1].T
            values |= {"logits_per_audio": logits, "logits_per_text": logits.T}
            if return_loss:
                values["loss"] = losses.contrastive_loss(*pair, scale)
        out = SlapOutput(**values)
        return out if return_dict is not False else out.to_tuple()


class _Run(NamedTuple):
    """A batch's real tokens end to end, where its sequences begin, and the way back."""

    tokens: Tensor
    """[T, ...]."""
    cu_seqlens: Tensor
    max_seqlen: int
    mask: Tensor | None = None
    """bool [B, L], true at the real tokens of the padded batch that this was, if it was one."""

    @property
    def positions(self) -> Tensor:
        """int64 [T], of each token in its own sequence."""
        return positions(self.cu_seqlens.diff())

    def pad(self, x: Tensor) -> Tensor:
        """[T, C] -> [B, L, C] with zeros at the padding; packed batches stay [T, C]."""
        if self.mask is None:
            return x
        return x.new_zeros(*self.mask.shape, x.shape[-1]).masked_scatter(self.mask[..., None], x)


def _unpad(
    name: str, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, packed_ndim: int
) -> _Run:
    if x.ndim == packed_ndim:
        if cu_seqlens is None:
            raise ValueError(f"{name}: found a packed run of shape {list(x.shape)}, without the "
                             "cu_seqlens that say where each sequence begins")  # fmt: skip
        return _Run(x, cu_seqlens, int(cu_seqlens.diff().max()))
    if mask is None:
        mask = torch.ones(x.shape[:2], device=x.device)
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"{name}: found a mask of shape {list(mask.shape)}, expected {list(x.shape[:2])}"
        )
    mask = mask.bool()
    lengths = mask.sum(1)
    return _Run(x[mask], starts_of(lengths), int(lengths.max()), mask)


def from_native(
    model: native.SlapModel, tokenizer: CaptionTokenizer, card: dict[str, Any] | None = None
) -> tuple[SlapModel, SlapProcessor]:
    """A trained model and its tokenizer as transformers' classes; the weights are shared."""
    wrapped = SlapModel(SlapConfig(to_dict(model.config)))
    wrapped.slap = model
    wrapped.card = card or {}
    extractor = SlapFeatureExtractor(to_dict(model.config.mel))
    return wrapped.train(model.training), SlapProcessor(extractor, make_tokenizer(tokenizer))


def convert(folder: str | Path, out: str | Path) -> None:
    """Converts a slap-fast model folder to one that transformers loads and model hubs show."""
    model, processor = from_native(*read_model(folder))
    model.save_pretrained(out)
    processor.save_pretrained(out)


transformers.AutoConfig.register("slap", SlapConfig)
transformers.AutoModel.register(SlapConfig, SlapModel)
transformers.AutoFeatureExtractor.register(SlapConfig, SlapFeatureExtractor)
transformers.AutoTokenizer.register(
    SlapConfig, fast_tokenizer_class=transformers.PreTrainedTokenizerFast
)
transformers.AutoProcessor.register(SlapConfig, SlapProcessor)
