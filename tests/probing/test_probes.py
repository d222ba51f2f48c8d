"""Layer probes: the planted layer is found, nothing is found in noise, and the optimum is one."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from healing_utils import extract_activations, load_corpus
from healing_utils.base.errors import HealingError
from healing_utils.healing import models
from healing_utils.probing import probes
from healing_utils.probing.probes import (
    COLUMNS,
    choose_penalty,
    control_labels,
    fit_probes,
    probe_layers,
    proximal_step,
)

NAMES = np.array(["ADJ", "NOUN", "VERB"])


def planted(
    words: int = 600, layers: int = 3, layer: int = 1, classes: int = 3, features: int = 12,
    noise: float = 1.0, seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Activations that are noise, but for `layer`, which has class means; and the class ids."""
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, size=words, p=np.arange(classes, 0, -1) / np.arange(classes + 1).sum())
    x = rng.standard_normal((layers, words, features))
    centres = np.random.default_rng(1000).standard_normal((classes, features))
    x[layer] = centres[y] + noise * x[layer]
    return (10 * x + 3).astype(np.float32), y


def objective(weight, bias, x, y, l1, l2) -> float:
    """The definition, in float64, on standardised activations x (words, features)."""
    scores = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    scores -= scores.max(axis=1, keepdims=True)
    loss = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(y)), y]
    return float(loss.mean() + l1 * np.abs(weight).sum() + l2 / 2 * np.square(weight).sum())


def standardised(probes, x: np.ndarray, layer: int) -> np.ndarray:
    return (x[layer] - probes.mean[layer]) / probes.scale[layer]


# --- the solver ----------------------------------------------------------------------------------


@pytest.mark.parametrize("l1, l2", [(0.02, 0.001), (0.003, 0.003), (0.0, 0.01), (1e-4, 1e-4)])
def test_the_optimality_conditions_hold_at_the_solution(l1, l2):
    x, y = planted(layers=2, layer=0)
    probes = fit_probes(x, y, 3, l1, l2, tolerance=1e-7)
    assert probes.converged.all()
    for layer in range(2):
        z, w, b = standardised(probes, x, layer), probes.weight[layer], probes.bias[layer]
        p = torch.softmax(torch.from_numpy(z @ w.T + b), dim=1).numpy() - np.eye(3)[y]
        slope = p.T @ z / len(y)
        zero = w == 0
        assert (np.abs(slope[zero]) <= l1 + 2e-4).all()
        assert np.abs(slope + l2 * w + l1 * np.sign(w))[~zero].max() < 2e-4
        assert np.abs(p.mean(axis=0)).max() < 2e-4  # the bias is free
        assert l1 == 0 or zero.any()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("l1, l2", [(0.01, 0.01), (0.002, 0.0005)])
def test_the_objective_is_no_worse_than_scikit_learns(l1, l2):
    from sklearn.linear_model import LogisticRegression

    x, y = planted(layers=1, layer=0, noise=2.0)
    test_x, test_y = planted(layers=1, layer=0, noise=2.0, seed=1)
    probes = fit_probes(x, y, 3, l1, l2, tolerance=1e-5)
    z = standardised(probes, x, 0)
    peer = LogisticRegression(
        solver="saga", C=1 / (len(y) * (l1 + l2)), l1_ratio=l1 / (l1 + l2), tol=1e-8,
        max_iter=1000, random_state=0, **_elastic(),
    ).fit(z, y)  # fmt: skip
    theirs = objective(peer.coef_, peer.intercept_, z, y, l1, l2)
    ours = objective(probes.weight[0], probes.bias[0], z, y, l1, l2)
    assert ours <= theirs * (1 + 1e-4)
    assert ours == pytest.approx(probes.objective[0], rel=1e-5)
    assert ours - probes.gap[0] <= theirs * (1 + 1e-7), "the bound is above a known objective"
    agreement = (probes.predict(test_x)[0] == test_y).mean() - (
        peer.predict(standardised(probes, test_x, 0)) == test_y
    ).mean()
    assert abs(agreement) <= 0.005


def _elastic() -> dict[str, str]:
    """scikit-learn 1.8 took the name of the penalty away: l1_ratio says it all."""
    import sklearn

    major, minor = map(int, sklearn.__version__.split(".")[:2])
    return {} if (major, minor) >= (1, 8) else {"penalty": "elasticnet"}


