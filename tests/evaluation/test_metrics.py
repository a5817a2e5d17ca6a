"""Metrics against loops written from their definitions, and CIDEr-D against pycocoevalcap."""

import math
import random
import re
import time

import numpy as np
import pytest

from slap_fast.evaluation.metrics import (
    cider_d,
    class_recall,
    classification,
    retrieval,
    tokenize,
)


def retrieval_by_loops(similarity, positives):
    """Sorts every query with the negatives first among equals; NaN last."""
    recalls, precisions = {1: [], 5: [], 10: []}, []
    for scores, right in zip(similarity, positives, strict=True):
        pairs = [(-score, column in right) for column, score in enumerate(scores)]
        order = [is_right for score, is_right in sorted(k for k in pairs if not math.isnan(k[0]))]
        ranks = [rank for rank, is_right in enumerate(order, 1) if is_right]
        for k, hits in recalls.items():
            hits.append(any(rank <= k for rank in ranks))
        at_positives = [(i + 1) / rank for i, rank in enumerate(ranks) if rank <= 10]
        precisions.append(sum(at_positives) / min(10, len(right)))
    result = {f"R@{k}": sum(hits) / len(hits) for k, hits in recalls.items()}
    return result | {"mAP@10": sum(precisions) / len(precisions)}


class TestRetrieval:
    @pytest.mark.parametrize("levels", [4, 10_000], ids=["many_ties", "few_ties"])
    @pytest.mark.parametrize("most", [1, 5, 40], ids=lambda n: f"up_to_{n}_positives")
    @pytest.mark.parametrize("nans", [False, True], ids=["no_nans", "nans"])
    def test_equals_sorting(self, levels, most, nans):
        rng = np.random.default_rng([levels, most, nans])
        similarity = rng.integers(levels, size=(30, 50)).astype(np.float32)
        positives = [
            set(rng.permutation(50)[: rng.integers(1, most, endpoint=True)]) for _ in similarity
        ]
        if nans:
            similarity[3] = np.nan
            similarity[:, [7, 30]] = np.nan
        expected = retrieval_by_loops(similarity, positives)
        assert retrieval(similarity, positives) == pytest.approx(expected, abs=1e-12)
        matrix = np.array([[column in right for column in range(50)] for right in positives])
        assert retrieval(similarity, matrix) == retrieval(similarity, positives)

    def test_by_hand(self):
        similarity = np.array([[0.9, 0.8, 0.1, 0.5], [0.1, 0.2, 0.3, 0.4]])
        # Ranks of the positives: 1 and 3; 4.
        result = retrieval(similarity, [{0, 3}, {0}])
        expected = {"R@1": 0.5, "R@5": 1.0, "R@10": 1.0, "mAP@10": (5 / 6 + 1 / 4) / 2}
        assert result == pytest.approx(expected)

    @pytest.mark.parametrize("value", [0.0, np.inf, -np.inf, np.nan])
    def test_equal_scores_for_all_pairs_retrieve_nothing(self, value):
        result = retrieval(np.full((20, 20), value), np.eye(20, dtype=bool))
        assert result == {"R@1": 0, "R@5": 0, "R@10": 0, "mAP@10": 0}

    def test_perfect_scores_retrieve_everything(self):
        result = retrieval(np.eye(20), np.eye(20, dtype=bool))
        assert result == {"R@1": 1, "R@5": 1, "R@10": 1, "mAP@10": 1}

    def test_a_failed_query_is_a_miss_and_leaves_the_others(self):
        similarity = np.eye(20)
        similarity[4] = np.nan
        assert set(retrieval(similarity, np.eye(20, dtype=bool)).values()) == {0.95}

    def test_a_large_matrix_is_ranked_in_parts(self):
        rng = np.random.default_rng(0)
        similarity = rng.normal(size=(1500, 1500)).astype(np.float32)
        similarity[np.arange(1500), np.arange(1500)] += 3
        ranks = 1 + (similarity > np.diag(similarity)[:, None]).sum(1)
        result = retrieval(similarity, [{i} for i in range(1500)])
        expected = {f"R@{k}": (ranks <= k).mean() for k in (1, 5, 10)}
        expected["mAP@10"] = np.where(ranks <= 10, 1 / ranks, 0).mean()
        assert result == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize(
        ("similarity", "positives", "message"),
        [
            (np.zeros((2, 3)), [{0}], "positives: found 1, expected 2"),
            (np.zeros((2, 3)), [{0}, set()], r"positives\[1\]: found none"),
            (np.zeros((2, 3)), [{0}, {3}], r"positives\[1\]: found 3, expected 0 .. 2"),
            (np.zeros((2, 3)), [{-1}, {1}], r"positives\[0\]: found -1"),
            (np.zeros((2, 3)), np.ones((2, 3), dtype=int), "positives: found int64"),
            (np.zeros((2, 3)), np.ones((2, 2), dtype=bool), "positives: found bool"),
            (np.zeros((0, 3)), [], "similarity: found shape"),
            (np.zeros(3), [{0}] * 3, "similarity: found shape"),
        ],
        ids=["too_few", "none", "too_large", "negative", "not_bool", "shape", "no_query", "1-D"],
    )
    def test_rejects(self, similarity, positives, message):
        with pytest.raises(ValueError, match=message):
            retrieval(similarity, positives)


