"""Units, intervals, exact tests, and Holm's correction.

Every number of the study that carries an uncertainty is made here. The unit of inference is a
(task, seed) pair, a damaged model beside its partner of the same task and seed. Inference is over
seeds on the tasks at hand; the test set's own error (`binomial_error`) comes on top.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from healing_utils.base.errors import HealingError

ALPHA = 0.05
MAX_UNITS = 44  # two halves of 2^22 sums each, 32 MB apiece: the last size that is still quick
MAX_PERMUTATIONS = 1_000_000  # listed within a second or two; beyond that they are drawn
DRAWN_PERMUTATIONS = 99_999
LEVEL_DIGITS = 6  # 1/3 read back from text is still 1/3


class Interval(NamedTuple):
    """A mean with its two-sided t-interval over `n` values; bounds are NaN below two values."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Exact(NamedTuple):
    """The p of an exact test, the smallest p that so many units can reach, and whether all
    arrangements were listed or only some were drawn."""

    p: float
    smallest_p: float
    listed: bool = True


def t_interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Mean and Student t-interval of independent values, one per unit. (At three to five values a
    percentile bootstrap covers far less than it says.) Raises HealingError on a missing value."""
    x = _finite(values)
    n = len(x)
    mean = float(x.mean()) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def sign_flip(values: Iterable[float]) -> Exact:
    """Exact one-sided test of a mean above zero: the share of all 2^n ways to flip the signs of n
    units whose sum is at least the observed one. The sums of the two halves of the units are listed
    and matched (2^(n/2) each). Raises HealingError on a missing value and beyond 44 units."""
    x = _finite(values)
    n = len(x)
    if n == 0:
        return Exact(math.nan, math.nan)
    if n > MAX_UNITS:
        raise HealingError(
            f"the exact sign-flip test takes at most {MAX_UNITS} units, got {n}; "
            "average units (for example over seeds) first"
        )
    # Ties are ties although their sums are added in another order.
    least = float(x.sum()) - 1e-9 * float(np.abs(x).sum())
    left, right = _flip_sums(x[: n // 2]), np.sort(_flip_sums(x[n // 2 :]))
    below = np.searchsorted(right, least - left, side="left")
    return Exact(int((len(right) - below).sum()) / 2**n, 1 / 2**n)


def _flip_sums(x: np.ndarray) -> np.ndarray:
    """Sums of x under all 2^len(x) sign flips, shape (2^len(x),)."""
    sums = np.zeros(1)
    for value in x:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def task_permutation(drops: Sequence[Sequence[float]], seed: int = 0) -> Exact:
    """Do tasks differ? Permutation of the task names within each seed of `drops` (tasks, seeds).

    p is the share of permutations with at least the observed variance between the tasks' means.
    Renaming the tasks in every seed alike changes nothing, so the (T!)^(S - 1) that keep the first
    seed's names are listed; where they are too many, some are drawn with `seed` and the observed
    order counts as one more (Phipson and Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9, 39).
    """
    x = np.array([_finite(row) for row in drops])
    tasks, seeds = x.shape
    # The sum over tasks is the same in every order, so the squared sums stand for the variance;
    # without the seeds' own level they lose no digits to it.
    x = x - x.mean(axis=0)
    # Ties are ties although their sums are added in another order.
    least = (x.sum(axis=1) ** 2).sum() - 1e-9 * np.abs(x).sum() ** 2
    count = math.factorial(tasks) ** (seeds - 1)
    if count <= MAX_PERMUTATIONS:
        sums = x[:, 0][None]  # (permutations, tasks)
        for column in x[:, 1:].T:
            orders = np.array(list(itertools.permutations(column)))
            sums = (sums[:, None] + orders[None]).reshape(-1, tasks)
        return Exact(float(((sums**2).sum(axis=1) >= least).mean()), 1 / count)
    rng, extreme = np.random.default_rng(seed), 1
    for start in range(0, DRAWN_PERMUTATIONS, 10_000):
        n = min(10_000, DRAWN_PERMUTATIONS - start)
        sums = rng.permuted(np.broadcast_to(x, (n, tasks, seeds)), axis=1).sum(axis=2)
        extreme += int(((sums**2).sum(axis=1) >= least).sum())
    return Exact(extreme / (DRAWN_PERMUTATIONS + 1), 1 / (DRAWN_PERMUTATIONS + 1), False)


def holm(p_values: Iterable[float]) -> np.ndarray:
    """Holm's step-down correction (1979, Scand. J. Statistics 6, 65-70), in the order given. A
    missing p stays missing and counts: a test not made does not make the others easier."""
    p = np.asarray(list(p_values), dtype=float)
    order = [i for i in np.argsort(p, kind="stable") if not math.isnan(p[i])]
    corrected = np.full(len(p), math.nan)
    steps = (len(p) - np.arange(len(order))) * p[order]
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def units_needed(size: float, power: float = 0.8, alpha: float = ALPHA) -> float:
    """How many paired units a one-sided t-test at `alpha` needs for an effect of `size` standard
    deviations and a `power`, by the noncentral t distribution; NaN for no effect."""
    if math.isnan(size) or size == 0:
        return math.nan
    for n in (*range(2, 1000), *range(1000, 100_000, 500)):
        limit = stats.t.ppf(1 - alpha, n - 1)
        if stats.nct.sf(limit, n - 1, abs(size) * math.sqrt(n)) >= power:
            return float(n)
    return math.inf


def binomial_error(score: float, test_size: float) -> float:
    """Standard error of a share of right answers; NaN of no share. A guide for macro-F1."""
    inside = 0 <= score <= 1 and test_size > 0
    return math.sqrt(score * (1 - score) / test_size) if inside else math.nan


def groups(
    frame: pd.DataFrame, by: Sequence[str], sort: bool = False
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The names and the rows of every group, in the order in which they come first."""
    for key, part in frame.groupby(list(by), sort=sort, dropna=False):
        yield dict(zip(by, key, strict=True)), part


