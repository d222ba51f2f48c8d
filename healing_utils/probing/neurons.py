"""Single neurons: which of them carry a property, and does the model use them?

A *neuron* is one unit of one hidden state, written (layer, index); layer 0 is the embeddings, layer
i the output of the i-th encoder layer. A probe that reads a property from neurons shows that it is
there, not that the model uses it (Antverg and Belinkov 2022): for that there is `ablate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from healing_utils.base.errors import HealingError, choose
from healing_utils.healing import training
from healing_utils.healing.encoders import encoder_layers
from healing_utils.probing.probes import Probes, fit_probes

Neuron = tuple[int, int]

METHODS = ("lca", "probeless", "gaussian")
WHICH = ("top", "random", "bottom")
BLOCK = 64  # words at a time whose densities under every class fit into a processor's cache
# Of the probes here; `fit_probes` says what they multiply. With the ridge ten times the lasso they
# converge several times as fast at the same accuracy (CoNLL-2000 chunks, MiniLM-L6).
L1, L2 = 1e-3, 1e-2
# Of a probe whose weights are ranked. An accuracy stands still before the order of weights does:
# over the model organism's 448 neurons the minimal set still moved between 1e-3 and 1e-4.
TOLERANCE = 1e-4


# --- Ranking --------------------------------------------------------------------------------------


def rank_neurons(
    activations: np.ndarray,
    labels: Sequence[Any],
    *,
    method: str = "lca",
    l1: float = L1,
    l2: float = L2,
    seed: int = 0,
    classes: Sequence[Any] | None = None,
    device: str | torch.device | None = None,
    **fitting: Any,
) -> list[Neuron]:
    """All neurons, strongest first, each once; the same list on every run.

    `activations` (layers, words, hidden), `labels` (words,); `classes` are the distinct labels
    unless given. Methods:

    - ``lca``, Linguistic Correlation Analysis (Dalvi et al. 2019): one elastic-net probe
      (`probes.fit_probes` with `l1`, `l2`, and to `TOLERANCE` unless `fitting` says
      otherwise) over the standardised neurons of all layers, ranked by `rank_weights`, where the
      definition stands. Only here `seed` matters: it orders the neurons whose weight is zero in
      every class.
    - ``probeless`` (Antverg and Belinkov 2022): the sum over pairs of classes of the absolute
      difference of the class means, a rare class weighing as much as a frequent one. The paper
      ranks within one layer; here layers of different scale are ranked together, so every neuron
      is divided by its standard deviation.
    - ``gaussian``: Torroba Hennigen et al. (2020) model the neurons of a class as a Gaussian, which
      gives p(class | neurons) by Bayes' rule, and select greedily by the likelihood of the labels,
      refitting for every neuron chosen. This is the first step of that search, for every neuron, so
      a univariate ranking: the mean over the words of log p(label | neuron) - log p(label), in
      nats, an estimate of their mutual information. As in the paper a prior keeps rare classes
      from shrinking to a point: here the variance over all words counts as one more word of every
      class.

    The three are those that Antverg and Belinkov (2022) compare. The last two look at each neuron
    by itself, so they do not inherit what a trained probe prefers, and rank two copies of a signal
    (the residual stream makes one in every layer) side by side, where the elastic net shares or
    drops. Their ties fall by (layer, index). (Mu and Andreas's 2020 intersection over union was
    left out: it takes one class at a time and a threshold on every neuron.)

    Raises HealingError for shapes that do not match, values that are not finite, fewer than two
    classes, a label outside `classes` and an unknown method.
    """
    activations, y, _ = _checked(activations, labels, classes)
    return _rank(activations, y, method, seed, {"l1": l1, "l2": l2, "device": device, **fitting})


def _rank(
    activations: np.ndarray,
    y: np.ndarray,
    method: str,
    seed: int,
    penalties: dict[str, Any],
    rows: np.ndarray | None = None,
    probe: Probes | None = None,
) -> list[Neuron]:
    """`rank_neurons` on class ids, on some words only, and with the probe where there is one."""
    choose(method, METHODS, "ranking method")
    everything = _every_neuron(activations)
    rows = np.arange(len(y)) if rows is None else rows
    if method == "lca":
        probe = probe or _fit_to_rank(activations, y, penalties, rows)[0]
        order = rank_weights(probe.weight[0], seed=seed)
    else:
        score = _probeless if method == "probeless" else _gaussian
        scores = np.concatenate([score(layer[rows], y[rows]) for layer in activations])
        order = np.argsort(-scores, kind="stable")
    return [everything[feature] for feature in order]


def _every_neuron(activations: np.ndarray) -> list[Neuron]:
    return [(i, j) for i in range(len(activations)) for j in range(activations.shape[2])]


def rank_weights(weight: np.ndarray, seed: int = 0) -> np.ndarray:
    """The features of a linear probe, strongest first: a permutation of them, (features,).

    `weight` is (classes, features), in units in which features can be compared. The definition:

    1. A class's *mass* is the sum of its absolute weights. Its top set at share p is the smallest
       set of its heaviest features that holds more than p of its mass. So a feature *enters* at
       the share of mass that strictly heavier features hold: a class's heaviest enters at 0, and
       features of equal weight enter together.
    2. p is swept from 0 to 1 (Dalvi et al. 2019 sweep it in steps; this is the limit of small
       steps), and a feature's place is the smallest share at which it enters for any class.
    3. Ties (at 0 there are as many as classes) fall by the larger share of mass that the feature
       itself holds, in the class where that is largest, then by position: (layer, index).
    4. Features that are zero in every class come last, in a random order drawn from `seed`. They
       carry no order of their own, and by position the bottom of the ranking would be one layer.

    A class without any weight has no say.
    """
    weight = np.abs(np.asarray(weight, dtype=np.float64))
    if weight.ndim != 2 or not np.isfinite(weight).all():
        raise HealingError(
            f"weights to rank must be finite and (classes, features), got shape {weight.shape}"
        )
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


def _probeless(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Σ over class pairs of |difference of means| / σ, of one layer's neurons, (hidden,)."""
    means, _, variance, _ = _moments(x, y)
    # Over sorted means, the i-th of C is added i times and subtracted C - 1 - i times.
    times = 2 * np.arange(len(means)) - len(means) + 1
    spread = times @ np.sort(means, axis=0)
    return np.divide(spread, np.sqrt(variance), out=np.zeros_like(spread), where=variance > 0)


