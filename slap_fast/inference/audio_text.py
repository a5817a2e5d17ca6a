"""What every model of audio and text does here: ours, and those of other people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np


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


class AudioEmbeddings(NamedTuple):
    """Vectors of N audio items, and what became of them."""

    vectors: np.ndarray
    """fp32 [N, E], unit norm; NaN for an item that failed."""
    failures: list[Failure]
    seconds: np.ndarray
    """float64 [N]: audio that the model heard, 0 for an item that failed."""


class Embedded(NamedTuple):
    """The vector of one audio item, and what became of the item."""

    vector: np.ndarray
    """fp32 [E], unit norm; NaN for an item that failed."""
    failure: Failure | None
    seconds: float
    """Audio that the model heard, 0 for an item that failed."""


@runtime_checkable
class AudioTextModel(Protocol):
    """Audio and text in one space.

    An audio item is a path, ``(path, start, end)`` in seconds, a mono array at the model's sample
    rate, or ``(array, sample_rate)``; float arrays have full scale 1.0, int16 ones 32,768.
    """

    @property
    def name(self) -> str:
        """The folder or the hub id it was loaded from."""

    @property
    def content_hash(self) -> str:
        """SHA-256, in hexadecimal, of all that vectors depend on: weights, configuration, tokenizer
        and preprocessing. Of equal hashes the vectors can be compared."""

    @property
    def embed_dim(self) -> int:
        """E, the size of a vector."""

    @property
    def sample_rate(self) -> int:
        """Hz, of the audio the model hears."""

    @property
    def default_template(self) -> str:
        """The zero-shot prompt of its authors, with ``{}`` in the label's place."""

    def facts(self) -> dict[str, Any]:
        """JSON values for a card: kind, parameters, preprocessing, seconds heard at a time."""

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
            long: what is longer than the model hears at a time, as overlapping chunks whose vectors
                are averaged, in memory that does not grow with its length, or as one sequence.
            on_error: ``"raise"``, or ``"skip"`` for a row of NaN.
            progress: show a bar.

        Returns:
            fp32 [N, E], unit norm, in the order given; with ``on_error="skip"`` also the list of
            :class:`Failure`.

        Raises:
            AudioError: an item cannot be read.
            ValueError: an argument is none of its values, or the model hears no sequence as one.
        """

    def embed_files(
        self, items: Any, *, long: Literal["chunks", "whole"] = "chunks", progress: bool = False
    ) -> AudioEmbeddings:
        """:meth:`embed_audio` that raises for no item, and says how much of each was heard."""

    def embed_each(
        self, items: Any, *, long: Literal["chunks", "whole"] = "chunks", progress: bool = False
    ) -> Iterator[Embedded]:
        """:meth:`embed_files` one item after the other, in the order given, in memory that does not
        grow with their number. An item comes once the next ones fill a forward pass with it."""

    def embed_text(self, texts: str | Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """One vector per text: fp32 [N, E], unit norm, in the order given."""

    def similarity(self, audio: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Cosines of audio [N, E] and text [M, E] vectors: fp32 [N, M]."""

    def classify(
        self,
        items: Any,
        labels: Sequence[str],
        template: str | Sequence[str] | None = None,
        *,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Any:
        """Zero-shot labels.

        Args:
            items: one audio item or a list of them.
            labels: any words; one that comes twice counts once.
            template: a sentence with ``{}`` in the label's place, by default
                :attr:`default_template`; several are averaged.
            on_error: ``"raise"``, or ``"skip"`` for None in place of an answer.
            progress: show a bar.

        Returns:
            {label: probability}, most likely first; a list of them for a list; with
            ``on_error="skip"`` also the list of :class:`Failure`.

        Raises:
            AudioError: an item cannot be read.
            ValueError: ``labels`` is empty, one text, or holds what is no text; or another argument
                is none of its values.
        """

    def label_vectors(
        self, labels: Sequence[str], template: str | Sequence[str] | None = None
    ) -> np.ndarray:
        """One vector per label, the mean over the templates: fp32 [L, E], unit norm."""


@runtime_checkable
class Captioner(Protocol):
    """A model that also says in words what it hears."""

    def caption(
        self,
        items: Any,
        *,
        num_beams: int = 1,
        max_tokens: int = 64,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Any:
        """A caption per item: a string, or a list for a list.

        With ``on_error="skip"`` None for an item that cannot be read, and also the list of
        :class:`Failure`; else that raises AudioError.
        """