def test_the_ridge_solution_is_lbfgs_s():
    from sklearn.linear_model import LogisticRegression

    x, y = planted(layers=1, layer=0)
    probes = fit_probes(x, y, 3, 0.0, 0.01, tolerance=1e-7)
    z = standardised(probes, x, 0)
    peer = LogisticRegression(C=1 / (len(y) * 0.01), tol=1e-9, max_iter=5000).fit(z, y)
    assert np.abs(probes.weight[0] - peer.coef_).max() < 1e-2


def test_the_gap_bounds_the_distance_to_the_minimum():
    x, y = planted(layers=1, layer=0)
    best = fit_probes(x, y, 3, 1e-3, 1e-3, tolerance=1e-7).objective[0]
    for steps in (10, 20, 40):
        early = fit_probes(x, y, 3, 1e-3, 1e-3, tolerance=1e-7, max_iterations=steps)
        assert early.objective[0] - best <= early.gap[0] * 1.001 + 1e-7
        assert bool(early.converged[0]) == (early.gap[0] <= 1e-7 * early.objective[0])
    assert not fit_probes(x, y, 3, 1e-4, 1e-4, max_iterations=3).converged.any()


def test_weights_are_exactly_zero_from_the_strength_that_theory_gives():
    x, y = planted(layers=1, layer=0)
    z = (x[0] - x[0].mean(0)) / x[0].std(0)
    # With no weight the residual is the labels' frequency: its largest product with a feature.
    strongest = np.abs((np.bincount(y) / len(y) - np.eye(3)[y]).T @ z / len(y)).max()
    above = fit_probes(x, y, 3, strongest * 1.001, 1e-3, tolerance=1e-6)
    below = fit_probes(x, y, 3, strongest * 0.98, 1e-3, tolerance=1e-6)
    assert not above.weight.any()
    assert np.allclose(above.bias[0] - above.bias[0].mean(), _centred_log(y), atol=1e-3)
    assert 1 <= np.count_nonzero(below.weight) <= 4


def _centred_log(y: np.ndarray) -> np.ndarray:
    log = np.log(np.bincount(y) / len(y))
    return log - log.mean()


@settings(max_examples=200, deadline=None)
@given(
    point=st.floats(-5, 5, width=32),
    step=st.floats(0.015625, 4, width=32),
    l1=st.floats(0, 2, width=32),
    other=st.floats(-6, 6),
)
def test_no_weight_does_better_than_the_proximal_step(point, step, l1, other):
    def cost(w: float) -> float:
        return (w - point) ** 2 / (2 * step) + l1 * abs(w)

    got = proximal_step(*(torch.tensor(value) for value in (point, step, l1))).item()
    assert cost(got) <= cost(other) + 1e-5 * (1 + abs(cost(other)))
    assert got * point >= 0 and abs(got) <= abs(point)
    if abs(point) < step * l1 * (1 - 1e-6):
        assert got == 0.0


def test_a_batch_of_layers_is_the_layers_one_at_a_time():
    x, y = planted(layers=4, layer=2)
    l1, l2 = [0.01, 0.003, 0.001, 0.03], [0.01, 0.001, 0.001, 0.01]
    batch = fit_probes(x, y, 3, l1, l2, tolerance=1e-6)
    assert len(set(batch.iterations.tolist())) > 1, "layers leave the batch when they are done"
    for i in range(4):
        alone = fit_probes(x[i : i + 1], y, 3, l1[i], l2[i], tolerance=1e-6)
        assert batch.objective[i] == pytest.approx(alone.objective[0], rel=3e-6)
        assert np.abs(batch.weight[i] - alone.weight[0]).max() < 5e-3
        assert np.array_equal(batch.l1, l1) and np.array_equal(batch.l2, l2)


def test_several_penalties_share_one_layer():
    x, y = planted(layers=1, layer=0)
    strengths = [0.03, 0.01, 0.001]
    path = fit_probes(x, y, 3, strengths, strengths, tolerance=1e-6)
    assert path.weight.shape == (3, 3, 12) and path.mean.shape == (3, 12)
    for i, strength in enumerate(strengths):
        alone = fit_probes(x, y, 3, strength, strength, tolerance=1e-6)
        assert path.objective[i] == pytest.approx(alone.objective[0], rel=3e-6)
    nonzero = np.count_nonzero(path.weight, axis=(1, 2))
    assert nonzero[0] < nonzero[1] < nonzero[2]