def _gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
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
    """Of `x` (words, hidden): class means and variances, each (classes, hidden), the variance over
    all words (hidden,), exactly 0 for a neuron that never changes, and class sizes (classes, 1).
    Classes without words are left out; means are relative to the mean over all words."""
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

    Columns: ``first``, ``second``; ``spearman``, the rank correlation over all neurons; for every k
    of `sizes` below the number of neurons ``overlap_k``, the share of the first's top k that the
    second's top k holds too (chance: k / neurons). Neurons that an elastic net sets to zero are in
    random order, which draws the correlation towards 0; the overlap of tops is free of that.
    """
    from scipy.stats import spearmanr

    if len(rankings) < 2:
        raise HealingError(f"agreement needs at least two rankings, got {len(rankings)}")
    names = list(rankings)
    common = sorted(rankings[names[0]])
    for name in names:
        if sorted(rankings[name]) != common or len(set(common)) < len(common):
            raise HealingError(f"ranking {name!r} does not hold each neuron of {names[0]!r} once")
    places = {name: np.argsort(_positions(rankings[name], common)) for name in names}
    rows = []
    for first, second in combinations(names, 2):
        row: dict[str, Any] = {"first": first, "second": second}
        row["spearman"] = float(spearmanr(places[first], places[second]).statistic)
        for k in sizes:
            if 0 < k < len(common):
                shared = (places[first] < k) & (places[second] < k)
                row[f"overlap_{k}"] = float(shared.sum() / k)
        rows.append(row)
    return pd.DataFrame(rows)


def _positions(ranking: Sequence[Neuron], common: Sequence[Neuron]) -> np.ndarray:
    where = {neuron: i for i, neuron in enumerate(common)}
    return np.array([where[tuple(neuron)] for neuron in ranking])


# --- How many are enough --------------------------------------------------------------------------


@dataclass(frozen=True)
class MinimalSet:
    """The smallest top of a ranking that does nearly as well as all neurons.

    `neurons`: the `k` strongest; `delta`: accuracy that may be lost on the dev split; `dev_full`,
    `dev_minimal`, `test_full`, `test_minimal`: accuracy of the probe on all neurons and of the one
    retrained on the `k`; `by_layer`: how many of the `k` each layer holds, embeddings first;
    `ranking`: all neurons; `ranked_on`: indices of the words that it was made from, (words,);
    `searched`: (k, dev accuracy) in the order in which they were tried.
    """

    neurons: list[Neuron] = field(repr=False)
    k: int
    delta: float
    dev_full: float
    dev_minimal: float
    test_full: float
    test_minimal: float
    by_layer: list[int]
    ranking: list[Neuron] = field(repr=False)
    ranked_on: np.ndarray = field(repr=False, compare=False)
    searched: list[tuple[int, float]] = field(repr=False)


def minimal_neurons(
    activations: np.ndarray,
    labels: Sequence[Any],
    test_activations: np.ndarray,
    test_labels: Sequence[Any],
    *,
    delta: float = 0.01,
    groups: Sequence[Any] | None = None,
    dev_share: float = 0.2,
    method: str = "lca",
    l1: float = L1,
    l2: float = L2,
    seed: int = 0,
    device: str | torch.device | None = None,
    **fitting: Any,
) -> MinimalSet:
    """The smallest top-k whose retrained probe stays within `delta` of the probe on all neurons.

    Activations are (layers, words, hidden), labels (words,); `delta` is in absolute accuracy.
    After Durrani et al. (2021). `dev_share` of the groups (sentence ids, (words,); without them
    each word is its own) is drawn by `seed` and held out whole; the ranking and every probe of the
    search see the other words only, and the dev split judges them.

    The search: k = 0 (the most frequent label), then 1, 2, 4, ... and all neurons, upwards, until
    one is within `delta`; then bisection between it and the last that was not. Accuracy need not
    rise with k. So the k returned is always one that was itself tried and found within `delta`;
    every k of the grid below it was tried and is not; only between two neighbours of the grid a
    smaller one may hide, where accuracy falls back and bisection stepped over it.

    k settled, the probes on all neurons and on the k are trained on all words, dev included, and
    scored once on test. Test labels that never occur in training count as errors.

    Raises HealingError as `rank_neurons` does, and where there is nothing to hold out.
    """
    activations, y, names = _checked(activations, labels, None)
    test_activations, test_y = _checked_test(test_activations, test_labels, activations, names)
    if not 0 <= delta < 1:
        raise HealingError(f"delta {delta!r} is not an accuracy to lose: from 0 to below 1")
    groups = np.arange(len(y)) if groups is None else np.asarray(groups)
    if groups.shape != y.shape:
        raise HealingError(f"got {len(groups)} groups for {len(y)} words: need one a word")
    inner, dev = _hold_out(groups, dev_share, seed)
    if len(np.unique(y[inner])) < 2:
        raise HealingError("what is left to train on after holding out words has one label only")
    penalties = {"l1": l1, "l2": l2, "device": device, **fitting}
    everything = _every_neuron(activations)
    probe, present = _fit_to_rank(activations, y, penalties, inner)
    answers = present[probe.predict(_features(activations, everything, dev))[0]]
    full = float(np.mean(answers == y[dev]))
    ranking = _rank(activations, y, method, seed, penalties, inner, probe)
    searched = [(len(ranking), full)]

    def enough(k: int) -> bool:
        if k < len(ranking):
            top = ranking[:k]
            accuracy = _accuracy(activations, y, activations, y, top, penalties, inner, dev)
            searched.append((k, accuracy))
        return dict(searched)[k] >= full - delta - 1e-9  # rounding is no loss of accuracy

    grid = [0, *(2**i for i in range(len(ranking).bit_length()) if 2**i < len(ranking))]
    grid.append(len(ranking))
    high = next(i for i, k in enumerate(grid) if enough(k))
    low, k = (grid[high - 1] if high else -1), grid[high]
    while k - low > 1:
        middle = (low + k) // 2
        low, k = (low, middle) if enough(middle) else (middle, k)

    def on_test(neurons: Sequence[Neuron]) -> float:
        return _accuracy(activations, y, test_activations, test_y, neurons, penalties)

    neurons = ranking[:k]
    return MinimalSet(
        neurons=neurons,
        k=k,
        delta=delta,
        dev_full=full,
        dev_minimal=dict(searched)[k],
        test_full=on_test(ranking),
        test_minimal=on_test(neurons),
        by_layer=np.bincount([n[0] for n in neurons], minlength=len(activations)).tolist(),
        ranking=ranking,
        ranked_on=inner,
        searched=searched,
    )


def _hold_out(groups: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the words to train on and of those held out: whole groups, at least one each."""
    names = np.unique(groups)
    if len(names) < 2 or not 0 < share < 1:
        raise HealingError(
            f"cannot hold out {share!r} of {len(names)} groups (sentences): "
            "need at least 2 and a share between 0 and 1"
        )
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    held = np.isin(groups, np.random.default_rng(seed).permutation(names)[:count])
    return np.flatnonzero(~held), np.flatnonzero(held)


