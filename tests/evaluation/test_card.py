"""The card: figures against hand counts, equal captions, failures, no randomness."""

import io

import numpy as np
import pytest
from rich.console import Console

from slap_fast.data.audio.track import AudioError
from slap_fast.data.sources.mixture import ChosenClips
from slap_fast.evaluation.card import evaluate, score
from slap_fast.evaluation.table import render
from slap_fast.inference.audio_text import AudioEmbeddings, Failure

VECTORS = {
    "dog": [1.0, 0.0, 0.0],
    "cat": [0.0, 1.0, 0.0],
    "rain": [0.0, 0.0, 1.0],
}


class Clips:
    """Eight clips of three kinds; two share a caption, one cannot be read."""

    kinds = ("dog", "dog", "dog", "cat", "cat", "cat", "rain", "cat")
    words = ("a dog", "A dog", "two dogs", "a cat", "one cat", "cats", "the rain", "an old cat")
    bad = 5

    def __len__(self):
        return 8

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

    def caption(self, items, *, num_beams, progress):
        return [Clips.words[i] for i in items]


class Mixed(KnowsKinds):
    """A model that takes some clips for another kind."""

    def vector(self, index):
        return np.array(VECTORS[Clips.kinds[index]]) + 0.1 * index * np.array(VECTORS["cat"])

    def embed_files(self, items, *, progress):
        return AudioEmbeddings(np.zeros((0, 3)), [], np.zeros(0))


@pytest.fixture
def card():
    return evaluate(KnowsKinds(), Clips())


def test_n_and_failures_are_counted(card):
    assert (card["n"], card["n_expected"], card["failures"]) == (7, 8, {"E_FORMAT": 1})
    assert card["seconds_heard"] == 7 * 1.5


def test_a_clip_without_readable_captions_is_left_out_and_counted():
    class Damaged(Clips):
        def captions(self, index):
            if index == 6:
                raise AudioError("E_SHARD_CORRUPT", "a.tar", "other bytes", "those packed")
            return super().captions(index)

    card = evaluate(KnowsKinds(), Damaged())
    assert (card["n"], card["n_expected"]) == (6, 8)
    assert card["failures"] == {"E_SHARD_CORRUPT": 1, "E_FORMAT": 1}
    assert card["retrieval"]["queries"] == 5 and "rain" not in card["zero_shot"]["labels"]


def test_equal_captions_are_one_query_with_several_positives(card):
    """Six queries. "a dog" may find two of the three dogs; all dogs tie, and ties count against.

    The clip that cannot be read, and its caption, count nowhere.
    """
    assert card["retrieval"]["queries"] == 6
    t2a = card["retrieval"]["t2a"]
    # Rain is found; each dog and cat query ties with a clip not its own.
    assert t2a["R@1"] == pytest.approx(1 / 6)
    assert t2a["R@5"] == 1
    chance = card["retrieval"]["chance"]["t2a"]["R@1"]
    assert chance == pytest.approx((2 / 7 + 5 * (1 / 7)) / 6)


def test_zero_shot_takes_labels_of_three_clips_or_more(card):
    zero_shot = card["zero_shot"]
    assert zero_shot["labels"] == ["cat", "dog"] and zero_shot["n"] == 6
    assert zero_shot["accuracy"] == zero_shot["balanced_accuracy"] == 1
    assert card["labels_left_out"] == {"rain": 1}
    assert (zero_shot["chance"], zero_shot["majority"]) == (0.5, 0.5)
    biased = evaluate(KnowsKinds(bias=2.0), Clips())
    assert biased["zero_shot"]["accuracy"] == pytest.approx(3 / 6)


def test_captions_are_scored_against_their_own_and_others_references(card):
    caption = card["caption"]
    assert caption["n"] == 7
    assert caption["CIDEr-D"] > 2 * caption["CIDEr-D_shuffled"]
    assert evaluate(KnowsKinds(), Clips(), captions=False)["caption"] is None


def test_score_is_the_mean_recall(card):
    sides = [card["retrieval"][s][f"R@{k}"] for s in ("t2a", "a2t") for k in (1, 5, 10)]
    assert score(card) == pytest.approx(sum(sides) / 6)


def test_the_table_shows_figures_chance_and_failures(card):
    out = io.StringIO()
    render(card, Console(file=out, width=120))
    text = out.getvalue()
    for part in ("7 of 8", "16.7%", "50.0% (majority)", "CIDEr-D", "E_FORMAT", "rain (1)"):
        assert part in text


@pytest.mark.parametrize("dead", [(), (0,), (1, 3, 6), (2, 5, 4, 7)], ids=str)
def test_figures_are_those_of_the_good_clips_alone(dead):
    """As if the others were not in the data: no misses of theirs, no captions that distract."""

    class SomeDead(Clips):
        def item(self, index):
            if index in dead:
                raise AudioError("E_FORMAT", f"{index}.wav", "noise", "audio")
            return index

    class Model(Mixed):
        def embed_files(self, items, *, progress):
            vectors, failures = [], []
            for i in range(len(items)):
                try:
                    vectors.append(self.vector(items[i]))
                except AudioError as error:
                    vectors.append(np.full(3, np.nan))
                    failures.append(Failure(i, "", error.code, str(error)))
            return AudioEmbeddings(np.array(vectors), failures, np.ones(len(items)))

    alive = [i for i in range(8) if i not in dead]
    cards = [evaluate(Model(), source) for source in (SomeDead(), ChosenClips(Clips(), alive))]
    for figure in ("retrieval", "zero_shot", "labels_left_out", "n"):
        assert cards[0][figure] == cards[1][figure]
    assert cards[0]["n_expected"] == 8 and sum(cards[0]["failures"].values()) == len(dead)


def test_no_clip_that_can_be_read_gives_no_figures():
    class AllDead(Clips):
        def captions(self, index):
            raise AudioError("E_SHARD_MISSING", "a.tar", "no such file", "a readable file")

    card = evaluate(Mixed(), AllDead())
    assert (card["n"], card["n_expected"], card["retrieval"]) == (0, 8, None)
    assert card["failures"] == {"E_SHARD_MISSING": 8}
    with pytest.raises(ValueError, match="found 0 of 8 clips"):
        score(card)
    out = io.StringIO()
    render(card, Console(file=out, width=120))
    assert "0 of 8 clips" in out.getvalue()