def test_the_order_of_words_does_not_matter_and_equal_calls_are_equal():
    x, y = planted()
    once, again = (fit_probes(x, y, 3, 0.003, 0.003, tolerance=1e-6) for _ in range(2))
    assert np.array_equal(once.weight, again.weight) and np.array_equal(once.bias, again.bias)
    order = np.random.default_rng(5).permutation(len(y))
    other = fit_probes(x[:, order], y[order], 3, 0.003, 0.003, tolerance=1e-6)
    assert np.abs(once.weight - other.weight).max() < 3e-3
    assert np.allclose(once.objective, other.objective, rtol=3e-6)


def test_no_random_state_is_touched():
    x, y = planted(words=80)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    probe_layers(x, y, x, y, y.astype(str), y.astype(str))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_an_integer_weight_is_that_many_copies():
    x, y = planted(words=200, layers=1, layer=0)
    times = np.random.default_rng(0).integers(0, 4, size=len(y))
    weighted = fit_probes(x, y, 3, 0.005, 0.005, weights=times, tolerance=1e-6)
    copies = np.repeat(np.arange(len(y)), times)
    copied = fit_probes(x[:, copies], y[copies], 3, 0.005, 0.005, tolerance=1e-6)
    assert np.allclose(weighted.mean, copied.mean, atol=1e-4)
    assert np.abs(weighted.weight - copied.weight).max() < 3e-3
    assert weighted.objective[0] == pytest.approx(copied.objective[0], rel=1e-5)


def test_a_start_at_the_solution_ends_there_at_once():
    x, y = planted(layers=2, layer=0)
    probes = fit_probes(x, y, 3, 0.003, 0.003, tolerance=1e-6)
    warm = fit_probes(x, y, 3, 0.003, 0.003, tolerance=1e-4, start=probes)
    assert (warm.iterations == 0).all() and np.array_equal(warm.weight, probes.weight)
    with pytest.raises(HealingError, match=r"start has weights .*\(2, 3, 12\), but need"):
        fit_probes(x[:1], y, 3, 0.003, 0.003, start=probes)


def test_a_start_worse_than_no_weights_is_not_taken():
    x, y = planted(layers=2, layer=0)
    plain = fit_probes(x, y, 3, 0.003, 0.003)
    far = replace(plain, weight=plain.weight * 1e3)
    one_far = replace(plain, weight=plain.weight * np.array([1, 1e3], np.float32)[:, None, None])
    again = fit_probes(x, y, 3, 0.003, 0.003, start=far)
    first = fit_probes(x[:1], y, 3, 0.003, 0.003)
    assert np.array_equal(again.weight[0], first.weight[0])
    assert again.iterations.max() < 100 and again.converged.all()
    assert fit_probes(x, y, 3, 0.003, 0.003, start=one_far).iterations[0] == 0


def test_on_a_cpu_a_layer_starts_from_the_one_before():
    x, y = planted(layers=3, layer=0)
    noise = np.random.default_rng(5).standard_normal(x.shape[1:])
    alike = np.stack([x[0], x[0] + 0.05 * noise, x[1]]).astype(np.float32)
    found = fit_probes(alike, y, 3, 0.003, 0.003)
    alone = [fit_probes(alike[i : i + 1], y, 3, 0.003, 0.003) for i in range(3)]
    assert found.iterations[1] < alone[1].iterations[0]
    for i in range(3):  # wherever they start, they end within the tolerance
        assert found.objective[i] == pytest.approx(alone[i].objective[0], rel=2e-3)
    assert found.converged.all()


def test_a_class_without_words_and_a_constant_feature_are_no_obstacle():
    x, y = planted(layers=1, layer=0)
    x[..., 4] = 1e4
    probes = fit_probes(x, y, 5, 0.003, 0.003, tolerance=1e-3)
    assert probes.converged.all() and np.isfinite(probes.scores(x)).all()
    assert not probes.weight[..., 4].any() and (probes.scale[..., 4] == 1).all()
    assert not probes.weight[:, 3:].any()
    assert np.isin(probes.predict(x), [0, 1, 2]).all()