def accuracy_curve(
    activations: np.ndarray,
    labels: Sequence[Any],
    test_activations: np.ndarray,
    test_labels: Sequence[Any],
    ranking: Sequence[Neuron],
    sizes: Iterable[int],
    *,
    l1: float = L1,
    l2: float = L2,
    seed: int = 0,
    device: str | torch.device | None = None,
    **fitting: Any,
) -> pd.DataFrame:
    """Test accuracy of a probe retrained on k neurons: the first, the last, and k at random.

    Columns ``k which accuracy``, `which` being ``top``, ``random`` or ``bottom``. The random
    neurons depend on `seed` only, not on the order of the ranking, and those of a smaller k are
    among those of a larger one. 0 neurons answer the most frequent training label.
    """
    activations, y, names = _checked(activations, labels, None)
    test_activations, test_y = _checked_test(test_activations, test_labels, activations, names)
    ranking = _checked_neurons(ranking, len(activations), activations.shape[2])
    penalties = {"l1": l1, "l2": l2, "device": device, **fitting}
    known: dict[tuple[Neuron, ...], float] = {}  # all neurons are one probe, whichever way taken
    rows = []
    for k, which, neurons in _picks(ranking, sizes, seed):
        key = tuple(sorted(neurons))
        if key not in known:
            known[key] = _accuracy(activations, y, test_activations, test_y, key, penalties)
        rows.append({"k": k, "which": which, "accuracy": known[key]})
    return pd.DataFrame(rows, columns=["k", "which", "accuracy"])