class TestClassification:
    def test_by_hand(self):
        scores = np.array([[3, 1, 2, 0], [3, 1, 2, 0], [1, 3, 2, 0], [0, 3, 2, 1], [0, 2, 3, 1.0]])
        result = classification(scores, np.array([0, 0, 0, 1, 1]))
        assert result == {
            "accuracy": 3 / 5,
            "balanced_accuracy": pytest.approx((2 / 3 + 1 / 2) / 2),
            "chance": 1 / 4,
            "majority": 3 / 5,
        }

    def test_class_recall(self):
        scores = np.eye(3)[[0, 1, 1, 2]]
        recall = class_recall(scores, np.array([0, 0, 1, 1]))
        np.testing.assert_array_equal(recall, [0.5, 0.5, np.nan])

    @pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
    def test_equal_scores_for_all_classes_are_never_right(self, value):
        result = classification(np.full((6, 3), value), np.arange(6) % 3)
        assert result["accuracy"] == result["balanced_accuracy"] == 0

    def test_a_failed_row_is_wrong(self):
        scores = np.eye(4)
        scores[2] = np.nan
        assert classification(scores, np.arange(4))["accuracy"] == 0.75

    @pytest.mark.parametrize(
        ("scores", "targets", "message"),
        [
            (np.zeros((2, 3)), [0, 3], "targets: found 0 .. 3, expected 0 .. 2"),
            (np.zeros((2, 3)), [-1, 0], "targets: found -1 .. 0"),
            (np.zeros((2, 3)), [0], "scores, targets: found shapes"),
            (np.zeros((0, 3)), [], "scores, targets: found shapes"),
        ],
        ids=["too_large", "negative", "lengths", "empty"],
    )
    def test_rejects(self, scores, targets, message):
        with pytest.raises(ValueError, match=message):
            classification(scores, np.array(targets, dtype=int))


CANDIDATES = [
    "A dog barks twice and then howls.",
    "Rain falls on a metal roof while thunder rolls far away",
    "a man is speaking, a man is speaking, a man is speaking",
    "Someone's old car won't start",
    "birds",
    "",
]
REFERENCES = [
    ["A dog barks, then howls.", "A dog is barking and howling in a yard"],
    ["Heavy rain on a metal roof", "Thunder rolls far away while rain falls", "A storm passes"],
    ["A man is speaking to a crowd", "A man speaks", "A man is speaking while a car passes"],
    ["An old car won't start", "An engine cranks but does not start"],
    ["Birds sing", "birds"],
    ["Silence", "Nothing is heard"],
]
# pip install --no-deps pycocoevalcap==1.2; then, with these lists and metrics.tokenize,
#   words = lambda captions: [" ".join(tokenize(caption)) for caption in captions]
#   Cider().compute_score(dict(enumerate(map(words, REFERENCES))),
#                         {i: words([caption]) for i, caption in enumerate(CANDIDATES)})
GOLDEN = [
    2.593444784164991,
    2.1360946531819627,
    1.053966769518553,
    3.5738283229821426,
    2.1216921748800703,
    0.0,
]


