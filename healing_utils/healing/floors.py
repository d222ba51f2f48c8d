"""Floors: what a task's training texts tell without any layer of the network.

A healed score at or below its floor is no healing, whatever share of the intact score it is. Two
linear models of scikit-learn's learn from the same examples as the network. The penalty is the one
that scores best on the held-out examples, the stronger of two that tie.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from healing_utils.healing.training import score
from healing_utils.texts.tasks import Split

# Weights of the data against the penalty, the strongest penalty first: C of the logistic
# regression, 1 / alpha of the ridge.
GRID = (0.01, 0.1, 1.0, 10.0, 100.0)


def tfidf(train: Split, validation: Split, test: Split, classes: int) -> dict[str, Any]:
    """The floor of the words: scikit-learn's `TfidfVectorizer` as it comes, pairs joined by a
    space. Returns `scores` on `test` as `training.score` gives them, the penalty's `weight` (one of
    `GRID`) and `held_out`, its score there; `classes` is 1 for a regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [
        [text if isinstance(text, str) else " ".join(text) for text in split.texts]
        for split in (train, validation, test)
    ]
    vectorizer = TfidfVectorizer()
    try:
        parts = [vectorizer.fit_transform(texts[0]), *map(vectorizer.transform, texts[1:])]
    except ValueError:  # no word of two letters in any text
        parts = [np.zeros((len(some), 1)) for some in texts]
    return _best(parts, (train, validation, test), classes)


def static(
    train: Split, validation: Split, test: Split, classes: int,
    means: Callable[[Sequence[str]], np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    """The floor of the embeddings, as `tfidf` returns it: the mean of a text's static token
    embeddings by `means`, of pairs both and their absolute difference, standardised."""
    from sklearn.preprocessing import StandardScaler

    parts = []
    for split in (train, validation, test):
        if isinstance(split.texts[0], str):
            parts.append(means(split.texts))
        else:
            first, second = (means([pair[i] for pair in split.texts]) for i in (0, 1))
            parts.append(np.hstack([first, second, np.abs(first - second)]))
    scaler = StandardScaler().fit(parts[0])
    return _best([scaler.transform(part) for part in parts], (train, validation, test), classes)


def static_means(
    tokenizer: Any, table: np.ndarray, max_length: int
) -> Callable[[Sequence[str]], np.ndarray]:
    """A function of texts that gives the mean of the rows of `table` (vocabulary, width) over each
    one's tokens, special ones left out: (texts, width) in float64. A text without a token is 0."""

    def means(texts: Sequence[str]) -> np.ndarray:
        cut = {"truncation": True, "max_length": max_length}
        found = tokenizer(list(texts), add_special_tokens=False, **cut)["input_ids"]
        rows = [table[ids].mean(axis=0, dtype=np.float64) if ids else 0 * table[0] for ids in found]
        return np.stack(rows)

    return means


def _best(parts: Sequence[Any], splits: Sequence[Split], classes: int) -> dict[str, Any]:
    """Fit on the first part, choose on the second, score on the third. Chosen by macro-F1, or by
    rank correlation, whatever a study scores by: its metric is in no cell's key."""
    from sklearn.dummy import DummyClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    regression = classes == 1
    metric = "spearman" if regression else "f1"
    labels = [np.asarray(s.labels, dtype=np.float64 if regression else np.int64) for s in splits]
    best: dict[str, Any] = {}
    eye = np.eye(classes)  # answers as `score` takes them, (examples, classes)
    for weight in GRID:
        if regression:
            model = Ridge(alpha=1 / weight).fit(parts[0], labels[0])
        elif len(set(splits[0].labels)) == 1:  # a draw may hold one class alone
            model = DummyClassifier().fit(parts[0], labels[0])
        else:
            with warnings.catch_warnings():  # as far as it came is a floor too
                warnings.simplefilter("ignore", ConvergenceWarning)
                model = LogisticRegression(C=weight, max_iter=1000).fit(parts[0], labels[0])
        held_out, scores = (
            score(model.predict(x)[:, None] if regression else eye[model.predict(x)], y)
            for x, y in zip(parts[1:], labels[1:], strict=True)
        )
        if not best or held_out[metric] > best["held_out"]:
            best = {"scores": scores, "weight": weight, "held_out": held_out[metric]}
    return best
