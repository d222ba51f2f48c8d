"""Diagnostic classifiers, layer by layer: what can be read linearly from a model's activations.

A probe is multinomial logistic regression with an elastic net on activations that are standardised
over the training words (`solver` has the objective and the method). It is scikit-learn's
``LogisticRegression(solver="saga")`` with ``C = 1 / (words (l1 + l2))`` and ``l1_ratio = l1 /
(l1 + l2)``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from healing_utils.base.errors import HealingError
from healing_utils.base.progress import Progress
from healing_utils.healing.shortcuts import keep_freed_memory
from healing_utils.healing.training import pick_device
from healing_utils.probing.solver import Layer, Problems, Solution, joined, solve, solve_in_groups

Penalty = float | tuple[float, float]

# (l1, l2), strongest first. At the strongest every weight is zero: the majority label. With l2 ten
# times l1 the problem is far better conditioned than with as much of both, and as accurate.
DEFAULT_PENALTIES = tuple((l1, 10 * l1) for l1 in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001))
PATIENCE = 2  # penalties in a row that are not clearly better after which a layer leaves the path
BLOCK = 1 << 26  # values whose squares and products are in memory at a time
CORRELATED = 4096  # features up to which their correlations are worth a product with themselves


def measured(x: torch.Tensor) -> Layer:
    """A layer to solve on, from standardised activations (words, features)."""
    if x.shape[1] > CORRELATED:
        return Layer(x, None, 1.0)
    products = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for some in x.split(_block(x)):
        products.addmm_(some.T, some, alpha=1 / len(x))
    # By Gelfand's formula: the norm of a high power bounds the power of the largest eigenvalue.
    largest, power = 1.0, products
    for doublings in range(5):
        if doublings:
            power = power @ power
        norm = float(power.norm())
        if norm == 0:
            return Layer(x, products, 0.0)
        largest *= norm ** (0.5**doublings)
        power = power / norm
    return Layer(x, products, 1.01 * largest)


def _block(x: torch.Tensor) -> int:
    """How many words of `x` (words, features) are taken at a time."""
    return max(1, BLOCK // x.shape[1])


def _standardised(
    x: Any, layer: int, device: torch.device, order: Any = slice(None)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(standardised, mean, scale) of a layer's activations (words, features), words in `order`."""
    x = _float32(x[layer][order]).to(device)
    if x.device.type == "cpu":
        keep_freed_memory()
    mean = x.mean(dim=0)
    if not torch.isfinite(mean).all():
        raise HealingError(f"activations of layer {layer} hold values not finite")
    x.sub_(mean)  # in place: of all neurons of a large corpus there is room for one copy
    variance = torch.zeros_like(mean)
    for some in x.split(_block(x)):  # a tenth of torch.var's time
        variance += some.square().sum(dim=0) / len(x)
    scale = variance.sqrt()
    # A constant has a standard deviation of some rounding errors. What float16 cannot tell from
    # zero counts as constant too (MiniLM-L6's last layer has two features of about 1e-32).
    constant = (scale <= 1e-6 * mean.abs()) | (scale < 6e-8)
    scale = torch.where(constant, 1.0, scale)
    x.div_(scale)
    if constant.any():
        x[:, constant] = 0
    return x, mean, scale


def _float32(x: Any) -> torch.Tensor:
    """A layer's activations as float32 in memory of their own."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", torch.float32, copy=True)
    return torch.from_numpy(np.array(x, dtype=np.float32))


def shape_of(x: Any, what: str, like: tuple[int, ...] | None = None) -> tuple[int, int, int]:
    """The shape of activations, with as many layers and features as the training's, if given."""
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) != 3 or 0 in shape:
        got = shape or type(x).__name__
        raise HealingError(f"{what} must be an array (layers, words, features), got {got}")
    if like is not None and (shape[0], shape[2]) != (like[0], like[2]):
        raise HealingError(
            f"{what} have {shape[0]} layers of {shape[2]} features, those trained on {like[0]} of "
            f"{like[2]}: they must be as many"
        )
    return shape


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


# --- at given penalties --------------------------------------------------------------------------


