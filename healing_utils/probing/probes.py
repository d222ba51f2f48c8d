"""Diagnostic classifiers: what can be read linearly from a model's activations, layer by layer.

A probe is scikit-learn's ``LogisticRegression(solver="saga")`` with ``C = 1 / (words (l1 + l2))``
and ``l1_ratio = l1 / (l1 + l2)``, on features standardised over the training words.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from torch.nn import functional as F

from healing_utils.base.errors import HealingError
from healing_utils.base.progress import Progress
from healing_utils.healing.shortcuts import keep_freed_memory
from healing_utils.healing.training import pick_device
from healing_utils.probing.solver import BLOCK, Layer, Problems, Solution, measured, solve

Penalty = float | tuple[float, float]

# (l1, l2), strongest first. At the strongest every weight is zero: the majority label. With l2 ten
# times l1 the problem is far better conditioned than with as much of both, and as accurate.
DEFAULT_PENALTIES = tuple((l1, 10 * l1) for l1 in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001))
FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
# Inverse variances of the weights. Parts of speech ask for 5 to 40 of MiniLM-L6, shuffled labels
# for the last; the organism's easiest layers would be some 10 % shorter with one still weaker.
PRECISIONS = (0.64, 5.0, 40.0, 320.0, 2560.0)
CODE_TOLERANCE = 1e-2  # of the probes: far below what a block more or less would change
PATIENCE = 2  # penalties in a row that are not clearly better after which a layer leaves the path


@dataclass(frozen=True)
class Words:
    """Words at `rows` of `activations` (layers, any, features), their `labels`, and those as `ids`
    of the classes `names`, -1 for none of them; `what` is said before "activations"."""

    what: str
    activations: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    names: np.ndarray
    ids: np.ndarray

    def neurons(self) -> list[tuple[int, int]]:
        """All of them, (layer, unit)."""
        return list(np.ndindex(*self.activations.shape[::2]))

    def at(self, places: np.ndarray | slice) -> Words:
        """Some of the words, in that order; of a memory map nothing is read."""
        own = {name: getattr(self, name)[places] for name in ("rows", "labels", "ids")}
        return replace(self, **own)

    def features(self, layer: int, units: np.ndarray | None = None) -> torch.Tensor:
        """A layer's, or some of its units': float32 (words, features), in memory of their own."""
        x = self.activations[layer]
        if units is not None:
            x = np.take(x, units, axis=1)  # several times as fast as rows and units at once
        x = torch.from_numpy(np.asarray(x[self.rows], dtype=np.float32))
        if not torch.isfinite(x.sum()):
            raise HealingError(f"{self.what}activations of layer {layer} hold values not finite")
        return x

    def of(self, neurons: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The features `neurons`, (layer, unit), ascending: float32 (words, neurons)."""
        layers, units = np.asarray(neurons).T
        out = torch.empty(len(self.ids), len(neurons))
        for layer in np.unique(layers):
            at = np.flatnonzero(layers == layer)
            out[:, at[0] : at[-1] + 1] = self.features(layer, units[at])
        return out


def labelled(
    activations: Any, labels: Any, train: Words | None = None, classes: Sequence[Any] | None = None
) -> Words:
    """Training words, of `classes`, by default all labels; or test words for probes of `train`."""
    what, need = "", "(layers, words, features)"
    if train is not None:
        what, need = "test ", "({}, words, {})".format(*train.activations.shape[::2])
    if torch.is_tensor(activations):
        activations = activations.detach().cpu().float().numpy()
    x = _array(activations)
    fits = train is None or x.shape[::2] == train.activations.shape[::2]
    if x.ndim != 3 or not x.size or not fits or x.dtype.kind not in "biuf":
        raise HealingError(f"{what}activations must be numbers {need}, got {x.shape} of {x.dtype}")
    labels = column(labels, x.shape[1], f"{what}labels")
    if labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels):
        labels = labels.astype(str)
    if labels.dtype.kind not in "biuU":
        raise HealingError(f"{what}labels must be strings or integers, got {labels.dtype}")
    if train is not None:
        classes = train.names
        if (labels.dtype.kind == "U") != (train.labels.dtype.kind == "U"):
            raise HealingError(f"labels are {train.labels.dtype} but test labels {labels.dtype}")
    names = np.unique(labels) if classes is None else np.asarray(classes)
    number = {name: i for i, name in enumerate(names.tolist())}
    ids = np.array([number.get(label, -1) for label in labels.tolist()])
    if train is None and (ids < 0).any():
        known = ", ".join(map(str, names[:10]))
        raise HealingError(f"label {labels[ids < 0][0]!s} is not among the classes: {known}")
    if train is None and (ids == ids[0]).all():
        raise HealingError(f"every label is {labels[0].item()!r}: nothing to tell apart")
    return Words(what, x, np.arange(x.shape[1]), labels, names, ids)


def _array(values: Any) -> np.ndarray:
    """Without a copy where it is one, also of a file in memory; empty, which fits nothing, for
    lists of unequal lengths."""
    try:
        return np.asarray(values)
    except ValueError:
        return np.empty(0)


def column(values: Any, words: int, what: str) -> np.ndarray:
    """`values` as an array (words,)."""
    values = _array(values)
    if values.shape != (words,):
        raise HealingError(f"{what} must be one value a word: {words}, got {values.size}")
    if (missing := pd.isna(values)).any():
        raise HealingError(f"{what} lack the value of word {missing.argmax()}")
    return values


def grouped(groups: Any, words: int) -> tuple[np.ndarray, np.ndarray]:
    """The names of the groups, and which of them each word is of, (words,); without, its own."""
    groups = np.arange(words) if groups is None else column(groups, words, "groups")
    names, index = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise HealingError(f"need at least 2 groups (sentences), got {len(names)}")
    return names, index


def shuffled(count: int, seed: int) -> np.ndarray:
    """0 to `count` in the order that `seed` draws."""
    try:
        return np.random.default_rng(operator.index(seed)).permutation(count)
    except (TypeError, ValueError):
        raise HealingError(f"seed {seed!r} is not a whole number from 0 up") from None


def held_out(groups: Any, words: int, share: float, seed: int) -> np.ndarray:
    """Which words are held out, (words,): whole groups, about that share of them, at least one."""
    names, index = grouped(groups, words)
    if not 0 < share < 1:
        raise HealingError(f"cannot hold out {share!r} of the words: need a share between 0 and 1")
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    return np.isin(index, shuffled(len(names), seed)[:count])


def control_labels(words: Iterable[str], frequencies: Sequence[float], seed: int = 0) -> np.ndarray:
    """Class ids (words,) of a control task: a random label a word *type* (Hewitt and Liang 2019,
    section 2), drawn by `frequencies` (classes,), that hangs on its spelling and the seed only."""
    counts = np.asarray(frequencies, dtype=np.float64)
    edges = np.cumsum(counts / counts.sum())
    types, index = np.unique([str(word) for word in words], return_inverse=True)
    draws = [hashlib.blake2b(f"{seed}\0{word}".encode(), digest_size=8).digest() for word in types]
    uniform = np.array([int.from_bytes(draw, "big") / 2**64 for draw in draws])
    ids = np.searchsorted(edges, uniform, side="right").clip(max=np.flatnonzero(counts).max())
    return ids[index]


