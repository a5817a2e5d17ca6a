"""The card: figures against hand counts, equal captions, failures, no randomness."""

import io

import numpy as np
import pytest
from rich.console import Console

from slap_fast.data.audio.track import AudioError
from slap_fast.evaluation.card import evaluate, score
from slap_fast.evaluation.table import render
from slap_fast.inference.audio_text import AudioEmbeddings, Failure

VECTORS = {
    "dog": [1.0, 0.0, 0.0],
    "cat": [0.0, 1.0, 0.0],
    "rain": [0.0, 0.0, 1.0],
}


class Clips:
    """Seven clips of three kinds; two share a caption, one cannot be read."""

    kinds = ("dog", "dog", "dog", "cat", "cat", "cat", "rain")
    words = ("a dog", "A dog", "two dogs", "a cat", "one cat", "cats", "the rain")
    bad = 5

    def __len__(self):
        return 7

    def captions(self, index):
        return (self.words[index],)

    def caption_key(self, index, caption):
        return caption.casefold()

    def label(self, index):
        return self.kinds[index]

    def item(self, index):
        return index


class KnowsKinds:
    """A model that embeds clips and texts by their kind; ``bias`` moves all clips to the cat."""

    def __init__(self, bias=0.0):
        self.bias = bias

    def embed_files(self, items, *, progress):
        bias = self.bias * np.array(VECTORS["cat"])
        rows = [np.array(VECTORS[Clips.kinds[i]]) + bias for i in items]
        rows[Clips.bad] = np.full(3, np.nan)
        error = AudioError("E_FORMAT", "x.wav", "noise", "audio")
        failures = [Failure(Clips.bad, "x.wav", "E_FORMAT", str(error))]
        seconds = np.array([0.0 if i == Clips.bad else 1.5 for i in items])
        return AudioEmbeddings(np.array(rows), failures, seconds)

    def embed_text(self, texts):
        kinds = [next(k for k in VECTORS if k in text.casefold()) for text in texts]
        return np.array([VECTORS[kind] for kind in kinds])

    def label_vectors(self, labels, template):
        return self.embed_text(labels)

    def similarity(self, audio, text):
        return audio @ text.T

    def caption(self, items, *, num_beams):
        return [Clips.words[i] for i in items]


@pytest.fixture
def card():
    return evaluate(KnowsKinds(), Clips())


def test_n_and_failures_are_counted(card):
    assert (card["n"], card["n_expected"], card["failures"]) == (6, 7, {"E_FORMAT": 1})
    assert card["seconds_heard"] == 6 * 1.5


def test_a_clip_without_readable_captions_is_left_out_and_counted():
    class Damaged(Clips):
        def captions(self, index):
            if index == 6:
                raise AudioError("E_SHARD_CORRUPT", "a.tar", "other bytes", "those packed")
            return super().captions(index)

    card = evaluate(KnowsKinds(), Damaged())
    assert (card["n"], card["n_expected"]) == (5, 7)
    assert card["failures"] == {"E_SHARD_CORRUPT": 1, "E_FORMAT": 1}
    assert card["retrieval"]["queries"] == 5 and "rain" not in card["zero_shot"]["labels"]


def test_equal_captions_are_one_query_with_several_positives(card):
    """Six queries. "a dog" may find two of the three dogs; all dogs tie, and ties count against."""
    assert card["retrieval"]["queries"] == 6
    t2a = card["retrieval"]["t2a"]
    # Rain is found; each dog and cat query ties with a clip not its own; "cats" has no clip.
    assert t2a["R@1"] == pytest.approx(1 / 6)
    assert t2a["R@5"] == pytest.approx(5 / 6)
    chance = card["retrieval"]["chance"]["t2a"]["R@1"]
    assert chance == pytest.approx((2 / 7 + 5 * (1 / 7)) / 6)


def test_zero_shot_takes_labels_of_three_clips_or_more(card):
    zero_shot = card["zero_shot"]
    assert zero_shot["labels"] == ["cat", "dog"] and zero_shot["n"] == 6
    assert zero_shot["accuracy"] == pytest.approx(5 / 6)
    assert zero_shot["balanced_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert (zero_shot["chance"], zero_shot["majority"]) == (0.5, 0.5)
    biased = evaluate(KnowsKinds(bias=2.0), Clips())
    assert biased["zero_shot"]["accuracy"] == pytest.approx(2 / 6)


def test_captions_are_scored_against_their_own_and_others_references(card):
    caption = card["caption"]
    assert caption["n"] == 6
    assert caption["CIDEr-D"] > 2 * caption["CIDEr-D_shuffled"]
    assert evaluate(KnowsKinds(), Clips(), captions=False)["caption"] is None


def test_score_is_the_mean_recall(card):
    sides = [card["retrieval"][s][f"R@{k}"] for s in ("t2a", "a2t") for k in (1, 5, 10)]
    assert score(card) == pytest.approx(sum(sides) / 6)


def test_the_table_shows_figures_chance_and_failures(card):
    out = io.StringIO()
    render(card, Console(file=out, width=120))
    text = out.getvalue()
    for part in ("6 of 7", "16.7%", "50.0% (majority)", "CIDEr-D", "E_FORMAT"):
        assert part in text
