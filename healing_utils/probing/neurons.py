"""Single neurons: which of them carry a property, and does the model use them?

A *neuron* is one unit of one hidden state, written (layer, index); layer 0 is the embeddings. That
a probe reads a property from neurons shows that it is there, not that the model uses it (Antverg
and Belinkov 2022): for that there is `ablate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from healing_utils.base.errors import HealingError, choose
from healing_utils.healing.encoders import encoder_layers
from healing_utils.healing.training import evaluate
from healing_utils.probing.probes import Probes, column, fit_probes, held_out, shape_of

Neuron = tuple[int, int]

METHODS = ("lca", "probeless", "gaussian")
WHICH = ("top", "random", "bottom")
BLOCK = 64  # words whose densities under every class fit into a processor's cache
# Of the probes here. With the ridge ten times the lasso they converge several times as fast at the
# same accuracy (CoNLL-2000 chunks, MiniLM-L6).
L1, L2 = 1e-3, 1e-2
# Of a probe whose weights are ranked. An accuracy stands still before the order of weights does:
# over the model organism's 448 neurons the minimal set still moved between 1e-3 and 1e-4.
TOLERANCE = 1e-4


# --- Words and their neurons ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Words:
    """Activations (layers, words, hidden) and class ids (words,); those at `rows` are meant."""

    activations: np.ndarray
    ids: np.ndarray
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.ids[self.rows]

    @property
    def neurons(self) -> list[Neuron]:
        layers, _, hidden = self.activations.shape
        return [(i, j) for i in range(layers) for j in range(hidden)]

    def features(self, neurons: Sequence[Neuron]) -> np.ndarray:
        """The activations of `neurons`, in their order, as one probe's: (1, words, neurons). Of a
        memory map only what is asked for is held."""
        places = np.asarray(neurons)
        features = np.empty((1, len(self.rows), len(places)), dtype=self.activations.dtype)
        for layer in np.unique(places[:, 0]):
            at = np.flatnonzero(places[:, 0] == layer)
            features[0][:, at] = self.activations[layer][self.rows[:, None], places[at, 1]]
        return features


def _words(
    activations: Any, labels: Sequence[Any], names: np.ndarray, trained: _Words | None = None
) -> _Words:
    """Labels become ids of the classes `names`; those of test words, for a probe `trained` on
    others, may be none of them: -1."""
    what, activations = "" if trained is None else "test ", np.asanyarray(activations)
    like = None if trained is None else trained.activations.shape
    words = shape_of(activations, f"{what}activations", like)[1]
    labels = column(labels, words, f"{what}labels")
    for number, layer in enumerate(activations):
        if not np.isfinite(layer).all():
            raise HealingError(f"{what}activations of layer {number} hold values not finite")
    number = {name: i for i, name in enumerate(names.tolist())}
    ids = np.array([number.get(label, -1) for label in labels.tolist()])
    if trained is None and (ids < 0).any():
        known = ", ".join(map(str, names[:10]))
        raise HealingError(f"label {labels[ids < 0][0]!s} is not among the classes: {known}")
    if trained is None and len(np.unique(ids)) < 2:
        raise HealingError(f"all words have the label {labels[0]!s}: nothing to tell apart")
    return _Words(activations, ids, np.arange(words))


def _checked_neurons(neurons: Iterable[Neuron], layers: int, hidden: int) -> list[Neuron]:
    neurons = [(int(layer), int(index)) for layer, index in neurons]
    for layer, index in neurons:
        if not (0 <= layer < layers and 0 <= index < hidden):
            there = f"layers from 0 (the embeddings) to {layers - 1}, units from 0 to {hidden - 1}"
            raise HealingError(f"there is no neuron {(layer, index)}: {there}")
    if len(set(neurons)) < len(neurons):
        raise HealingError("a neuron is named twice")
    return neurons


def _fit(
    words: _Words, neurons: Sequence[Neuron], fitting: dict[str, Any]
) -> tuple[Probes, Callable[[_Words], float]]:
    """One probe over `neurons`, and its accuracy on other words."""
    # A split may hold no word of a class, whose free bias would have no optimum.
    present, dense = np.unique(words.labels, return_inverse=True)
    probe = fit_probes(words.features(neurons), dense, len(present), **fitting)

    def accuracy(test: _Words) -> float:
        answers = present[probe.predict(test.features(neurons))[0]]
        return float(np.mean(answers == test.labels))

    return probe, accuracy


def _accuracy(
    train: _Words, test: _Words, neurons: Sequence[Neuron], fitting: dict[str, Any]
) -> float:
    """Of a probe on these neurons; without any it answers the most frequent training label."""
    if not len(neurons):
        return float(np.mean(test.labels == np.bincount(train.labels).argmax()))
    # In the order of the layers, so that a set of neurons has one accuracy however it was ranked.
    neurons = sorted(neurons)
    return _fit(train, neurons, fitting)[1](test)


# --- Ranking --------------------------------------------------------------------------------------


def rank_neurons(
    activations: np.ndarray, labels: Sequence[Any], *, method: str = "lca", l1: float = L1,
    l2: float = L2, seed: int = 0, classes: Sequence[Any] | None = None,
    device: str | torch.device | None = None, **fitting: Any,
) -> list[Neuron]:  # fmt: skip
    """All neurons, strongest first, each once; the same list on every run.

    `activations` (layers, words, hidden), `labels` (words,); `classes` are the distinct labels
    unless given. The methods are those that Antverg and Belinkov (2022) compare:

    - ``lca``, Linguistic Correlation Analysis (Dalvi et al. 2019): one elastic-net probe
      (`fit_probes`, to `TOLERANCE` unless `fitting` says otherwise) over the neurons of all layers,
      ranked by `rank_weights`, which alone needs the `seed`.
    - ``probeless`` (Antverg and Belinkov 2022): the sum over pairs of classes of the absolute
      difference of the class means, over the neuron's standard deviation.
    - ``gaussian``: the first step of the greedy search of Torroba Hennigen et al. (2020): the mean
      over the words of log p(label | neuron) - log p(label), in nats, the neurons of a class being
      Gaussian. As a prior that keeps rare classes from shrinking to a point the variance over all
      words counts as one more word of every class.

    The last two look at each neuron by itself: two copies of a signal (the residual stream makes
    one in every layer) stand side by side, where the elastic net shares or drops. Their ties fall
    by (layer, index). Raises HealingError for shapes that do not match, values that are not finite,
    fewer than two classes and a label outside `classes`.
    """
    names = np.unique(np.asarray(labels)) if classes is None else np.asarray(classes)
    fitting = {"l1": l1, "l2": l2, "device": device, **fitting}
    return _rank(_words(activations, labels, names), method, seed, fitting)


def _rank(
    words: _Words, method: str, seed: int, fitting: dict[str, Any], probe: Probes | None = None
) -> list[Neuron]:
    """`rank_neurons`, with the probe over all of them where there is one."""
    choose(method, METHODS, "ranking method")
    if method == "lca":
        if probe is None:
            probe, _ = _fit(words, words.neurons, {"tolerance": TOLERANCE, **fitting})
        order = rank_weights(probe.weight[0], seed=seed)
    else:
        score = probeless if method == "probeless" else gaussian
        scores = [score(layer[words.rows], words.labels) for layer in words.activations]
        order = np.argsort(-np.concatenate(scores), kind="stable")
    neurons = words.neurons
    return [neurons[feature] for feature in order]


def rank_weights(weight: np.ndarray, seed: int = 0) -> np.ndarray:
    """The features of a linear probe, strongest first: a permutation of them, (features,).

    `weight` (classes, features). A class's *mass* is the sum of its absolute weights; its top set
    at share p is the smallest set of its heaviest features that holds more than p of it. So a
    feature *enters* at the share that strictly heavier ones hold. p is swept from 0 to 1 (Dalvi et
    al. 2019 sweep it in steps; this is the limit of small ones), and a feature's place is the
    smallest share at which it enters for any class that has weights. Ties (at 0 there are as many
    as classes) fall by the largest share of a class's mass that the feature itself holds, then by
    position. Features that are zero in every class come last, in a random order drawn from `seed`:
    by position the bottom of the ranking would be one layer.
    """
    weight = np.abs(np.asarray(weight, dtype=np.float64))
    features = weight.shape[1]
    enters, largest = np.ones(features), np.zeros(features)
    for own in weight[weight.any(axis=1)]:
        values, counts = np.unique(own, return_counts=True)  # ascending
        held = np.cumsum((values * counts)[::-1])[::-1]  # mass of a value and those above it
        heavier = np.append(held[1:], 0.0) / held[0]
        enters = np.minimum(enters, heavier[np.searchsorted(values, own)])
        largest = np.maximum(largest, own / held[0])
    zero = ~weight.any(axis=0)
    shuffled = np.random.default_rng(seed).permutation(features)
    last = np.where(zero, shuffled, np.arange(features))
    return np.lexsort((last, -largest, enters, zero))


def probeless(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Σ over class pairs of |difference of means| / σ, of one layer's neurons, (hidden,)."""
    means, _, variance, _ = _moments(x, y)
    # Over sorted means, the i-th of C is added i times and subtracted C - 1 - i times.
    times = 2 * np.arange(len(means)) - len(means) + 1
    spread = times @ np.sort(means, axis=0)
    return np.divide(spread, np.sqrt(variance), out=np.zeros_like(spread), where=variance > 0)


def gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean log p(label | neuron) - log p(label) in nats, of one layer's neurons, (hidden,)."""
    means, within, variance, counts = _moments(x, y)
    changes = variance > 0
    sigma = np.sqrt(np.where(changes, variance, 1.0))
    shrunk = (counts * within / sigma**2 + 1) / (counts + 1)  # in units of σ², so at least 1 / n
    # In units of σ around the mean: float32 is enough, and twice as fast.
    standard = torch.from_numpy(((x - x.mean(axis=0, dtype=np.float64)) / sigma).astype(np.float32))
    prior = torch.from_numpy(counts / counts.sum()).float()
    mean = torch.from_numpy(means / sigma).float()[:, None]  # (classes, 1, hidden)
    width = torch.from_numpy(np.sqrt(2 * shrunk)).float()[:, None]
    constant = (prior.log() - torch.from_numpy(np.log(shrunk)).float() / 2)[:, None]
    label = torch.from_numpy(np.unique(y, return_inverse=True)[1])
    gain = torch.zeros(x.shape[1], dtype=torch.float64)
    for some, own in zip(standard.split(BLOCK), label.split(BLOCK), strict=True):
        joint = constant - ((some - mean) / width).square()  # log p(class, neuron) + a constant
        chosen = joint[own, torch.arange(len(own))] - prior[own].log()
        gain += (chosen - joint.logsumexp(dim=0)).sum(dim=0, dtype=torch.float64)
    return np.where(changes, gain.numpy() / len(y), 0.0)


