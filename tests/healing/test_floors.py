"""Floors: scikit-learn's own models, called by hand, give the same scores."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import planted_texts, tiny_tokenizer
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

from healing_utils.healing import floors
from healing_utils.texts.tasks import Split


def splits(pairs: bool = False) -> list[Split]:
    found = []
    for count, seed in ((80, 0), (40, 1), (60, 2)):
        texts, labels = planted_texts(count, 3, seed)
        flip = np.random.default_rng(seed).random(count) < 0.2  # so that no floor is perfect
        labels = [(y + f) % 3 for y, f in zip(labels, flip.astype(int).tolist(), strict=True)]
        found.append(Split([[t, t[::-1]] for t in texts] if pairs else texts, labels))
    return found


def agrees(got, parts, found):
    """Whether a floor is that of the best penalty, the first of those that tie, on test."""
    tried = []
    for weight in floors.GRID:
        model = LogisticRegression(C=weight, max_iter=1000).fit(parts[0], found[0].labels)
        said = [model.predict(part) for part in parts]
        scores = [f1_score(s.labels, y, average="macro") for s, y in zip(found, said, strict=True)]
        tried.append((scores[1], weight, scores[2]))
    held_out, weight, test = max(tried, key=lambda one: one[0])
    assert (got["weight"], got["held_out"]) == (weight, pytest.approx(held_out))
    assert got["scores"]["f1"] == pytest.approx(test)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_floor_of_words_is_scikit_learns(pairs):
    found = splits(pairs=pairs)
    texts = [[" ".join(t) if pairs else t for t in split.texts] for split in found]
    vectorizer = TfidfVectorizer().fit(texts[0])
    agrees(floors.tfidf(*found, 3), list(map(vectorizer.transform, texts)), found)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_floor_of_embeddings_is_scikit_learns_on_their_means(pairs):
    found, tokenizer = splits(pairs=pairs), tiny_tokenizer()
    table = np.random.default_rng(0).standard_normal((len(tokenizer), 8)).astype(np.float32)
    got = floors.static(*found, 3, floors.static_means(tokenizer, table, 16))

    def features(text) -> np.ndarray:
        if isinstance(text, list):
            a, b = map(features, text)
            return np.concatenate([a, b, abs(a - b)])
        ids = [tokenizer.convert_tokens_to_ids(word) for word in text.split()]
        return table[ids].astype(np.float64).mean(axis=0)

    raw = [np.stack([features(t) for t in split.texts]) for split in found]
    agrees(got, list(map(StandardScaler().fit(raw[0]).transform, raw)), found)


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
    one = [Split(["a word", "two words"], [1, 1]), *empty[1:]]
    for found in (empty, one):
        assert floors.tfidf(*found, 2)["scores"]["accuracy"] == 0.5
    means = floors.static_means(tiny_tokenizer(), np.ones((60, 4), dtype=np.float32), 8)
    assert means(["", "good bad"]).tolist() == [[0] * 4, [1] * 4]