def test_float16_tensors_and_memory_maps_give_what_float32_gives(tmp_path):
    x, y = planted()
    half = x.astype(np.float16)
    np.save(tmp_path / "x.npy", half)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    want = fit_probes(half.astype(np.float32), y, 3, 0.003, 0.003)
    for given_ in (half, mapped, torch.from_numpy(half)):
        got = fit_probes(given_, y, 3, 0.003, 0.003)
        assert np.array_equal(got.weight, want.weight)
        assert np.array_equal(got.predict(given_), want.predict(half.astype(np.float32)))


def test_activations_of_any_byte_order_and_direction_are_taken():
    x, y = planted()
    want = fit_probes(x, y, 3, 0.003, 0.003).weight
    for given_ in (x.astype(">f4"), x.astype(np.longdouble), x[:, ::-1].copy()[:, ::-1]):
        assert np.array_equal(fit_probes(given_, y, 3, 0.003, 0.003).weight, want)


def test_correlated_features_need_fewer_passes_in_their_own_metric(monkeypatch):
    x, y = planted(layers=1, layer=0, features=40, noise=3.0)
    rng = np.random.default_rng(1)
    common = rng.standard_normal((len(y), 3)) @ rng.standard_normal((3, 40))
    x[0] += 20 * common.astype(np.float32)
    own = fit_probes(x, y, 3, 1e-3, 1e-3, tolerance=1e-5)
    monkeypatch.setattr(probes, "CORRELATED", 0)
    plain = fit_probes(x, y, 3, 1e-3, 1e-3, tolerance=1e-5)
    assert own.converged.all() and plain.converged.all()
    assert own.objective == pytest.approx(plain.objective, rel=2e-5)
    assert own.iterations[0] < 0.7 * plain.iterations[0]


@pytest.fixture(scope="module")
def tagged() -> tuple[np.ndarray, np.ndarray]:
    """All neurons of the model organism on 300 words, as one layer, and the words' tags: here the
    bias settles late."""
    corpus = load_corpus("organism").draw(0, 60, 1).train
    classifier = models.load_classifier("organism", num_labels=2, seed=0)
    layers = extract_activations(classifier, models.load_tokenizer("organism"), corpus.words)
    _, ids = np.unique([tag for tags in corpus.labels for tag in tags], return_inverse=True)
    return np.concatenate(list(layers), axis=1)[None, :300], ids[:300]


@pytest.mark.parametrize("correlated", [0, probes.CORRELATED])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_the_minimum_lies_within_the_stated_gap(monkeypatch, tagged, correlated, tolerance):
    x, y = tagged
    classes = int(y.max()) + 1
    minimum = fit_probes(x, y, classes, 1e-3, 1e-2, tolerance=1e-6).objective[0]
    monkeypatch.setattr(probes, "CORRELATED", correlated)
    probe = fit_probes(x, y, classes, 1e-3, 1e-2, tolerance=tolerance)
    assert probe.converged.all()
    assert probe.objective[0] - minimum <= probe.gap[0] <= tolerance * probe.objective[0]


@pytest.mark.parametrize("features", [1, 2, 7, 60])
def test_the_metric_is_the_mean_product_and_its_bound_is_close(features):
    rng = np.random.default_rng(features)
    x = torch.from_numpy(rng.standard_normal((50, features)).astype(np.float32))
    x[:, -1] = -x[:, 0]  # the largest eigenvector has a sum of zero where these are all
    weights = torch.from_numpy(rng.dirichlet(np.ones(50)).astype(np.float32))
    metric = probes._metric(x, weights)
    want = sum(w * torch.outer(row, row) for w, row in zip(weights, x, strict=True))
    assert torch.allclose(metric.products, want, atol=1e-5)
    largest = float(torch.linalg.eigvalsh(want.double())[-1])
    assert largest <= metric.largest <= 1.2 * largest
    assert probes._metric(torch.zeros(50, features), weights).largest == 0
    alike = probes._metric(x, None), probes._metric(x, torch.full((50,), 1 / 50))
    assert torch.allclose(alike[0].products, alike[1].products, atol=1e-6)


