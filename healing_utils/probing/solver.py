"""The solver of the probes: many multinomial logistic regressions with an elastic net at once.

For features x, weights W (classes, features) and a free bias b a problem is to minimise

    mean over words of cross-entropy(W x + b, label)  +  l1 |W|_1  +  l2 / 2 |W|_2^2

A batch of problems is solved together by accelerated proximal gradient descent (FISTA: Beck and
Teboulle 2009, *SIAM J. Imaging Sciences* 2(1), section 4) with

- a step per problem and class: a class's curvature is taken as proportional to the standard
  deviation of its label, and grows until a quadratic model of that curvature bounds the loss
  (Scheinberg, Goldfarb and Bai 2014, *Found. Comput. Math.* 14);
- the features' correlations as the model's metric, as they bound the Hessian of the loss (Boehning
  1992, *Ann. Inst. Statist. Math.* 44(1), theorem 5.3): half the passes over the words. The
  proximal step in that metric has no closed form; some steps of FISTA, without words, will do;
- momentum that starts anew when it points uphill (O'Donoghue and Candes 2015, *Found. Comput.
  Math.* 15, section 3.2);
- a bound on how far the objective is above its minimum, from Fenchel duality, as the stopping rule;
  a problem that has met it leaves the batch.

The logits of an extrapolated point are the extrapolated logits, so an iteration costs two matrix
products a layer, however many problems (penalties, labellings) share the layer's activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch

CHECK = 3  # iterations between looks at the stopping rule: each waits for the device
CURVATURE_UP, CURVATURE_DOWN = 1.5, 0.98
TOGETHER = 1 << 22  # activations and scores that a CPU keeps in its caches between two passes
INNER_STEPS = 5  # for the proximal step in the metric: with fewer or more of them it takes longer


@dataclass(frozen=True)
class Layer:
    """`x`: standardised activations (words, features); `metric`: the mean of their x xᵀ,
    (features, features), or None for the identity; `largest`: a bound on its eigenvalues."""

    x: torch.Tensor
    metric: torch.Tensor | None
    largest: float


@dataclass(frozen=True)
class Problems:
    """Problem p reads `layers[layer[p]]` and wants `targets[p]` (words,), ids below `classes`, at
    `penalties[p]`, l1 and l2; `layer` is ascending."""

    layers: list[Layer]
    layer: list[int]
    targets: torch.Tensor
    penalties: torch.Tensor
    classes: int


@dataclass
class Solution:
    """weight (problems, classes, features), bias (problems, classes), the rest (problems,)."""

    weight: torch.Tensor
    bias: torch.Tensor
    objective: torch.Tensor
    gap: torch.Tensor
    iterations: torch.Tensor
    converged: torch.Tensor


Start = tuple[torch.Tensor, torch.Tensor] | None  # weight, bias


def joined(parts: list[Solution]) -> Solution:
    return Solution(
        *(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Solution))
    )


def proximal_step(point: torch.Tensor, step: torch.Tensor, l1: torch.Tensor) -> torch.Tensor:
    """The minimiser over w of ``(w - point)^2 / (2 step) + l1 |w|``, elementwise: exactly zero for
    what is within ``step * l1`` of it."""
    reach = step * l1
    return point - point.clamp(-reach, reach)


def solve_in_groups(
    given: Problems, tolerance: float, max_iterations: int, start: Start = None
) -> Solution:
    """As `solve`; a CPU solves together the layers that it keeps in its caches."""
    if given.targets.device.type != "cpu":
        return solve(given, tolerance, max_iterations, start)
    problems, words = given.targets.shape
    runs = [rows for _, rows in _runs(given.layer)]
    values = words * (given.layers[0].x.shape[1] * len(runs) + given.classes * problems)
    group = max(1, TOGETHER * len(runs) // values)
    parts = []
    for first in range(0, len(runs), group):
        some = runs[first : first + group]
        rows = slice(some[0].start, some[-1].stop)
        own = replace(
            given, layer=given.layer[rows], targets=given.targets[rows],
            penalties=given.penalties[rows],
        )  # fmt: skip
        begin = None if start is None else (start[0][rows], start[1][rows])
        parts.append(solve(own, tolerance, max_iterations, begin))
    return joined(parts)


def _runs(layer: list[int]) -> Iterator[tuple[int, slice]]:
    """The problems of each layer, which share its matrix products."""
    start = 0
    for end in range(1, len(layer) + 1):
        if end == len(layer) or layer[end] != layer[start]:
            yield layer[start], slice(start, end)
            start = end


def solve(given: Problems, tolerance: float, max_iterations: int, start: Start = None) -> Solution:
    """Minimise each problem's objective to a relative gap of `tolerance`.

    Notation, as in Beck and Teboulle: w the iterate, v the extrapolated point, theta the momentum's
    counter; z and vz are their logits. Arrays over words are (problems, classes, words).
    """
    device = given.targets.device
    problems, words = given.targets.shape
    layers, features, classes = given.layers, given.layers[0].x.shape[1], given.classes
    mass = torch.full((words,), 1 / words, device=device)  # of a word in the mean
    layer = given.layer
    targets = given.targets[:, None]  # (problems, 1, words)
    l1, l2 = given.penalties.T[:, :, None, None]
    largest = torch.tensor([layers[i].largest for i in layer], device=device)[:, None, None]

    prior = torch.zeros(problems, classes, device=device)
    prior.scatter_add_(1, given.targets, mass.expand(problems, words))
    prior = prior.clamp_min(0.1 / words)  # a class may never occur
    prior /= prior.sum(dim=1, keepdim=True)
    shape = (prior * (1 - prior)).sqrt()[:, :, None]  # of the curvature, over classes
    curvature = torch.full((problems, 1, 1), 0.5, device=device)
    w, b = start or (torch.zeros(problems, classes, features, device=device), prior.log())

    def logits(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(layer), classes, words, device=device)
        for i, rows in _runs(layer):
            flat = w[rows].reshape(-1, features)
            torch.addmm(b[rows].reshape(-1, 1), flat, layers[i].x.T, out=out[rows].view(-1, words))
        return out

    def weight_gradient(residual: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(layer), classes, features, device=device)
        for i, rows in _runs(layer):
            torch.mm(residual[rows].view(-1, words), layers[i].x, out=out[rows].view(-1, features))
        return out

    def measured(w: torch.Tensor) -> torch.Tensor:
        """`w` times its layer's metric."""
        if layers[0].metric is None:  # for all layers, which have as many features
            return w
        parts = [w[rows].flatten(0, 1) @ layers[i].metric for i, rows in _runs(layer)]
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
        gradient, bias_gradient = weight_gradient(residual), residual.sum(dim=2)

        if check:
            # The probabilities at v are a feasible point of the dual problem, but for the bias.
            # Elementwise the distance from the primal is h(v) + h*(-gradient) + v gradient, with h
            # the elastic net. A bias that settles moves the probabilities too, by a step of squared
            # length `slack` in the loss's curvature: that is its own share, and times the distance
            # from the minimum in that metric the share of the weights; where it is small.
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
        if layers[0].metric is None:
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
                (v, torch.lerp(w, new, beyond_new)), (vb, torch.lerp(b, new_b, beyond_new[..., 0])),
                (vz, torch.lerp(z, new_z, beyond_new)), (w, new), (b, new_b), (z, new_z),
                (theta, theta_next), (w_loss, new_loss),
            )
        )  # fmt: skip
    return out
