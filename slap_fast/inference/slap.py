"""A trained model for users: audio files and sentences in, vectors, labels and captions out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from slap_fast.atomic_files import MANIFEST, find_folder, to_json
from slap_fast.checkpoint.hub import download
from slap_fast.checkpoint.model import read_model, write_model
from slap_fast.config import to_dict
from slap_fast.console import Progress
from slap_fast.data.audio.track import AudioError
from slap_fast.data.patches import clip_patches, pack_patches
from slap_fast.inference.audio_text import Failure
from slap_fast.inference.chunks import packs, windows
from slap_fast.inference.embedder import Embedder, content_hash, skips
from slap_fast.inference.items import as_list, blocks, is_list, name_of
from slap_fast.models.generate import generate
from slap_fast.models.layers import Segments
from slap_fast.models.slap import SlapModel
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.packed import PackedPatches, PackedText

FILES = ("*.json", "*.safetensors", MANIFEST)
"""Of a model's folder on a hub."""


class Slap(Embedder):
    """Audio and text in one space, captions, and zero-shot labels.

    An audio item is a path, ``(path, start, end)`` in seconds, a mono array at the model's sample
    rate, or ``(array, sample_rate)``; float arrays have full scale 1.0, int16 ones 32,768.
    :class:`slap_fast.inference.audio_text.AudioTextModel` documents what it shares with others.
    """

    default_template = "the sound of {}"
    window_seconds = 30.0
    hears_whole = True

    def __init__(
        self,
        model: SlapModel,
        tokenizer: CaptionTokenizer,
        card: dict[str, Any] | None = None,
        *,
        max_tokens: int = 16_384,
        name: str = "slap-fast",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.card = card or {}
        self.max_size = max_tokens
        """Audio tokens in one forward pass at most; a second has about 25."""
        self.name = name

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Slap:
        """Loads a model's folder, the best checkpoint of a run's folder, or a hub id.

        Args:
            name: the folder or the id.
            device: where it runs.
            revision: branch, tag or commit of a hub id.
            local_files_only: of a hub id, only what was downloaded before.

        Raises:
            CheckpointError: the folder is missing something, damaged or newer; names it.
        """
        folder = Path(name)
        if not find_folder(folder).is_dir():
            folder = download(str(name), FILES, revision, local_files_only)
        model, tokenizer, card = read_model(folder)
        return cls(model.to(device), tokenizer, card, name=str(name))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what :meth:`from_pretrained` reads."""
        write_model(Path(folder), self.model, self.tokenizer, self.card)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.log_logit_scale.device

    @property
    def embed_dim(self) -> int:
        return self.model.config.embed_dim or self.model.config.audio.hidden_size

    @property
    def sample_rate(self) -> int:
        return self.model.config.mel.sample_rate

    @cached_property
    def content_hash(self) -> str:
        settings = to_json(to_dict(self.model.config)) + self.tokenizer.sha256
        return content_hash(self.model, settings)

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "SLAP",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "embed_dim": self.embed_dim,
            "sample_rate": self.sample_rate,
            "window_seconds": self.window_seconds,
            "preprocessing": f"slap-fast mel patches, {self.model.config.mel.preset} preset",
            "content_hash": self.content_hash,
        }

    def caption(
        self,
        items: Any,
        *,
        num_beams: int = 1,
        max_tokens: int = 64,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Any:
        """As :class:`~slap_fast.inference.audio_text.Captioner` says; hears the first 30 s of a
        clip."""
        skip, items_list = skips(on_error), as_list(items)
        captions: list[str | None] = [None] * len(items_list)
        failures: list[Failure] = []

        def first_windows() -> Iterator[tuple[int, Tensor]]:
            for i in range(len(items_list)):
                name, rate = "", self.sample_rate
                try:
                    item = items_list[i]  # may be read from a shard
                    name = name_of(item)
                    samples = blocks(item, rate)
                    first = next(windows(samples, rate, self.window_seconds, name))
                except AudioError as error:
                    if not skip:
                        raise
                    failures.append(Failure(i, name or error.path, error.code, str(error)))
                    bar.update()
                else:
                    yield i, self._prepare(first)

        options = {"desc": "captioning", "unit": "clip", "show": progress}
        with Progress(total=len(items_list), **options) as bar:
            for owners, patches in packs(first_windows(), self.max_size, self._size):
                generated = self._generate(self._pack(patches), num_beams, max_tokens)
                for owner, caption in zip(owners, generated, strict=True):
                    captions[owner] = caption
                bar.update(len(owners))
        result = captions if is_list(items) else captions[0]
        return (result, failures) if skip else result

    @torch.inference_mode()
    def _generate(self, audio: PackedPatches, num_beams: int, max_tokens: int) -> list[str]:
        ids = generate(
            self.model.caption_decoder,
            self.model.audio_encoder(audio),
            Segments(audio.cu_seqlens, audio.max_seqlen),
            start_id=self.tokenizer.start_id,
            end_id=self.tokenizer.end_id,
            max_tokens=max_tokens,
            num_beams=num_beams,
        )
        return [self.tokenizer.decode(line) for line in ids]

    @property
    def _logit_scale(self) -> float:
        return self.model.logit_scale.item()

    def _prepare(self, waveform: np.ndarray) -> Tensor:
        return clip_patches(waveform, self.model.config.mel).patches

    def _size(self, prepared: Tensor) -> int:
        return len(prepared)

    def _audio_features(self, prepared: list[Tensor]) -> Tensor:
        return self.model.embed_audio(self._pack(prepared))

    def _text_features(self, texts: list[str]) -> Tensor:
        text = PackedText.from_ids(self.tokenizer.encode(texts))
        return self.model.embed_text(PackedText(*(_to(x, self.device) for x in text)))

    def _pack(self, clips: list[Tensor]) -> PackedPatches:
        packed = pack_patches(clips, self.model.config.mel)
        return PackedPatches(*(_to(x, self.device) for x in packed))


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
