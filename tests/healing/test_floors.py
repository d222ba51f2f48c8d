"""Floors: scikit-learn's own models, called by hand, give the same scores."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import planted_texts, tiny_tokenizer
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import StandardScaler

from healing_utils.healing import floors
from healing_utils.texts.tasks import Split


def splits(classes: int = 3, pairs: bool = False) -> list[Split]:
    found = []
    for count, seed in ((80, 0), (40, 1), (60, 2)):
        texts, labels = planted_texts(count, classes, seed)
        flip = np.random.default_rng(seed).random(count) < 0.2  # so that no floor is perfect
        labels = [(y + 1) % classes if f else y for y, f in zip(labels, flip, strict=True)]
        found.append(Split([[t, t[::-1]] for t in texts] if pairs else texts, labels))
    return found


def joined(split: Split) -> list[str]:
    return [t if isinstance(t, str) else f"{t[0]} {t[1]}" for t in split.texts]


def agrees(got, parts, found):
    """Whether a floor is that of the best penalty, the first of those that tie, on test."""
    tried, labels = {}, found[2].labels
    for weight in floors.GRID:
        model = LogisticRegression(C=weight, max_iter=1000).fit(parts[0], found[0].labels)
        held_out = f1_score(found[1].labels, model.predict(parts[1]), average="macro")
        tried[weight] = held_out, model.predict(parts[2])
    best = max(tried, key=lambda weight: tried[weight][0])
    assert got["weight"] == best and got["held_out"] == pytest.approx(tried[best][0])
    said = tried[best][1]
    assert got["scores"]["f1"] == pytest.approx(f1_score(labels, said, average="macro"))
    assert got["scores"]["accuracy"] == pytest.approx(accuracy_score(labels, said))


@pytest.mark.parametrize("pairs", [False, True])
def test_the_floor_of_words_is_scikit_learns(pairs):
    found = splits(pairs=pairs)
    vectorizer = TfidfVectorizer().fit(joined(found[0]))
    parts = [vectorizer.transform(joined(split)) for split in found]
    agrees(floors.tfidf(*found, 3), parts, found)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_floor_of_embeddings_is_scikit_learns_on_their_means(pairs):
    found, tokenizer = splits(pairs=pairs), tiny_tokenizer()
    table = np.random.default_rng(0).standard_normal((len(tokenizer), 8)).astype(np.float32)
    got = floors.static(*found, 3, floors.static_means(tokenizer, table, 16))

    def mean(text: str) -> np.ndarray:
        ids = [tokenizer.convert_tokens_to_ids(word) for word in text.split()]
        return table[ids].astype(np.float64).mean(axis=0)

    def features(text) -> np.ndarray:
        if isinstance(text, str):
            return mean(text)
        a, b = map(mean, text)
        return np.concatenate([a, b, abs(a - b)])

    raw = [np.stack([features(t) for t in split.texts]) for split in found]
    scaler = StandardScaler().fit(raw[0])
    agrees(got, [scaler.transform(x) for x in raw], found)


def test_the_floor_of_a_regression_is_ridge_by_rank_correlation():
    found = [Split(s.texts, [y + 0.1 * i for i, y in enumerate(s.labels)]) for s in splits()]
    got = floors.tfidf(*found, 1)
    vectorizer = TfidfVectorizer().fit(found[0].texts)
    parts = [vectorizer.transform(split.texts) for split in found]
    model = Ridge(alpha=1 / got["weight"]).fit(parts[0], found[0].labels)
    wanted = spearmanr(model.predict(parts[2]), found[2].labels).statistic
    assert got["scores"] == {"spearman": pytest.approx(wanted)}


def test_texts_without_words_and_draws_of_one_class_have_a_floor():
    empty = [Split(["!", "?", "!"], [0, 1, 0]), Split(["!"], [0]), Split(["?", "!"], [1, 0])]
    assert floors.tfidf(*empty, 2)["scores"]["accuracy"] == 0.5
    one = [Split(["a word", "two words"], [1, 1]), *empty[1:]]
    assert floors.tfidf(*one, 2)["scores"]["accuracy"] == 0.5
    means = floors.static_means(tiny_tokenizer(), np.ones((60, 4), dtype=np.float32), 8)
    assert means(["", "good bad"]).tolist() == [[0] * 4, [1] * 4]
