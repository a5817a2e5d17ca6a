"""A trained model for users: audio files and sentences in, vectors, labels and captions out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from slap_fast.atomic_files import MANIFEST, find_folder
from slap_fast.checkpoint.format import CheckpointError
from slap_fast.checkpoint.model import read_model, write_model
from slap_fast.data.audio.decode import as_waveform, decode, stream
from slap_fast.data.audio.track import AudioError
from slap_fast.data.patches import clip_patches, pack_patches
from slap_fast.inference.chunks import chunks, packs
from slap_fast.models.generate import generate
from slap_fast.models.layers import Segments
from slap_fast.models.slap import SlapModel
from slap_fast.models.tokenizer import CaptionTokenizer
from slap_fast.packed import PackedPatches, PackedText

DEFAULT_TEMPLATE = "the sound of {}"


class Failure(NamedTuple):
    """An item that could not be embedded."""

    index: int
    """Position of the item in the list."""
    name: str
    """The file, or a description of the array."""
    code: str
    """E_..., as in :mod:`slap_fast.data.audio.decode`."""
    message: str
    """One line."""


class Slap:
    """Audio and text in one space, captions, and zero-shot labels.

    An audio item is a path, ``(path, start, end)`` in seconds, a mono array at the model's sample
    rate, or ``(array, sample_rate)``; float arrays have full scale 1.0, int16 ones 32,768.
    """

    def __init__(
        self,
        model: SlapModel,
        tokenizer: CaptionTokenizer,
        card: dict[str, Any] | None = None,
        *,
        max_tokens: int = 16_384,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.card = card or {}
        self.max_tokens = max_tokens
        """Audio tokens in one forward pass at most; a second has about 25."""

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | torch.device = "cpu") -> Slap:
        """Loads a model's folder, the best checkpoint of a run's folder, or a hub id.

        Raises CheckpointError, which names the folder: something missing, damaged or newer.
        """
        folder = Path(name)
        if not find_folder(folder).is_dir():
            folder = _download(str(name))
        model, tokenizer, card = read_model(folder)
        return cls(model.to(device), tokenizer, card)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what :meth:`from_pretrained` reads."""
        write_model(Path(folder), self.model, self.tokenizer, self.card)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.log_logit_scale.device

    def embed_audio(
        self,
        items: Any,
        *,
        long: Literal["chunks", "whole"] = "chunks",
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Any:
        """One vector per item.

        Args:
            items: one audio item or a list of them.
            long: a clip of more than 30 s as overlapping 30 s chunks whose vectors are averaged, in
                memory that does not grow with its length, or as one sequence.
            on_error: ``"raise"``, or ``"skip"`` for a row of NaN.
            progress: show a bar.

        Returns:
            fp32 [N, E], unit norm, in the order given; with ``on_error="skip"`` also the list of
            :class:`Failure`.

        Raises:
            AudioError: an item cannot be read.
        """
        if long not in ("chunks", "whole"):
            raise ValueError(f"long: found {long!r}, expected 'chunks' or 'whole'")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error: found {on_error!r}, expected 'raise' or 'skip'")
        items = _as_list(items)
        failures: list[Failure] = []

        def audio_chunks() -> Iterator[tuple[int, torch.Tensor]]:
            for i, item in enumerate(tqdm(items, desc="embedding", disable=not progress)):
                try:
                    for waveform in self._waveforms(item, long):
                        yield i, clip_patches(waveform, self.model.config.mel).patches
                except AudioError as error:
                    if on_error == "raise":
                        raise
                    failures.append(Failure(i, _name(item), error.code, str(error)))

        total = np.zeros((len(items), self.embed_dim), dtype=np.float64)
        for owners, patches in packs(audio_chunks(), self.max_tokens):
            with torch.inference_mode():
                features = self.model.embed_audio(self._pack(patches)).float().cpu().numpy()
            np.add.at(total, owners, features)
        total[[failure.index for failure in failures]] = np.nan
        vectors = _unit(total)
        return vectors if on_error == "raise" else (vectors, failures)

    def embed_text(self, texts: str | Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """One vector per text: fp32 [N, E], unit norm, in the order given."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        out = np.zeros((len(texts), self.embed_dim), dtype=np.float32)
        for i in range(0, len(texts), batch_size):
            ids = self.tokenizer.encode(texts[i : i + batch_size])
            text = _to(PackedText.from_ids(ids), self.device)
            with torch.inference_mode():
                out[i : i + batch_size] = self.model.embed_text(text).float().cpu().numpy()
        return _unit(out)

    @property
    def embed_dim(self) -> int:
        """E."""
        return self.model.config.embed_dim or self.model.config.audio.hidden_size

    def similarity(self, audio: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Cosines of audio [N, E] and text [M, E] vectors: fp32 [N, M]."""
        return np.asarray(audio) @ np.asarray(text).T

    def classify(
        self, items: Any, labels: Sequence[str], template: str | Sequence[str] = DEFAULT_TEMPLATE
    ) -> Any:
        """Zero-shot labels: {label: probability}, most likely first; a list of them for a list.

        ``template`` is a sentence with ``{}`` in the label's place; several are averaged.
        """
        scores = self.similarity(self.embed_audio(items), self.label_vectors(labels, template))
        logits = torch.from_numpy(scores) * self.model.logit_scale.item()
        pairs = (zip(labels, row, strict=True) for row in logits.softmax(-1).tolist())
        rows = [dict(sorted(row, key=lambda pair: -pair[1])) for row in pairs]
        return rows if _is_list(items) else rows[0]

    def label_vectors(
        self, labels: Sequence[str], template: str | Sequence[str] = DEFAULT_TEMPLATE
    ) -> np.ndarray:
        """One vector per label, the mean over the templates: fp32 [L, E], unit norm."""
        if not labels:
            raise ValueError("labels: found none, expected at least one")
        templates = [template] if isinstance(template, str) else list(template)
        for text in templates:
            if "{}" not in text:
                raise ValueError(f"template: found {text!r}, expected '{{}}' where the label goes")
        texts = [text.replace("{}", label) for text in templates for label in labels]
        return _unit(self.embed_text(texts).reshape(len(templates), len(labels), -1).mean(0))

    @torch.inference_mode()
    def caption(self, items: Any, *, num_beams: int = 1, max_tokens: int = 64) -> Any:
        """A caption per item: a string, or a list for a list. A clip over 30 s: its first 30 s."""
        first_chunks = (next(self._waveforms(item, "chunks")) for item in _as_list(items))
        clips = (clip_patches(chunk, self.model.config.mel).patches for chunk in first_chunks)
        captions: list[str] = []
        for _, patches in packs(enumerate(clips), self.max_tokens):
            audio = self._pack(patches)
            ids = generate(
                self.model.caption_decoder,
                self.model.audio_encoder(audio),
                Segments(audio.cu_seqlens, audio.max_seqlen),
                start_id=self.tokenizer.start_id,
                end_id=self.tokenizer.end_id,
                max_tokens=max_tokens,
                num_beams=num_beams,
            )
            captions += map(self.tokenizer.decode, ids)
        return captions if _is_list(items) else captions[0]

    def _pack(self, clips: list[torch.Tensor]) -> PackedPatches:
        return _to(pack_patches(clips, self.model.config.mel), self.device)

    def waveform(self, item: Any) -> np.ndarray:
        """An audio item in one piece: float32 [num_samples] at the model's rate."""
        return next(self._waveforms(item, "whole"))

    def _waveforms(self, item: Any, long: str) -> Iterator[np.ndarray]:
        """The item's waveform, in one piece or in chunks."""
        rate = self.model.config.mel.sample_rate
        is_span = isinstance(item, tuple) and len(item) == 3
        source, start, end = item if is_span else (item, 0.0, None)
        if _is_array(source):
            source = (source, rate)
        blocks: Iterable[np.ndarray]
        if isinstance(source, tuple) and _is_array(source[0]):
            blocks = [as_waveform(*source, sample_rate=rate)]
        elif long == "whole":
            blocks = [decode(source, sample_rate=rate, start=start, end=end).waveform]
        else:
            blocks = stream(source, sample_rate=rate, start=start, end=end)
        return iter(blocks) if long == "whole" else chunks(blocks, rate, _name(item))


def _unit(vectors: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(norm, 1e-12)).astype(np.float32)


def _to(packed: Any, device: torch.device) -> Any:
    return type(packed)(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in packed))


def _is_array(item: Any) -> bool:
    return isinstance(item, (np.ndarray, torch.Tensor))


def _is_list(items: Any) -> bool:
    return isinstance(items, Sequence) and not isinstance(items, (str, bytes, tuple))


def _as_list(items: Any) -> Sequence[Any]:
    return items if _is_list(items) else [items]


def _name(item: Any) -> str:
    source = item[0] if isinstance(item, tuple) else item
    return f"array of {len(source)} samples" if _is_array(source) else str(source)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", MANIFEST]))
    except (HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name}: found no such folder, nor a hub model of that name that can be reached "
            f"({type(error).__name__})"
        ) from None