def center_of_mass(by_layer: Sequence[float]) -> float:
    """Mean layer of a set of neurons as a share of the depth: 0 the embeddings, 1 the last layer.

    `by_layer` counts the set's neurons in each layer, (layers + 1,). NaN for an empty set, and
    where there is one layer only, so no depth.
    """
    counts = np.asarray(by_layer, dtype=np.float64)
    if counts.ndim != 1 or not len(counts) or not (counts >= 0).all():
        raise HealingError(f"need a count of neurons for every layer, 0 or more: got {by_layer!r}")
    if len(counts) < 2 or counts.sum() == 0:
        return float("nan")
    return float(counts @ np.linspace(0, 1, len(counts)) / counts.sum())


def _accuracy(
    activations: np.ndarray,
    y: np.ndarray,
    test_activations: np.ndarray,
    test_y: np.ndarray,
    neurons: Sequence[Neuron],
    penalties: dict[str, Any],
    rows: np.ndarray | None = None,
    test_rows: np.ndarray | None = None,
) -> float:
    """Train a probe on these neurons of (some rows of) the training words; accuracy on the test's.

    Without neurons the probe answers the most frequent training label.
    """
    rows = np.arange(len(y)) if rows is None else rows
    test_rows = np.arange(len(test_y)) if test_rows is None else test_rows
    if not len(neurons):
        return float(np.mean(test_y[test_rows] == np.bincount(y[rows]).argmax()))
    # In the order of the layers, so that a set of neurons has one accuracy however it was ranked.
    neurons = sorted(neurons)
    probe, present = _fit(activations, y, neurons, penalties, rows)
    answers = present[probe.predict(_features(test_activations, neurons, test_rows))[0]]
    return float(np.mean(answers == test_y[test_rows]))