@dataclass
class Probes(Solution):
    """Fitted probes, one a layer, as arrays.

    `weight` (layers, classes, features) acts on standardised activations ``(x - mean) / scale``;
    `bias` (layers, classes); `mean`, `scale` (layers, features), the standard deviation over the
    training words, 1 where a feature is constant, whose weight is 0. `objective` (layers,) in nats
    a word, at most `gap` (layers,) above the minimum; `iterations`, `converged` (layers,).
    """

    mean: np.ndarray
    scale: np.ndarray

    def scores(self, x: Any) -> np.ndarray:
        """Logits of activations `x` (layers, words, features): (layers, words, classes)."""
        fitted = (self.mean.shape[0], 0, self.mean.shape[1])
        layers, words, _ = shape_of(x, "activations", fitted)
        out = np.empty((layers, words, self.bias.shape[1]), dtype=np.float32)
        for i in range(layers):
            z = (_float32(x[i]) - torch.from_numpy(self.mean[i])) / torch.from_numpy(self.scale[i])
            w, b = torch.from_numpy(self.weight[i]), torch.from_numpy(self.bias[i])
            out[i] = torch.addmm(b, z, w.T).numpy()
        return out

    def predict(self, x: Any) -> np.ndarray:
        """Class ids, (layers, words); the lower id where two classes tie."""
        return self.scores(x).argmax(axis=-1)


