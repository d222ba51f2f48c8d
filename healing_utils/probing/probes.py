"""Diagnostic classifiers, layer by layer: what can be read linearly from a model's activations.

A probe is multinomial logistic regression with an elastic net. For one layer, activations x
standardised over the training words, weights W (classes, features) and a free bias b minimise

    mean over words of cross-entropy(W x + b, label)  +  l1 |W|_1  +  l2 / 2 |W|_2^2

which is scikit-learn's ``LogisticRegression(solver="saga")`` with ``C = 1 / (words (l1 + l2))`` and
``l1_ratio = l1 / (l1 + l2)``.

All probes of a call are one batch of convex problems, solved together by accelerated proximal
gradient descent (FISTA: Beck and Teboulle 2009, *SIAM J. Imaging Sciences* 2(1), section 4) with

- a step per problem and class: a class's curvature is taken as proportional to the standard
  deviation of its label, and the step grows until a quadratic model of that curvature no longer
  bounds the loss (Scheinberg, Goldfarb and Bai 2014, *Foundations of Computational Mathematics*
  14);
- the features' correlations as the model's metric, where they are few enough, as they bound the
  Hessian of the loss (Boehning 1992, *Annals of the Institute of Statistical Mathematics* 44(1),
  theorem 5.3): half the passes over the words. The proximal step in that metric has no closed form;
  some steps of FISTA on it, which touch no words, are near enough;
- momentum that starts anew when it points uphill (O'Donoghue and Candes 2015, *Foundations of
  Computational Mathematics* 15, section 3.2);
- the proximal step of the elastic net, so that weights are exactly zero, not merely small;
- a bound on how far the objective is above its minimum, from Fenchel duality, as the stopping rule;
  a problem that has met it leaves the batch.

The logits of an extrapolated point are the extrapolated logits, so an iteration costs two matrix
products a layer, however many problems (penalties, labellings) share the layer's activations. A CPU
solves together the layers that it keeps in its caches: large ones each alone; at given penalties
each then starts from the solution of the one before, which residual connections make near: a
quarter fewer iterations over MiniLM-L6's seven layers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from healing_utils.base.errors import HealingError
from healing_utils.base.progress import Progress
from healing_utils.healing.shortcuts import keep_freed_memory
from healing_utils.healing.training import pick_device

# (l1, l2), strongest first. At the strongest every weight is zero: the majority label. With l2 ten
# times l1 the problem is far better conditioned than with as much of both, and as accurate.
DEFAULT_PENALTIES = tuple((l1, 10 * l1) for l1 in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001))
CHECK = 3  # iterations between looks at the stopping rule: each waits for the device
CURVATURE_UP, CURVATURE_DOWN = 1.5, 0.98
BLOCK = 1 << 26  # values whose squares and products are in memory at a time
TOGETHER = 1 << 22  # activations and scores that a CPU keeps in its caches between two passes
CORRELATED = 4096  # features up to which their correlations are worth a product with themselves
INNER_STEPS = 5  # for the proximal step under them: with fewer or more of them it takes longer
PATIENCE = 2  # penalties in a row that are not clearly better after which a layer leaves the path
COLUMNS = (
    "layer", "accuracy", "macro_f1", "majority", "control_accuracy", "selectivity", "l1", "l2",
    "nonzero", "iterations", "converged", "n_train", "n_test", "n_classes",
)  # fmt: skip

Penalty = float | tuple[float, float]


@dataclass(frozen=True)
class Probes:
    """Fitted probes, one a layer.

    `weight` (layers, classes, features) acts on standardised activations ``(x - mean) / scale``;
    `bias` (layers, classes); `mean`, `scale` (layers, features), the standard deviation over the
    training words, 1 where a feature is constant; such a feature's weight is 0. `objective`
    (layers,) in nats a word, at most `gap` (layers,) above the minimum; `iterations`, `converged`,
    `l1`, `l2` (layers,).
    """

    weight: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    objective: np.ndarray
    gap: np.ndarray
    iterations: np.ndarray
    converged: np.ndarray
    l1: np.ndarray
    l2: np.ndarray

    def scores(self, x: Any) -> np.ndarray:
        """Logits of activations `x` (layers, words, features): (layers, words, classes)."""
        layers, _, features = shape = _shape(x, "activations")
        if (layers, features) != self.mean.shape:
            raise HealingError(
                f"activations are (layers, words, features) = {shape}, but the probes were fitted "
                f"on {self.mean.shape[0]} layers of {self.mean.shape[1]} features"
            )
        out = np.empty((layers, shape[1], self.bias.shape[1]), dtype=np.float32)
        for i in range(layers):
            z = (_float32(x[i]) - torch.from_numpy(self.mean[i])) / torch.from_numpy(self.scale[i])
            w, b = torch.from_numpy(self.weight[i]), torch.from_numpy(self.bias[i])
            out[i] = torch.addmm(b, z, w.T).numpy()
        return out

    def predict(self, x: Any) -> np.ndarray:
        """Class ids, (layers, words); the lower id where two classes tie."""
        return self.scores(x).argmax(axis=-1)


# --- input ---------------------------------------------------------------------------------------


def _shape(x: Any, what: str) -> tuple[int, int, int]:
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) != 3 or 0 in shape:
        raise HealingError(
            f"{what} must be an array (layers, words, features), none of them 0; got "
            f"{shape or type(x).__name__}"
        )
    return shape


def _float32(x: Any) -> torch.Tensor:
    """One layer, (words, features), as a float32 tensor on the CPU; may share memory with `x`."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().float()
    return torch.from_numpy(np.array(x, dtype=np.float32))  # a copy: a memory map may be read-only


