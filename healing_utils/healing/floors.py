"""Floors: what a task's training texts tell without any layer of the network.

Two linear models of scikit-learn's learn from the same examples as the network. The penalty is the
one that scores best on the held-out examples, the stronger of two that tie.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from healing_utils.healing.training import score
from healing_utils.texts.tasks import Split

# C of the logistic regression, 1 / alpha of the ridge, the strongest penalty first.
GRID = (0.01, 0.1, 1.0, 10.0, 100.0)


def tfidf(train: Split, validation: Split, test: Split, classes: int) -> dict[str, Any]:
    """The floor of the words, pairs joined by a space. Returns `scores` on `test` as
    `training.score` gives them, the penalty's `weight` (one of `GRID`) and its score `held_out`;
    `classes` is 1 for a regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    splits, vectorizer = (train, validation, test), TfidfVectorizer()
    texts = [[t if isinstance(t, str) else " ".join(t) for t in s.texts] for s in splits]
    try:
        parts = [vectorizer.fit_transform(texts[0]), *map(vectorizer.transform, texts[1:])]
    except ValueError:  # no word of two letters in any text
        parts = [np.zeros((len(some), 1)) for some in texts]
    return _best(parts, splits, classes)


def static(
    train: Split, validation: Split, test: Split, classes: int,
    means: Callable[[Sequence[str]], np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    """The floor of the embeddings, as `tfidf` returns it: the mean of a text's static token
    embeddings by `means`, of pairs both and their absolute difference, standardised."""
    from sklearn.preprocessing import StandardScaler

    splits, parts = (train, validation, test), []
    for texts in (split.texts for split in splits):
        if isinstance(texts[0], str):
            parts.append(means(texts))
        else:
            first, second = map(means, zip(*texts, strict=True))
            parts.append(np.hstack([first, second, np.abs(first - second)]))
    scaler = StandardScaler().fit(parts[0])
    return _best(list(map(scaler.transform, parts)), splits, classes)


def static_means(
    tokenizer: Any, table: np.ndarray, max_length: int
) -> Callable[[Sequence[str]], np.ndarray]:
    """A function of texts: the mean of the rows of `table` (vocabulary, width) over each one's
    own tokens, 0 where there is none: (texts, width) in float64."""
    cut = {"add_special_tokens": False, "truncation": True, "max_length": max_length}

    def means(texts: Sequence[str]) -> np.ndarray:
        rows = (table[np.array(ids, int)] for ids in tokenizer(list(texts), **cut)["input_ids"])
        return np.stack([r.sum(axis=0, dtype=np.float64) / max(1, len(r)) for r in rows])

    return means


def _best(parts: Sequence[Any], splits: Sequence[Split], classes: int) -> dict[str, Any]:
    """Fit on the first part, choose on the second (by macro-F1 or rank correlation, as a study's
    metric is in no cell's key), score on the third."""
    from sklearn.dummy import DummyClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    regression, eye = classes == 1, np.eye(classes)
    metric, kind = ("spearman", np.float64) if regression else ("f1", np.int64)
    labels = [np.asarray(split.labels, dtype=kind) for split in splits]
    found: list[dict[str, Any]] = []
    for weight in GRID:
        if regression:
            model = Ridge(alpha=1 / weight)
        elif len(set(splits[0].labels)) == 1:  # a draw may hold one class alone
            model = DummyClassifier()
        else:
            model = LogisticRegression(C=weight, max_iter=1000)
        with warnings.catch_warnings():  # as far as it came is a floor too
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(parts[0], labels[0])
        said = map(model.predict, parts[1:])  # which `score` takes as (examples, classes)
        logits = [x[:, None] if regression else eye[x] for x in said]
        held_out, scores = map(score, logits, labels[1:])
        found.append({"scores": scores, "weight": weight, "held_out": held_out[metric]})
    return max(found, key=lambda floor: floor["held_out"])  # the first of those that tie