def test_layers_together_as_on_a_gpu_reach_the_same_minima(monkeypatch):
    x, y = planted(layers=4, layer=2)
    strengths = ([0.05, 0.003, 0.001, 0.02],) * 2  # they leave at different times
    apart = fit_probes(x, y, 3, *strengths, tolerance=1e-6)
    monkeypatch.setattr(probes, "_at_once", lambda layers, device: [slice(0, layers)])
    for correlated in (0, probes.CORRELATED):
        monkeypatch.setattr(probes, "CORRELATED", correlated)
        together = fit_probes(x, y, 3, *strengths, tolerance=1e-6)
        assert together.converged.all()
        assert together.objective == pytest.approx(apart.objective, rel=2e-6)
        assert np.abs(together.weight - apart.weight).max() < 1e-2


def test_layers_solved_together_or_each_alone_are_the_same_probes(monkeypatch):
    x, y = planted(layers=5, layer=2)
    words = [f"w{i % 97}" for i in range(len(y))]
    given = (x[:, :400], y[:400], x[:, 400:], y[400:], words[:400], words[400:])
    calls, solve = [], probes._solve_together

    def counted(given, *rest):
        calls.append(len(given.layer.unique()))
        return solve(given, *rest)

    monkeypatch.setattr(probes, "_solve_together", counted)
    tables = {}
    for at_once in (1, 2, 5):
        # Values of a layer's activations, and of the scores of its two problems.
        monkeypatch.setattr(probes, "TOGETHER", at_once * 400 * (12 + 2 * 3))
        calls.clear()
        tables[at_once] = probe_layers(*given, tolerance=1e-6)
        assert max(calls) == at_once
    for table in tables.values():
        pd.testing.assert_frame_equal(
            table.drop(columns=["iterations", "nonzero"]),
            tables[1].drop(columns=["iterations", "nonzero"]),
        )
        assert np.abs(table.nonzero - tables[1].nonzero).max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_a_gpu_finds_the_same_minimum():
    x, y = planted()
    cpu, gpu = (
        fit_probes(x, y, 3, 0.003, 0.003, tolerance=1e-6, device=d) for d in ("cpu", "cuda")
    )
    assert np.allclose(cpu.objective, gpu.objective, rtol=1e-5)
    assert np.abs(cpu.weight - gpu.weight).max() < 1e-2


# --- the penalty's choice ------------------------------------------------------------------------


def test_the_chosen_penalty_is_weak_for_signal_and_strong_for_noise():
    x, y = planted(words=800, layers=2, layer=1, features=40, noise=1.5)
    probes = choose_penalty(x, y, None, 3, (0.3, 0.03, 0.003, 0.0003))
    assert probes.l1[0] >= 0.03 and probes.l1[1] <= 0.03
    assert np.array_equal(probes.l1, probes.l2)
    refitted = fit_probes(x, y, 3, probes.l1, probes.l2, tolerance=1e-6)
    assert np.allclose(probes.objective, refitted.objective, rtol=1e-3)


def test_choosing_keeps_groups_whole():
    # Every sentence has its own direction, and all its words one random label: a split inside
    # sentences would reward learning them by heart, a split between sentences cannot.
    rng = np.random.default_rng(0)
    sentences, words = 60, 12
    groups = np.repeat(np.arange(sentences), words)
    y = rng.integers(2, size=sentences)[groups]
    x = np.eye(sentences, dtype=np.float32)[groups][None] + 0.01 * rng.standard_normal(
        (1, len(y), sentences)
    )
    penalties = (0.3, 0.003)
    assert choose_penalty(x, y, None, 2, penalties, dev=0.3).l1[0] == 0.003
    within = [choose_penalty(x, y, groups, 2, penalties, dev=0.3, seed=s) for s in range(5)]
    assert [p.l1[0] for p in within].count(0.3) >= 3
    with pytest.raises(HealingError, match="at least 2 groups"):
        choose_penalty(x, y, np.zeros(len(y)), 2, penalties)


# --- control tasks -------------------------------------------------------------------------------