def _penalty(penalty: Penalty) -> tuple[float, float]:
    """(l1, l2) of a pair, or of one number that is both. Raises HealingError."""
    pair = tuple(penalty) if isinstance(penalty, Sequence) else (penalty, penalty)
    try:
        l1, l2 = map(float, pair)
    except (TypeError, ValueError):
        l1 = l2 = float("nan")
    if not (0 <= l1 < float("inf") and 0 < l2 < float("inf")):
        raise HealingError(
            f"penalty {penalty!r}: need l1 of at least 0 and l2 above 0 (with l2 at 0 the minimum "
            "need not be unique), as one number for both or as a pair (l1, l2)"
        )
    return l1, l2


def _ids(y: Any, words: int, classes: int) -> torch.Tensor:
    y = np.asarray(y)
    if y.shape != (words,) or y.dtype.kind not in "iu":
        raise HealingError(
            f"labels must be {words} class ids, one a word; got {y.dtype} of shape {y.shape}"
        )
    if classes < 2:
        raise HealingError(f"a probe needs at least 2 classes, got {classes}")
    if y.min() < 0 or y.max() >= classes:
        raise HealingError(f"class ids must be from 0 to {classes - 1}, got {y.min()} to {y.max()}")
    return torch.from_numpy(y.astype(np.int64))


def _own_float32(x: Any) -> torch.Tensor:
    """As `_float32`, in memory of its own."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", torch.float32, copy=True)
    return _float32(x)


def _check_finite(x: torch.Tensor, what: str) -> None:
    """Raise HealingError where `x` (words, features) has NaN or infinity."""
    if torch.isfinite(x.sum()):  # no array of answers as long as all are
        return
    finite = torch.isfinite(x)
    if not finite.all():
        word, feature = (~finite).nonzero()[0].tolist()
        raise HealingError(
            f"{what} have {int((~finite).sum())} values that are not finite, the first at word "
            f"{word}, feature {feature}"
        )


def _block(x: torch.Tensor) -> int:
    """How many words of `x` (words, features) are taken at a time."""
    return max(1, BLOCK // x.shape[1])


def _standardise(
    x: torch.Tensor, layer: int, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(standardised, mean, scale) of one layer's activations (words, features), whose memory is
    used: of all neurons of a large corpus there is room for one copy."""
    if x.device.type == "cpu":
        keep_freed_memory()
    mean = x.mean(dim=0) if weights is None else weights @ x
    if not torch.isfinite(mean).all():
        _check_finite(x, f"activations of layer {layer}")
    x.sub_(mean)
    variance = torch.zeros_like(mean)
    block = _block(x)
    for start in range(0, len(x), block):  # a tenth of torch.var's time
        squares = x[start : start + block].square()
        own = None if weights is None else weights[start : start + block]
        variance += squares.sum(dim=0) / len(x) if own is None else own @ squares
    scale = variance.sqrt()
    # A constant has a standard deviation of some rounding errors. What float16 cannot tell from
    # zero counts as constant too (MiniLM-L6's last layer has two features of about 1e-32).
    constant = (scale <= 1e-6 * mean.abs()) | (scale < 6e-8)
    scale = torch.where(constant, 1.0, scale)
    x.div_(scale)
    if constant.any():
        x[:, constant] = 0
    return x, mean, scale


# --- the solver ----------------------------------------------------------------------------------


def proximal_step(point: torch.Tensor, step: torch.Tensor, l1: torch.Tensor) -> torch.Tensor:
    """The minimiser over w of ``(w - point)^2 / (2 step) + l1 |w|``, elementwise: soft threshold.

    What is within ``step * l1`` of zero becomes exactly zero.
    """
    reach = step * l1
    return point - point.clamp(-reach, reach)


@dataclass(frozen=True)
class _Metric:
    """In which a layer's features are measured: `products` (features, features), the mean of x xᵀ
    over words, or None for the identity; `largest`, a bound on its eigenvalues."""

    products: torch.Tensor | None
    largest: float

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        """`w` (rows, features) times the metric."""
        return w if self.products is None else w @ self.products


def _metric(x: torch.Tensor, weights: torch.Tensor | None) -> _Metric:
    """Of standardised activations (words, features) and the words' weights (words,), None for words
    that count alike."""
    if x.shape[1] > CORRELATED:
        return _Metric(None, 1.0)
    products = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for start in range(0, len(x), _block(x)):
        some = x[start : start + _block(x)]
        if weights is None:
            products.addmm_(some.T, some, alpha=1 / len(x))
        else:
            products.addmm_(some.T * weights[start : start + _block(x)], some)
    # By Gelfand's formula: the norm of a high power bounds the power of the largest eigenvalue.
    largest, power = 1.0, products
    for doublings in range(5):
        if doublings:
            power = power @ power
        norm = float(power.norm())
        if norm == 0:
            return _Metric(products, 0.0)
        largest *= norm ** (0.5**doublings)
        power = power / norm
    return _Metric(products, 1.01 * largest)


@dataclass
class _Problems:
    """Problems that share activations: problem p reads layer[p] and wants targets[p].

    `layer` is ascending, on the CPU; `l1`, `l2` (problems,). `x`: one standardised (words,
    features) tensor a layer; `metric`: one a layer, by `_metric`; `targets` (problems, words);
    `weights` (words,), summing to 1.
    """

    x: list[torch.Tensor]
    metric: list[_Metric]
    layer: torch.Tensor
    targets: torch.Tensor
    l1: torch.Tensor
    l2: torch.Tensor
    weights: torch.Tensor
    classes: int


@dataclass
class _Solution:
    """weight (problems, classes, features), bias (problems, classes), the rest (problems,)."""

    weight: torch.Tensor
    bias: torch.Tensor
    objective: torch.Tensor
    gap: torch.Tensor
    iterations: torch.Tensor
    converged: torch.Tensor