def random_captions(seed, items):
    """Short captions over a small, skewed vocabulary: n-grams up to 4 do repeat."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(40)]
    weights = [1 / (i + 1) for i in range(40)]

    def caption():
        return " ".join(rng.choices(words, weights, k=rng.randint(0, 12)))

    candidates = [caption() for _ in range(items)]
    return candidates, [[caption() for _ in range(rng.randint(1, 5))] for _ in range(items)]


class TestCiderD:
    def test_golden_values(self):
        mean, scores = cider_d(CANDIDATES, REFERENCES)
        np.testing.assert_allclose(scores, GOLDEN, rtol=0, atol=1e-9)
        assert mean == pytest.approx(np.mean(GOLDEN), abs=1e-9)

    @pytest.mark.parametrize("items", [1, 2, 200])
    def test_equals_pycocoevalcap(self, items):
        cider = pytest.importorskip("pycocoevalcap.cider.cider")
        candidates, references = random_captions(items, items)
        expected = cider.Cider().compute_score(
            dict(enumerate(references)), {i: [caption] for i, caption in enumerate(candidates)}
        )
        mean, scores = cider_d(candidates, references, tokenize=str.split)
        assert mean == pytest.approx(expected[0], abs=1e-9)
        np.testing.assert_allclose(scores, expected[1], rtol=0, atol=1e-9)

    def test_a_match_scores_10_and_other_words_0(self):
        captions = ["a dog barks at night", "rain on an old roof", "two men talk quietly indoors"]
        assert cider_d(captions, [[caption] for caption in captions])[1] == pytest.approx([10] * 3)
        _, scores = cider_d(["x y z u v"] * 3, [[caption] for caption in captions])
        assert scores.tolist() == [0, 0, 0]

    def test_one_word_by_hand(self):
        # ln(3/1) weighs both; the cosine of the 1-grams is 1, of the others 0; the lengths agree.
        _, scores = cider_d(["dog", "x", "y"], [["dog"], ["rain"], ["wind"]])
        assert scores == pytest.approx([2.5, 0, 0])

    def test_repeating_the_reference_is_clipped_and_penalised(self):
        reference = [["a dog barks"], ["wind"], ["rain"]]
        once = cider_d(["a dog barks", "", ""], reference)[1][0]
        often = cider_d(["a dog barks " * 6, "", ""], reference)[1][0]
        assert once == pytest.approx(7.5) and often < 1

    def test_mappings_pair_by_key(self):
        references = dict(reversed(list(enumerate(REFERENCES))))
        _, scores = cider_d(dict(enumerate(CANDIDATES)), references)
        np.testing.assert_allclose(scores, GOLDEN, rtol=0, atol=1e-9)

    def test_5000_items_take_seconds(self):
        candidates, references = random_captions(0, 5000)
        start = time.process_time()
        cider_d(candidates, references)
        assert time.process_time() - start < 10

    @pytest.mark.parametrize(
        ("candidates", "references", "message"),
        [
            (["a"], [["a"], ["b"]], "found 1 and 2 items"),
            ([], [], "found 0 and 0 items"),
            (["a", "b"], [["a"], []], "references[1]: found []"),
            (["a", "b"], ["a", "b"], "references[0]: found 'a'"),
            ({"x": "a"}, {"y": ["a"]}, "with the keys of candidates"),
            ({"x": "a"}, [["a"]], "with the keys of candidates"),
        ],
        ids=["lengths", "empty", "no_reference", "bare_string", "keys", "list_for_mapping"],
    )
    def test_rejects(self, candidates, references, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            cider_d(candidates, references)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A Dog barks, then HOWLS.", "a dog barks then howls"),
        ("Someone's car won\u2019t start", "someones car wont start"),
        ("dog-like_noise,rain;  (far)\n", "dog like noise rain far"),
        ("caf\u00e9 at 9", "caf\u00e9 at 9"),
        (" ... ", ""),
    ],
    ids=["case", "apostrophes", "punctuation", "letters_and_digits", "nothing"],
)
def test_tokenize(caption, words):
    assert tokenize(caption) == words.split()