def test_control_labels_are_a_function_of_the_type_and_the_seed():
    words = ["the", "cat", "sat", "the", "mat"]
    got = control_labels(words, [3, 1, 1], seed=4)
    assert got[0] == got[3]
    assert np.array_equal(got[::-1], control_labels(words[::-1], [3, 1, 1], seed=4))
    assert control_labels(["mat"], [3, 1, 1], seed=4)[0] == got[4]
    many = [f"w{i}" for i in range(4000)]
    labels = control_labels(many, [60, 30, 0, 10], seed=0)
    assert np.allclose(np.bincount(labels, minlength=4) / 4000, [0.6, 0.3, 0, 0.1], atol=0.03)
    assert (labels != control_labels(many, [60, 30, 0, 10], seed=1)).mean() > 0.4
    # Known once and for all: another process, machine or version may not redraw them.
    assert control_labels(["the", "cat", "sat", "mat", "on", "a"], [1] * 4).tolist() == [
        1,
        2,
        2,
        1,
        0,
        0,
    ]


def word_activations(
    seed: int, types: int = 250, words: int = 3000, test: int = 1500, features: int = 96
) -> tuple[np.ndarray, ...]:
    """Activations that carry the word's identity, and one feature that carries its context."""
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((types, features))
    index = rng.integers(types, size=words + test)
    context = rng.choice([-1, 1], size=words + test)
    x = table[index] + 0.3 * rng.standard_normal((words + test, features))
    x = np.concatenate([x, 2 * context[:, None] + 0.3 * rng.standard_normal((len(x), 1))], axis=1)
    names = np.array([f"w{i}" for i in index])
    return x[None].astype(np.float32), names, context


def test_random_labels_per_word_type_have_no_selectivity_and_context_has():
    n, differences = 3000, []
    for seed in range(4):
        x, names, context = word_activations(seed, features=300)
        random = control_labels(names, [5, 3, 2], seed=100 + seed)
        got = probe_layers(
            x[:, :n], random[:n], x[:, n:], random[n:], names[:n], names[n:],
            seed=seed, penalties=(0.03, 0.01, 0.003),
        ).iloc[0]  # fmt: skip
        assert got.accuracy > got.majority + 0.3, "the probe must be able to learn words by heart"
        assert got.accuracy - got.control_accuracy == pytest.approx(got.selectivity)
        differences.append(got.selectivity)
    assert np.abs(differences).max() < 0.02
    got = probe_layers(
        x[:, :n], context[:n], x[:, n:], context[n:], names[:n], names[n:], penalties=(0.03, 0.01)
    ).iloc[0]
    assert got.accuracy > 0.99 and got.control_accuracy < 0.97 and got.selectivity > 0.02


# --- the table -----------------------------------------------------------------------------------


def test_the_planted_layer_is_the_best_layer_whatever_the_labels_are_called():
    x, y = planted(words=700, layers=4, layer=2)
    names = NAMES[y]
    got = probe_layers(x[:, :500], names[:500], x[:, 500:], names[500:])
    assert list(got.columns) == list(COLUMNS) and got.layer.tolist() == [0, 1, 2, 3]
    assert got.accuracy.idxmax() == got.macro_f1.idxmax() == 2
    assert got.accuracy[2] > got.majority[2] + 0.2
    assert got.converged.all() and got.n_train.unique() == [500] and got.n_test.unique() == [200]
    assert got.n_classes.unique() == [3]
    assert got.majority[0] == pytest.approx((y[500:] == 0).mean())
    assert got.control_accuracy.isna().all() and got.selectivity.isna().all()
    numbers = probe_layers(x[:, :500], y[:500] * 7, x[:, 500:], y[500:] * 7)
    pd.testing.assert_frame_equal(got, numbers)


def test_random_activations_score_no_better_than_the_majority_label():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 1500, 100)).astype(np.float32)
    y = rng.choice(6, size=1500, p=[0.34, 0.2, 0.16, 0.12, 0.1, 0.08])
    got = probe_layers(x[:, :700], y[:700], x[:, 700:], y[700:])
    error = np.sqrt(got.majority * (1 - got.majority) / 800)
    assert (np.abs(got.accuracy - got.majority) < 2 * error).all()
    # And that is the regularisation's doing: without it, noise costs accuracy.
    free = probe_layers(x[:, :700], y[:700], x[:, 700:], y[700:], penalties=[(0.0, 1e-4)])
    assert (free.accuracy < got.accuracy - 2 * error).all()


