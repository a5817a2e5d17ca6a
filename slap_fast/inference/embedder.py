"""What all models of audio and text do alike: files, windows, batches, labels."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from slap_fast.console import Progress
from slap_fast.data.audio.track import AudioError
from slap_fast.inference.audio_text import AudioEmbeddings, Embedded, Failure
from slap_fast.inference.chunks import packs, windows
from slap_fast.inference.items import as_list, blocks, is_list, name_of, whole


class Embedder(ABC):
    """An :class:`~slap_fast.inference.audio_text.AudioTextModel`, which documents the methods."""

    name: str
    default_template: ClassVar[str]
    window_seconds: float
    """Audio heard at a time; a longer item is heard in windows that overlap by half."""
    hears_whole: ClassVar[bool]
    """Whether an item of any length may also be one sequence."""
    max_size: int
    """Of a forward pass at most, as :meth:`_size` counts."""

    @property
    @abstractmethod
    def embed_dim(self) -> int: ...

    @property
    @abstractmethod
    def sample_rate(self) -> int: ...

    @property
    @abstractmethod
    def content_hash(self) -> str: ...

    @abstractmethod
    def facts(self) -> dict[str, Any]: ...

    @abstractmethod
    def _prepare(self, waveform: np.ndarray) -> Any:
        """The model's input of one window."""

    def _size(self, prepared: Any) -> int:
        """What a window adds to a forward pass."""
        return 1

    @abstractmethod
    def _audio_features(self, prepared: list[Any]) -> Tensor:
        """[n, E] of prepared windows; no gradient is recorded."""

    @abstractmethod
    def _text_features(self, texts: list[str]) -> Tensor:
        """[n, E] of texts; no gradient is recorded."""

    @property
    @abstractmethod
    def _logit_scale(self) -> float:
        """What cosines are multiplied by before the softmax over labels."""

    def _probabilities(self, audio: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """[N, L] of audio and label features, [N, E] and [L, E]."""
        logits = torch.from_numpy(_unit(audio) @ _unit(labels).T) * self._logit_scale
        return logits.softmax(-1).numpy()

    def embed_audio(
        self,
        items: Any,
        *,
        long: Literal["chunks", "whole"] = "chunks",
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Any:
        skip = skips(on_error)
        features, failures, _ = self._embed(as_list(items), long, skip, progress)
        return (_unit(features), failures) if skip else _unit(features)

    def embed_files(
        self, items: Any, *, long: Literal["chunks", "whole"] = "chunks", progress: bool = False
    ) -> AudioEmbeddings:
        features, failures, seconds = self._embed(as_list(items), long, True, progress)
        return AudioEmbeddings(_unit(features), failures, seconds)

    def embed_each(
        self, items: Any, *, long: Literal["chunks", "whole"] = "chunks", progress: bool = False
    ) -> Iterator[Embedded]:
        for feature, failure, seconds in self._each(as_list(items), long, True, progress):
            yield Embedded(_unit(feature), failure, seconds)

    def embed_text(self, texts: str | Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return _unit(self._embed_texts(texts, batch_size))

    def similarity(self, audio: np.ndarray, text: np.ndarray) -> np.ndarray:
        return np.asarray(audio) @ np.asarray(text).T

    def classify(
        self,
        items: Any,
        labels: Sequence[str],
        template: str | Sequence[str] | None = None,
        *,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Any:
        skip = skips(on_error)
        labels = list(dict.fromkeys(_check_labels(labels)))
        label_features = self._label_features(labels, template)
        features, failures, _ = self._embed(as_list(items), "chunks", skip, progress)
        answers: list[dict[str, float] | None] = [
            dict(sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1]))
            for row in self._probabilities(features, label_features).tolist()
        ]
        for failure in failures:
            answers[failure.index] = None
        result = answers if is_list(items) else answers[0]
        return (result, failures) if skip else result

    def label_vectors(
        self, labels: Sequence[str], template: str | Sequence[str] | None = None
    ) -> np.ndarray:
        return _unit(self._label_features(_check_labels(labels), template))

    def waveform(self, item: Any) -> np.ndarray:
        """An audio item in one piece: float32 [num_samples] at the model's rate."""
        return whole(item, self.sample_rate)

    def _embed(
        self, items: Sequence[Any], long: str, skip: bool, progress: bool
    ) -> tuple[np.ndarray, list[Failure], np.ndarray]:
        """Features [N, E], failures, and seconds heard [N], as :meth:`_each` gives them."""
        features, seconds = np.zeros((len(items), self.embed_dim)), np.zeros(len(items))
        failures: list[Failure] = []
        for i, each in enumerate(self._each(items, long, skip, progress)):
            features[i], failure, seconds[i] = each
            failures += [failure] if failure else []
        return features, failures, seconds

    def _each(
        self, items: Sequence[Any], long: str, skip: bool, progress: bool
    ) -> Iterator[tuple[np.ndarray, Failure | None, float]]:
        """(mean feature of its windows [E], failure, seconds heard) of each item, in order.

        An item is given as soon as its windows went through the model, and then forgotten.
        """
        if long not in ("chunks", "whole"):
            raise ValueError(f"long: found {long!r}, expected 'chunks' or 'whole'")
        if long == "whole" and not self.hears_whole:
            raise ValueError(
                f"long: found 'whole', expected 'chunks': {self.name} hears "
                f"{self.window_seconds:g} s at a time"
            )
        totals: dict[int, np.ndarray] = {}
        counts, seconds = Counter[int](), Counter[int]()
        failures: dict[int, Failure] = {}
        bar = Progress(total=len(items), desc="embedding", unit="clip", show=progress)
        started, heard = time.perf_counter(), 0.0

        def hear(i: int, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
            nonlocal heard
            for block in blocks:
                seconds[i] += len(block) / self.sample_rate
                heard += len(block) / self.sample_rate
                yield block

        def prepared() -> Iterator[tuple[int, Any]]:
            for i in range(len(items)):
                name = ""
                try:
                    item = items[i]  # may be read from a shard
                    name = name_of(item)
                    for waveform in self._windows(item, long, partial(hear, i)):
                        yield i, self._prepare(waveform)
                except AudioError as error:
                    if not skip:
                        raise
                    failures[i] = Failure(i, name or error.path, error.code, str(error))
                speed = heard / (time.perf_counter() - started)
                bar.set_postfix_str(f"{speed:.0f} s of audio/s", refresh=False)
                bar.update()

        def finished(i: int) -> tuple[np.ndarray, Failure | None, float]:
            total, failure = totals.pop(i, np.zeros(self.embed_dim)), failures.pop(i, None)
            mean = total / max(counts.pop(i, 0), 1)
            length = seconds.pop(i, 0.0)
            return (np.full_like(mean, np.nan), failure, 0.0) if failure else (mean, None, length)

        next_item = 0
        with bar:
            for owners, batch in packs(prepared(), self.max_size, self._size):
                with torch.inference_mode():
                    features = self._audio_features(batch).float().cpu().numpy()
                for owner, feature in zip(owners, features.astype(np.float64), strict=True):
                    totals[owner] = totals.get(owner, 0.0) + feature
                    counts[owner] += 1
                for i in range(next_item, owners[-1]):  # of the last one, windows may follow
                    yield finished(i)
                next_item = owners[-1]
            for i in range(next_item, len(items)):
                yield finished(i)

    def _windows(
        self,
        item: Any,
        long: str,
        hear: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]],
    ) -> Iterator[np.ndarray]:
        """The item's waveform, in one piece or in windows, all of it through ``hear``."""
        rate = self.sample_rate
        if long == "whole":
            return hear([whole(item, rate)])
        return windows(hear(blocks(item, rate)), rate, self.window_seconds, name_of(item))

    def _embed_texts(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Features [N, E]."""
        features = np.zeros((len(texts), self.embed_dim), dtype=np.float32)
        for i in range(0, len(texts), batch_size):
            with torch.inference_mode():
                batch = self._text_features(texts[i : i + batch_size])
            features[i : i + batch_size] = batch.float().cpu().numpy()
        return features

    def _label_features(
        self, labels: Sequence[str], template: str | Sequence[str] | None
    ) -> np.ndarray:
        """Features [L, E], the means over the templates."""
        if template is None or template == ():
            template = self.default_template
        templates = [template] if isinstance(template, str) else list(template)
        for text in templates:
            if "{}" not in text:
                raise ValueError(f"template: found {text!r}, expected '{{}}' where the label goes")
        texts = [text.replace("{}", label) for text in templates for label in labels]
        features = self._embed_texts(texts, batch_size=256)
        return features.reshape(len(templates), len(labels), -1).mean(0)


def skips(on_error: str) -> bool:
    """Whether ``on_error`` is "skip". Raises ValueError where it is not "raise" either."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: found {on_error!r}, expected 'raise' or 'skip'")
    return on_error == "skip"


def _check_labels(labels: Sequence[str]) -> list[str]:
    if isinstance(labels, (str, bytes)):
        raise ValueError(f"labels: found the text {labels!r}, expected a list of labels")
    labels = list(labels)
    if not labels:
        raise ValueError("labels: found none, expected at least one")
    for i, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"labels[{i}]: found {label!r}, expected text that is not empty")
    return labels


def content_hash(module: nn.Module, settings: str) -> str:
    """SHA-256 of a module's tensors, by name, and of a text that says how it is used."""
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _unit(features: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(features, axis=-1, keepdims=True)
    return (features / np.maximum(norm, 1e-12)).astype(np.float32)