def _moments(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of `x` (words, hidden): class means, relative to that of all words, and variances, each
    (classes, hidden), the variance over all words (hidden,), exactly 0 for a neuron that never
    changes, and class sizes (classes, 1). Classes without words are left out."""
    x = np.asarray(x, dtype=np.float64)
    x = x - x.mean(axis=0)
    member = (y[None, :] == np.unique(y)[:, None]).astype(np.float64)  # (classes, words)
    counts = member.sum(axis=1, keepdims=True)
    means = member @ x / counts
    within = np.maximum(member @ x**2 / counts - means**2, 0.0)
    changes = x.max(axis=0) > x.min(axis=0)
    return means * changes, within * changes, x.var(axis=0) * changes, counts


def ranking_agreement(
    rankings: Mapping[str, Sequence[Neuron]], sizes: Sequence[int] = (10, 100)
) -> pd.DataFrame:
    """How alike rankings of the same neurons are: one row a pair of them.

    Columns: ``first``, ``second``; ``spearman``, over all neurons, which the random order of those
    that an elastic net sets to zero draws towards 0; for every k of `sizes` below the number of
    neurons ``overlap_k``, the share of one's top k in the other's (chance: k / neurons).
    """
    from scipy.stats import spearmanr

    one, common = next((name, sorted(ranking)) for name, ranking in rankings.items())
    places = {}
    for name, ranking in rankings.items():
        at = {tuple(neuron): i for i, neuron in enumerate(ranking)}
        if sorted(ranking) != common or len(at) < len(common):
            raise HealingError(f"ranking {name!r} does not hold each neuron of {one!r} once")
        places[name] = np.array([at[neuron] for neuron in common])
    rows = []
    for first, second in combinations(rankings, 2):
        spearman = float(spearmanr(places[first], places[second]).statistic)
        row: dict[str, Any] = {"first": first, "second": second, "spearman": spearman}
        for k in sizes:
            if 0 < k < len(common):
                shared = (places[first] < k) & (places[second] < k)
                row[f"overlap_{k}"] = float(shared.sum() / k)
        rows.append(row)
    return pd.DataFrame(rows)


# --- How many are enough --------------------------------------------------------------------------


@dataclass(frozen=True)
class MinimalSet:
    """The smallest top of a ranking that does nearly as well as all neurons."""

    neurons: list[Neuron] = field(repr=False)  # the k strongest
    k: int
    delta: float  # accuracy that may be lost on the dev split
    dev_full: float  # accuracy of the probe on all neurons
    dev_minimal: float  # of the one retrained on the k
    test_full: float
    test_minimal: float
    by_layer: list[int]  # how many of the k each layer holds, embeddings first
    ranking: list[Neuron] = field(repr=False)  # all neurons
    ranked_on: np.ndarray = field(repr=False, compare=False)  # indices of its words, (words,)
    searched: list[tuple[int, float]] = field(repr=False)  # (k, dev accuracy), as tried


def minimal_neurons(
    activations: np.ndarray, labels: Sequence[Any], test_activations: np.ndarray,
    test_labels: Sequence[Any], *, delta: float = 0.01, groups: Sequence[Any] | None = None,
    dev_share: float = 0.2, method: str = "lca", l1: float = L1, l2: float = L2, seed: int = 0,
    device: str | torch.device | None = None, **fitting: Any,
) -> MinimalSet:  # fmt: skip
    """The smallest top-k whose retrained probe stays within `delta` of the probe on all neurons.

    After Durrani et al. (2021). A `dev_share` of the `groups` (words,), such as sentences, is drawn
    by `seed` and held out whole: it judges the probes of the search, which like the ranking see the
    other words only. The search goes from k = 0 (the most frequent label) over 1, 2, 4, ... to all
    neurons until one is within `delta`, in absolute accuracy, then bisects between it and the last
    that was not. Accuracy need not rise with k, so between two sizes that were tried a smaller one
    may hide. Then probes on all neurons and on the k are trained on all words, dev included, and
    scored once on test, where labels that never occur in training count as errors. Raises
    HealingError as `rank_neurons` does, and where there is nothing to hold out.
    """
    names = np.unique(np.asarray(labels))
    words = _words(activations, labels, names)
    test = _words(test_activations, test_labels, names, words)
    if not 0 <= delta < 1:
        raise HealingError(f"delta {delta!r} is not an accuracy to lose: from 0 to below 1")
    held = held_out(column(groups, len(words.ids), "groups"), dev_share, seed)
    inner, dev = (replace(words, rows=np.flatnonzero(rows)) for rows in (~held, held))
    if len(np.unique(inner.labels)) < 2:
        raise HealingError("what is left to train on after holding out words has one label only")
    fitting = {"l1": l1, "l2": l2, "device": device, **fitting}
    probe, accuracy = _fit(inner, words.neurons, {"tolerance": TOLERANCE, **fitting})
    full = accuracy(dev)
    ranking = _rank(inner, method, seed, fitting, probe)
    searched = {len(ranking): full}

    def enough(k: int) -> bool:
        if k not in searched:
            searched[k] = _accuracy(inner, dev, ranking[:k], fitting)
        return searched[k] >= full - delta - 1e-9  # rounding is no loss of accuracy

    grid = [0, *(2**i for i in range(len(ranking).bit_length()) if 2**i < len(ranking))]
    grid.append(len(ranking))
    high = next(i for i, k in enumerate(grid) if enough(k))
    low, k = (grid[high - 1] if high else -1), grid[high]
    while k - low > 1:
        middle = (low + k) // 2
        low, k = (low, middle) if enough(middle) else (middle, k)
    return MinimalSet(
        neurons=ranking[:k], k=k, delta=delta, dev_full=full, dev_minimal=searched[k],
        test_full=_accuracy(words, test, ranking, fitting),
        test_minimal=_accuracy(words, test, ranking[:k], fitting),
        by_layer=np.bincount([n[0] for n in ranking[:k]], minlength=len(activations)).tolist(),
        ranking=ranking, ranked_on=inner.rows, searched=list(searched.items()),
    )  # fmt: skip


def accuracy_curve(
    activations: np.ndarray, labels: Sequence[Any], test_activations: np.ndarray,
    test_labels: Sequence[Any], ranking: Sequence[Neuron], sizes: Iterable[int], *,
    l1: float = L1, l2: float = L2, seed: int = 0, device: str | torch.device | None = None,
    **fitting: Any,
) -> pd.DataFrame:  # fmt: skip
    """Test accuracy of a probe retrained on k neurons: the first, the last, and k at random.

    Columns ``k which accuracy``, `which` one of `WHICH`. The random neurons depend on `seed` only,
    not on the order of the ranking, and those of a smaller k are among those of a larger one.
    """
    names = np.unique(np.asarray(labels))
    words = _words(activations, labels, names)
    test = _words(test_activations, test_labels, names, words)
    ranking = _checked_neurons(ranking, len(words.activations), words.activations.shape[2])
    fitting = {"l1": l1, "l2": l2, "device": device, **fitting}
    known: dict[tuple[Neuron, ...], float] = {}  # all neurons are one probe, whichever way taken
    rows = []
    for k, which, neurons in picks(ranking, sizes, seed):
        key = tuple(sorted(neurons))
        if key not in known:
            known[key] = _accuracy(words, test, key, fitting)
        rows.append({"k": k, "which": which, "accuracy": known[key]})
    return pd.DataFrame(rows, columns=["k", "which", "accuracy"])


def center_of_mass(by_layer: Sequence[float]) -> float:
    """Mean layer of neurons, counted `by_layer` (layers + 1,), as a share of the depth: 0 the
    embeddings, 1 the last layer; NaN for an empty set, and for a single layer."""
    counts = np.asarray(by_layer, dtype=np.float64)
    if len(counts) < 2 or counts.sum() == 0:
        return float("nan")
    return float(counts @ np.linspace(0, 1, len(counts)) / counts.sum())


def picks(
    ranking: Sequence[Neuron], sizes: Iterable[int], seed: int
) -> Iterator[tuple[int, str, list[Neuron]]]:
    """(k, which, the neurons) for every k of `sizes` and every one of `WHICH`."""
    ranking = list(ranking)
    shuffled = sorted(ranking)
    order = np.random.default_rng(seed).permutation(len(shuffled))
    for k in sizes:
        if not 0 <= k <= len(ranking):
            raise HealingError(f"cannot take {k} of {len(ranking)} ranked neurons")
        yield k, "top", ranking[:k]
        yield k, "random", [shuffled[i] for i in order[:k]]
        yield k, "bottom", ranking[len(ranking) - k :]


# --- Does the model use them? ---------------------------------------------------------------------


@contextlib.contextmanager
def ablate(
    model: nn.Module, neurons: Iterable[Neuron], values: np.ndarray | None = None
) -> Iterator[None]:
    """Within this context every forward pass of `model` has these neurons at zero, or at `values`.

    `values` (layers + 1, hidden), for instance each neuron's mean activation, are read at `neurons`
    only. Works on every encoder of `encoder_layers`, with or without a task head, and in training.

    Neuron (i, j) is unit j of ``hidden_states[i]`` as the model reports them: of what encoder layer
    i (from 0) takes in, and for the last i of what leaves the stack, in ModernBERT by its final
    norm. Whoever else reads that state sees it ablated too. Raises HealingError for a neuron that
    the model does not have and values of another shape.
    """
    layers = encoder_layers(model)
    shape = (len(layers) + 1, model.config.hidden_size)
    values = np.zeros(shape, np.float32) if values is None else np.asarray(values, np.float32)
    if values.shape != shape:
        raise HealingError(f"values to ablate to have shape {values.shape}; need {shape}")
    units: dict[int, list[int]] = {}
    for layer, index in _checked_neurons(neurons, *shape):
        units.setdefault(layer, []).append(index)
    with contextlib.ExitStack() as stack:
        for layer, indices in units.items():
            index, value = torch.tensor(indices), torch.from_numpy(values[layer][indices])
            if layer < len(layers):
                handles = _ablate_input(layers[layer], index, value)
            else:
                handles = _ablate_output(model, layers, index, value)
            for handle in handles:
                stack.callback(handle.remove)
        yield


def _put(hidden: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    """Units `index` of the last axis become `value`; batch and length may stand in any order."""
    hidden[..., index.to(hidden.device)] = value.to(hidden)


def _ablate_input(layer: nn.Module, index: torch.Tensor, value: torch.Tensor) -> list[Any]:
    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        _put(args[0] if args else kwargs["hidden_states"], index, value)

    return [layer.register_forward_pre_hook(before, with_kwargs=True)]


def _ablate_output(
    model: nn.Module, layers: list[nn.Module], index: torch.Tensor, value: torch.Tensor
) -> list[Any]:
    """Ablate what leaves the stack: the last layer's output, or what a final norm makes of it.

    That a norm outside the layers is a final one (DeBERTa's is not) shows when it is handed that
    very tensor: it gets the units back and is ablated behind.
    """
    last: dict[str, torch.Tensor] = {}

    def after_layer(_: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        last.update(hidden=hidden, units=hidden[..., index.to(hidden.device)].clone())
        _put(hidden, index, value)

    def before_norm(_: nn.Module, args: tuple) -> None:
        if args and args[0] is last.get("hidden"):
            _put(args[0], index, last["units"])

    def after_norm(_: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if args and args[0] is last.get("hidden"):
            _put(output, index, value)

    inside = {module for layer in layers for module in layer.modules()}
    # A head may begin with a norm of its own, which must see the ablated state.
    outside = [m for m in getattr(model, "base_model", model).modules() if m not in inside]
    norms = [module for module in outside if "norm" in type(module).__name__.lower()]
    return [
        layers[-1].register_forward_hook(after_layer, prepend=True),
        *(norm.register_forward_pre_hook(before_norm) for norm in norms),
        *(norm.register_forward_hook(after_norm, prepend=True) for norm in norms),
    ]


def ablation_scores(
    model: nn.Module, data: Any, ranking: Sequence[Neuron], sizes: Iterable[int], *,
    values: np.ndarray | None = None, seed: int = 0, **settings: Any,
) -> pd.DataFrame:  # fmt: skip
    """The task's scores with the first, the last, and k random neurons ablated.

    Columns ``k which``, as in `accuracy_curve`, and the scores of ``evaluate(model, data,
    **settings)``; `values` as in `ablate`.
    """
    rows = []
    for k, which, neurons in picks(ranking, sizes, seed):
        with ablate(model, neurons, values):
            rows.append({"k": k, "which": which, **evaluate(model, data, **settings)})
    return pd.DataFrame(rows)
