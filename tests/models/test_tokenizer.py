"""Captions to ids: the length they are cut to, and files with settings of their own."""

import pytest
from tokenizers import Tokenizer, processors

from slap_fast.models.tokenizer import BUNDLED, END, START, CaptionTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer.load(None, 8)


def test_a_long_caption_keeps_its_first_words_and_the_start_and_end_tokens(tokenizer):
    texts = ["rain falls on a roof of tin while a dog barks", "rain falls", ""]
    uncut = CaptionTokenizer.load(None, 1_000).encode(texts)
    assert len(uncut[0]) > 8 > len(uncut[1])
    ids = tokenizer.encode(texts)
    assert ids[0] == [*uncut[0][:7], tokenizer.end_id] and ids[1:] == uncut[1:]
    assert {caption[0] for caption in ids} == {tokenizer.start_id} != {tokenizer.end_id}


def test_truncation_padding_and_post_processing_of_a_file_are_ignored(tokenizer, tmp_path):
    stored = Tokenizer.from_file(str(BUNDLED))
    stored.enable_truncation(4)
    stored.enable_padding(length=12)
    ends = [(START, tokenizer.start_id), (END, tokenizer.end_id)]
    stored.post_processor = processors.TemplateProcessing(f"{START} $A {END}", None, ends)
    stored.save(str(tmp_path / "tokenizer.json"))
    texts = ["a dog barks at the rain", "x"]
    assert CaptionTokenizer.load(str(tmp_path), 8).encode(texts) == tokenizer.encode(texts)


def test_decoding_drops_the_start_and_end_tokens(tokenizer):
    text = "a dog"
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text
