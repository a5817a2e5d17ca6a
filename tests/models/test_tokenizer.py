"""Captions to ids: the length they are cut to, and files with rules of their own."""

import pytest
from tokenizers import Tokenizer, processors

from slap_fast.models.tokenizer import BUNDLED, END, START, CaptionTokenizer


@pytest.fixture(scope="module")
def words():
    return CaptionTokenizer.load(None, 8)


def test_a_long_caption_keeps_its_first_words_and_both_ends(words):
    texts = ["rain falls on a roof of tin while a dog barks", "rain falls", ""]
    whole = CaptionTokenizer.load(None, 1_000).encode(texts)
    assert len(whole[0]) > 8 > len(whole[1])
    found = words.encode(texts)
    assert found[0] == [*whole[0][:7], words.end_id] and found[1:] == whole[1:]
    assert {ids[0] for ids in found} == {words.start_id} != {words.end_id}


def test_what_a_file_says_of_cutting_padding_and_ends_does_not_count(words, tmp_path):
    tokenizer = Tokenizer.from_file(str(BUNDLED))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12)
    ends = [(START, words.start_id), (END, words.end_id)]
    tokenizer.post_processor = processors.TemplateProcessing(f"{START} $A {END}", None, ends)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["a dog barks at the rain", "x"]
    assert CaptionTokenizer.load(str(tmp_path), 8).encode(texts) == words.encode(texts)


def test_the_text_comes_back_without_the_ends(words):
    text = "a dog"
    assert words.decode(words.encode([text])[0]) == text
