"""Single neurons: which of them carry a property, and does the model use them?

A *neuron* is one unit of one hidden state, written (layer, index); layer 0 is the embeddings. What
a probe reads from neurons need not be used (Antverg and Belinkov 2022): for that there is `ablate`.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from healing_utils.base.errors import HealingError, choose
from healing_utils.healing.encoders import layer_stack
from healing_utils.healing.training import evaluate
from healing_utils.probing.probes import Probes, Words, fit_probes, held_out, labelled, shuffled

Neuron = tuple[int, int]

METHODS = ("lca", "probeless", "gaussian")
WHICH = ("top", "random", "bottom")
BLOCK = 64  # words whose densities under every class fit into a processor's cache
L1, L2 = 1e-3, 1e-2  # with the ridge ten times the lasso probes converge several times as fast
# Of a probe whose weights are ranked: over the model organism's 448 neurons the minimal set still
# moved between 1e-3 and 1e-4, where an accuracy has long stood still.
TOLERANCE = 1e-4


def there(neurons: Iterable[Neuron], layers: int, hidden: int) -> list[Neuron]:
    """`neurons`, ascending; HealingError where one is in none of so many layers, or comes twice."""
    known, named = set(np.ndindex(layers, hidden)), [tuple(np.ravel(n).tolist()) for n in neurons]
    if odd := [n for n, times in Counter(named).items() if times > 1 or n not in known]:
        shape = f"layers 0 (the embeddings) to {layers - 1}, units 0 to {hidden - 1}"
        raise HealingError(f"there is no neuron {odd[0]}, or it is named twice: {shape}")
    return sorted(named)


def _accuracy(
    train: Words, test: Words, neurons: Sequence[Neuron], fitting: dict[str, Any],
    probe: Probes | None = None,
) -> float:  # fmt: skip
    """Of a probe on these neurons; without any it answers the most frequent training label."""
    if not len(neurons):
        return float(np.mean(test.ids == np.bincount(train.ids).argmax()))
    neurons = sorted(neurons)  # so that a set has one accuracy, however it was ranked
    probe = probe or fit_probes(train.of(neurons), train.ids, **fitting)
    answers = probe.scores(test.of(neurons))[0].argmax(dim=-1).numpy()
    return float(np.mean(probe.names[answers] == test.ids))


def rank_neurons(
    activations: np.ndarray, labels: Sequence[Any], *, method: str = "lca", l1: float = L1,
    l2: float = L2, seed: int = 0, classes: Sequence[Any] | None = None,
    device: str | torch.device | None = None, **fitting: Any,
) -> list[Neuron]:  # fmt: skip
    """All neurons, strongest first, each once, by `activations` (layers, words, hidden) and
    `labels` (words,) of `classes`. The methods are those that Antverg and Belinkov (2022) compare:

    - ``lca``, Linguistic Correlation Analysis (Dalvi et al. 2019): `rank_weights` of an elastic-net
      probe on the neurons of all layers, by default to `TOLERANCE`; it alone needs the `seed`.
    - ``probeless``: the sum over pairs of classes of the absolute difference of the class means,
      over the neuron's standard deviation.
    - ``gaussian``, the first step of Torroba Hennigen et al. (2020): the mean over the words of
      log p(label | neuron) - log p(label), in nats, the neurons of a class being Gaussian, with the
      variance over all words as one more word of every class.

    Raises HealingError for what does not fit together, values that are not finite, fewer than two
    classes and a label outside `classes`.
    """
    choose(method, METHODS, "ranking method")
    words = labelled(activations, labels, classes=classes)
    fitting = {"penalties": [(l1, l2)], "device": device, **fitting}
    return _rank(words, method, seed, _fit_all(words, fitting) if method == "lca" else None)


def _fit_all(words: Words, fitting: dict[str, Any]) -> Probes:
    """The probe on all neurons, whose weights may be ranked."""
    return fit_probes(words.of(words.neurons()), words.ids, **{"tolerance": TOLERANCE, **fitting})


def _rank(words: Words, method: str, seed: int, probe: Probes | None) -> list[Neuron]:
    if method == "lca":
        order = rank_weights(probe.weight[0].cpu(), seed=seed)
    else:
        score = {"probeless": probeless, "gaussian": gaussian}[method]
        layers = range(len(words.activations))
        scores = [score(words.features(layer).numpy(), words.ids) for layer in layers]
        order = np.argsort(-np.concatenate(scores), kind="stable")
    neurons = words.neurons()
    return [neurons[place] for place in order]


def rank_weights(weight: np.ndarray, seed: int = 0) -> np.ndarray:
    """The features of a linear probe, strongest first, (features,); `weight` (classes, features).

    A feature *enters* at the share of a class's absolute weights that strictly heavier ones hold:
    the limit of small steps of the sweep of Dalvi et al. (2019). Its place is the smallest share at
    which it enters for any class; ties fall by the largest share that it holds itself, then by
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
    last = np.where(zero, shuffled(features, seed), np.arange(features))
    return np.lexsort((last, -largest, enters, zero))


