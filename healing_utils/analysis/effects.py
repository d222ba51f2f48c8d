"""Units, intervals, exact tests, and the verdict on an effect.

Every number of the study that carries an uncertainty is made here. The unit is a **seed**: what it
draws (examples, head, batches, the corruption) may be shared between its tasks, so seeds are
independent and tasks are not. Inference is about the tasks at hand; the test set's own error
(`binomial_error`) comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from healing_utils.base.errors import HealingError

ALPHA = 0.05
MAX_UNITS = 22  # 2^22 sums of 8 bytes: the last size that is quick
LEVEL_DIGITS = 6  # 1/3 read back from text is still 1/3


class Interval(NamedTuple):
    """A mean with its two-sided t-interval over `n` values; bounds are NaN below two values."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def t_interval(values: Iterable[float]) -> Interval:
    """Mean and 95 % Student t-interval of independent values, one per unit. (At three to five a
    percentile bootstrap covers far less than it says.) Raises HealingError on a missing value."""
    x = _finite(values)
    n, mean = len(x), float(x.mean()) if len(x) else math.nan
    half = stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return Interval(mean, float(mean - half), float(mean + half), n)


def sign_flip(values: Iterable[float]) -> float:
    """Exact one-sided p of a mean above zero: the share of all 2^n ways to flip the signs of n
    units whose sum is at least the observed one; 1 / 2^n is the smallest, NaN of no units. Beyond
    `MAX_UNITS` units Student's t test, which is then as good. Raises HealingError on a missing
    value."""
    x = _finite(values)
    if not len(x):
        return math.nan
    if len(x) > MAX_UNITS and np.ptp(x) > 0:
        return float(stats.ttest_1samp(x, 0, alternative="greater").pvalue)
    sums = np.zeros(1)
    for value in x[:MAX_UNITS]:  # more are all alike
        sums = np.concatenate([sums + value, sums - value])
    # Ties are ties although their sums are added in another order.
    least = x[:MAX_UNITS].sum() - 1e-9 * np.abs(x[:MAX_UNITS]).sum()
    return float((sums >= least).mean())


def p_values(values: Iterable[float], direction: str, margin: float) -> tuple[float, float]:
    """p of a claim about the mean of `values`, and p of its opposite. *more*: the mean is above the
    margin, or below it; *not worse*: above -margin, or below; *same*: within both margins (the
    larger p of two tests), or beyond either (the smaller, doubled)."""
    x = np.asarray(list(values), dtype=float)
    if direction == "same":
        within = np.maximum(sign_flip(x + margin), sign_flip(margin - x))
        beyond = np.minimum(sign_flip(x - margin), sign_flip(-margin - x))
        return float(within), float(np.minimum(1, 2 * beyond))
    inside = clearance(x, direction, margin)
    return sign_flip(inside), sign_flip(-inside)


def clearance(effect: Any, direction: str, margin: float) -> Any:
    """How far an effect, or each of several, lies within what a claim says; negative outside."""
    limits = {"more": effect - margin, "not worse": effect + margin}
    return limits.get(direction, margin - np.abs(effect))


def holm(p_values: Iterable[float]) -> np.ndarray:
    """Holm's step-down correction (1979, Scand. J. Statistics 6, 65-70), in the order given. A
    missing p stays missing and counts: a test not made does not make the others easier."""
    p = np.asarray(list(p_values), dtype=float)
    order = [i for i in np.argsort(p, kind="stable") if not math.isnan(p[i])]
    corrected = np.full(len(p), math.nan)
    steps = (len(p) - np.arange(len(order))) * p[order]
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def units_needed(size: float, alpha: float = ALPHA) -> float:
    """How many units a one-sided t-test at `alpha` needs to find an effect of `size` standard
    deviations in four of five cases, by the noncentral t distribution; NaN for no effect."""
    if math.isnan(size) or size <= 0:
        return math.nan
    n = np.array([*range(2, 1000), *range(1000, 100_000, 500)])
    limit = stats.t.ppf(1 - alpha, n - 1)
    enough = np.flatnonzero(stats.nct.sf(limit, n - 1, size * np.sqrt(n)) >= 0.8)
    return float(n[enough[0]]) if len(enough) else math.inf


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


def one_metric(cells: pd.DataFrame) -> None:
    """Refuse scores of a task by several metrics: a stage may have been planned with another."""
    for names, part in groups(cells, ["model", "task"]):
        if part["metric"].nunique() > 1:
            raise HealingError(
                f"{names['model']} on {names['task']} was scored by several metrics: "
                f"{', '.join(sorted(part['metric'].unique()))}; run its stages with one"
            )


def as_fraction(level: float) -> Fraction:
    """A level as the fraction it stands for: 0.333333 is 1/3."""
    return Fraction(float(level)).limit_denominator(48)


def count(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


def named(missing: Sequence[str]) -> str:
    """What is missing, its first three by name."""
    return ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")


def _finite(values: Iterable[float]) -> np.ndarray:
    x = np.asarray(list(values), dtype=float)
    bad = int((~np.isfinite(x)).sum())
    if bad:
        raise HealingError(f"{bad} of {len(x)} values are missing or infinite; leave none out here")
    return x
