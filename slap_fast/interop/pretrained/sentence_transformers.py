"""Any sentence-transformers model that takes audio and text."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slap_fast.checkpoint.format import CheckpointError
from slap_fast.inference.embedder import Embedder, content_hash
from slap_fast.interop.pretrained.settings import read_settings


class SentenceTransformerModel(Embedder):
    """A SentenceTransformer: texts are its queries and audio its documents, with their prompts.

    It stores no temperature for :meth:`classify`: 20, as its contrastive losses have by default.
    """

    default_template = "{}"
    hears_whole = False
    max_size = 8
    _logit_scale = 20.0

    def __init__(self, model: Any, name: str, settings: str) -> None:
        self.model, self.name, self.settings = model, name, settings

    @classmethod
    def from_folder(
        cls, folder: Path, name: str, device: str | torch.device
    ) -> SentenceTransformerModel:
        """Loads a folder as SentenceTransformer.save writes it. Raises CheckpointError."""
        try:
            from sentence_transformers import SentenceTransformer
        except Exception as error:
            raise CheckpointError(
                f"{folder}: is a sentence-transformers model, and that package cannot be imported "
                f"({type(error).__name__}): pip install sentence-transformers"
            ) from None
        if not any(folder.rglob("*.safetensors")):
            raise CheckpointError(f"{folder}: found no *.safetensors, expected the weights in it")
        try:
            model = SentenceTransformer(
                str(folder),
                device=str(device),
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            message = " ".join(str(error).split())
            raise CheckpointError(f"{folder}: cannot be loaded: {message}") from None
        missing = {"audio", "text"} - set(model.modalities)
        if missing:
            raise CheckpointError(
                f"{folder}: takes {', '.join(model.modalities)}, expected audio and text"
            )
        return cls(model.eval(), name, read_settings(folder))

    @property
    def embed_dim(self) -> int:
        return self.model.get_embedding_dimension()

    @property
    def sample_rate(self) -> int:
        return self._audio_processor.sampling_rate

    @property
    def window_seconds(self) -> float:
        """As the feature extractor of a CLAP or of a Whisper says; 30 where it has no limit."""
        for limit in ("max_length_s", "chunk_length"):
            if seconds := getattr(self._audio_processor, limit, None):
                return float(seconds)
        return 30.0

    @cached_property
    def content_hash(self) -> str:
        return content_hash(self.model, self.settings)

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "sentence-transformers",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "embed_dim": self.embed_dim,
            "sample_rate": self.sample_rate,
            "window_seconds": self.window_seconds,
            "preprocessing": type(self._audio_processor).__name__,
            "content_hash": self.content_hash,
        }

    @cached_property
    def _audio_processor(self) -> Any:
        """What knows the sample rate: the feature extractor, or the module itself."""
        for module in self.model.modules():
            processor = getattr(module, "processor", None)
            for owner in (getattr(processor, "feature_extractor", None), processor, module):
                if getattr(owner, "sampling_rate", None):
                    return owner
        raise CheckpointError(f"{self.name}: none of its modules says its audio's sampling rate")

    def _prepare(self, waveform: np.ndarray) -> dict[str, Any]:
        return {"array": waveform, "sampling_rate": self.sample_rate}

    def _audio_features(self, prepared: list[dict[str, Any]]) -> Tensor:
        # Each alone: some processors pad a batch, and their models hear the padding.
        return self.model.encode_document(prepared, batch_size=1, convert_to_tensor=True)

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.model.encode_query(texts, batch_size=len(texts), convert_to_tensor=True)