def probeless(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As `rank_neurons` says, of one layer's neurons, (hidden,)."""
    means, _, variance, _ = _moments(x, y)
    # Over sorted means, the i-th of C is added i times and subtracted C - 1 - i times.
    times = 2 * np.arange(len(means)) - len(means) + 1
    spread = times @ np.sort(means, axis=0)
    return np.divide(spread, np.sqrt(variance), out=np.zeros_like(spread), where=variance > 0)


def gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As `rank_neurons` says, of one layer's neurons, (hidden,)."""
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
    (classes, hidden), the variance over all words, 0 for a neuron that never changes, and class
    sizes (classes, 1)."""
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
    """How alike rankings of the same neurons are: a row for each pair, ``first`` and ``second``,
    ``spearman`` over all (the random order of those with weight zero draws it towards 0) and for
    every k of `sizes` ``overlap_k``, the share of one's top k in the other's (chance: k / all)."""
    if len({tuple(sorted(ranking)) for ranking in rankings.values()}) > 1:
        raise HealingError("rankings to compare must be of the same neurons, each once")
    # Of each neuron, in ascending order, its place in a ranking.
    places = {name: np.lexsort(np.transpose(own)[::-1]) for name, own in rankings.items()}
    rows = []
    for (first, a), (second, b) in combinations(places.items(), 2):
        # Places are their own ranks.
        row = {"first": first, "second": second, "spearman": float(np.corrcoef(a, b)[0, 1])}
        for k in sizes:
            if 0 < k < len(a):
                row[f"overlap_{k}"] = float(((a < k) & (b < k)).sum() / k)
        rows.append(row)
    return pd.DataFrame(rows)


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
    """The smallest top-k whose retrained probe stays within `delta` of the probe on all neurons, in
    absolute accuracy, after Durrani et al. (2021).

    A `dev_share` of the `groups` (words,), such as sentences, is drawn by `seed` and held out: it
    judges the probes of the search, which like the ranking see the other words only. The search
    tries k = 0 (the most frequent label), 1, 2, 4, ... until one is within `delta`, then bisects;
    accuracy need not rise with k, so a smaller one may hide. Probes on all neurons and on the k are
    then trained on all words and scored once on test, where an unknown label is an error. Raises
    HealingError as `rank_neurons` does, and where there is nothing to hold out.
    """
    choose(method, METHODS, "ranking method")
    words = labelled(activations, labels)
    test = labelled(test_activations, test_labels, words)
    if not 0 <= delta < 1:
        raise HealingError(f"delta {delta!r} is not an accuracy to lose: from 0 to below 1")
    held = held_out(groups, len(words.ids), dev_share, seed)
    inner, dev = words.at(~held), words.at(held)
    if len(np.unique(inner.ids)) < 2:
        raise HealingError("what is left to train on after holding out words has one label only")
    fitting = {"penalties": [(l1, l2)], "device": device, **fitting}
    probe = _fit_all(inner, fitting)
    full = _accuracy(inner, dev, words.neurons(), fitting, probe)
    ranking = _rank(inner, method, seed, probe)
    searched = {len(ranking): full}

    def enough(k: int) -> bool:
        if k not in searched:
            searched[k] = _accuracy(inner, dev, ranking[:k], fitting)
        return searched[k] >= full - delta - 1e-9  # rounding is no loss of accuracy

    low, k = -1, 0
    while not enough(k):
        low, k = k, min(max(2 * k, 1), len(ranking))
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
    seed: int = 0, **fitting: Any,
) -> pd.DataFrame:  # fmt: skip
    """Test accuracy of a probe retrained on k neurons, ``k which accuracy``: the first, the last,
    and k at random, as `by_size` takes them."""
    words = labelled(activations, labels)
    test = labelled(test_activations, test_labels, words)
    there(ranking, *words.activations.shape[::2])
    fitting = {"penalties": [(L1, L2)], **fitting}

    def accuracy(neurons: tuple[Neuron, ...]) -> dict[str, float]:
        return {"accuracy": _accuracy(words, test, neurons, fitting)}

    return by_size(ranking, sizes, seed, accuracy)


def by_size(
    ranking: Sequence[Neuron], sizes: Iterable[int], seed: int,
    scores: Callable[[tuple[Neuron, ...]], dict[str, float]],
) -> pd.DataFrame:  # fmt: skip
    """The `scores` of the first, the last and k random neurons, a row ``k which`` each. The random
    ones hang on `seed` only, and those of a smaller k are among those of a larger one."""
    ranking, common, rows = list(ranking), sorted(ranking), []
    drawn = [common[place] for place in shuffled(len(ranking), seed)]
    scores = functools.cache(scores)  # all neurons are one set, whichever way taken
    for k in sizes:
        if k not in range(len(ranking) + 1):
            raise HealingError(f"cannot take {k} of {len(ranking)} ranked neurons")
        taken = ranking[:k], drawn[:k], ranking[len(ranking) - k :]
        for which, neurons in zip(WHICH, taken, strict=True):
            rows.append({"k": k, "which": which, **scores(tuple(sorted(neurons)))})
    return pd.DataFrame(rows)


def center_of_mass(by_layer: Sequence[float]) -> float:
    """Mean layer of neurons, counted `by_layer` (layers + 1,), as a share of the depth: 0 the
    embeddings, 1 the last layer; NaN for an empty set, and for a single layer."""
    counts = np.asarray(by_layer, dtype=np.float64)
    mass = counts @ np.linspace(0, 1, len(counts))
    return float(mass / counts.sum()) if len(counts) > 1 and counts.any() else float("nan")


@contextlib.contextmanager
def ablate(
    model: nn.Module, neurons: Iterable[Neuron], values: np.ndarray | None = None
) -> Iterator[None]:
    """Within this context every forward pass of `model` has these neurons at zero, or at `values`
    (layers + 1, hidden), for instance each neuron's mean activation.

    Neuron (i, j) is unit j of ``hidden_states[i]`` as the model reports them: of what encoder layer
    i (from 0) takes in, and for the last i of what leaves the stack, in ModernBERT by its final
    norm. Raises HealingError for a neuron that the model does not have and values of another shape.
    """
    stack = layer_stack(model)
    shape = (len(stack) + 1, model.config.hidden_size)
    values = np.zeros(shape, np.float32) if values is None else np.asarray(values, np.float32)
    if values.shape != shape or not np.isfinite(values).all():
        raise HealingError(f"values must be {shape} finite numbers, got {values.shape}")
    places = np.array(there(neurons, *shape), dtype=np.int64).reshape(-1, 2)
    # What gives the last state: the holder of the stack, with a final norm of its own (ModernBERT),
    # or (RoBERTa-PreLayerNorm) a norm of the model behind it.
    base = getattr(model, "base_model", model)
    last = next(m for m in base.modules() if any(child is stack for child in m.children()))
    if last is not base:
        last = [last, *(m for m in base.children() if "norm" in type(m).__name__.lower())][-1]

    def change(layer: int, units: np.ndarray, _: nn.Module, args: tuple, given: Any) -> None:
        """Before a layer `given` is what it takes in by name; behind the last, what it gave."""
        if layer < len(stack):
            states = [args[0] if args else given["hidden_states"]]
        else:  # XLNet records a copy
            recorded = getattr(given, "hidden_states", None) or ()
            states = [given if torch.is_tensor(given) else given[0], *recorded[-1:]]
        for hidden in states:  # batch and length may stand in any order
            hidden[..., units] = torch.from_numpy(values[layer, units]).to(hidden)

    with contextlib.ExitStack() as hooks:
        for layer in np.unique(places[:, 0]).tolist():
            hook = functools.partial(change, layer, places[places[:, 0] == layer, 1])
            if layer < len(stack):
                handle = stack[layer].register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = last.register_forward_hook(hook, prepend=True)
            hooks.callback(handle.remove)
        yield


def ablation_scores(
    model: nn.Module, data: Any, ranking: Sequence[Neuron], sizes: Iterable[int], *,
    values: np.ndarray | None = None, seed: int = 0, **settings: Any,
) -> pd.DataFrame:  # fmt: skip
    """The task's scores, those of ``evaluate(model, data, **settings)``, with neurons ablated as
    `by_size` takes them; `values` as in `ablate`."""

    def scores(neurons: tuple[Neuron, ...]) -> dict[str, float]:
        with ablate(model, neurons, values):
            return evaluate(model, data, **settings)

    return by_size(ranking, sizes, seed, scores)
