"""A trained model as a SentenceTransformer of one module, for texts and for audio.

from sentence_transformers import SentenceTransformer
from slap_fast.interop.sentence_transformers import SlapModule
model = SentenceTransformer(modules=[SlapModule.load("runs/my/best")])
model.encode(["a dog barks"]), model.encode(["a.wav", {"array": x, "sampling_rate": 44_100}])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers.base.modality import infer_batch_modality
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from slap_fast.data.audio.items import audio_item
from slap_fast.data.patches import clip_patches, pack_patches
from slap_fast.inference.slap import Slap
from slap_fast.packed import PackedPatches, PackedText


class SlapModule(InputModule):
    """Packs a batch of texts or of audio and embeds it; gradients flow."""

    save_in_root = False

    def __init__(self, slap: Slap) -> None:
        super().__init__()
        self.slap, self.model = slap, slap.model
        self.sampling_rate = slap.sample_rate

    @property
    def modalities(self) -> list[str]:
        return ["text", "audio"]

    def get_embedding_dimension(self) -> int:
        return self.slap.embed_dim

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """Packs texts or audio: paths, arrays at the model's rate, or {"array", "sampling_rate"}.

        Raises ValueError for a batch of both.
        """
        modality = infer_batch_modality(inputs, supported_modalities=self.modalities)
        if modality == "text":
            ids = self.slap.tokenizer.encode([(prompt or "") + text for text in inputs])
            return {"modality": modality, **PackedText.from_ids(ids)._asdict()}
        if modality != "audio":
            raise ValueError(f"inputs: found a batch of {modality}, expected text or audio")
        mel = self.model.config.mel
        waveforms = (self.slap.waveform(audio_item(value)) for value in inputs)
        clips = [clip_patches(waveform, mel).patches for waveform in waveforms]
        return {"modality": modality, **pack_patches(clips, mel)._asdict()}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Tensor | Any]:
        kind, embed = PackedText, self.model.embed_text
        if features["modality"] == "audio":
            kind, embed = PackedPatches, self.model.embed_audio
        packed = kind(**{name: features[name] for name in kind._fields})
        return {**features, "sentence_embedding": embed(packed)}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        self.slap.save_pretrained(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **_: Any) -> SlapModule:
        """A model's folder or hub id, or a SentenceTransformer's folder and the module's in it."""
        return cls(Slap.from_pretrained(Path(model_name_or_path, subfolder)))
