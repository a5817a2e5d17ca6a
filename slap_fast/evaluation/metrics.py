"""Retrieval, classification and captioning figures from arrays and strings; numpy alone.

Ties and failed items never help, or a model that gives every pair the same score would look good:
among equal scores the wrong ones come first, and a NaN is a miss.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence, Set

import numpy as np

Tokens = tuple[str, ...]
Vector = tuple[dict[Tokens, float], list[float], int]
"""(n-gram -> tf-idf, its norm for each n, number of words)."""


def retrieval(
    similarity: np.ndarray, positives: Sequence[Set[int]] | np.ndarray
) -> dict[str, float]:
    """R@1, R@5, R@10 and mAP@10 of ranked search, as fractions of 1.

    A query is a hit at k when any of its positives is among the first k. Its AP@10 is the sum of
    the precisions at the ranks (up to 10) of its positives, divided by min(positives, 10). Among
    equal scores the negatives come first; a positive whose score is NaN is never found.

    Args:
        similarity: float [Q, N], larger is closer.
        positives: per query, the columns that are right; or the same as bool [Q, N].

    Raises:
        ValueError: no query, shapes that do not fit, a column out of range, or a query without
            a positive.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(f"similarity: found shape {similarity.shape}, expected [Q, N], none 0")
    if len(positives) != len(similarity):
        raise ValueError(f"positives: found {len(positives)}, expected {len(similarity)} queries")
    step = max(1, 1_000_000 // similarity.shape[1])  # keeps the temporaries at a few 10 MB
    first_ranks, average_precisions = [], []
    for start in range(0, len(similarity), step):
        rows = similarity[start : start + step]
        relevant = _relevant(positives[start : start + step], rows.shape, start)
        ranks = _ranks(rows, relevant)
        precisions = (ranks <= 10) * (np.arange(ranks.shape[1]) + 1) / ranks
        first_ranks.append(ranks[:, 0])
        average_precisions.append(precisions.sum(1) / np.minimum(relevant.sum(1), 10))
    recalls = {f"R@{k}": float((np.concatenate(first_ranks) <= k).mean()) for k in (1, 5, 10)}
    return recalls | {"mAP@10": float(np.concatenate(average_precisions).mean())}


def _relevant(
    positives: Sequence[Set[int]] | np.ndarray, shape: tuple[int, ...], start: int
) -> np.ndarray:
    """The positives of some queries, the first of which is number ``start``, as bool [q, N]."""
    if isinstance(positives, np.ndarray):
        relevant = positives
        if relevant.dtype != bool or relevant.shape != shape:
            given = f"{relevant.dtype} {relevant.shape}"
            raise ValueError(f"positives: found {given}, expected bool, as similarity")
    else:
        relevant, end = np.zeros(shape, dtype=bool), shape[1]
        for row, columns in enumerate(positives, start):
            if wrong := [column for column in columns if not 0 <= column < end]:
                raise ValueError(f"positives[{row}]: found {wrong[0]}, expected 0 .. {end - 1}")
            relevant[row - start, list(columns)] = True
    none = np.flatnonzero(~relevant.any(1))
    if len(none):
        raise ValueError(f"positives[{start + none[0]}]: found none, expected at least one")
    return relevant


def _ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """float [Q, <= 10]: ranks from 1 of each query's best positives; inf where there is none."""
    scored = relevant & ~np.isnan(scores)
    columns = min(10, relevant.sum(1).max())
    best = np.where(scored, -scores, np.inf)
    best = -np.sort(np.partition(best, columns - 1, axis=1)[:, :columns], axis=1)
    # A comparison with NaN is false: neither a positive nor a failed item stands before another.
    negatives = np.where(relevant, np.nan, scores)
    ranks = np.empty(best.shape)
    for j in range(columns):
        ranks[:, j] = j + 1 + (negatives >= best[:, j : j + 1]).sum(1)
    ranks[np.arange(columns) >= scored.sum(1, keepdims=True)] = np.inf
    return ranks


def classification(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Accuracy, its mean over the classes, and two baselines, as fractions of 1.

    A row counts as right when its target's score is larger than every other: a tie, or a NaN
    anywhere in the row, is wrong.

    Args:
        scores: float [N, L].
        targets: int [N], 0 .. L - 1.

    Returns:
        ``accuracy``; ``balanced_accuracy``, the mean of :func:`class_recall` over the classes that
        occur; ``chance``, 1 / L; ``majority``, the share of the most frequent class.

    Raises:
        ValueError: no row, shapes that do not fit, or a target out of range.
    """
    recall = class_recall(scores, targets)
    return {
        "accuracy": float(_right(scores, targets).mean()),
        "balanced_accuracy": float(np.nanmean(recall)),
        "chance": 1 / len(recall),
        "majority": float(np.bincount(targets).max() / len(targets)),
    }


def class_recall(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float64 [L]: per class the share of its rows that are right, NaN for one that does not occur.

    Arguments, errors and ties are :func:`classification`'s.
    """
    right, num_classes = _right(scores, targets), np.shape(scores)[1]
    counts = np.bincount(targets, minlength=num_classes)
    hits = np.bincount(targets, weights=right, minlength=num_classes)
    return np.divide(hits, counts, out=np.full(num_classes, np.nan), where=counts > 0)


def _right(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.ndim != 2 or 0 in scores.shape or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"scores, targets: found shapes {scores.shape}, {targets.shape}, "
            "expected [N, L] and [N], none 0"
        )
    smallest, largest, last = targets.min(), targets.max(), scores.shape[1] - 1
    if smallest < 0 or largest > last:
        raise ValueError(f"targets: found {smallest} .. {largest}, expected 0 .. {last}")
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    return ((scores < own).sum(1) == last) & ~np.isnan(own[:, 0])


def tokenize(caption: str) -> list[str]:
    """Lower case, apostrophes removed, other punctuation to spaces, split at white space.

    A stand-in for the Penn Treebank tokenizer of published figures, which needs Java; scores from
    the two differ a little.
    """
    return re.sub(r"[^\w\s]|_", " ", re.sub(r"['\u2019]", "", caption.lower())).split()


def cider_d(
    candidates: Mapping[Hashable, str] | Sequence[str],
    references: Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]],
    *,
    tokenize: Callable[[str], Sequence[str]] = tokenize,
) -> tuple[float, np.ndarray]:
    """CIDEr-D (arXiv 1411.5726), n-grams of 1 to 4, sigma 6, as pycocoevalcap 1.2 computes it.

    Document frequencies come from the references themselves, so scores of different sets cannot be
    compared, and with a single item every score is 0.

    Args:
        candidates: one caption per item.
        references: at least one caption per item; a mapping (with the same keys) if candidates is.
        tokenize: caption -> words; ``str.split`` for captions that are tokenised already.

    Returns:
        (mean, float64 [items] in the order of ``candidates``); 10 is a perfect match, and published
        figures are 100 times the mean.

    Raises:
        ValueError: no item, items that do not pair up, or an item without a reference.
    """
    if isinstance(candidates, Mapping):
        if not isinstance(references, Mapping) or candidates.keys() != references.keys():
            raise ValueError("references: expected a mapping with the keys of candidates")
        references = [references[key] for key in candidates]
        candidates = list(candidates.values())
    if len(candidates) != len(references) or not len(candidates):
        raise ValueError(
            f"candidates, references: found {len(candidates)} and {len(references)} items, "
            "expected equally many, at least one"
        )
    for item, captions in enumerate(references):
        if isinstance(captions, str) or not len(captions):
            raise ValueError(f"references[{item}]: found {captions!r}, expected a list of captions")
    reference_counts = [[_ngrams(tokenize(text)) for text in captions] for captions in references]
    frequency = Counter(ngram for counts in reference_counts for ngram in set().union(*counts))
    log_items = math.log(len(candidates))
    idf = {ngram: log_items - math.log(count) for ngram, count in frequency.items()}

    def vector(counts: Counter[Tokens]) -> Vector:
        weights = {ngram: count * idf.get(ngram, log_items) for ngram, count in counts.items()}
        squares = [0.0] * 4
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        length = sum(count for ngram, count in counts.items() if len(ngram) == 1)
        return weights, list(map(math.sqrt, squares)), length

    scores = np.zeros(len(candidates))
    for item, (candidate, captions) in enumerate(zip(candidates, reference_counts, strict=True)):
        generated = vector(_ngrams(tokenize(candidate)))
        total = sum(_similarity(generated, reference) for reference in map(vector, captions))
        scores[item] = 10 * total / len(captions)
    return float(scores.mean()), scores


def _ngrams(words: Sequence[str]) -> Counter[Tokens]:
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def _similarity(candidate: Vector, reference: Vector) -> float:
    """Mean over n of the clipped cosine, times a penalty on the difference of lengths."""
    weights, norms, length = candidate
    ref_weights, ref_norms, ref_length = reference
    products = [0.0] * 4
    for ngram, weight in weights.items():
        if ngram in ref_weights:
            # Clipped, so that repeating a word of the reference earns nothing.
            products[len(ngram) - 1] += min(weight, ref_weights[ngram]) * ref_weights[ngram]
    parts = zip(products, norms, ref_norms, strict=True)
    cosines = (product / (a * b) for product, a, b in parts if a and b)
    return sum(cosines) / 4 * math.exp(-((length - ref_length) ** 2) / (2 * 6.0**2))
