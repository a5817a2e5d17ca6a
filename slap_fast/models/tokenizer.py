"""Caption text to token ids and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

BUNDLED = Path(__file__).with_name("tokenizer.json")
START, END = "[CLS]", "[SEP]"


class CaptionTokenizer:
    """A ``tokenizer.json`` whose [CLS] starts and whose [SEP] ends a caption, as in ModernBERT.

    The one bundled with the package is a byte-level BPE, so no text is unknown to it.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.max_tokens = max_tokens
        self.start_id, self.end_id = (tokenizer.token_to_id(token) for token in (START, END))
        if None in (self.start_id, self.end_id):
            token = START if self.start_id is None else END
            raise ValueError(
                f"tokenizer: has no token {token}, expected ModernBERT's special tokens"
            )

    @classmethod
    def load(cls, name: str | None, max_tokens: int) -> CaptionTokenizer:
        """From a ``tokenizer.json``, a folder that has one, or a hub id; None is the bundled one.

        Raises ValueError that names the path or id.
        """
        path = BUNDLED if name is None else Path(name)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            is_file = path.suffix == ".json"
            loaded = Tokenizer.from_file(str(path)) if is_file else Tokenizer.from_pretrained(name)
        except Exception as error:  # tokenizers raises bare Exception, hubs raise many types
            raise ValueError(
                f"tokenizer: cannot read {path}: {str(error).splitlines()[0]}; expected a "
                "tokenizer.json, a folder with one, or a hub id that can be reached"
            ) from None
        return cls(loaded, max_tokens)

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self._tokenizer.get_vocab_size()

    @property
    def sha256(self) -> str:
        """Identifies the vocabulary and its rules."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The text of ``tokenizer.json``."""
        return self._tokenizer.to_str(pretty=True)

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of each caption, [CLS] first and [SEP] last, at most ``max_tokens`` of them."""
        encoded = self._tokenizer.encode_batch_fast(list(captions), add_special_tokens=False)
        room = self.max_tokens - 2
        return [[self.start_id, *caption.ids[:room], self.end_id] for caption in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE over captions, with ModernBERT's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["[PAD]", "[UNK]", START, END, "[MASK]"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer
