"""The solver of the probes: many multinomial logistic regressions with an elastic net at once.

For features x, weights W (classes, features) and a free bias b a problem is to minimise

    mean over words of cross-entropy(W x + b, label)  +  l1 |W|_1  +  l2 / 2 |W|_2^2

by FISTA (Beck and Teboulle 2009, *SIAM J. Imaging Sciences* 2(1), section 4), with

- a step per problem and class: a class's curvature is proportional to the standard deviation of its
  label, and grows until it bounds the loss (Scheinberg et al. 2014, *Found. Comput. Math.* 14);
- the features' correlations as metric, as they bound the Hessian (Boehning 1992, *Ann. Inst.
  Statist. Math.* 44(1), theorem 5.3): half the passes over the words. The proximal step in it has
  no closed form; some steps of FISTA, without words, will do;
- momentum that starts anew uphill (O'Donoghue and Candes 2015, *Found. Comput. Math.* 15, 3.2);
- a bound on the minimum, from Fenchel duality: a problem that is near enough leaves the batch.

The logits of an extrapolated point are the extrapolated logits, so an iteration costs two matrix
products a layer, however many problems share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from healing_utils.base.errors import HealingError

CHECK = 3  # iterations between looks at the stopping rule: each waits for the device
CURVATURE_UP, CURVATURE_DOWN = 1.5, 0.98
TOGETHER = 1 << 22  # activations and scores that a CPU keeps in its caches between two passes
INNER_STEPS = 5  # for the proximal step in the metric: with fewer or more of them it takes longer
BLOCK = 1 << 26  # values whose squares and products are in memory at a time
CORRELATED = 4096  # features up to which their correlations are worth a product with themselves


class Layer(NamedTuple):
    x: torch.Tensor  # standardised activations (words, features)
    metric: torch.Tensor | None  # the mean of their x xᵀ, (features, features); None: the identity
    largest: float  # a bound on its eigenvalues


class Problems(NamedTuple):
    """Problem p reads `layers[layer[p]]`, `layer` ascending, and wants `targets[p]` (words,), ids
    below `classes`, at `penalties[p]`, l1 and l2; `start`: weights and biases to begin at."""

    layers: list[Layer]
    layer: list[int]
    targets: torch.Tensor
    penalties: torch.Tensor
    classes: int
    start: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class Solution:
    weight: torch.Tensor  # (problems, classes, features)
    bias: torch.Tensor  # (problems, classes)
    objective: torch.Tensor  # in nats a word; this and what follows (problems,)
    gap: torch.Tensor  # how far above the minimum it is at most
    iterations: torch.Tensor
    converged: torch.Tensor


def measured(x: torch.Tensor) -> Layer:
    if x.shape[1] > CORRELATED:
        return Layer(x, None, 1.0)
    products = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for some in x.split(max(1, BLOCK // x.shape[1])):
        products.addmm_(some.T, some, alpha=1 / len(x))
    # By Gelfand's formula: the norm of a high power bounds the power of the largest eigenvalue.
    largest, power = 1.0, products
    for doublings in range(5):
        if doublings:
            power = power @ power
        norm = float(power.norm())
        largest *= norm ** (0.5**doublings)
        power = power / (norm or 1.0)
    return Layer(x, products, 1.01 * largest)


def solve(given: Problems, tolerance: float, max_iterations: int) -> Solution:
    """Minimise each problem's objective to a relative gap of `tolerance`. A CPU solves together the
    layers that it keeps in its caches, a GPU all of them."""
    if not tolerance > 0 or max_iterations < 1:
        raise HealingError("need a tolerance above 0 and max_iterations of at least 1")
    problems, words = given.targets.shape
    runs = [rows for _, rows in _runs(given.layer)]
    group = len(runs)
    if given.targets.device.type == "cpu":
        values = words * (given.layers[0].x.shape[1] * len(runs) + given.classes * problems)
        group = max(1, TOGETHER * len(runs) // values)
    parts = []
    for first in range(0, len(runs), group):
        some = runs[first : first + group]
        rows = slice(some[0].start, some[-1].stop)
        start = given.start and (given.start[0][rows], given.start[1][rows])
        own = given.layer[rows], given.targets[rows], given.penalties[rows], given.classes, start
        parts.append(vars(_solve(Problems(given.layers, *own), tolerance, max_iterations)))
    return Solution(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _runs(layer: list[int]) -> Iterator[tuple[int, slice]]:
    """The problems of each layer, which share its matrix products."""
    start = 0
    for number, same in groupby(layer):
        stop = start + len(list(same))
        yield number, slice(start, stop)
        start = stop


def _solve(given: Problems, tolerance: float, max_iterations: int) -> Solution:
    """Beck and Teboulle's notation: w the iterate, v the extrapolated point, theta the momentum's
    counter; z and vz are their logits, (problems, classes, words)."""
    layers, layer, targets, penalties, classes, start = given
    device, (problems, words), features = targets.device, targets.shape, layers[0].x.shape[1]
    mass = torch.full((words,), 1 / words, device=device)  # of a word in the mean
    prior = torch.zeros(problems, classes, device=device)
    prior.scatter_add_(1, targets, mass.expand(problems, words))
    prior = prior.clamp_min(0.1 / words)  # a class may never occur
    prior /= prior.sum(dim=1, keepdim=True)
    shape = (prior * (1 - prior)).sqrt()[:, :, None]  # of the curvature, over classes
    curvature = torch.full((problems, 1, 1), 0.5, device=device)
    targets = targets[:, None]  # (problems, 1, words)
    l1, l2 = penalties.T[:, :, None, None]
    largest = torch.tensor([layers[i].largest for i in layer], device=device)[:, None, None]

    def logits(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(layer), classes, words, device=device)
        for i, rows in _runs(layer):
            flat = w[rows].reshape(-1, features)
            torch.addmm(b[rows].reshape(-1, 1), flat, layers[i].x.T, out=out[rows].view(-1, words))
        return out

    def times(values: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
        """`values` (problems, classes, n) times each one's layer's matrix (n, features)."""
        out = torch.empty(len(layer), classes, features, device=device)
        for i, rows in _runs(layer):
            torch.mm(values[rows].flatten(0, 1), matrices[i], out=out[rows].view(-1, features))
        return out

    x, metrics = [own.x for own in layers], [own.metric for own in layers]
    plain = metrics[0] is None  # for all layers, which have as many features

    def cross_entropy(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(problems,) in float64, and the log-probabilities."""
        log_p = torch.log_softmax(z, dim=1)
        return -(log_p.gather(1, targets)[:, 0] * mass).sum(dim=1, dtype=torch.float64), log_p

    def penalty(w: torch.Tensor) -> torch.Tensor:
        return (l1 * w.abs() + l2 / 2 * w.square()).sum(dim=(1, 2), dtype=torch.float64)

    w, b = start or (torch.zeros(problems, classes, features, device=device), prior.log())
    z = logits(w, b)
    w_loss = cross_entropy(z)[0]
    # A start that is worse than no weights at all is not taken; 1e-6 is more than rounding.
    poor = w_loss + penalty(w) > -(prior * prior.log()).sum(dim=1) + 1e-6
    if poor.any():
        w, b = torch.where(poor[:, None, None], 0.0, w), torch.where(poor[:, None], prior.log(), b)
        z = logits(w, b)
        w_loss = cross_entropy(z)[0]
    bound = torch.full_like(w_loss, -torch.inf)  # under the minimum
    v, vb, vz, theta = w, b, z, torch.ones_like(curvature)
    counts = torch.zeros(problems, dtype=torch.int64, device=device)
    out = Solution(*map(torch.empty_like, (w, b, w_loss, w_loss)), counts, counts.bool())
    where = torch.arange(problems, device=device)  # problems still in the batch

    for iteration in range(max_iterations + 1):
        loss, log_p = cross_entropy(vz)
        p = log_p.exp_()
        check = iteration % CHECK == 0 or iteration == max_iterations
        spread = (p * (1 - p)) @ mass if check else None  # (problems, classes)
        p.scatter_(1, targets, -1.0, reduce="add")
        residual = p.mul_(mass)
        gradient, bias_gradient = times(residual, x), residual.sum(dim=2)

        if check:
            # The probabilities at v are feasible in the dual problem, but for the bias: elementwise
            # the distance from the primal is h(v) + h*(-gradient) + v gradient, h the elastic net.
            # A bias that settles moves them too, by a step of squared length `slack` in the loss's
            # curvature: that, and times the distance from the minimum the share of the weights.
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
                ) = (tensor[stay] for tensor in (
                    where, targets, l1, l2, largest, shape, curvature, w, b, z, v, vb, vz, theta,
                    w_loss, bound, loss, gradient, bias_gradient,
                ))  # fmt: skip

        scale = curvature * shape  # (problems, classes, 1), of the metric
        step = 1 / (scale * largest + l2)
        reach = step * l1  # exactly zero is what is within it of zero
        if plain:
            point = v - step * (gradient + l2 * v)
            new = point - point.clamp(-reach, reach)
        else:
            # FISTA on the model: its gradient at a point is fixed + scale metric(point) + l2 point.
            there = times(v, metrics)
            fixed = step * (scale * there - gradient)
            shrunk, scaled = 1 - step * l2, step * scale
            new = point = v
            for k in range(INNER_STEPS):
                down = torch.addcmul(fixed, shrunk, point)
                down = down.addcmul_(scaled, times(point, metrics) if k else there, value=-1)
                last, new = new, down - down.clamp(-reach, reach)
                point = torch.lerp(last, new, 1 + k / (k + 3))
        new_b = vb - bias_gradient / scale[:, :, 0]
        new_z = logits(new, new_b)
        new_loss = cross_entropy(new_z)[0]
        move, move_b = new - v, new_b - vb
        pull = scale * (move if plain else times(move, metrics))
        beyond = new_loss - loss - (gradient * move).sum(dim=(1, 2), dtype=torch.float64)
        beyond -= (bias_gradient * move_b).sum(dim=1)
        model = (pull * move).sum(dim=(1, 2)) / 2
        model += (scale[:, :, 0] * move_b.square()).sum(dim=1) / 2
        # Where the model does not bound the loss, but for the rounding error of the two losses, the
        # step is taken again, shorter.
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
                (v, torch.lerp(w, new, beyond_new)), (vb, torch.lerp(b, new_b, beyond_new[..., 0])),
                (vz, torch.lerp(z, new_z, beyond_new)), (w, new), (b, new_b), (z, new_z),
                (theta, theta_next), (w_loss, new_loss),
            )
        )  # fmt: skip
    return out