def _solve(
    given: _Problems,
    tolerance: float,
    max_iterations: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> _Solution:
    """Minimise each problem's objective to a relative gap of `tolerance`, from `weight`, `bias`."""
    if given.targets.device.type != "cpu":
        return _solve_together(given, tolerance, max_iterations, weight, bias)
    problems, words = given.targets.shape
    layers = [rows for _, rows in _runs(given.layer.tolist())]
    values = words * (given.x[0].shape[1] * len(layers) + given.classes * problems)
    group = max(1, TOGETHER * len(layers) // values)
    parts = []
    for first in range(0, len(layers), group):
        some = layers[first : first + group]
        rows = slice(some[0].start, some[-1].stop)
        own = replace(
            given, layer=given.layer[rows], targets=given.targets[rows], l1=given.l1[rows],
            l2=given.l2[rows],
        )  # fmt: skip
        start = (None, None) if weight is None or bias is None else (weight[rows], bias[rows])
        parts.append(_solve_together(own, tolerance, max_iterations, *start))
    return _joined(parts)


def _joined(parts: Sequence[_Solution]) -> _Solution:
    return _Solution(
        *(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(_Solution))
    )


def _at_once(layers: int, device: torch.device) -> list[slice]:
    """Layers that are solved together: on a GPU all, on a CPU each alone, while it is in the cache
    and in memory that the one before has left."""
    if device.type != "cpu":
        return [slice(0, layers)]
    return [slice(i, i + 1) for i in range(layers)]


def _runs(layer: list[int]) -> Iterator[tuple[int, slice]]:
    """(layer, its problems): those of one layer are neighbours, and share a matrix product."""
    start = 0
    for end in range(1, len(layer) + 1):
        if end == len(layer) or layer[end] != layer[start]:
            yield layer[start], slice(start, end)
            start = end


def _solve_together(
    given: _Problems,
    tolerance: float,
    max_iterations: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> _Solution:
    """Notation, as in Beck and Teboulle: w the iterate, v the extrapolated point, theta the
    momentum's counter. Arrays over words are (problems, classes, words)."""
    device = given.targets.device
    problems, words = given.targets.shape
    features, classes = given.x[0].shape[1], given.classes
    mass = given.weights  # (words,)
    layer = given.layer.tolist()
    targets = given.targets[:, None]  # (problems, 1, words)
    l1, l2 = given.l1[:, None, None], given.l2[:, None, None]
    largest = torch.tensor([given.metric[i].largest for i in layer], device=device)[:, None, None]

    prior = torch.zeros(problems, classes, device=device)
    prior.scatter_add_(1, given.targets, mass.expand(problems, words))
    prior = prior.clamp_min(0.1 / words)  # a class may never occur
    prior /= prior.sum(dim=1, keepdim=True)
    shape = (prior * (1 - prior)).sqrt()[:, :, None]  # of the curvature, over classes
    curvature = torch.full((problems, 1, 1), 0.5, device=device)
    if weight is None or bias is None:
        weight = torch.zeros(problems, classes, features, device=device)
        bias = prior.log()
    w, b = weight, bias

    def logits(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(layer), classes, words, device=device)
        for i, rows in _runs(layer):
            flat = out[rows].view(-1, words)
            torch.addmm(
                b[rows].reshape(-1, 1), w[rows].reshape(-1, features), given.x[i].T, out=flat
            )
        return out

    def weight_gradient(residual: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(layer), classes, features, device=device)
        for i, rows in _runs(layer):
            torch.mm(residual[rows].view(-1, words), given.x[i], out=out[rows].view(-1, features))
        return out

    def measured(w: torch.Tensor) -> torch.Tensor:
        """`w` times its layer's metric."""
        parts = [given.metric[i](w[rows].flatten(0, 1)) for i, rows in _runs(layer)]
        return torch.cat(parts).view_as(w) if len(parts) > 1 else parts[0].view_as(w)

    def cross_entropy(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(problems,) in float64, and the log-probabilities."""
        log_p = torch.log_softmax(z, dim=1)
        return -(log_p.gather(1, targets)[:, 0] * mass).sum(dim=1, dtype=torch.float64), log_p

    def penalty(w: torch.Tensor) -> torch.Tensor:
        return (l1 * w.abs() + l2 / 2 * w.square()).sum(dim=(1, 2), dtype=torch.float64)

    z = logits(w, b)
    w_loss = cross_entropy(z)[0]
    # A start that is worse than no weights at all is not taken; 1e-6 is more than rounding.
    poor = w_loss + penalty(w) > -(prior * prior.log()).sum(dim=1) + 1e-6
    if poor.any():
        w, b = torch.where(poor[:, None, None], 0.0, w), torch.where(poor[:, None], prior.log(), b)
        z = logits(w, b)
        w_loss = cross_entropy(z)[0]
    bound = torch.full_like(w_loss, -torch.inf)  # under the minimum
    v, vb, vz = w, b, z
    theta = torch.ones_like(curvature)

    out = _Solution(
        torch.empty(problems, classes, features, device=device),
        torch.empty(problems, classes, device=device),
        torch.empty_like(w_loss),
        torch.empty_like(w_loss),
        torch.zeros(problems, dtype=torch.int64, device=device),
        torch.zeros(problems, dtype=torch.bool, device=device),
    )
    where = torch.arange(problems, device=device)  # problems still in the batch

    for iteration in range(max_iterations + 1):
        loss, log_p = cross_entropy(vz)
        p = log_p.exp_()
        check = iteration % CHECK == 0 or iteration == max_iterations
        spread = (p * (1 - p)) @ mass if check else None  # (problems, classes)
        p.scatter_(1, targets, -1.0, reduce="add")
        residual = p.mul_(mass)
        gradient, bias_gradient = weight_gradient(residual), residual.sum(dim=2)

        if check:
            # The probabilities at v are a feasible point of the dual problem, but for the bias.
            # Elementwise the distance from the primal is h(v) + h*(-gradient) + v gradient, with h
            # the elastic net: never negative. A bias that settles moves the probabilities too, by a
            # step of squared length `slack` in the loss's curvature: that is its own share, and
            # times the distance from the minimum in the same metric the share of the weights. To
            # second order, so only where it is small.
            above = (gradient.abs() - l1).clamp_min(0).square() / (2 * l2)
            above += gradient * v + l1 * v.abs() + l2 / 2 * v.square()
            slack = (bias_gradient.square() / spread.clamp_min(1e-12)).sum(dim=1)
            dual = loss + penalty(v) - above.sum(dim=(1, 2), dtype=torch.float64) - slack
            objective = w_loss + penalty(w)
            dual -= (slack * (objective - dual).clamp_min(0)).sqrt()
            near = slack <= tolerance * objective
            bound = torch.where(near, torch.maximum(bound, dual), bound)
            gap = objective - bound
            done = gap <= tolerance * objective
            leaving = done if iteration < max_iterations else torch.ones_like(done)
            if leaving.any():
                rows = where[leaving]
                out.weight[rows], out.bias[rows] = w[leaving], b[leaving]
                out.objective[rows], out.gap[rows] = objective[leaving], gap[leaving]
                out.iterations[rows], out.converged[rows] = iteration, done[leaving]
                stay = (~leaving).nonzero()[:, 0]
                if not len(stay):
                    break
                layer = [layer[i] for i in stay.tolist()]
                (
                    where, targets, l1, l2, largest, shape, curvature, w, b, z, v, vb, vz, theta,
                    w_loss, bound, loss, gradient, bias_gradient,
                ) = (
                    t[stay] for t in (
                        where, targets, l1, l2, largest, shape, curvature, w, b, z, v, vb, vz,
                        theta, w_loss, bound, loss, gradient, bias_gradient,
                    )
                )  # fmt: skip

        scale = curvature * shape  # (problems, classes, 1), of the metric
        step = 1 / (scale * largest + l2)
        if all(given.metric[i].products is None for i in layer):
            new = proximal_step(v - step * (gradient + l2 * v), step, l1)
        else:
            # FISTA on the model: its gradient at a point is fixed + scale metric(point) + l2 point.
            there = measured(v)
            fixed = step * (scale * there - gradient)
            shrunk, scaled = 1 - step * l2, step * scale
            new = point = v
            for k in range(INNER_STEPS):
                down = torch.addcmul(fixed, shrunk, point)
                down = down.addcmul_(scaled, measured(point) if k else there, value=-1)
                last, new = new, proximal_step(down, step, l1)
                point = torch.lerp(last, new, 1 + k / (k + 3))
        new_b = vb - bias_gradient / scale[:, :, 0]
        new_z = logits(new, new_b)
        new_loss = cross_entropy(new_z)[0]
        move, move_b = new - v, new_b - vb
        pull = scale * measured(move)
        beyond = new_loss - loss - (gradient * move).sum(dim=(1, 2), dtype=torch.float64)
        beyond -= (bias_gradient * move_b).sum(dim=1)
        model = (pull * move).sum(dim=(1, 2)) / 2
        model += (scale[:, :, 0] * move_b.square()).sum(dim=1) / 2
        # Where the model does not bound the loss the step is taken again, shorter. The last term is
        # the rounding error of the two losses.
        again = ~(beyond <= model + 1e-6 * loss)[:, None, None]
        ratio = (beyond / model.clamp_min(1e-30)).float().nan_to_num(8.0)[:, None, None]
        curvature = curvature * torch.where(
            again, ratio.clamp(CURVATURE_UP, 8.0), torch.full_like(ratio, CURVATURE_DOWN)
        )
        uphill = (pull * (new - w)).sum(dim=(1, 2), keepdim=True) < 0
        theta_now = torch.where(uphill, 1.0, theta)
        theta_next = (1 + (1 + 4 * theta_now.square()).sqrt()) / 2
        beyond_new = 1 + (theta_now - 1) / theta_next  # how far v is from w to new
        # A GPU would have to be waited for to see that no problem steps again.
        some = device.type != "cpu" or bool(again.any())
        v, vb, vz, w, b, z, theta, w_loss = (
            torch.where(again.view(-1, *[1] * (old.ndim - 1)), old, moved) if some else moved
            for old, moved in (
                (v, torch.lerp(w, new, beyond_new)),
                (vb, torch.lerp(b, new_b, beyond_new[..., 0])),
                (vz, torch.lerp(z, new_z, beyond_new)),
                (w, new),
                (b, new_b),
                (z, new_z),
                (theta, theta_next),
                (w_loss, new_loss),
            )
        )
    return out


# --- fitting -------------------------------------------------------------------------------------


def _per_problem(value: Any, name: str) -> np.ndarray:
    try:
        return np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise HealingError(f"{name} must be a number, or one a layer; got {value!r}") from error


def _check_solver(tolerance: float, max_iterations: int) -> None:
    if not (tolerance > 0 and max_iterations >= 1):
        raise HealingError(
            f"tolerance must be above 0 and max_iterations at least 1; got {tolerance} and "
            f"{max_iterations}"
        )


def fit_probes(
    x: Any,
    y: Any,
    classes: int,
    l1: Any,
    l2: Any,
    *,
    weights: Any = None,
    start: Probes | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 5000,
    device: Any = None,
) -> Probes:
    """Fit one probe a layer at given penalties; all at once.

    `x` (layers, words, features), an array of any float type (a memory map too) or a tensor; `y`
    (words,) class ids below `classes`. `l1`, `l2`: numbers, or one a layer; activations of a single
    layer are shared by as many probes as there are penalties. `weights` (words,): how much a word
    counts, in the loss and in the standardisation; an integer weight is that many copies.
    `start`: probes to start from. A layer is done when its objective is within `tolerance` of the
    minimum, relatively, by the duality gap; `converged` says which were before `max_iterations`.
    Without `start` a layer on a CPU starts from the one before it, where that is better than no
    weights: within the tolerance its weights depend on it.

    Raises HealingError for shapes, ids, penalties or values that cannot be used.
    """
    layers, words, features = _shape(x, "activations")
    _check_solver(tolerance, max_iterations)
    device = pick_device(device)
    ids = _ids(y, words, classes).to(device)
    l1, l2 = np.broadcast_arrays(_per_problem(l1, "l1"), _per_problem(l2, "l2"))
    problems = max(layers, len(l1))
    if len(l1) not in (1, problems) or layers not in (1, problems):
        raise HealingError(f"got {len(l1)} penalties for {layers} layers: need one, or one a layer")
    pairs = [_penalty(pair) for pair in zip(l1.tolist(), l2.tolist(), strict=True)]
    pairs = pairs * (problems // len(pairs))

    mass, unequal = torch.full((words,), 1 / words, device=device), None
    if weights is not None:
        given = np.asarray(weights, dtype=np.float64)
        usable = np.isfinite(given).all() and given.min(initial=0) >= 0 < given.max(initial=0)
        if given.shape != (words,) or not usable:
            raise HealingError(f"weights must be {words} numbers of at least 0, not all of them 0")
        mass = unequal = torch.from_numpy(given / given.sum()).float().to(device)
    weight = bias = None
    if start is not None:
        if start.weight.shape != (problems, classes, features):
            raise HealingError(
                f"start has weights (layers, classes, features) = {start.weight.shape}, but need "
                f"{(problems, classes, features)}"
            )
        weight = torch.from_numpy(start.weight).to(device)
        bias = torch.from_numpy(start.bias).to(device)
    strengths = torch.tensor(pairs, device=device)  # (problems, 2)
    shared = layers < problems
    parts: list[_Solution] = []
    means, scales = [], []
    for some in _at_once(layers, device):
        xs = []
        for i in range(layers)[some]:
            own = _own_float32(x[i]).to(device)
            z, mean, scale = _standardise(own, i, unequal)
            xs.append(z)
            means.append(mean)
            scales.append(scale)
        rows = slice(None) if shared else some
        given = strengths[rows]
        count = len(given)
        begin = None, None
        if weight is not None:
            begin = weight[rows], bias[rows]
        elif parts:  # residual connections: a layer's features are much as before
            begin = parts[-1].weight, parts[-1].bias
        parts.append(
            _solve_together(
                _Problems(
                    xs,
                    [_metric(z, unequal) for z in xs],
                    torch.zeros(count, dtype=torch.long) if shared else torch.arange(count),
                    ids.expand(count, words),
                    given[:, 0],
                    given[:, 1],
                    mass,
                    classes,
                ),
                tolerance,
                max_iterations,
                *begin,
            )
        )
    found = _joined(parts)
    return _probes(found, means * (problems // layers), scales * (problems // layers), pairs)


def _probes(
    found: _Solution,
    means: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    penalties: Sequence[tuple[float, float]],
) -> Probes:
    return Probes(
        found.weight.cpu().numpy(),
        found.bias.cpu().numpy(),
        torch.stack(list(means)).cpu().numpy(),
        torch.stack(list(scales)).cpu().numpy(),
        found.objective.cpu().numpy(),
        found.gap.cpu().numpy(),
        found.iterations.cpu().numpy(),
        found.converged.cpu().numpy(),
        np.array([p[0] for p in penalties]),
        np.array([p[1] for p in penalties]),
    )


def _path(penalties: Iterable[Penalty]) -> list[tuple[float, float]]:
    """The penalties as pairs, strongest first: each solution starts from the one before."""
    if isinstance(penalties, str) or not isinstance(penalties, Iterable):
        raise HealingError(f"penalties must be a list of numbers or pairs, got {penalties!r}")
    pairs = sorted({_penalty(p) for p in penalties}, key=lambda p: (-sum(p), -p[0]))
    if not pairs:
        raise HealingError("penalties are empty: need at least one")
    return pairs


def _inner_split(groups: np.ndarray, dev: float, seed: int) -> tuple[np.ndarray, int]:
    """(order, fit): the words of `order[:fit]` are fitted on, the rest are for choosing.

    About a fraction `dev` of the groups, at least one, is kept for choosing, each group whole.
    """
    if not 0 < dev < 1:
        raise HealingError(f"dev must be a fraction above 0 and below 1, got {dev}")
    names, index = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise HealingError(
            "choosing a penalty needs at least 2 groups (sentences), one to fit on and one to "
            "choose on; got 1"
        )
    kept = min(max(1, round(dev * len(names))), len(names) - 1)
    chosen = np.zeros(len(names), dtype=bool)
    chosen[np.random.default_rng(seed).permutation(len(names))[:kept]] = True
    on_dev = chosen[index]
    return np.argsort(on_dev, kind="stable"), int((~on_dev).sum())


def _clearly_lower(losses: torch.Tensor, than: torch.Tensor) -> bool:
    """Whether the mean of `losses` (words,) is lower by over two standard errors, word by word."""
    gain = than - losses
    return bool(gain.mean() > 2 * gain.std(correction=0) / len(gain) ** 0.5)


def _fit_chosen(
    x: list[torch.Tensor],
    targets: torch.Tensor,
    fit: int,
    classes: int,
    penalties: list[tuple[float, float]],
    tolerance: float,
    max_iterations: int,
    bar: Progress | None = None,
) -> tuple[_Solution, list[tuple[float, float]]]:
    """Choose every probe's penalty on the words from `fit` on, then fit it on all words.

    `x`: standardised activations, a tensor (words, features) a layer; `targets` (labellings,
    words). Problems are ordered by layer, then by labelling. Choosing compares losses on words held
    out, so ten times the tolerance is enough there.
    """
    device, labellings = targets.device, len(targets)
    layer = torch.arange(len(x)).repeat_interleave(labellings)
    targets = targets.repeat(len(x), 1)  # (problems, words)
    problems, words, features = len(targets), targets.shape[1], x[0].shape[1]

    def measure(part: slice) -> tuple[slice, torch.Tensor, list[_Metric]]:
        count = len(range(words)[part])
        weights = torch.full((count,), 1 / count, device=device)
        return part, weights, [_metric(z[part], None) for z in x]

    def solve(rows: list[int], on: tuple, pairs: list, loose: float, weight: Any, bias: Any):
        part, weights, metric = on
        return _solve(
            _Problems(
                [z[part] for z in x],
                metric,
                layer[rows],
                targets[rows, part],
                torch.tensor([p[0] for p in pairs], device=device),
                torch.tensor([p[1] for p in pairs], device=device),
                weights,
                classes,
            ),
            loose * tolerance,
            max_iterations,
            weight,
            bias,
        )

    everyone, weight, bias = list(range(problems)), None, None
    chosen = [penalties[0]] * problems
    if len(penalties) > 1:
        best, since = [None] * problems, [0] * problems  # best: (words of dev,) losses
        weight = torch.empty(problems, classes, features, device=device)
        bias = torch.empty(problems, classes, device=device)
        rows, last, inner = everyone, None, measure(slice(0, fit))
        for penalty in penalties:
            start = (None, None) if last is None else (last.weight, last.bias)
            last = solve(rows, inner, [penalty] * len(rows), 10.0, *start)
            stay = []
            for j, row in enumerate(rows):
                scores = torch.addmm(last.bias[j], x[int(layer[row])][fit:], last.weight[j].T)
                loss = F.cross_entropy(scores, targets[row, fit:], reduction="none")
                since[row] += 1
                if best[row] is None or _clearly_lower(loss, best[row]):
                    best[row], since[row], chosen[row] = loss, 0, penalty
                    weight[row], bias[row] = last.weight[j], last.bias[j]
                if since[row] < PATIENCE:
                    stay.append(j)
            if bar is not None:
                bar.update(note=f"penalty {penalty[0]:g}, {len(stay)} of {problems} going on")
            if not stay:
                break
            rows = [rows[j] for j in stay]
            last.weight, last.bias = last.weight[stay], last.bias[stay]
    return solve(everyone, measure(slice(0, words)), chosen, 1.0, weight, bias), chosen


def choose_penalty(
    x: Any,
    y: Any,
    groups: Any,
    classes: int,
    penalties: Iterable[Penalty] = DEFAULT_PENALTIES,
    *,
    dev: float = 0.1,
    seed: int = 0,
    tolerance: float = 1e-3,
    max_iterations: int = 5000,
    device: Any = None,
) -> Probes:
    """Probes (one a layer) whose penalty is the best of `penalties` on an inner split.

    `x`, `y`, `classes` as for `fit_probes`; `groups` (words,): what must not be divided between the
    two sides of the split, such as the sentence a word stands in; None for every word on its own.
    A fraction `dev` of the groups is kept for choosing, per layer, from the strongest penalty on;
    each fit starts from the one before. A weaker penalty is taken only where it lowers the mean
    cross-entropy on the kept words by more than two standard errors of the paired difference, so
    that noise does not pass for signal; a layer leaves the path after two penalties that do not.
    The chosen penalty is then fitted on all words. Mean and standard deviation of the features are
    those of all words on either side: they hold no label.
    """
    layers, words, _ = _shape(x, "activations")
    _check_solver(tolerance, max_iterations)
    device = pick_device(device)
    ids = _ids(y, words, classes)
    path = _path(penalties)
    order, fit = np.arange(words), words
    if len(path) > 1:
        order, fit = _inner_split(_column(groups, words, "groups"), dev, seed)
    xs, means, scales = zip(
        *(_standardise(_float32(x[i])[order].to(device), i, None) for i in range(layers)),
        strict=True,
    )
    targets = ids[order][None].to(device)
    found, chosen = _fit_chosen(list(xs), targets, fit, classes, path, tolerance, max_iterations)
    return _probes(found, means, scales, chosen)


# --- labels --------------------------------------------------------------------------------------


def _column(values: Any, words: int, what: str) -> np.ndarray:
    """`values` as an array (words,); every word its own value where it is None."""
    if values is None:
        return np.arange(words)
    values = np.asarray(values)
    if values.shape != (words,):
        raise HealingError(
            f"{what} must be one value a word: {words}, got {'x'.join(map(str, values.shape))}"
        )
    return values


def _labels(values: Any, words: int, what: str) -> np.ndarray:
    values = _column(values, words, what)
    if values.dtype.kind == "O" and all(isinstance(v, str) for v in values):
        values = values.astype(str)
    if values.dtype.kind not in "iuU":
        raise HealingError(
            f"{what} must be strings or integers, got {values.dtype}, such as {values[0]!r}"
        )
    return values


def control_labels(words: Iterable[str], frequencies: Sequence[float], seed: int = 0) -> np.ndarray:
    """Class ids of a control task: a random label a word *type* (Hewitt and Liang 2019, section 2).

    The label of a type is drawn with probability proportional to `frequencies` (classes,), the
    counts of the real labels, and is a function of the word's spelling and the seed only: not of
    the order, nor of which other words there are, so a test word unseen in training has its own.
    Returns (words,).
    """
    counts = np.asarray(frequencies, dtype=np.float64)
    if counts.ndim != 1 or not (np.isfinite(counts).all() and counts.min() >= 0 < counts.max()):
        raise HealingError("label frequencies must be a list of numbers of at least 0, not all 0")
    edges = np.cumsum(counts / counts.sum())
    words = np.asarray([str(word) for word in words])
    types, index = np.unique(words, return_inverse=True)
    draws = [
        int.from_bytes(hashlib.blake2b(f"{seed}\0{word}".encode(), digest_size=8).digest(), "big")
        for word in types.tolist()
    ]
    uniform = np.array([draw / 2**64 for draw in draws])
    ids = np.searchsorted(edges, uniform, side="right").clip(max=np.flatnonzero(counts).max())
    return ids[index]


# --- the table -----------------------------------------------------------------------------------


def probe_layers(
    activations: Any,
    labels: Any,
    test_activations: Any,
    test_labels: Any,
    words: Sequence[str] | None = None,
    test_words: Sequence[str] | None = None,
    groups: Any = None,
    *,
    penalties: Iterable[Penalty] = DEFAULT_PENALTIES,
    dev: float = 0.1,
    seed: int = 0,
    tolerance: float = 1e-3,
    max_iterations: int = 5000,
    device: Any = None,
    memory: int = 2**31,
    progress: bool = False,
) -> pd.DataFrame:
    """How well each layer's activations tell the labels of words (or sentences) never fitted on.

    `activations` (layers, words, features) and `test_activations`, arrays of any float type, memory
    maps or tensors; `labels`, `test_labels` (words,), strings or integers; `groups` (words,), the
    sentence of each training word, kept whole when the penalty is chosen (`choose_penalty`; the
    split follows from `seed`). A test label that training never shows cannot be answered, so it
    counts as an error. Layers are converted to float32 and fitted together in blocks whose training
    activations take at most `memory` bytes, but at least one layer at a time.

    Returns one row a layer: `accuracy` and `macro_f1` on test (over the labels that occur there or
    were answered), `majority`: what the most frequent training label scores there,
    `control_accuracy`: a probe's for the control task of `control_labels`, its penalty chosen the
    same way from the same list, and `selectivity`, accuracy minus that (both NaN without `words`
    and `test_words`); the chosen `l1` and `l2`, `nonzero` weights, `iterations` and whether they
    `converged`, for the real labels' probe; `n_train`, `n_test` words and `n_classes` in training.

    Raises HealingError for shapes that do not match, labels of a single class, and activations that
    are not finite.
    """
    from sklearn.metrics import f1_score

    layers, n_train, features = shape = _shape(activations, "activations")
    test_shape = _shape(test_activations, "test activations")
    n_test = test_shape[1]
    if (test_shape[0], test_shape[2]) != (layers, features):
        raise HealingError(
            f"activations are (layers, words, features) = {shape}, test activations {test_shape}: "
            "layers and features must be as many"
        )
    labels = _labels(labels, n_train, "labels")
    test_labels = _labels(test_labels, n_test, "test labels")
    if (labels.dtype.kind == "U") != (test_labels.dtype.kind == "U"):
        raise HealingError(f"labels are {labels.dtype} but test labels are {test_labels.dtype}")
    if (words is None) != (test_words is None):
        raise HealingError("control tasks need both words and test_words; got only one of them")
    names, ids = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise HealingError(
            f"every training label is {names[0].item()!r}: a probe needs two classes"
        )
    _check_solver(tolerance, max_iterations)
    path = _path(penalties)
    order, fit = np.arange(n_train), n_train
    if len(path) > 1:
        order, fit = _inner_split(_column(groups, n_train, "groups"), dev, seed)
    device = pick_device(device)

    counts = np.bincount(ids)
    targets = [ids]
    if words is not None:
        words = _column(words, n_train, "words")
        test_words = _column(test_words, n_test, "test words")
        targets.append(control_labels(words, counts, seed))
        test_control = torch.from_numpy(control_labels(test_words, counts, seed)).to(device)
    targets = torch.from_numpy(np.stack(targets)[:, order]).to(device)  # (labellings, words)
    majority = float((test_labels == names[counts.argmax()]).mean())

    rows = []
    size = max(1, int(memory) // (4 * n_train * features))
    blocks = [range(i, min(i + size, layers)) for i in range(0, layers, size)]
    steps = len(blocks) * (len(path) + 1)
    with Progress(steps, "probes") if progress else contextlib.nullcontext() as bar:
        for number, block in enumerate(blocks):
            xs, means, scales = zip(
                *(_standardise(_float32(activations[i])[order].to(device), i, None) for i in block),
                strict=True,
            )
            found, chosen = _fit_chosen(
                list(xs), targets, fit, len(names), path, tolerance, max_iterations, bar
            )
            if bar is not None:
                bar.update((number + 1) * (len(path) + 1) - bar.done)
            for j, layer in enumerate(block):
                z = _float32(test_activations[layer]).to(device)
                _check_finite(z, f"test activations of layer {layer}")
                z = (z - means[j]) / scales[j]
                answers = [
                    torch.addmm(found.bias[p], z, found.weight[p].T).argmax(dim=1)
                    for p in range(j * len(targets), (j + 1) * len(targets))
                ]  # for the labels and, with words, for the control task
                said = names[answers[0].cpu().numpy()]
                accuracy = float((said == test_labels).mean())
                control = float("nan")
                if words is not None:
                    control = (answers[1] == test_control).float().mean().item()
                p = j * len(targets)
                rows.append(
                    (
                        layer,
                        accuracy,
                        float(f1_score(test_labels, said, average="macro", zero_division=0)),
                        majority,
                        control,
                        accuracy - control,
                        *chosen[p],
                        int((found.weight[p] != 0).sum()),
                        int(found.iterations[p]),
                        bool(found.converged[p]),
                        n_train,
                        n_test,
                        len(names),
                    )
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))
