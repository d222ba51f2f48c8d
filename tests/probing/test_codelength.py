"""The online code: as short as the entropy where labels are noise, far shorter where planted."""

from __future__ import annotations

import numpy as np
import pytest

from healing_utils.base.errors import HealingError
from healing_utils.probing import probes
from healing_utils.probing.probes import FRACTIONS, block_ends, online_codelength


@pytest.fixture
def words():
    """Activations of two layers, noise and class means, labels of four classes, sentences."""
    count, features, rng = 2000, 20, np.random.default_rng(0)
    labels = rng.choice(4, size=count, p=[0.4, 0.3, 0.2, 0.1])
    x = rng.standard_normal((2, count, features)).astype(np.float32)
    x[1] += 3 * np.random.default_rng(1000).standard_normal((4, features))[labels]
    groups = np.repeat(np.arange(count // 10), 10)
    return x, labels, groups


def test_random_labels_take_their_entropy_and_planted_ones_far_less(words):
    x, labels, groups = words
    found = online_codelength(x, labels, groups).set_index("layer")
    share = np.bincount(labels) / len(labels)
    least = -len(labels) * (share * np.log2(share)).sum()  # bits at their own frequencies
    assert found["uniform"].tolist() == [2.0 * len(labels)] * 2
    # No code is shorter than the entropy in the mean; learning the frequencies and saying which
    # prior was taken costs some bits, and so does what the probes make of noise.
    assert 0.99 * least < found.loc[0, "codelength"] < 1.03 * least
    assert found.loc[1, "codelength"] < 0.1 * least
    # Noise is read with the strongest prior there is.
    assert found.loc[0, "precision"] == max(probes.PRECISIONS)

    # Labels that take longer to learn have the longer code.
    noisy = x[1:] + 4 * np.random.default_rng(2).standard_normal(x[1:].shape)
    longer = online_codelength(noisy, labels, groups)["codelength"][0]
    assert 2 * found.loc[1, "codelength"] < longer < least


def test_blocks_are_the_papers_fractions_in_whole_sentences():
    groups = np.repeat(np.arange(400), 10)
    ends = block_ends(groups)
    assert ends[-1] == len(groups) and ends == sorted(set(ends))
    assert all(end % 10 == 0 for end in ends)
    wanted = [f * len(groups) for f in FRACTIONS]
    assert all(any(0 <= end - w < 10 for end in ends) for w in wanted)
    assert block_ends(np.arange(2)) == [1, 2]
    # Where the first block is all, nothing is known before it: the uniform code, and the prior.
    groups = np.array([0] + [1] * 2999)
    assert block_ends(groups) == [3000]
    one = online_codelength(np.zeros((1, 3000, 2), np.float32), np.arange(3000) % 2, groups)
    assert one["codelength"][0] == 3000 + np.log2(len(probes.PRECISIONS))


def test_the_code_is_the_sum_over_blocks_by_hand(monkeypatch):
    """Three words, then three: the second block by the frequencies alone, where x says nothing."""
    monkeypatch.setattr(probes, "FRACTIONS", (0.5, 1.0))
    x = np.zeros((1, 6, 2), dtype=np.float32)  # constant: no weight
    labels = np.array([0, 0, 1, 0, 0, 2])
    monkeypatch.setattr(probes, "shuffled", lambda count, seed: np.arange(count))
    (bits,) = online_codelength(x, labels)["codelength"]
    known = np.array([2 / 3, 1 / 3, 0])
    mixed = (3 * known + 1) / 6
    wanted = np.log2(len(probes.PRECISIONS)) + 3 * np.log2(3) - np.log2(mixed[labels[3:]]).sum()
    assert bits == pytest.approx(wanted, abs=2e-2)  # the probe's tolerance


def test_a_class_that_comes_late_costs_finitely_many_bits():
    labels = np.array([0] * 50 + [1] * 49 + [2])
    x = np.random.default_rng(0).standard_normal((1, 100, 5)).astype(np.float32)
    tables = [online_codelength(x, labels, seed=seed) for seed in (0, 1, 2, 2)]
    assert all(np.isfinite(table["codelength"]).all() for table in tables)
    assert tables[-1].equals(tables[-2]) and not tables[0].equals(tables[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [3, 3, 3, 3]}, "every label is 3: nothing to tell apart"),
        ({"groups": [7, 7, 7, 7]}, "need at least 2 groups .* got 1"),
        ({"activations": np.full((1, 4, 2), np.nan)}, "layer 0 hold values not finite"),
    ],
)
def test_what_cannot_be_sent_is_refused(change, message):
    with pytest.raises(HealingError, match=message):
        online_codelength(**{"activations": np.zeros((1, 4, 2)), "labels": [0, 0, 1, 0], **change})