def bounds(name: str, values: Iterable[float]) -> dict[str, float]:
    """Mean and t-interval as the columns `NAME`, `NAME_low` and `NAME_high`."""
    interval = t_interval(values)
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def means(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Mean and t-interval of `value` over the n rows of each group that have one."""
    rows = [
        {**names, **bounds(value, part[value].dropna()), "n": int(part[value].notna().sum())}
        for names, part in groups(frame, by)
    ]
    return pd.DataFrame(rows, columns=[*by, value, f"{value}_low", f"{value}_high", "n"])


def no_duplicates(rows: pd.DataFrame, names: Sequence[str], what: str) -> None:
    twice = rows[rows.duplicated(list(names))]
    if len(twice):
        first = ", ".join(f"{name} {twice.iloc[0][name]}" for name in names)
        raise HealingError(
            f"{count(len(twice), 'duplicate cell')} ({what}); the first is {first}. "
            "Select one recipe, part and strength before comparing."
        )


def as_fraction(level: float) -> Fraction:
    """A level as the fraction it stands for: 0.333333 is 1/3."""
    return Fraction(float(level)).limit_denominator(48)


def layer_tuple(value: Any) -> tuple[int, ...]:
    """Layers as a tuple, from a tuple, a list, or the text that a CSV file holds."""
    if isinstance(value, str):
        value = value.strip("()[] ").replace(",", " ").split()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    return tuple(int(x) for x in value)


def count(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


def _finite(values: Iterable[float]) -> np.ndarray:
    x = np.asarray(list(values), dtype=float)
    bad = int((~np.isfinite(x)).sum())
    if bad:
        raise HealingError(f"{bad} of {len(x)} values are missing or infinite; leave none out here")
    return x


def named_gaps(missing: Iterable[str]) -> list[str]:
    """What is missing as one problem, its first three by name; none where nothing is."""
    missing = list(dict.fromkeys(missing))
    if not missing:
        return []
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return [f"{count(len(missing), 'value')} missing: {shown}"]


class Cells:
    """Values of one model's cells by unit, averaged over corpora; what is missing has a name.

    `rows` has ``state task seed side level`` and `value`, and, of probes, ``corpus column`` and
    ``layer n_layers``. `corpora` are the (corpus, column) pairs expected, ``[()]`` without any.
    """

    def __init__(self, rows: pd.DataFrame, value: str, corpora: Sequence[tuple] = ((),)):
        names = ["state", "task", "seed", "side", "level", *(["corpus", "column"] if any(corpora)
                                                             else [])]  # fmt: skip
        by_layer = "layer" in rows and len(rows)
        layers = range(int(rows["n_layers"].iloc[0]) + 1 if by_layer else 1)
        self.corpora = list(corpora)
        self.wide = rows.assign(layer=rows["layer"] if by_layer else 0).pivot(
            index=names, columns="layer", values=value
        )
        self.wide = self.wide.reindex(columns=layers).astype(float)

    def of(
        self, state: str, units: Sequence[tuple[str, int]], side: str = "none", level: float = 0.0
    ) -> tuple[np.ndarray, list[list[str]]]:
        """Values of every (task, seed) unit, (units, layers), NaN where anything is missing, and
        for each unit the names of what is."""
        shape = (len(units), len(self.corpora), self.wide.shape[1])
        wanted = pd.MultiIndex.from_tuples(
            [
                (state, "none" if state == "pretrained" else task, seed, side, level, *corpus)
                for task, seed in units
                for corpus in self.corpora
            ],
            names=self.wide.index.names,
        )
        if not len(wanted):
            return np.full((len(units), shape[2]), math.nan), [["no corpus"] for _ in units]
        block = self.wide.reindex(wanted).to_numpy().reshape(shape)
        gaps = np.isnan(block)
        lost: list[list[str]] = [[] for _ in units]
        for u, c in np.argwhere(gaps.any(axis=2)):
            task, seed = units[u]
            words = [state] if state == "pretrained" else [task, state]
            words += [side, str(as_fraction(level))] if side != "none" else []
            words += [f"seed {seed}", *self.corpora[c]]
            if not gaps[u, c].all():
                words.append(f"layer {' '.join(map(str, np.flatnonzero(gaps[u, c])))}")
            lost[u].append(" ".join(words))
        # A layer that is missing takes its whole curve along.
        return np.where(gaps.any(axis=(1, 2))[:, None], math.nan, block.mean(axis=1)), lost