def test_blocks_of_layers_and_memory_maps_do_not_change_the_table(tmp_path):
    x, y = planted(layers=3)
    words = np.array([f"w{i % 40}" for i in range(len(y))])
    half = x.astype(np.float16)
    np.save(tmp_path / "x.npy", half)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    arguments = y[:400], y[400:], words[:400], words[400:]
    whole, blocks = (
        probe_layers(
            source[:, :400], arguments[0], source[:, 400:], *arguments[1:], memory=memory,
            tolerance=1e-5,
        )
        for source, memory in ((half, 2**31), (mapped, 1))
    )  # fmt: skip
    for column in ("accuracy", "control_accuracy", "macro_f1", "l1"):
        assert np.allclose(whole[column], blocks[column], atol=0.011), column


def test_a_test_label_unseen_in_training_is_an_error():
    x, y = planted(layers=1, layer=0, noise=0.1)
    names = NAMES[y]
    test = names[400:].copy()
    before = probe_layers(x[:, :400], names[:400], x[:, 400:], test).iloc[0]
    test[:50] = "X"
    got = probe_layers(x[:, :400], names[:400], x[:, 400:], test).iloc[0]
    assert before.accuracy == 1.0
    assert got.accuracy == pytest.approx(0.75) and got.n_classes == 3
    assert got.macro_f1 < before.macro_f1 - 0.25, "the unseen label is a class of F1 0"


def test_macro_f1_is_scikit_learns():
    from sklearn.metrics import f1_score

    x, y = planted(layers=1, layer=0)
    got = probe_layers(x[:, :400], y[:400], x[:, 400:], y[400:], penalties=[0.01]).iloc[0]
    probes = fit_probes(x[:, :400], y[:400], 3, 0.01, 0.01)
    said = probes.predict(x[:, 400:])[0]
    assert got.accuracy == pytest.approx((said == y[400:]).mean())
    assert got.macro_f1 == pytest.approx(f1_score(y[400:], said, average="macro"))
    assert got.nonzero == np.count_nonzero(probes.weight)


def test_progress_counts_to_its_end(monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")
    x, y = planted(words=100)
    assert len(probe_layers(x, y, x, y, progress=True, memory=1)) == 3


def bad(**changes):
    x, y = planted(words=60)
    words = y.astype(str)
    good = {
        "activations": x, "labels": y, "test_activations": x[:, :20], "test_labels": y[:20],
        "words": words, "test_words": words[:20],
    }  # fmt: skip
    return {**good, **{k: v(good) if callable(v) else v for k, v in changes.items()}}


def _nan(good):
    x = good["activations"].copy()
    x[1, 7, 3] = np.nan
    return x


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activations": lambda g: g["activations"][0]}, r"activations must be an array .*60, 12"),
        ({"activations": [[1.0]]}, "got list"),
        ({"test_activations": lambda g: g["test_activations"][..., :5]}, "must be as many"),
        ({"test_activations": lambda g: g["test_activations"][:2]}, "must be as many"),
        ({"labels": lambda g: g["labels"][:50]}, "labels must be one value a word: 60, got 50"),
        ({"test_labels": lambda g: g["labels"]}, "test labels must be one value a word: 20"),
        ({"words": ["a"] * 59}, "words must be one value a word: 60, got 59"),
        ({"test_words": None}, "need both words and test_words"),
        ({"groups": [0] * 59}, "groups must be one value a word: 60, got 59"),
        ({"groups": [0] * 60}, "at least 2 groups"),
        ({"labels": ["NN"] * 60, "test_labels": ["NN"] * 20}, "every training label is 'NN'"),
        ({"labels": lambda g: g["labels"] * 1.0}, "strings or integers, got float64"),
        ({"labels": lambda g: g["labels"].astype(str)}, "but test labels are int64"),
        ({"activations": _nan}, "activations of layer 1 have 1 .* at word 7, feature 3"),
        ({"test_activations": lambda g: _nan(g)[:, :20]}, "test activations of layer 1 have 1"),
        ({"penalties": []}, "penalties are empty"),
        ({"penalties": 0.1}, "penalties must be a list"),
        ({"penalties": [0.1, 0.0]}, "penalty 0.0: need l1 of at least 0 and l2 above 0"),
        ({"penalties": [(0.1, 0.1, 0.1)]}, "as a pair"),
        ({"penalties": ["strong"]}, "penalty 'strong'"),
        ({"dev": 1.0}, "dev must be a fraction"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
    ],
)
def test_bad_input_says_what_is_wrong(changes, message):
    with pytest.raises(HealingError, match=message) as caught:
        probe_layers(**bad(**changes))
    assert "\n" not in str(caught.value)