def fit_probes(
    x: Any, y: Any, classes: int, l1: Any, l2: Any, *, tolerance: float = 1e-3,
    max_iterations: int = 5000, device: Any = None,
) -> Probes:  # fmt: skip
    """Fit one probe a layer at given penalties.

    `x` (layers, words, features), an array of any float type (a memory map too) or a tensor; `y`
    (words,) class ids below `classes`. `l1`, `l2`: numbers, or one a layer; activations of a single
    layer are shared by as many probes as there are penalties. A layer is done when its objective is
    within `tolerance` of the minimum, relatively, by the duality gap; `converged` says which were
    before `max_iterations`. A GPU solves all layers together, a CPU one by one, in its caches, each
    from the solution of the one before, which residual connections make near: a quarter fewer
    iterations over MiniLM-L6's seven layers. Raises HealingError for what cannot be used.
    """
    layers, words, _ = shape_of(x, "activations")
    device = pick_device(device)
    y = np.asarray(y)
    if y.shape != (words,) or y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= classes:
        raise HealingError(f"labels must be {words} class ids from 0 to {classes - 1}, one a word")
    ids = torch.from_numpy(y.astype(np.int64)).to(device)
    pairs = [_penalty(p) for p in zip(*np.broadcast_arrays(*np.atleast_1d(l1, l2)), strict=True)]
    problems = max(layers, len(pairs))
    if len(pairs) not in (1, problems) or layers not in (1, problems):
        raise HealingError(f"got {len(pairs)} penalties for {layers} layers: need one, or as many")
    penalties = torch.tensor(pairs * (problems // len(pairs)), device=device)
    shared, start = layers < problems, None
    parts, means, scales = [], [], []
    at_once = 1 if device.type == "cpu" else layers
    for first in range(0, layers, at_once):
        ready = [_standardised(x, i, device) for i in range(first, first + at_once)]
        own = penalties if shared else penalties[first : first + at_once]
        layer = [0] * problems if shared else list(range(at_once))
        on = [measured(z) for z, _, _ in ready]
        given = Problems(on, layer, ids.expand(len(own), words), own, classes)
        parts.append(solve(given, tolerance, max_iterations, start))
        start = parts[-1].weight, parts[-1].bias
        means += [mean for _, mean, _ in ready]
        scales += [scale for _, _, scale in ready]
    found = {name: value.cpu().numpy() for name, value in vars(joined(parts)).items()}
    mean, scale = (torch.stack(s * (problems // layers)).cpu().numpy() for s in (means, scales))
    return Probes(**found, mean=mean, scale=scale)


# --- the choice of a penalty ---------------------------------------------------------------------


def held_out(groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which words are held out, (words,): whole groups, about that share of them, at least one."""
    names, index = np.unique(groups, return_inverse=True)
    if len(names) < 2 or not 0 < share < 1:
        raise HealingError(
            f"cannot hold out {share!r} of {len(names)} groups (sentences): "
            "need at least 2 and a share between 0 and 1"
        )
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    chosen = np.zeros(len(names), dtype=bool)
    chosen[np.random.default_rng(seed).permutation(len(names))[:count]] = True
    return chosen[index]


def _clearly_lower(losses: torch.Tensor, than: torch.Tensor) -> bool:
    """By over two standard errors, word by word, so that noise does not pass for signal."""
    gain = than - losses
    return bool(gain.mean() > 2 * gain.std(correction=0) / len(gain) ** 0.5)


def _fit_chosen(
    x: list[torch.Tensor], targets: torch.Tensor, fit: int, classes: int,
    path: list[tuple[float, float]], solver: dict[str, Any], bar: Progress | None,
) -> tuple[Solution, list[tuple[float, float]]]:  # fmt: skip
    """Choose every probe's penalty on the words from `fit` on, then fit it on all words.

    `x`: standardised activations, a tensor (words, features) a layer; `targets` (labellings,
    words). Problems are ordered by layer, then by labelling. From the strongest penalty on each fit
    starts from the one before, and a probe leaves the path after `PATIENCE` that do not help. To
    compare losses ten times the tolerance is enough.
    """
    device, labellings = targets.device, len(targets)
    layer = [i for i in range(len(x)) for _ in range(labellings)]
    targets = targets.repeat(len(x), 1)  # (problems, words)
    problems = len(targets)

    def fitted(rows: list[int], layers: list[Layer], pairs: list, start: Any, **solver: Any):
        wanted = targets[rows, : len(layers[0].x)]
        penalties = torch.tensor(pairs, device=device)
        given = Problems(layers, [layer[row] for row in rows], wanted, penalties, classes)
        return solve_in_groups(given, start=start, **solver)

    rows, chosen, start = list(range(problems)), [path[0]] * problems, None
    if len(path) > 1:
        inner = [measured(z[:fit]) for z in x]
        loose = {**solver, "tolerance": 10 * solver["tolerance"]}
        best, since = [None] * problems, [0] * problems  # best: losses (words held out,)
        weight = torch.empty(problems, classes, x[0].shape[1], device=device)
        bias = torch.empty(problems, classes, device=device)
        for penalty in path:
            found = fitted(rows, inner, [penalty] * len(rows), start, **loose)
            stay = []
            for j, row in enumerate(rows):
                scores = torch.addmm(found.bias[j], x[layer[row]][fit:], found.weight[j].T)
                loss = F.cross_entropy(scores, targets[row, fit:], reduction="none")
                since[row] += 1
                if best[row] is None or _clearly_lower(loss, best[row]):
                    best[row], since[row], chosen[row] = loss, 0, penalty
                    weight[row], bias[row] = found.weight[j], found.bias[j]
                if since[row] < PATIENCE:
                    stay.append(j)
            if bar is not None:
                bar.update(note=f"penalty {penalty[0]:g}, {len(stay)} of {problems} going on")
            if not stay:
                break
            rows = [rows[j] for j in stay]
            start = found.weight[stay], found.bias[stay]
        start = weight, bias
    whole = [measured(z) for z in x]
    return fitted(list(range(problems)), whole, chosen, start, **solver), chosen


# --- the table -----------------------------------------------------------------------------------


def column(values: Any, words: int, what: str, labels: bool = False) -> np.ndarray:
    """`values` as an array (words,); every word its own value where it is None."""
    values = np.arange(words) if values is None else np.asarray(values)
    if values.shape != (words,):
        got = "x".join(map(str, values.shape))
        raise HealingError(f"{what} must be one value a word: {words}, got {got}")
    if labels and values.dtype.kind == "O" and all(isinstance(v, str) for v in values):
        values = values.astype(str)
    if labels and values.dtype.kind not in "iuU":
        raise HealingError(f"{what} must be strings or integers, got {values.dtype}")
    return values


def control_labels(words: Iterable[str], frequencies: Sequence[float], seed: int = 0) -> np.ndarray:
    """Class ids (words,) of a control task: a random label a word *type* (Hewitt and Liang 2019,
    section 2).

    The label of a type is drawn with probability proportional to `frequencies` (classes,), the
    counts of the real labels, and is a function of the word's spelling and the seed only: not of
    the order, nor of which other words there are, so a test word unseen in training has its own.
    """
    counts = np.asarray(frequencies, dtype=np.float64)
    edges = np.cumsum(counts / counts.sum())
    types, index = np.unique([str(word) for word in words], return_inverse=True)
    draws = [
        int.from_bytes(hashlib.blake2b(f"{seed}\0{word}".encode(), digest_size=8).digest(), "big")
        for word in types.tolist()
    ]
    uniform = np.array([draw / 2**64 for draw in draws])
    ids = np.searchsorted(edges, uniform, side="right").clip(max=np.flatnonzero(counts).max())
    return ids[index]


def probe_layers(
    activations: Any, labels: Any, test_activations: Any, test_labels: Any,
    words: Sequence[str] | None = None, test_words: Sequence[str] | None = None, groups: Any = None,
    *, penalties: Iterable[Penalty] = DEFAULT_PENALTIES, dev: float = 0.1, seed: int = 0,
    tolerance: float = 1e-3, max_iterations: int = 5000, device: Any = None, memory: int = 2**31,
    progress: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """How well each layer's activations tell the labels of words (or sentences) never fitted on.

    `activations` (layers, words, features) and `test_activations`, arrays of any float type, memory
    maps or tensors; `labels`, `test_labels` (words,), strings or integers; `groups` (words,), the
    sentence of each training word. A fraction `dev` of the groups, drawn by `seed`, is kept whole
    for choosing each layer's penalty, which is then fitted on all words. Features are standardised
    over all words: that holds no label. Layers are fitted together in blocks whose training
    activations take at most `memory` bytes, but at least one layer at a time.

    Returns one row a layer: `accuracy` and `macro_f1` on test (over the labels that occur there or
    were answered; one that training never shows is an error), `majority`: what the most frequent
    training label scores there, `control_accuracy`: a probe's for the task of `control_labels`, its
    penalty chosen the same way, and `selectivity`, accuracy minus that (both NaN without `words`
    and `test_words`); of the labels' probe the chosen `l1` and `l2`, `nonzero` weights,
    `iterations` and whether they `converged`; `n_train`, `n_test` words, `n_classes` in training.

    Raises HealingError for shapes that do not match, labels of a single class, and activations that
    are not finite.
    """
    from sklearn.metrics import f1_score

    layers, n_train, features = shape = shape_of(activations, "activations")
    n_test = shape_of(test_activations, "test activations", shape)[1]
    labels = column(labels, n_train, "labels", labels=True)
    test_labels = column(test_labels, n_test, "test labels", labels=True)
    if (labels.dtype.kind == "U") != (test_labels.dtype.kind == "U"):
        raise HealingError(f"labels are {labels.dtype} but test labels are {test_labels.dtype}")
    if (words is None) != (test_words is None):
        raise HealingError("control tasks need both words and test_words; got only one of them")
    names, ids = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise HealingError(f"every training label is {labels[0].item()!r}: a probe needs two")
    # Strongest first: each solution starts from the one before.
    path = sorted({_penalty(p) for p in penalties}, key=lambda p: (-sum(p), -p[0]))
    if not path or not tolerance > 0:
        raise HealingError(f"need at least one penalty and a tolerance above 0, got {tolerance}")
    order, fit = np.arange(n_train), n_train
    if len(path) > 1:
        held = held_out(column(groups, n_train, "groups"), dev, seed)
        order, fit = np.argsort(held, kind="stable"), int((~held).sum())
    device = pick_device(device)
    solver = {"tolerance": tolerance, "max_iterations": max_iterations}

    counts = np.bincount(ids)
    majority = float((test_labels == names[counts.argmax()]).mean())
    targets = [ids]
    if words is not None:
        targets.append(control_labels(column(words, n_train, "words"), counts, seed))
        test_words = column(test_words, n_test, "test words")
        test_control = torch.from_numpy(control_labels(test_words, counts, seed))
    targets = torch.from_numpy(np.stack(targets)[:, order]).to(device)  # (labellings, words)

    rows, steps = [], len(path) + 1
    size = max(1, int(memory) // (4 * n_train * features))
    blocks = [range(i, min(i + size, layers)) for i in range(0, layers, size)]
    with Progress(len(blocks) * steps, "probes") if progress else contextlib.nullcontext() as bar:
        for number, block in enumerate(blocks):
            ready = [_standardised(activations, i, device, order) for i in block]
            x = [z for z, _, _ in ready]
            found, chosen = _fit_chosen(x, targets, fit, len(names), path, solver, bar)
            if bar is not None:
                bar.update((number + 1) * steps - bar.done)
            for j, (layer, (_, mean, scale)) in enumerate(zip(block, ready, strict=True)):
                z = _float32(test_activations[layer]).to(device)
                if not torch.isfinite(z).all():
                    raise HealingError(f"test activations of layer {layer} hold values not finite")
                z = (z - mean) / scale
                p = j * len(targets)  # the probe of the labels; behind it that of the control task
                answers = [
                    torch.addmm(found.bias[i], z, found.weight[i].T).argmax(dim=1).cpu()
                    for i in range(p, p + len(targets))
                ]
                said = names[answers[0].numpy()]
                accuracy, control = float((said == test_labels).mean()), float("nan")
                if words is not None:
                    control = (answers[1] == test_control).float().mean().item()
                f1 = f1_score(test_labels, said, average="macro", zero_division=0)
                rows.append({
                    "layer": layer, "accuracy": accuracy, "macro_f1": f1, "majority": majority,
                    "control_accuracy": control, "selectivity": accuracy - control,
                    "l1": chosen[p][0], "l2": chosen[p][1],
                    "nonzero": int((found.weight[p] != 0).sum()),
                    "iterations": int(found.iterations[p]), "converged": bool(found.converged[p]),
                    "n_train": n_train, "n_test": n_test, "n_classes": len(names),
                })  # fmt: skip
    return pd.DataFrame(rows)