def _fit(
    activations: np.ndarray,
    y: np.ndarray,
    neurons: Sequence[Neuron],
    penalties: dict[str, Any],
    rows: np.ndarray,
) -> tuple[Probes, np.ndarray]:
    """One probe over `neurons`, and which class each of its outputs stands for: a split may hold
    no word of a class, and the free bias of a class without words has no optimum."""
    present, dense = np.unique(y[rows], return_inverse=True)
    x = _features(activations, neurons, rows)
    return fit_probes(x, dense, len(present), **penalties), present


def _fit_to_rank(
    activations: np.ndarray, y: np.ndarray, penalties: dict[str, Any], rows: np.ndarray
) -> tuple[Probes, np.ndarray]:
    """As `_fit`, over every neuron, to the tolerance of a ranking unless `penalties` has one."""
    ranked = {"tolerance": TOLERANCE, **penalties}
    return _fit(activations, y, _every_neuron(activations), ranked, rows)


def _features(activations: np.ndarray, neurons: Sequence[Neuron], rows: np.ndarray) -> np.ndarray:
    """The activations of `neurons`, in their order, as one probe's features: (1, words, neurons).

    Read layer by layer, so that of a memory map only what is asked for is held.
    """
    places = np.asarray(neurons)
    features = np.empty((1, len(rows), len(places)), dtype=activations.dtype)
    for layer in np.unique(places[:, 0]):
        at = np.flatnonzero(places[:, 0] == layer)
        features[0][:, at] = activations[layer][rows[:, None], places[at, 1]]
    return features