def test_bad_calls_of_the_solver_say_what_is_wrong():
    x, y = planted(words=40)
    for arguments, message in [
        ((x, y, 2, 0.1, 0.1), "class ids must be from 0 to 1"),
        ((x, y, 1, 0.1, 0.1), "at least 2 classes"),
        ((x, y[:5], 3, 0.1, 0.1), "labels must be 40 class ids"),
        ((x, y, 3, [0.1, 0.2], 0.1), "got 2 penalties for 3 layers"),
        ((x, y, 3, 0.1, 0.0), "l2 above 0"),
        ((x, y, 3, "much", 0.1), "l1 must be a number"),
    ]:
        with pytest.raises(HealingError, match=message):
            fit_probes(*arguments)
    with pytest.raises(HealingError, match="weights must be 40 numbers"):
        fit_probes(x, y, 3, 0.1, 0.1, weights=np.zeros(40))
    with pytest.raises(HealingError, match="fitted on 3 layers of 12 features"):
        fit_probes(x, y, 3, 0.1, 0.1).scores(x[:2])
    with pytest.raises(HealingError, match="label frequencies"):
        control_labels(["a"], [0, 0])


# --- real activations ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chunks():
    """MiniLM-L6's third layer on 80 sentences of CoNLL-2000, last subwords, and chunk ids."""
    from transformers import AutoModel, AutoTokenizer

    nltk = pytest.importorskip("nltk")
    name = "sentence-transformers/all-MiniLM-L6-v2"
    try:
        sentences = nltk.corpus.conll2000.iob_sents("train.txt")[:80]
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        model = AutoModel.from_pretrained(name, local_files_only=True, dtype=torch.float32).eval()
    except (LookupError, OSError) as error:
        hint = f"HF_HOME={os.environ.get('HF_HOME')}, NLTK_DATA={os.environ.get('NLTK_DATA')}"
        pytest.skip(f"CoNLL-2000 or {name} is not stored here ({hint}): {type(error).__name__}")
    rows = []
    for sentence in sentences:
        words = [word for word, _, _ in sentence]
        inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        last = {word: i for i, word in enumerate(inputs.word_ids()) if word is not None}
        with torch.inference_mode():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[3][0]
        rows.append(hidden[[last[i] for i in range(len(words))]].numpy())
    labels = np.array([tag for sentence in sentences for _, _, tag in sentence])
    return np.concatenate(rows)[None], labels


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_on_real_activations_the_objective_is_no_worse_than_saga_s(chunks):
    from sklearn.linear_model import LogisticRegression

    x, labels = chunks
    names, y = np.unique(labels, return_inverse=True)
    n, l1, l2 = 1500, 0.003, 0.003
    y, test_y = y[:n], y[n:]
    probes = fit_probes(x[:, :n], y, len(names), l1, l2, tolerance=1e-5)
    z = standardised(probes, x, 0)
    peer = LogisticRegression(
        solver="saga", C=1 / (n * (l1 + l2)), l1_ratio=0.5, tol=1e-3, max_iter=60,
        random_state=0, **_elastic(),
    ).fit(z[:n], y)  # fmt: skip
    present = peer.classes_
    theirs = objective(
        peer.coef_, peer.intercept_, z[:n], np.searchsorted(present, y), l1, l2
    )  # fmt: skip
    ours = objective(probes.weight[0], probes.bias[0], z[:n], y, l1, l2)
    assert ours <= theirs * (1 + 1e-4) and probes.converged.all()
    accuracy = (probes.predict(x[:, n:])[0] == test_y).mean()
    assert accuracy == pytest.approx((peer.predict(z[n:]) == test_y).mean(), abs=0.005)
    assert accuracy > 0.7
