"""Layer probes: the planted layer is found, nothing is found in noise, and the optimum is one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from healing_utils import extract_activations, load_corpus, rank_neurons
from healing_utils.base.errors import HealingError
from healing_utils.healing import models
from healing_utils.probing import solver
from healing_utils.probing.probes import control_labels, fit_probes, probe_layers


def float32(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float32))


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


def objective(weight, bias, z, y, l1, l2) -> float:
    """The definition, in float64, on standardised activations z (words, features)."""
    scores = torch.from_numpy(z.astype(np.float64) @ weight.T.astype(np.float64) + bias)
    loss = F.cross_entropy(scores, torch.from_numpy(y)).item()
    return loss + l1 * np.abs(weight).sum() + l2 / 2 * np.square(weight).sum()


def fit(x, y, *penalties, **settings):
    """`fit_probes` on x (words, features), its arrays, and x as they see it."""
    found = fit_probes(float32(x), y, penalties, **settings)
    arrays = SimpleNamespace(**{name: np.asarray(value) for name, value in vars(found).items()})
    arrays.answers = lambda x: found.scores(float32(x))[0].argmax(dim=-1).numpy()
    return arrays, (float32(x).numpy() - arrays.mean) / arrays.scale


@pytest.mark.parametrize("l1, l2", [(0.02, 0.001), (0.0, 0.01), (1e-4, 1e-4)])
def test_the_optimality_conditions_hold_at_the_solution(l1, l2):
    x, y = planted(words=300, layers=2, layer=0)
    for own in x:
        found, z = fit(own, y, (l1, l2), tolerance=1e-7)
        w, b = found.weight[0], found.bias[0]
        assert found.converged.all()
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

    (x,), y = planted(words=300, layers=1, layer=0, noise=2.0)
    found, z = fit(x, y, (l1, l2), tolerance=1e-5)
    peer = LogisticRegression(
        solver="saga", C=1 / (len(y) * (l1 + l2)), l1_ratio=l1 / (l1 + l2), tol=1e-8,
        max_iter=1000, random_state=0,
    ).fit(z, y)  # fmt: skip
    theirs = objective(peer.coef_, peer.intercept_, z, y, l1, l2)
    ours = objective(found.weight[0], found.bias[0], z, y, l1, l2)
    assert ours <= theirs * (1 + 1e-4)
    assert ours == pytest.approx(found.objective[0], rel=1e-5)
    assert ours - found.gap[0] <= theirs * (1 + 1e-7), "the bound is above a known objective"
    assert np.mean(found.answers(x) == peer.predict(z)) > 0.99


def test_penalties_of_one_call_are_those_of_one_at_a_time_from_any_start():
    (x,), y = planted(words=300, layers=1, layer=0)
    penalties = [(0.01, 0.01), (0.003, 0.001), 0.001, (0.03, 0.01)]
    shared, _ = fit(x, y, *penalties, tolerance=1e-6)
    assert len(set(shared.iterations.tolist())) > 1, "problems leave the batch when they are done"
    assert shared.weight.shape == (4, 3, 12) and shared.mean.shape == (12,)
    near = fit_probes(float32(x + 1), y, penalties[:1])
    for i, penalty in enumerate(penalties):
        for start in (None, near):
            alone, _ = fit(x, y, penalty, tolerance=1e-6, start=start)
            assert shared.objective[i] == pytest.approx(alone.objective[0], rel=3e-6)
            assert np.abs(shared.weight[i] - alone.weight[0]).max() < 5e-3


def test_the_order_of_words_does_not_matter_and_equal_calls_are_equal():
    (x,), y = planted(words=300, layers=1, layer=0)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    once, again = (fit(x, y, 0.003, tolerance=1e-6)[0] for _ in range(2))
    assert torch.equal(state[0], torch.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])
    assert np.array_equal(once.weight, again.weight) and np.array_equal(once.bias, again.bias)
    order = np.random.default_rng(5).permutation(len(y))
    other, _ = fit(x[order], y[order], 0.003, tolerance=1e-6)
    assert np.abs(once.weight - other.weight).max() < 3e-3
    assert np.allclose(once.objective, other.objective, rtol=3e-6)


def test_a_class_without_words_and_a_constant_feature_are_no_obstacle():
    (x,), y = planted(layers=1, layer=0)
    x[:, 4] = 1e4
    found, z = fit(x, 2 * y, 0.003)
    assert found.converged.all() and np.isfinite(z).all()
    assert not found.weight[..., 4].any() and found.scale[4] == 1
    assert found.weight.shape == (1, 3, 12) and found.names.tolist() == [0, 2, 4]
    assert not fit(x, y, 1e-4, max_iterations=3)[0].converged.any()


def test_any_array_of_the_same_numbers_gives_the_same_table_and_stays(tmp_path):
    x, y = planted()
    half = x.astype(np.float16)
    np.save(tmp_path / "x.npy", half)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    single = half.astype(np.float32)
    strided = single[:, ::-1].copy()[:, ::-1]

    def table(x):
        return probe_layers(x[:, :400], y[:400], x[:, 400:], y[400:], penalties=(0.01,))

    want, before = table(single), single.copy()
    tensor = torch.from_numpy(half).requires_grad_()
    for same in (half, mapped, tensor, single.astype(">f4"), strided, single):
        pd.testing.assert_frame_equal(table(same), want)
    assert np.array_equal(single, before)
    rough = tensor.bfloat16()
    assert rank_neurons(rough, y) == rank_neurons(rough.float().detach().numpy(), y)


@pytest.fixture(scope="module")
def tagged() -> tuple[np.ndarray, np.ndarray, float]:
    """All neurons of the model organism on 300 words, as one layer, the words' tags, and the
    minimum: here the bias settles late."""
    corpus = load_corpus("organism").draw(0, 60, 1).train
    classifier = models.load_classifier("organism", num_labels=2, seed=0)
    layers = extract_activations(classifier, models.load_tokenizer("organism"), corpus.words)
    _, ids = np.unique([tag for tags in corpus.labels for tag in tags], return_inverse=True)
    x, y = np.concatenate(list(layers), axis=1)[:300], ids[:300]
    return x, y, fit(x, y, (1e-3, 1e-2), tolerance=1e-6)[0].objective[0]


@pytest.mark.parametrize("correlated", [0, solver.CORRELATED])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_the_minimum_lies_within_the_stated_gap(monkeypatch, tagged, correlated, tolerance):
    x, y, minimum = tagged
    monkeypatch.setattr(solver, "CORRELATED", correlated)
    probe, _ = fit(x, y, (1e-3, 1e-2), tolerance=tolerance)
    assert probe.converged.all()
    assert probe.objective[0] - minimum <= probe.gap[0] <= tolerance * probe.objective[0]


def test_layers_solved_together_in_blocks_or_each_alone_are_the_same_probes(monkeypatch):
    x, y = planted(words=300, layers=5, layer=2)
    words = [f"w{i % 97}" for i in range(len(y))]
    given = (x[:, :200], y[:200], x[:, 200:], y[200:], words[:200], words[200:])
    calls, solve = [], solver._solve

    def counted(given, *rest):
        calls.append(len(set(given.layer)))
        return solve(given, *rest)

    monkeypatch.setattr(solver, "_solve", counted)
    tables = []
    for at_once, memory in ((1, 2**31), (2, 2**31), (5, 2**31), (5, 1)):
        # Values of a layer's activations, and of the scores of its two problems.
        monkeypatch.setattr(solver, "TOGETHER", at_once * 200 * (12 + 2 * 3))
        calls.clear()
        settings = {"tolerance": 1e-6, "penalties": (0.1, 0.01), "memory": memory}
        table = probe_layers(*given, **settings, device="cpu", progress=True)
        assert max(calls) == (1 if memory == 1 else at_once)
        tables.append(table.drop(columns=["iterations", "nonzero"]))
        pd.testing.assert_frame_equal(tables[-1], tables[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_a_gpu_finds_the_same_minimum():
    (x,), y = planted(layers=1, layer=0)
    cpu, gpu = (
        fit_probes(float32(x), y, [0.003], tolerance=1e-6, device=d) for d in ("cpu", "cuda")
    )
    assert np.allclose(cpu.objective, gpu.objective.cpu(), rtol=1e-5)
    assert (cpu.weight - gpu.weight.cpu()).abs().max() < 1e-2


def test_choosing_keeps_groups_whole():
    # Every sentence has its own direction, and all its words one random label: a split inside
    # sentences would reward learning them by heart, a split between sentences cannot.
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 12)
    y = rng.integers(2, size=60)[groups]
    x = np.eye(60, dtype=np.float32)[groups][None] + 0.01 * rng.standard_normal((1, 720, 60))
    given, choice = (x, y, x, y), {"penalties": (0.3, 0.003), "dev": 0.3}
    assert probe_layers(*given, **choice).l1[0] == 0.003
    within = [probe_layers(*given, groups=groups, **choice, seed=s).l1[0] for s in range(3)]
    assert within.count(0.3) >= 2


def test_control_labels_are_a_function_of_the_type_and_the_seed():
    words = ["the", "cat", "sat", "the", "mat"]
    got = control_labels(words, [3, 1, 1], seed=4)
    assert got[0] == got[3] and control_labels(["mat"], [3, 1, 1], seed=4)[0] == got[4]
    assert np.array_equal(got[::-1], control_labels(words[::-1], [3, 1, 1], seed=4))
    many = [f"w{i}" for i in range(4000)]
    labels = control_labels(many, [60, 30, 0, 10], seed=0)
    assert np.allclose(np.bincount(labels, minlength=4) / 4000, [0.6, 0.3, 0, 0.1], atol=0.03)
    assert (labels != control_labels(many, [60, 30, 0, 10], seed=1)).mean() > 0.4
    # Known once and for all: another process, machine or version may not redraw them.
    known = control_labels(["the", "cat", "sat", "mat", "on", "a"], [1] * 4)
    assert known.tolist() == [1, 2, 2, 1, 0, 0]


def test_random_labels_per_word_type_have_no_selectivity_and_context_has():
    rng = np.random.default_rng(0)
    # Activations that carry the word's identity, and one feature that carries its context.
    index, context = rng.integers(250, size=4500), rng.choice([-1, 1], size=4500)
    x = rng.standard_normal((250, 301))[index] + 0.3 * rng.standard_normal((4500, 301))
    x[:, 300] = 2 * context + 0.3 * rng.standard_normal(4500)
    names, n = np.array([f"w{i}" for i in index]), 3000

    def probed(labels, *penalties):
        given = x[None, :n], labels[:n], x[None, n:], labels[n:], names[:n], names[n:]
        return probe_layers(*given, penalties=penalties).iloc[0]

    got = probed(control_labels(names, [5, 3, 2], seed=100), 0.03, 0.01, 0.003)
    assert got.accuracy > got.majority + 0.3, "the probe must be able to learn words by heart"
    assert got.accuracy - got.control_accuracy == pytest.approx(got.selectivity, abs=1e-9)
    assert abs(got.selectivity) < 0.02
    got = probed(context, 0.03, 0.01)
    assert got.accuracy > 0.99 and got.control_accuracy < 0.97 and got.selectivity > 0.02


def test_the_planted_layer_is_the_best_layer_whatever_the_labels_are_called():
    x, y = planted(words=700, layers=4, layer=2)
    names = NAMES[y]
    got = probe_layers(x[:, :500], names[:500], x[:, 500:], names[500:])
    assert got.accuracy.idxmax() == got.macro_f1.idxmax() == 2 == got.layer[2]
    assert got.accuracy[2] > got.majority[2] + 0.2 and got.converged.all()
    counts = got[["n_train", "n_test", "n_classes"]]
    assert (counts == [500, 200, 3]).all(axis=None)
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


def test_true_and_one_are_the_same_label_and_lists_are_arrays():
    x, y = planted(classes=2, layers=1, layer=0, words=60)
    want = probe_layers(x, y, x, y, penalties=[0.01])
    for train, test in ((y, y > 0), (y > 0, y)):
        same = probe_layers(x.tolist(), train.tolist(), x, test, penalties=[0.01])
        pd.testing.assert_frame_equal(same, want)


def test_the_table_is_scikit_learns_and_a_label_unseen_in_training_an_error():
    from sklearn.metrics import f1_score

    x, y = planted(layers=1, layer=0)
    test = np.where(np.arange(200) < 50, 9, y[400:])
    got = probe_layers(x[:, :400], y[:400], x[:, 400:], test, penalties=[0.01]).iloc[0]
    found, _ = fit(x[0, :400], y[:400], 0.01)
    said = found.answers(x[0, 400:])
    assert got.accuracy == pytest.approx((said == test).mean()) and got.n_classes == 3
    assert got.macro_f1 == pytest.approx(f1_score(test, said, average="macro"))
    assert got.nonzero == np.count_nonzero(found.weight)


X, Y = planted(words=60)
NAN = X.copy()
NAN[1, 7, 3] = np.nan


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activations": X[0]}, r"activations must be numbers .*60, 12"),
        ({"activations": [[[1.0, 2.0], [3.0]]]}, r"activations must be numbers .*got \(0,\)"),
        ({"test_activations": X[:, :20, :5]}, r"must be numbers \(3, words, 12\), got .*5"),
        ({"labels": Y[:50]}, "labels must be one value a word: 60, got 50"),
        ({"test_labels": Y}, "test labels must be one value a word: 20"),
        ({"test_words": None}, "need both words and test_words"),
        ({"groups": [0] * 59}, "groups must be one value a word: 60, got 59"),
        ({"groups": [0] * 60}, "need at least 2 groups .* got 1"),
        ({"labels": ["NN"] * 60, "test_labels": ["NN"] * 20}, "every label is 'NN'"),
        ({"labels": Y * 1.0}, "strings or integers, got float64"),
        ({"labels": None}, "labels must be one value a word: 60, got 1"),
        ({"test_labels": ["NN", None] * 10}, "test labels lack the value of word 1"),
        ({"seed": 1.5}, "seed 1.5 is not a whole number from 0 up"),
        ({"labels": Y.astype(str)}, "but test labels int64"),
        ({"activations": NAN}, "activations of layer 1 hold values not finite"),
        ({"test_activations": NAN[:, :20]}, "test activations of layer 1 hold"),
        ({"activations": X * 1e30}, "too large: their squares are not finite"),
        ({"activations": X.astype(str)}, "must be numbers .* of <U"),
        ({"penalties": []}, "at least one penalty"),
        ({"penalties": [0.1, 0.0]}, "penalty 0.0: need l1 of at least 0 and l2 above 0"),
        ({"penalties": [(0.1, 0.1, 0.1)]}, "as a pair"),
        ({"dev": 1.0}, "cannot hold out 1.0"),
        ({"tolerance": 0.0}, "a tolerance above 0"),
        ({"max_iterations": -1}, "max_iterations of at least 1"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
    ],
)
def test_bad_input_says_what_is_wrong(changes, message):
    good = {
        "activations": X, "labels": Y, "test_activations": X[:, :20], "test_labels": Y[:20],
        "words": Y.astype(str), "test_words": Y[:20].astype(str),
    }  # fmt: skip
    with pytest.raises(HealingError, match=message) as caught:
        probe_layers(**{**good, **changes})
    assert "\n" not in str(caught.value)