@dataclass
class Probes(Solution):
    """Probes of one layer for the classes `names`, with weights of ``(x - mean) / scale``."""

    names: np.ndarray
    mean: torch.Tensor  # over the training words, (features,)
    scale: torch.Tensor  # their standard deviation, 1 of a feature that is constant

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, (probes, words, classes), of `x` (words, features), standardised in place."""
        x = x.to(self.mean.device).sub_(self.mean).div_(self.scale)
        own = zip(self.weight, self.bias, strict=True)
        return torch.stack([torch.addmm(bias, x, weight.T) for weight, bias in own]).cpu()


def fit_probes(
    x: torch.Tensor, y: Any, penalties: Sequence[Penalty], *, tolerance: float = 1e-3,
    max_iterations: int = 5000, device: Any = None, start: Probes | None = None,
) -> Probes:  # fmt: skip
    """One probe a penalty, to labels `y` (words,), on float32 `x` (words, features), which is
    standardised in place. Those of the layer before are a `start` that saves iterations."""
    x, mean, scale = _standardised(x, pick_device(device))
    # Of what does occur: without any word a class's free bias would have no optimum.
    names, ids = np.unique(y, return_inverse=True)
    pairs = torch.tensor([_penalty(penalty) for penalty in penalties], device=x.device)
    targets = torch.from_numpy(ids).to(x.device).expand(len(pairs), -1)
    begin = start and (start.weight, start.bias)
    given = Problems([measured(x)], [0] * len(pairs), targets, pairs, len(names), begin)
    found = solve(given, tolerance, max_iterations)
    return Probes(**vars(found), names=names, mean=mean, scale=scale)


def _standardised(
    x: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(standardised, mean, scale), in place: there may be no room for a copy."""
    x = x.to(device)
    if device.type == "cpu":
        keep_freed_memory()
    mean = x.mean(dim=0)
    x.sub_(mean)
    variance = torch.zeros_like(mean)
    for some in x.split(max(1, BLOCK // x.shape[1])):  # a tenth of torch.var's time
        variance += some.square().sum(dim=0) / len(x)
    scale = variance.sqrt()
    if not torch.isfinite(scale).all():
        raise HealingError("activations are too large: their squares are not finite in float32")
    # A constant has a standard deviation of some rounding errors. What float16 cannot tell from
    # zero counts as constant too (MiniLM-L6's last layer has two features of about 1e-32).
    constant = (scale <= 1e-6 * mean.abs()) | (scale < 6e-8)
    scale = torch.where(constant, 1.0, scale)
    x.div_(scale)
    if constant.any():
        x[:, constant] = 0
    return x, mean, scale


def _penalty(penalty: Penalty) -> tuple[float, float]:
    """(l1, l2) of a pair, or of one number that is both."""
    try:
        l1, l2 = map(float, penalty if isinstance(penalty, Sequence) else (penalty, penalty))
    except (TypeError, ValueError):
        l1 = l2 = float("nan")
    if not (0 <= l1 < float("inf") and 0 < l2 < float("inf")):
        need = "need l1 of at least 0 and l2 above 0, as one number for both or as a pair (l1, l2)"
        raise HealingError(f"penalty {penalty!r}: {need}")
    return l1, l2


def _fit_chosen(
    x: list[torch.Tensor], targets: torch.Tensor, fit: int, classes: int,
    path: list[tuple[float, float]], tolerance: float, max_iterations: int,
) -> tuple[Solution, list[tuple[float, float]]]:  # fmt: skip
    """Choose every probe's penalty on the words from `fit` on, then fit it on all words: `x`, a
    (words, features) a layer, to each of `targets` (labellings, words)."""
    layer = [i for i in range(len(x)) for _ in targets]
    targets = targets.repeat(len(x), 1)  # (problems, words)
    rows = everything = list(range(len(layer)))

    def fitted(rows: list[int], layers: list[Layer], pairs: list, start: Any, tolerance: float):
        penalties = torch.tensor(pairs, device=targets.device)
        wanted = targets[rows, : len(layers[0].x)]
        given = Problems(layers, [layer[i] for i in rows], wanted, penalties, classes, start)
        return solve(given, tolerance, max_iterations)

    chosen, start = path * len(layer), None
    if len(path) > 1:
        inner = [measured(z[:fit]) for z in x]
        best: dict[int, tuple] = {}  # losses of the words held out, place on the path, the probe
        for place, penalty in enumerate(path):
            found = fitted(rows, inner, [penalty] * len(rows), start, 10 * tolerance)
            stay = []
            for j, row in enumerate(rows):
                weight, bias = found.weight[j], found.bias[j]
                scores = torch.addmm(bias, x[layer[row]][fit:], weight.T)
                loss = F.cross_entropy(scores, targets[row, fit:], reduction="none")
                gain = best[row][0] - loss if row in best else torch.ones(1)
                # By over two standard errors, word by word, so that noise does not pass for signal.
                if gain.mean() > 2 * gain.std(correction=0) / len(gain) ** 0.5:
                    best[row] = loss, place, weight, bias
                if place - best[row][1] < PATIENCE:
                    stay.append(j)
            if not stay:
                break
            rows, start = [rows[j] for j in stay], (found.weight[stay], found.bias[stay])
        _, places, *probes = zip(*(best[row] for row in everything), strict=True)
        chosen, start = [path[place] for place in places], tuple(map(torch.stack, probes))
    return fitted(everything, [measured(z) for z in x], chosen, start, tolerance), chosen


def probe_layers(
    activations: Any, labels: Any, test_activations: Any, test_labels: Any,
    words: Sequence[str] | None = None, test_words: Sequence[str] | None = None, groups: Any = None,
    *, penalties: Iterable[Penalty] = DEFAULT_PENALTIES, dev: float = 0.1, seed: int = 0,
    tolerance: float = 1e-3, max_iterations: int = 5000, device: Any = None, memory: int = 2**31,
    progress: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """How well each layer's activations tell the labels of words (or sentences) never fitted on.

    `activations` (layers, words, features) of any numbers; `labels` (words,), strings or integers;
    `groups` (words,), the sentence of each training word. A fraction `dev` of them, drawn by
    `seed`, is held out to choose each layer's penalty, at which it is then fitted on all words; as
    many layers at once as take at most `memory` bytes.

    Returns a row a layer: `accuracy` and `macro_f1` on test (over the labels that occur there or
    were answered); `majority`, what the most frequent training label scores there;
    `control_accuracy` of a probe for `control_labels`, and `selectivity`, accuracy minus that (NaN
    without `words`); of the labels' probe `l1`, `l2`, `nonzero` weights, `iterations`, `converged`;
    `n_train`, `n_test` words, `n_classes` in training. Raises HealingError for what does not fit
    together, labels of a single class, and values that are not finite.
    """
    from sklearn.metrics import f1_score

    train = labelled(activations, labels)
    test = labelled(test_activations, test_labels, train)
    (layers, n_train, features), n_test = train.activations.shape, len(test.ids)
    if (words is None) != (test_words is None):
        raise HealingError("control tasks need both words and test_words; got only one of them")
    # Strongest first: each solution starts from the one before.
    path = sorted({_penalty(p) for p in penalties}, key=lambda p: (-sum(p), -p[0]))
    if not path:
        raise HealingError("need at least one penalty")
    order, fit = np.arange(n_train), n_train
    if len(path) > 1:
        held = held_out(groups, n_train, dev, seed)
        order, fit = np.argsort(held, kind="stable"), int((~held).sum())
    device = pick_device(device)
    counts, targets, control = np.bincount(train.ids), [train.ids], float("nan")
    if words is not None:
        targets.append(control_labels(column(words, n_train, "words"), counts, seed))
        test_words = column(test_words, n_test, "test words")
        test_control = torch.from_numpy(control_labels(test_words, counts, seed))
    targets = torch.from_numpy(np.stack(targets)[:, order]).to(device)  # (labellings, words)
    train, names, rows = train.at(order), train.names, []
    majority = float(np.mean(test.ids == counts.argmax()))
    size = max(1, int(memory) // (4 * n_train * features))
    with Progress(layers, "probes") if progress else contextlib.nullcontext() as bar:
        for first in range(0, layers, size):
            block = range(first, min(first + size, layers))
            ready = [_standardised(train.features(layer), device) for layer in block]
            given = [x for x, _, _ in ready], targets, fit, len(names), path
            found, chosen = _fit_chosen(*given, tolerance, max_iterations)
            for layer, (_, mean, scale) in zip(block, ready, strict=True):
                p = (layer - first) * len(targets)  # the labels' probe, then the control task's
                own = {name: each[p : p + len(targets)] for name, each in vars(found).items()}
                probes = Probes(**own, names=names, mean=mean, scale=scale)
                answers = probes.scores(test.features(layer)).argmax(dim=-1)
                said = names[answers[0].numpy()]
                accuracy = float((said == test.labels).mean())
                if words is not None:
                    control = (answers[1] == test_control).float().mean().item()
                rows.append({
                    "layer": layer, "accuracy": accuracy,
                    "macro_f1": f1_score(test.labels, said, average="macro", zero_division=0),
                    "majority": majority, "control_accuracy": control,
                    "selectivity": accuracy - control, "l1": chosen[p][0], "l2": chosen[p][1],
                    "nonzero": int((probes.weight[0] != 0).sum()),
                    "iterations": int(probes.iterations[0]), "converged": bool(probes.converged[0]),
                    "n_train": n_train, "n_test": n_test, "n_classes": len(names),
                })  # fmt: skip
            if bar:
                bar.update(len(block))
    return pd.DataFrame(rows)


def block_ends(groups: np.ndarray) -> list[int]:
    """Where the blocks of words end, (blocks,): at the ends of groups, which lie side by side."""
    words = len(groups)
    whole = np.flatnonzero(np.append(groups[1:] != groups[:-1], True)) + 1
    places = np.searchsorted(whole, [max(1, round(f * words)) for f in FRACTIONS])
    return sorted({int(whole[i]) for i in places})


def online_codelength(
    activations: Any, labels: Any, groups: Any = None, *, seed: int = 0, device: Any = None
) -> pd.DataFrame:
    """The length of the online code of `labels` (words,) given `activations` (layers, words,
    features); `groups` (words,): the sentence of each word, put into an order drawn by `seed`.

    Voita and Titov (2020, arXiv 2003.12298, section 2.2.2): labels are sent in blocks, `FRACTIONS`
    of the words in whole sentences. The first has a uniform code; every other takes the
    cross-entropy of a probe fitted on all that was sent before, so that the length tells how well
    labels can be read and how many words it takes to learn to. The probe has a Gaussian prior, l2 =
    precision / words; the best of `PRECISIONS` over all blocks is taken, and the bits that say
    which are counted. What a probe says is mixed with a uniform code, as if each class had been
    seen once more: a new one would else take infinitely many bits.

    Returns a row a layer: `layer`; `codelength` and `uniform`, bits of all words; the `precision`
    taken. Raises HealingError as `probe_layers` does.
    """
    words = labelled(activations, labels)
    names, group = grouped(groups, len(words.ids))
    place = np.argsort(shuffled(len(names), seed))
    order = np.argsort(place[group], kind="stable")
    words, ends = words.at(order), block_ends(group[order])
    uniform, rows = np.log2(len(words.names)), []
    for layer in range(len(activations)):
        blocks = [_block(words, layer, sent, end, device) for sent, end in pairwise(ends)]
        lengths = sum(blocks, np.zeros(len(PRECISIONS)))
        bits = np.log2(len(PRECISIONS)) + ends[0] * uniform + lengths.min()
        precision = PRECISIONS[lengths.argmin()]
        rows.append((layer, float(bits), float(len(words.ids) * uniform), precision))
    return pd.DataFrame(rows, columns=["layer", "codelength", "uniform", "precision"])


def _block(words: Words, layer: int, sent: int, end: int, device: Any) -> np.ndarray:
    """Bits of the words from `sent` to `end`, when those before are known: one for each prior."""
    before, block, classes = words.at(slice(sent)), words.at(slice(sent, end)), len(words.names)
    said = np.zeros((len(PRECISIONS), len(block.ids), classes))
    if (before.ids == before.ids[0]).all():
        said[..., before.ids[0]] = 1
    else:
        priors = [(0.0, precision / sent) for precision in PRECISIONS]
        x = before.features(layer)
        probes = fit_probes(x, before.ids, priors, tolerance=CODE_TOLERANCE, device=device)
        scores = probes.scores(block.features(layer)).numpy()
        said[..., probes.names] = softmax(scores.astype(float), axis=-1)
    mixed = (sent * said + 1) / (sent + classes)
    return -np.log2(mixed[:, np.arange(len(block.ids)), block.ids]).sum(axis=1)
