"""Neurons: the one that was planted is the one found, and ablating it is what breaks the task."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from families import FAMILIES, LAYERS, WIDTH, tiny_batch, tiny_model
from helpers import random_examples
from scipy.stats import norm, spearmanr

from healing_utils.base.errors import HealingError
from healing_utils.healing import training
from healing_utils.probing import neurons as module
from healing_utils.probing.neurons import (
    METHODS,
    ablate,
    ablation_scores,
    accuracy_curve,
    center_of_mass,
    minimal_neurons,
    rank_neurons,
    rank_weights,
    ranking_agreement,
)  # fmt: skip
from healing_utils.probing.probes import held_out

DEPTH, HIDDEN = 4, 6
EVERYTHING = [(layer, index) for layer in range(DEPTH) for index in range(HIDDEN)]


def planted(neurons: list[tuple[int, int]], words: int = 600, seed: int = 0):
    """Noise (layers, words, hidden) in which each of `neurons` carries one bit of the label, and
    nothing else any of it; layers differ in scale, so that a ranking by raw size would go astray.
    """
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(DEPTH, words, HIDDEN)).astype(np.float32)
    bits = rng.integers(2, size=(words, len(neurons)))
    for bit, (layer, index) in zip(bits.T, neurons, strict=True):
        activations[layer, :, index] = 4.0 * bit + 0.3 * activations[layer, :, index]
    scale = 10.0 ** np.arange(-1, DEPTH - 1)[:, None, None]
    labels = np.array(["".join(map(str, row)) for row in bits])
    return ((activations + 2) * scale).astype(np.float32), labels


@pytest.mark.parametrize("method", METHODS)
def test_planted_neurons_are_ranked_first_whatever_classes_are_called(method):
    for neuron in [(0, 2), (3, 0)]:
        ranking = rank_neurons(*planted([neuron]), method=method)
        assert ranking[0] == neuron and sorted(ranking) == EVERYTHING
    activations, labels = planted([(1, 4), (2, 0)])
    renamed = np.array([{"00": 7, "01": 3, "10": 5, "11": 1}[label] for label in labels])
    again = rank_neurons(activations, renamed, method=method, classes=[1, 3, 5, 7, 9])
    assert set(again[:2]) == {(1, 4), (2, 0)}
    activations[1, :, 0] = 0.1  # never changes; no float: its mean is not exactly itself
    activations[2, :, 1] = 0
    ranking = rank_neurons(activations, labels, method=method)
    assert set(ranking[:2]) == {(1, 4), (2, 0)}
    if method != "lca":  # there they are among all those with weight zero
        assert ranking[-2:] == [(1, 0), (2, 1)]


def test_scores_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 4)) + 3, rng.integers(3, size=90)
    x = x + 0.5 * y[:, None] * rng.normal(size=4)
    sigma = x.std(axis=0)
    means = [x[y == c].mean(axis=0) for c in range(3)]
    pairs = sum(abs(means[a] - means[b]) for a, b in [(0, 1), (0, 2), (1, 2)])
    assert np.allclose(module.probeless(x, y), pairs / sigma)
    shares = np.bincount(y) / 90
    variances = [((y == c).sum() * x[y == c].var(axis=0) + sigma**2) for c in range(3)]
    widths = [np.sqrt(v / ((y == c).sum() + 1)) for c, v in enumerate(variances)]
    densities = np.stack([shares[c] * norm.pdf(x, means[c], widths[c]) for c in range(3)])
    posterior = densities[y, np.arange(90)] / densities.sum(axis=0)
    wanted = (np.log(posterior) - np.log(shares[y])[:, None]).mean(axis=0)
    assert np.allclose(module.gaussian(x, y), wanted, atol=1e-5)


def test_the_sweep_on_a_small_matrix_worked_by_hand():
    weight = np.array([
        [5.0, -3.0, 1.5, 0.5, 0.0, 0.0],  # mass 10: 0, 1, 2, 3 enter at 0, 0.5, 0.8, 0.95
        [0.0, 2.0, 0.0, -2.0, 16.0, 0.0],  # mass 20: 4 enters at 0, 1 and 3 together at 0.8
    ])  # fmt: skip
    # At 0 feature 4 holds the larger share of its class (0.8 against 0.5); at 0.5 comes feature 1;
    # at 0.8 feature 2 (0.15 of its class) and then feature 3 (0.1); feature 5 is zero.
    assert rank_weights(weight).tolist() == [4, 0, 1, 2, 3, 5]
    # The sign does not matter, nor the order or the scale of the classes.
    assert rank_weights(-weight[::-1] * [[2.0], [0.25]]).tolist() == [4, 0, 1, 2, 3, 5]
    # A class without weight has no say, and equal weights fall by position.
    assert rank_weights(np.array([[0.0, 1, 1, 2, 1], [0] * 5])).tolist() == [3, 1, 2, 4, 0]
    # Weights that are zero come last, in an order that the seed alone decides.
    weight = np.zeros((3, 50))
    weight[1, [30, 7]] = 1.0, 2.0
    first, again, other = (rank_weights(weight, seed=seed).tolist() for seed in (4, 4, 5))
    assert first == again != other and first[:2] == [7, 30] and sorted(first) == list(range(50))
    assert first[2:] != sorted(first[2:])


def test_agreement_is_one_with_itself_minus_one_with_its_reverse_and_chance_with_another():
    ranking = [(layer, index) for layer in range(20) for index in range(100)]
    order = np.random.default_rng(0).permutation(len(ranking))
    rankings = {"a": ranking, "back": ranking[::-1], "other": [ranking[i] for i in order]}
    table = ranking_agreement(rankings | {"same": ranking}, sizes=(10, 1000, 5000))
    table = table.set_index(["first", "second"])
    assert list(table.columns) == ["spearman", "overlap_10", "overlap_1000"]
    assert table.loc[("a", "same")].tolist() == pytest.approx([1, 1, 1])
    assert table.loc[("a", "back")].tolist() == pytest.approx([-1, 0, 0])
    spearman = spearmanr(np.argsort(order), range(2000)).statistic
    assert table.loc[("a", "other"), "spearman"] == pytest.approx(spearman)
    assert table.loc[("a", "other"), "overlap_1000"] == pytest.approx(0.5, abs=0.06)
    with pytest.raises(HealingError, match="must be of the same neurons"):
        ranking_agreement({"a": [(0, 0), (0, 1)], "b": [(0, 0), (0, 0)]})


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_set_without_redundancy_is_exactly_the_minimal_set(method):
    carriers = [(1, 4), (2, 0), (2, 3)]
    train, test = planted(carriers), planted(carriers, seed=1)
    found = minimal_neurons(*train, *test, method=method, groups=np.arange(600) // 10)
    assert set(found.neurons) == set(carriers) and found.k == 3
    assert found.neurons == found.ranking[:3] and sorted(found.ranking) == EVERYTHING
    assert found.by_layer == [0, 1, 2, 0]
    assert center_of_mass(found.by_layer) == pytest.approx(5 / 9)
    assert min(found.dev_full, found.dev_minimal, found.test_full, found.test_minimal) > 0.98
    tried, goal = dict(found.searched), found.dev_full - found.delta
    assert {0, 1, 2, 3, 4, 24} == set(tried) and len(found.searched) == 6
    assert tried[3] >= goal > max(tried[0], tried[1], tried[2])
    assert found == minimal_neurons(*train, *test, method=method, groups=np.arange(600) // 10)


def test_without_signal_the_minimal_set_is_empty_and_has_no_centre():
    activations, _ = planted([])
    labels = np.random.default_rng(5).choice(["a", "b"], p=[0.9, 0.1], size=600)
    found = minimal_neurons(activations, labels, activations, labels, l1=0.05)
    assert (found.k, found.neurons, found.by_layer) == (0, [], [0] * DEPTH)
    assert found.test_minimal == pytest.approx(np.mean(labels == "a"))
    assert math.isnan(center_of_mass(found.by_layer))


def test_groups_stay_whole():
    groups = np.random.default_rng(0).integers(20, size=200)
    held = held_out(groups, 200, 0.2, seed=3)
    assert not set(groups[held]) & set(groups[~held]) and len(set(groups[held])) == 4
    assert not np.array_equal(held, held_out(groups, 200, 0.2, seed=4))
    # What gives a sentence away says nothing of another one's label.
    sentence = np.arange(200) // 10
    labels = np.random.default_rng(1).integers(2, size=20)[sentence]
    x = np.eye(20, dtype=np.float32)[sentence][None]
    told = minimal_neurons(x, labels, x, labels, l1=3e-3)
    kept = minimal_neurons(x, labels, x, labels, l1=3e-3, groups=sentence)
    assert told.dev_full > 0.95 and kept.dev_full < 0.8


def test_a_label_that_only_the_test_words_have_counts_as_an_error():
    train, (activations, labels) = planted([(1, 4)]), planted([(1, 4)], seed=1)
    labels = np.where(np.arange(600) < 300, "never", labels)
    assert minimal_neurons(*train, activations, labels).test_full == pytest.approx(0.5, abs=0.01)


def test_the_curve_rises_at_the_top_first_and_the_bottom_last():
    carriers = [(1, 4), (2, 0), (3, 3)]
    train, test = planted(carriers), planted(carriers, seed=1)
    ranking = rank_neurons(*train)
    table = accuracy_curve(*train, *test, ranking, [0, 1, 3, 20, 24], seed=0)
    assert list(table.columns) == ["k", "which", "accuracy"] and len(table) == 15
    at = table.set_index(["k", "which"])["accuracy"]
    assert at[3, "top"] > 0.98 and 0.15 < at[1, "top"] < 0.4
    # The last 20 of 24 lack three carriers and one more.
    assert at[20, "bottom"] < 0.25
    assert at[24, "top"] == at[24, "random"] == at[24, "bottom"] > 0.98
    majority = np.mean(test[1] == max(set(train[1]), key=list(train[1]).count))
    assert at[0, "top"] == at[0, "random"] == at[0, "bottom"] == pytest.approx(majority)


def test_random_neurons_hang_on_the_seed_and_not_on_the_ranking():
    def random(ranking, seed):
        table = module.by_size(ranking, [3, 10], seed, lambda neurons: {"neurons": neurons})
        return table.neurons[table.which == "random"].tolist()

    few, many = random(EVERYTHING, 0)
    assert set(few) < set(many) and len(set(many)) == 10
    assert random(EVERYTHING[::-1], 0) == [few, many] != random(EVERYTHING, 1)


UNITS = [2, 3, 11]


@torch.no_grad()
def forward(model, batch):
    out = model(**batch, output_hidden_states=True)
    return [h.clone() for h in out.hidden_states], out[0]


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "none"), *((f, "classification") for f in sorted(FAMILIES))]
)
def test_ablation_changes_the_named_units_of_one_hidden_state_and_nothing_else(family, head):
    batch, model = tiny_batch(), tiny_model(family, head)
    values = np.random.default_rng(0).normal(size=(LAYERS + 1, WIDTH)).astype(np.float32)
    others = [i for i in range(WIDTH) if i not in UNITS]
    whole, answer = forward(model, batch)
    for layer in range(LAYERS + 1):
        named = [(layer, unit) for unit in UNITS]
        # Never called before: transformers adds its own recording hooks in the first call.
        fresh = tiny_model(family, head)
        with ablate(fresh, named):
            first = forward(fresh, batch)
        for chosen in (values, None):
            wanted = torch.from_numpy((0 * values if chosen is None else values)[layer, UNITS])
            with ablate(model, named, chosen):
                got, changed = forward(model, batch)
                assert torch.equal(model(**batch)[0], changed), "whether or not it is recorded"
            assert len(got) == LAYERS + 1
            assert all(map(torch.equal, got[:layer], whole[:layer]))
            assert torch.equal(got[layer][..., others], whole[layer][..., others])
            assert (got[layer][..., UNITS] == wanted).all()
            for above in range(layer + 1, LAYERS + 1):
                assert not torch.allclose(got[above], whole[above], atol=1e-4)
            assert not torch.allclose(changed, answer, atol=1e-6)
        assert torch.equal(first[1], changed) and all(map(torch.equal, first[0], got))
        with pytest.raises(KeyError), ablate(model, named):
            raise KeyError
        again, same = forward(model, batch)
        assert torch.equal(same, answer) and all(map(torch.equal, again, whole))


def one_unit_classifier(unit: int = 5):
    """A DistilBERT whose answer is the sign of one unit of the last hidden state at [CLS], around
    its median; and examples labelled with just that answer."""
    model = tiny_model("distilbert", "classification")
    data = random_examples(100)
    with torch.no_grad():
        for linear in (model.pre_classifier, model.classifier):
            linear.weight.zero_()
            linear.bias.zero_()
        model.pre_classifier.weight[:2, unit] = torch.tensor([1.0, -1.0])
        model.classifier.weight[1, :2] = torch.tensor([1.0, -1.0])
        median = np.median(training.predict(model, data, device="cpu")[:, 1])
        model.classifier.bias[1] = -float(median)
    answers = training.predict(model, data, device="cpu").argmax(axis=1)
    return model, training.Encoded(data.ids, None, answers, data.pad)


def test_ablating_the_unit_that_a_classifier_reads_costs_its_score_and_others_cost_nothing():
    model, data = one_unit_classifier()
    ranking = [(LAYERS, 5), *((LAYERS, unit) for unit in range(WIDTH) if unit != 5)]
    table = ablation_scores(model, data, ranking, [0, 1, WIDTH - 1], device="cpu")
    assert {"k", "which", "accuracy", "f1", "loss"} <= set(table.columns) and len(table) == 9
    at = table.set_index(["k", "which"])["accuracy"]
    assert at[0, "top"] == at[0, "bottom"] == at[0, "random"] == 1
    assert at[1, "top"] == pytest.approx(0.5, abs=0.02)
    assert at[WIDTH - 1, "bottom"] == 1
    # One value for all examples, whichever: no information is left.
    values = np.full((LAYERS + 1, WIDTH), 3.0)
    table = ablation_scores(model, data, ranking, [1], values=values, device="cpu")
    at = table.set_index("which")["accuracy"]
    assert at["top"] == pytest.approx(0.5, abs=0.02) and at["bottom"] == 1


def test_the_neuron_that_probes_find_is_the_neuron_that_the_model_uses():
    model, data = one_unit_classifier()
    with torch.no_grad():
        outputs = [model(torch.tensor([i]), output_hidden_states=True) for i in data.ids]
    first = [torch.stack(output.hidden_states)[:, :, 0] for output in outputs]
    ranking = rank_neurons(torch.cat(first, dim=1), data.labels)  # (layers, examples, hidden)
    at = ablation_scores(model, data, ranking, [1], device="cpu").set_index("which")["accuracy"]
    assert ranking[0] == (LAYERS, 5)
    # The last one may lie in an earlier layer and feed the unit a little.
    assert at["top"] < 0.6 < 0.8 < at["bottom"]


TRAIN = planted([(1, 4)])
SHORTER = TRAIN[0][:, :, :-1]


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (rank_neurons, {"method": "gausian"}, "Did you mean 'gaussian'"),
        (rank_neurons, {"labels": ["a"] * 600}, "nothing to tell apart"),
        (rank_neurons, {"classes": ["0", "2"]}, "label 1 is not among the classes: 0, 2"),
        (rank_neurons, {"activations": np.full((3, 600, 2), np.inf)}, "layer 0 hold values"),
        (rank_neurons, {"seed": -1, "method": "lca"}, "seed -1 is not a whole number from 0 up"),
        (minimal_neurons, {"test_activations": SHORTER}, r"numbers \(4, words, 6\), got .*5"),
        (minimal_neurons, {"delta": -1}, "delta -1"),
        (minimal_neurons, {"groups": [None, 1] * 300}, "groups lack the value of word 0"),
        (minimal_neurons, {"groups": TRAIN[1]}, "one label only"),
        (accuracy_curve, {"sizes": [25]}, "cannot take 25 of 24"),
        (accuracy_curve, {"ranking": [(-1, 0)]}, r"no neuron \(-1, 0\).* units 0 to 5"),
        (accuracy_curve, {"ranking": [(0, 0), (0, 0)]}, "or it is named twice"),
    ],
)
def test_what_cannot_be_ranked_or_searched_is_refused(function, change, message):
    x, y = TRAIN
    given = {"activations": x, "labels": y, "method": "probeless"}
    if function is not rank_neurons:
        given |= {"test_activations": x, "test_labels": y}
    if function is accuracy_curve:
        del given["method"]
        given |= {"ranking": EVERYTHING, "sizes": [1]}
    with pytest.raises(HealingError, match=message):
        function(**{**given, **change})


@pytest.mark.parametrize(
    ("neurons", "values", "message"),
    [
        ([(LAYERS + 1, 0)], None, "no neuron"), ([(0, WIDTH)], None, "no neuron"),
        ([(-1, 0)], None, "no neuron"), ((0, 1), None, "no neuron"), ("ab", None, "no neuron"),
        ([(0.5, 1)], None, "no neuron"), ([(0, 1), [0, 1]], None, "twice"),
        ([(0, 1)], np.zeros((LAYERS, WIDTH)), r"must be \(4, 16\) finite numbers"),
        ([(0, 1)], np.full((LAYERS + 1, WIDTH), np.nan), "finite numbers"),
    ],
)  # fmt: skip
def test_neurons_that_there_are_not_and_values_that_are_none_are_refused(neurons, values, message):
    with pytest.raises(HealingError, match=message), ablate(tiny_model("bert"), neurons, values):
        pass
