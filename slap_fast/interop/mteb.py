"""A trained model for mteb's audio and audio-text tasks.

    import mteb
    from slap_fast.interop.mteb import SlapEncoder
    mteb.evaluate(SlapEncoder("runs/my/best"), mteb.get_tasks(modalities=["audio"]))

Audio is read undecoded and collated here: mteb's own collator imports torchaudio, and its datasets
torchcodec.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from torch.utils.data import DataLoader

from slap_fast.data.audio.items import audio_item
from slap_fast.inference.slap import Slap


class SlapEncoder(AbsEncoder):
    """mteb's encoder protocol."""

    def __init__(
        self,
        model_name: str | Slap,
        revision: str | None = None,
        device: str | None = None,
        **_: Any,
    ) -> None:
        """``model_name``: a folder, a hub id, or a model that is loaded already."""
        loaded = isinstance(model_name, Slap)
        name = "slap-fast/loaded" if loaded else model_name
        self.model = model_name if loaded else Slap.from_pretrained(name, device=device or "cpu")
        self.mteb_model_meta = _meta(name, revision, self.model)

    def encode(
        self, inputs: DataLoader, *, task_metadata: Any, hf_split: str, hf_subset: str, **_: Any
    ) -> np.ndarray:
        """Embeds N rows to [N, E]: their text, their audio, or the sum of both."""
        columns = inputs.dataset.features
        embeddings = []
        if "text" in columns:
            embeddings.append(self.model.embed_text(list(inputs.dataset["text"])))
        if "audio" in columns:
            batches = undecoded(inputs)
            audio = [self.model.embed_audio([audio_item(x) for x in batch]) for batch in batches]
            embeddings.append(np.concatenate(audio))
        if not embeddings:
            raise ValueError(f"inputs: found columns {', '.join(columns)}, expected text or audio")
        return sum(embeddings)


def undecoded(inputs: DataLoader) -> DataLoader:
    """The loader's audio column, in the same batches and order, not decoded."""
    rows = inputs.dataset.select_columns("audio")
    if isinstance(rows.features["audio"], datasets.Audio):
        rows = rows.cast_column("audio", datasets.Audio(decode=False))
    return DataLoader(rows, inputs.batch_size, collate_fn=lambda rows: [x["audio"] for x in rows])


def _meta(name: str, revision: str | None, slap: Slap) -> ModelMeta:
    parameters = sum(p.numel() for p in slap.model.parameters())
    return ModelMeta(
        loader=SlapEncoder,
        name=name if name.count("/") == 1 else "slap-fast/" + name.rstrip("/").replace("/", "_"),
        revision=revision or "local",
        release_date=None,
        languages=None,
        n_parameters=parameters,
        memory_usage_mb=round(4 * parameters / 2**20),
        max_tokens=slap.model.config.text.max_tokens,
        embed_dim=slap.embed_dim,
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name="cosine",
        use_instructions=False,
        training_datasets=None,
        modalities=["audio", "text"],
    )