def _picks(
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

    `values` (layers + 1, hidden), for instance each neuron's mean activation, in which only the
    places of `neurons` are read. Works on every encoder of `encoder_layers`, with or without a
    task head, and on models in training; the hooks are gone afterwards, whatever happened inside.

    Neuron (i, j) is unit j of ``hidden_states[i]`` as the model reports them: of what encoder layer
    i (from 0) takes in, and for the last i of what leaves the stack, which in ModernBERT is the
    output of its final norm. Units are overwritten in place, so whoever else reads that hidden
    state (DeBERTa's convolution, the reported ``hidden_states``) sees it ablated too.

    Raises HealingError for a neuron that the model does not have and values of another shape.
    """
    layers = encoder_layers(model)
    hidden = model.config.hidden_size
    neurons = _checked_neurons(neurons, len(layers) + 1, hidden)
    shape = (len(layers) + 1, hidden)
    values = np.zeros(shape, np.float32) if values is None else np.asarray(values, np.float32)
    if values.shape != shape:
        raise HealingError(f"values to ablate to have shape {values.shape}; need {shape}")
    units: dict[int, list[int]] = {}
    for layer, index in neurons:
        units.setdefault(layer, []).append(index)
    handles = []
    try:
        for layer, indices in units.items():
            index = torch.tensor(indices)
            value = torch.from_numpy(values[layer][indices])
            if layer < len(layers):
                handles.append(_ablate_input(layers[layer], index, value))
            else:
                handles += _ablate_output(model, layers, index, value)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _put(hidden: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    """Units `index` of the last axis become `value`; batch and length may stand in any order."""
    hidden[..., index.to(hidden.device)] = value.to(hidden)


def _ablate_input(layer: nn.Module, index: torch.Tensor, value: torch.Tensor) -> Any:
    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        _put(args[0] if args else kwargs["hidden_states"], index, value)

    return layer.register_forward_pre_hook(before, with_kwargs=True)


def _ablate_output(
    model: nn.Module, layers: list[nn.Module], index: torch.Tensor, value: torch.Tensor
) -> list[Any]:
    """Ablate what leaves the stack: the last layer's output, or what a final norm makes of it.

    Whether a norm outside the layers is a final one shows when it is handed that very tensor
    (DeBERTa has one that is not: it is for its relative embedding). It then gets the units back
    and is ablated behind.
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

    inside = {id(module) for layer in layers for module in layer.modules()}
    # A head may begin with a norm of its own, which must see the ablated state.
    norms = [
        module
        for module in getattr(model, "base_model", model).modules()
        if "norm" in type(module).__name__.lower() and id(module) not in inside
    ]
    return [
        layers[-1].register_forward_hook(after_layer, prepend=True),
        *(norm.register_forward_pre_hook(before_norm) for norm in norms),
        *(norm.register_forward_hook(after_norm, prepend=True) for norm in norms),
    ]


def ablation_scores(
    model: nn.Module,
    data: Any,
    ranking: Sequence[Neuron],
    sizes: Iterable[int],
    *,
    values: np.ndarray | None = None,
    seed: int = 0,
    evaluate: Callable[..., dict[str, float]] = training.evaluate,
    **settings: Any,
) -> pd.DataFrame:
    """The task's scores with the first, the last, and k random neurons ablated.

    Columns ``k which`` and the scores of ``evaluate(model, data, **settings)``; `which` is ``top``,
    ``random`` or ``bottom``, the random ones drawn by `seed` as in `accuracy_curve`. With k = 0
    the model is whole. `values` as in `ablate`.
    """
    rows = []
    for k, which, neurons in _picks(ranking, sizes, seed):
        with ablate(model, neurons, values):
            rows.append({"k": k, "which": which, **evaluate(model, data, **settings)})
    return pd.DataFrame(rows)


# --- What goes in ---------------------------------------------------------------------------------


def _checked(
    activations: np.ndarray, labels: Sequence[Any], classes: Sequence[Any] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations as an array, labels as ids of the classes (words,), and the classes."""
    activations = _checked_shape(activations, labels)
    labels = np.asarray(labels)
    names = np.unique(labels) if classes is None else np.asarray(classes)
    y = _ids(labels, names)
    if (y < 0).any():
        known = ", ".join(map(str, names[:10]))
        raise HealingError(f"label {labels[y < 0][0]!s} is not among the classes: {known}")
    if len(np.unique(y)) < 2:
        raise HealingError(
            f"all {len(y)} words have the label {labels[0]!s}: nothing to tell apart"
        )
    return activations, y, names


def _checked_test(
    activations: np.ndarray, labels: Sequence[Any], trained: np.ndarray, names: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same for test words; a label that is not among the classes becomes -1."""
    activations = _checked_shape(activations, labels, "test ")
    if (activations.shape[0], activations.shape[2]) != (trained.shape[0], trained.shape[2]):
        raise HealingError(
            f"test activations are {activations.shape} and training's {trained.shape} "
            "(layers, words, hidden): layers and hidden size must agree"
        )
    return activations, _ids(np.asarray(labels), names)


def _checked_shape(activations: np.ndarray, labels: Sequence[Any], which: str = "") -> np.ndarray:
    activations = np.asanyarray(activations)
    if activations.ndim != 3 or activations.shape[1] != len(labels) or not len(labels):
        raise HealingError(
            f"{which}activations are {activations.shape} and there are {len(labels)} {which}labels:"
            " need (layers, words, hidden) and one label a word"
        )
    for number, layer in enumerate(activations):
        if not np.isfinite(layer).all():
            raise HealingError(f"{which}activations of layer {number} hold values not finite")
    return activations


def _ids(labels: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Each label's index in `names`, -1 where it is not there."""
    number = {name: i for i, name in enumerate(names.tolist())}
    return np.array([number.get(label, -1) for label in labels.tolist()])


def _checked_neurons(neurons: Iterable[Neuron], layers: int, hidden: int) -> list[Neuron]:
    neurons = [(int(layer), int(index)) for layer, index in neurons]
    for layer, index in neurons:
        if not (0 <= layer < layers and 0 <= index < hidden):
            raise HealingError(
                f"there is no neuron {(layer, index)}: layers go from 0 (the embeddings) to "
                f"{layers - 1}, neurons of a layer from 0 to {hidden - 1}"
            )
    if len(set(neurons)) < len(neurons):
        raise HealingError("a neuron is named twice")
    return neurons
