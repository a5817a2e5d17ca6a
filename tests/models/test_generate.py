"""Caption decoding: causal, cached equals recomputed, beam search equals brute force."""

import itertools

import pytest
import torch

from slap_fast.config import CaptionDecoderConfig
from slap_fast.models.caption_decoder import CaptionDecoder
from slap_fast.models.generate import generate
from slap_fast.models.layers import Segments
from slap_fast.packed import PackedText, starts_of

START, END, VOCAB = 0, 1, 5
LENGTHS = [6, 3, 11]


@pytest.fixture
def decoder():
    torch.manual_seed(3)
    config = CaptionDecoderConfig(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
    model = CaptionDecoder(config, VOCAB, 12).double()
    torch.nn.init.normal_(model.token_embedding.weight, std=1.0)
    return model.eval()


@pytest.fixture
def audio():
    torch.manual_seed(4)
    features = 2 * torch.randn(sum(LENGTHS), 12, dtype=torch.float64)
    return features, Segments(starts_of(LENGTHS), max(LENGTHS))


def log_probs(decoder, audio, clip: int, ids: list[int]) -> torch.Tensor:
    """Next-token log-probabilities after each of ``ids``, by the packed teacher-forced pass."""
    features, segments = audio
    start, end = segments.cu_seqlens[clip : clip + 2].tolist()
    context = Segments(torch.tensor([0, end - start]).int(), end - start)
    with torch.no_grad():
        hidden = decoder(PackedText.from_ids([ids]), features[start:end], context)
        return (hidden @ decoder.token_embedding.weight.T).float().log_softmax(-1)


def search(decoder, audio, beams: int, tokens: int) -> list[list[int]]:
    return generate(
        decoder, *audio, start_id=START, end_id=END, max_tokens=tokens, num_beams=beams,
        length_penalty=0.0,
    )  # fmt: skip


def test_a_token_does_not_see_the_ones_after_it(decoder, audio):
    a = log_probs(decoder, audio, 0, [0, 2, 3, 4])
    b = log_probs(decoder, audio, 0, [0, 2, 4, 2])
    assert torch.equal(a[:2], b[:2]) and not torch.allclose(a[2], b[2])


def test_greedy_with_a_cache_equals_recomputing(decoder, audio):
    captions = search(decoder, audio, 1, 8)
    for clip, tokens in enumerate(captions):
        ids = [START]
        while len(ids) <= 8 and ids[-1] != END:
            ids.append(int(log_probs(decoder, audio, clip, ids)[-1].argmax()))
        assert tokens == [t for t in ids[1:] if t != END]


def test_wide_beams_find_the_best_of_all_captions(decoder, audio):
    tokens = 3
    captions = search(decoder, audio, VOCAB**tokens, tokens)
    for clip in range(len(LENGTHS)):
        best, best_score = None, -torch.inf
        for ids in itertools.product(range(VOCAB), repeat=tokens):
            ids = list(ids[: ids.index(END) + 1]) if END in ids else list(ids)
            table = log_probs(decoder, audio, clip, [START, *ids[:-1]])
            score = float(sum(table[i, t] for i, t in enumerate(ids)))
            if score > best_score + 1e-9:
                best, best_score = ids, score
        assert captions[clip] == [t for t in best if t != END]


def test_a_clip_is_captioned_the_same_alone_and_in_a_batch(decoder, audio):
    features, segments = audio
    together = search(decoder, audio, 3, 6)
    for clip, part in enumerate(features.split(LENGTHS)):
        context = Segments(torch.tensor([0, len(part)]).int(), len(part))
        assert search(decoder, (part, context), 3, 6) == [together[clip]]
