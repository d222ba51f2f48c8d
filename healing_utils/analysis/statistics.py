"""Intervals, exact tests, measures of recovery, and the verdict on each claim of paper A.

Every number of the study that carries an uncertainty is made here and nowhere else. The unit of
inference is a (task, seed) pair, averaged over the corrupted levels; a corrupted model is always
compared with the intact model of the same task and seed. Inference is over seeds on the tasks at
hand; the test set's own error (`binomial_error`) comes on top and is reported beside it.

Paper A: Han, Zhang and Simion (2024), Healing Powers of BERT, arXiv 2406.14459.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from healing_utils.base.errors import HealingError, choose

MARGIN = 0.01  # one point of score: a smaller effect is of no interest, whatever its p
ALPHA = 0.05
MAX_UNITS = 44  # two halves of 2^22 sums each, 32 MB apiece: the last size that is still quick

STATEMENTS = {
    "A1": "Corrupted models do not fully recover",
    "A2": "The more is corrupted, the more is lost",
    "A3": "Corrupting the bottom layers costs more than corrupting as many top layers",
}
DEMONSTRATION = "demonstration, never evidence: the organism was built so that pre-training matters"
CHANCE = {"score": "chance", "score_f1": "chance_f1", "score_accuracy": "chance_accuracy"}

CORRELATIONS = ("matthews", "spearman")  # metrics that are no share of right answers

_NEEDED = ("model", "task", "state", "side", "level", "kind", "seed")
_SETTING = ["model", "task", "side", "level", "kind", "part", "strength", "layers"]
_LEVEL_DIGITS = 6  # 1/3 read back from text is still 1/3


# --- intervals and tests ---------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean with its two-sided t-interval over `n` values; bounds are NaN below two values."""

    mean: float
    low: float
    high: float
    n: int


class SignFlip(NamedTuple):
    """The p of a sign-flip test, and the smallest p that so many units can reach."""

    p: float
    smallest_p: float


def t_interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Mean and Student t-interval of independent values, one per unit.

    At three to five values a percentile bootstrap covers far less than it says; the t-interval
    covers what it says when the values are roughly normal. Raises HealingError on a missing value:
    what to do about it is the caller's decision.
    """
    x = _finite(values)
    n = len(x)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(x.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def sign_flip(values: Iterable[float], alternative: str = "greater") -> SignFlip:
    """Exact one-sample test of symmetry about zero: all 2^n ways to flip the signs of n units.

    `alternative` says where the mean lies if the hypothesis is wrong: ``greater``, ``less`` or
    ``two-sided``. p is the share of flips whose sum is at least as extreme as the observed one.
    No flip is sampled: the sums of the two halves of the units are listed and matched
    (2^(n/2) each), so 30 units are as exact as 3. Raises HealingError beyond 44 units.
    """
    choose(alternative, ("greater", "less", "two-sided"), "alternative")
    x = _finite(values)
    n = len(x)
    if n == 0:
        return SignFlip(math.nan, math.nan)
    if n > MAX_UNITS:
        raise HealingError(
            f"the exact sign-flip test takes at most {MAX_UNITS} units, got {n}; "
            "average units (for example over seeds) first"
        )
    observed = float(x.sum())
    # Ties are ties although their sums are added in another order.
    tolerance = 1e-9 * float(np.abs(x).sum())
    left, right = _flip_sums(x[: n // 2]), np.sort(_flip_sums(x[n // 2 :]))

    def at_least(threshold: float) -> int:
        below = np.searchsorted(right, threshold - tolerance - left, side="left")
        return int((len(right) - below).sum())

    if alternative == "greater":
        count = at_least(observed)
    elif alternative == "less":
        count = at_least(-observed)  # the flips are symmetric: sums <= s are as many as >= -s
    else:
        count = min(2 * at_least(abs(observed)), 2**n)
    smallest = 1 if alternative != "two-sided" else 2
    return SignFlip(count / 2**n, min(1.0, smallest / 2**n))


def holm(p_values: Iterable[float]) -> np.ndarray:
    """Holm's step-down correction of a family of p-values, in the order given.

    A missing p (NaN) stays missing but counts as a member of the family: a test that could not be
    made does not make the others easier. Source: Holm (1979), Scand. J. Statistics 6, 65-70.
    """
    p = np.asarray(list(p_values), dtype=float)
    corrected = np.full(len(p), math.nan)
    running = 0.0
    for rank, i in enumerate(i for i in np.argsort(p, kind="stable") if not math.isnan(p[i])):
        running = max(running, (len(p) - rank) * p[i])
        corrected[i] = min(1.0, running)
    return corrected


def units_needed(size: float, power: float = 0.8, alpha: float = ALPHA) -> float:
    """How many paired units a one-sided t-test at `alpha` needs for an effect of `size` standard
    deviations of the differences to be found with probability `power`; NaN for no effect.

    By the noncentral t distribution, which is exact for normal differences.
    """
    if math.isnan(size) or size == 0:
        return math.nan
    for n in (*range(2, 1000), *range(1000, 100_000, 500)):
        limit = stats.t.ppf(1 - alpha, n - 1)
        if stats.nct.sf(limit, n - 1, abs(size) * math.sqrt(n)) >= power:
            return float(n)
    return math.inf


def binomial_error(score, test_size):
    """Binomial standard error of a share of right answers `score` on `test_size` examples.

    Exact for accuracy, a guide for macro-F1, without meaning for correlations. Takes numbers or
    columns. On 872 sentences at 0.82 it is 0.013.
    """
    score, size = np.asarray(score, dtype=float), np.asarray(test_size, dtype=float)
    inside = (score >= 0) & (score <= 1) & (size > 0)
    variance = np.where(inside, score * (1 - score), math.nan) / np.where(inside, size, math.nan)
    error = np.sqrt(variance)
    return float(error) if error.ndim == 0 else error


# --- measures of recovery --------------------------------------------------------------------


def measures(results: pd.DataFrame, value: str = "score") -> pd.DataFrame:
    """Damage and recovery of every corrupted cell, one row per setting and seed.

    `results` is the baseline, corruption and recovery tables put together. A row has `intact`,
    `broken`, `healed`, `scratch` and `chance` of the same model, task and seed in the score named
    by `value` (`score`, `score_f1`, `score_accuracy`, ...), and

    - `retained` = healed / intact,
    - `retained_above_chance` = (healed - chance) / (intact - chance),
    - `healing` = (healed - broken) / (intact - broken).

    A measure that cannot be computed is NaN and `reason` says why. In particular `healing` is
    missing for a whole setting whose damage, intact - broken, has a 95 % t-interval over the seeds
    that does not lie above zero: there the quotient is noise. Raises HealingError on a missing
    column, on duplicate cells, and where one task was scored by two metrics.
    """
    table = _clean(results, value)
    paired = ["model", "task", "seed"]

    intact = table[table.state == "intact"]
    _no_duplicates(intact, paired, "intact")
    scratch = table[table.state == "scratch"]
    _no_duplicates(scratch, paired, "scratch")

    cell = [*_SETTING, "seed"]
    keep = [*cell, "metric", "test_size", "value", "chance_value"]
    sides = {}
    for state in ("broken", "healed"):
        part = table[table.state == state]
        _no_duplicates(part, cell, state)
        sides[state] = part[keep].rename(columns={"value": state})
    rows = sides["broken"].merge(
        sides["healed"], on=cell, how="outer", suffixes=("_broken", "_healed")
    )
    for name in ("metric", "test_size", "chance_value"):
        rows[name] = rows.pop(f"{name}_healed").where(
            lambda column: column.notna(), rows.pop(f"{name}_broken")
        )
    rows = rows.merge(
        intact[[*paired, "value", "chance_value"]].rename(
            columns={"value": "intact", "chance_value": "intact_chance"}
        ),
        on=paired,
        how="left",
    )
    rows = rows.merge(
        scratch[[*paired, "value"]].rename(columns={"value": "scratch"}), on=paired, how="left"
    )
    rows["chance"] = rows.pop("chance_value").where(
        lambda column: column.notna(), rows.pop("intact_chance")
    )

    reasons: list[list[str]] = [[] for _ in range(len(rows))]
    for i, row in enumerate(rows.itertuples(index=False)):
        missing = [s for s in ("intact", "broken", "healed") if pd.isna(getattr(row, s))]
        if missing:
            reasons[i].append("missing: " + ", ".join(missing))

    usable = rows.intact > 0
    rows["retained"] = (rows.healed / rows.intact).where(usable)
    above = rows.intact - rows.chance
    rows["retained_above_chance"] = ((rows.healed - rows.chance) / above).where(above > 0)
    rows["healing"] = (rows.healed - rows.broken) / (rows.intact - rows.broken)
    for i in np.flatnonzero(rows.intact <= 0):
        reasons[i].append("retained: the intact score is not above zero")
    for i in np.flatnonzero(above <= 0):
        reasons[i].append("retained above chance: the intact score is not above chance")

    rows = rows.reset_index(drop=True)
    damage = rows.intact - rows.broken
    for _, indices in rows.groupby(_SETTING, dropna=False, sort=False).indices.items():
        known = damage.iloc[indices].dropna()
        if known.empty:
            continue
        reason = _no_denominator(t_interval(known))
        if reason:
            rows.loc[rows.index[indices], "healing"] = math.nan
            for i in indices:
                reasons[i].append(f"healing: {reason}")
    rows["healing"] = rows.healing.replace([math.inf, -math.inf], math.nan)
    rows["reason"] = ["; ".join(r) for r in reasons]
    order = [
        *cell, "metric", "test_size", "intact", "broken", "healed", "scratch", "chance",
        "retained", "retained_above_chance", "healing", "reason",
    ]  # fmt: skip
    return rows[order].sort_values(cell, na_position="first", ignore_index=True)


def summary(
    measured: pd.DataFrame,
    columns: Sequence[str] = ("intact", "broken", "healed", "retained", "healing"),
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Means and t-intervals over seeds of `measures`, one row per setting.

    Each name of `columns` gives `NAME`, `NAME_low` and `NAME_high`; `n` counts the seeds, and
    `reason` gathers the rows' reasons. A seed without a value is left out of that column's mean
    and named by `reason`. `test_error` is the test set's own standard error at the mean intact
    score, which more seeds do not lower; it is missing for correlations.
    """
    out = []
    keys = [k for k in _SETTING if k in measured]
    for key, part in measured.groupby(keys, dropna=False, sort=True):
        row = dict(zip(keys, key, strict=True))
        row["metric"] = _one(part.metric)
        row["n"] = part.seed.nunique()
        row["test_size"] = part.test_size.min()
        correlation = row["metric"] in CORRELATIONS
        row["test_error"] = (
            math.nan if correlation else binomial_error(part.intact.mean(), row["test_size"])
        )
        for name in columns:
            interval = t_interval(part[name].dropna(), confidence)
            row[name], row[f"{name}_low"], row[f"{name}_high"] = interval[:3]
        row["reason"] = "; ".join(dict.fromkeys(r for r in part.reason if r))
        out.append(row)
    return pd.DataFrame(out)


def _no_denominator(damage: Interval) -> str:
    """Why intact - broken cannot be divided by, or an empty string."""
    if damage.n < 2:
        return "one seed gives no interval for intact - broken"
    shown = f"{damage.mean:.3f} [{damage.low:.3f}, {damage.high:.3f}]"
    if damage.high < 0:
        return f"the corruption did no damage, intact - broken is {shown}"
    if damage.low <= 0:
        return f"intact - broken is within its interval of zero, {shown} over {damage.n} seeds"
    return ""


# --- claims ----------------------------------------------------------------------------------


def claims(
    results: pd.DataFrame,
    kind: str = "reinit",
    value: str = "score",
    grid: Mapping[str, Sequence] | None = None,
    margin: float = MARGIN,
    alpha: float = ALPHA,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """The verdict on claims A1 to A3, one row per model and claim.

    Losses are intact - healed of the same task and seed. Per unit, a (task, seed) pair:

    - A1 is the loss, averaged over the sides and then over the levels;
    - A2 is the least-squares slope of that side-averaged loss on the level, times the distance
      between the largest and the smallest level below 1: the loss the level adds over that range;
    - A3 is healed(top) - healed(bottom) at the same level, averaged over the levels below 1.

    Level 1 corrupts every layer; it is one cell, stands for both sides in A1, and has no part in
    A2 and A3.

    Over the units come a t-interval, the exact one-sided sign-flip test (effect > 0) and Holm's
    correction over a model's claims; `verdict` decides. The expected cells are the product
    of the tasks, seeds, sides and levels that occur for the model and `kind`, or what `grid` says
    (``tasks``, ``seeds``, ``sides``, ``levels``; cells outside of it then play no part). A missing
    cell makes the verdict undecided and `reason` names it; effect and p then describe the
    `n` complete units out of `n_expected`. Only whole-layer corruptions by side enter: rows with
    another `part` or the side `custom` belong to other questions.

    Raises HealingError on duplicate cells and on an unknown entry of `grid`.
    """
    table = _clean(results, value)
    for name in grid or {}:
        choose(name, ("tasks", "seeds", "sides", "levels"), "entry of the grid")
    rows = []
    for model, part in table.groupby("model", sort=False):
        units = _Units(part, kind, grid)
        found = [
            _claim("A1", units, units.loss, margin, confidence),
            _claim("A2", units, units.rise, margin, confidence),
            _claim("A3", units, units.side_difference, margin, confidence),
        ]
        corrected = holm([row["p"] for row in found])
        for row, p_corrected in zip(found, corrected, strict=True):
            missing = row.pop("missing")
            row["p_corrected"] = float(p_corrected)
            row["margin"] = margin
            row["verdict"], row["reason"] = verdict(
                row["low"], row["high"], row["p_corrected"], row["smallest_p"],
                margin=margin, alpha=alpha, missing=missing,
            )  # fmt: skip
            row["evidence"] = evidence_of_side(model) if row["claim"] == "A3" else "evidence"
            rows.append({"model": model, "kind": kind, **row})
    names = [
        "model", "kind", "claim", "statement", "definition", "effect", "low", "high", "n",
        "n_expected", "units", "p", "smallest_p", "p_corrected", "margin", "verdict", "reason",
        "evidence",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=names)


def verdict(
    low: float,
    high: float,
    p_corrected: float,
    smallest_p: float = 0.0,
    *,
    margin: float = MARGIN,
    alpha: float = ALPHA,
    missing: Sequence[str] = (),
) -> tuple[str, str]:
    """``holds``, ``fails`` or ``undecided`` for an effect claimed to be positive, and the reason.

    *Holds*: the corrected p is below `alpha` and the whole interval lies above `margin`. *Fails*:
    the whole interval lies within ± `margin`, or on the other side of zero. Everything else,
    and anything with a cell missing, is *undecided*.
    """
    if missing:
        return "undecided", "; ".join(missing)
    if math.isnan(low) or math.isnan(high):
        return "undecided", "fewer than two units give no interval"
    points = f"{100 * margin:g} point" + ("" if margin == 0.01 else "s")
    if low >= -margin and high <= margin:
        return "fails", f"the interval lies within {points} of zero"
    if high < 0:
        return "fails", "the interval lies on the other side of zero"
    if low > margin and p_corrected < alpha:
        return "holds", f"corrected p below {alpha:g} and the interval above {points}"
    reasons = []
    if low <= margin:
        reasons.append(f"the interval is not clear of {points}")
    if not p_corrected < alpha:
        if smallest_p >= alpha:
            reasons.append(
                f"so few units cannot reach p below {alpha:g} (the smallest is {smallest_p:.3g})"
            )
        else:
            reasons.append(f"corrected p is not below {alpha:g}")
    return "undecided", "; ".join(reasons)


def _claim(name: str, units: _Units, effect, margin: float, confidence: float) -> dict:
    values, definition, problems = effect()
    interval = t_interval(values, confidence)
    test = sign_flip(values)
    return {
        "claim": name,
        "statement": STATEMENTS[name],
        "definition": definition,
        "effect": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "n_expected": len(units.tasks) * len(units.seeds),
        "units": f"{_count(len(units.tasks), 'task')} x {_count(len(units.seeds), 'seed')}",
        "p": test.p,
        "smallest_p": test.smallest_p,
        "missing": problems,
    }


class _Units:
    """The cells of one model and kind as units, against the grid of cells expected."""

    def __init__(self, table: pd.DataFrame, kind: str, grid: Mapping[str, Sequence] | None):
        grid = grid or {}
        intact = table[table.state == "intact"]
        corrupted = table[
            table.state.isin(["healed", "broken"])
            & (table.kind == kind)
            & (table.part == "all")
            & table.side.isin(["bottom", "top", "all"])
        ]
        healed = corrupted[corrupted.state == "healed"]
        _no_duplicates(intact, ["task", "seed"], "intact")
        _no_duplicates(healed, ["task", "seed", "side", "level"], f"healed, kind {kind}")
        self.kind = kind
        present = pd.concat([intact, corrupted])
        self.tasks = sorted(grid.get("tasks", present.task.unique()))
        self.seeds = sorted(int(s) for s in grid.get("seeds", present.seed.unique()))
        self.sides = [
            s for s in ("bottom", "top") if s in set(grid.get("sides", corrupted.side.unique()))
        ]
        levels = [round(float(x), _LEVEL_DIGITS) for x in grid.get("levels", corrupted.level)]
        self.levels = sorted(set(levels))
        self.intact = self._scores(intact, ["task", "seed"])
        self.healed = self._scores(healed, ["task", "seed", "side", "level"])

    @staticmethod
    def _scores(rows: pd.DataFrame, names: list[str]) -> dict[tuple, float]:
        rows = rows[rows.value.notna()]  # a cell without a score is a missing cell
        keys = rows[names].itertuples(index=False, name=None)
        return dict(zip(keys, rows.value.astype(float), strict=True))

    def _cells(self, level: float) -> list[tuple[str, float]]:
        sides = ["all"] if level == 1 else self.sides
        return [(side, level) for side in sides]

    def _collect(self, levels: list[float], with_intact: bool):
        """Yield a unit's intact score and healed scores by (side, level); note what is missing."""
        complete, missing = [], []
        for task in self.tasks:
            for seed in self.seeds:
                wanted = [cell for level in levels for cell in self._cells(level)]
                healed = {c: self.healed.get((task, seed, *c)) for c in wanted}
                intact = self.intact.get((task, seed))
                lost = [
                    f"{task} healed {side} {as_fraction(level)} seed {seed}"
                    for (side, level), score in healed.items()
                    if score is None
                ]
                if with_intact and intact is None:
                    lost.append(f"{task} intact seed {seed}")
                missing += lost
                if not lost:
                    complete.append((intact, healed))
        return complete, missing

    def _problems(self, levels: list[float], missing: list[str], sides: int = 1) -> list[str]:
        if not self.levels or not self.healed:
            return [f"no healed cell of kind {self.kind}"]
        if not levels:
            return ["no level below 1"]
        if len(self.sides) < sides and any(level < 1 for level in levels):
            absent = [s for s in ("bottom", "top") if s not in self.sides]
            return [f"no cell of side {' or '.join(absent)}"]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            return [f"{_count(len(missing), 'cell')} missing: {shown}"]
        return []

    def _level_losses(self, unit, levels: list[float]) -> np.ndarray:
        intact, healed = unit
        return np.array(
            [np.mean([intact - healed[cell] for cell in self._cells(level)]) for level in levels]
        )

    def _over(self, levels: list[float]) -> str:
        return ", ".join(str(as_fraction(level)) for level in levels) or "none"

    def loss(self):
        definition = (
            f"intact - healed, averaged over {_sides(self.sides)} and levels "
            f"{self._over(self.levels)}"
        )
        complete, missing = self._collect(self.levels, with_intact=True)
        problems = self._problems(self.levels, missing)
        if problems and not missing:
            return [], definition, problems
        return (
            [float(self._level_losses(u, self.levels).mean()) for u in complete],
            definition,
            problems,
        )

    def rise(self):
        # Level 1 always contains the bottom: beside levels that are averaged over both sides it
        # would tell which layers were hit, not how many.
        levels = [level for level in self.levels if level < 1]
        definition = (
            f"least-squares slope of intact - healed (mean of {_sides(self.sides)}) on the level, "
            f"times the range of levels {self._over(levels)}"
        )
        complete, missing = self._collect(levels, with_intact=True)
        problems = self._problems(levels, missing)
        if not problems and len(levels) < 2:
            problems = ["one level only"]
        if len(levels) < 2 or (problems and not missing):
            return [], definition, problems
        x = np.array(levels)
        centred = x - x.mean()
        weights = centred / (centred**2).sum() * (x.max() - x.min())
        return (
            [float(weights @ self._level_losses(u, levels)) for u in complete],
            definition,
            problems,
        )

    def side_difference(self):
        levels = [level for level in self.levels if level < 1]
        definition = (
            "healed(top) - healed(bottom) at the same level, averaged over levels "
            f"{self._over(levels)}"
        )
        # The intact score cancels, so that a missing intact cell does not touch this claim.
        complete, missing = self._collect(levels, with_intact=False)
        problems = self._problems(levels, missing, sides=2)
        if not levels or len(self.sides) < 2:
            return [], definition, problems
        values = [
            float(np.mean([healed["top", x] - healed["bottom", x] for x in levels]))
            for _, healed in complete
        ]
        return values, definition, problems


# --- shared ----------------------------------------------------------------------------------


def as_fraction(level: float) -> Fraction:
    """A level as the fraction it stands for: 0.333333 is 1/3."""
    return Fraction(float(level)).limit_denominator(48)


def _finite(values: Iterable[float]) -> np.ndarray:
    x = np.asarray(list(values), dtype=float)
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).sum())
        raise HealingError(f"{bad} of {len(x)} values are missing or infinite; leave none out here")
    return x


def _flip_sums(x: np.ndarray) -> np.ndarray:
    """Sums of x under all 2^len(x) sign flips, shape (2^len(x),)."""
    sums = np.zeros(1)
    for value in x:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _clean(results: pd.DataFrame, value: str) -> pd.DataFrame:
    """Result rows with `value` and `chance_value` columns, rounded levels and optional columns."""
    for name in (*_NEEDED, value):
        if name not in results:
            choose(name, [str(c) for c in results.columns], "column of the results")
    table = results.reset_index(drop=True).copy()
    optional = {"part": "all", "strength": math.nan, "layers": None, "metric": "", "test_size": 0}
    for name, default in optional.items():
        if name not in table:
            table[name] = [default] * len(table)
    table["part"] = table.part.where(table.part.notna(), "all")
    table["strength"] = table.strength.astype(float)
    table["layers"] = [layer_tuple(x) for x in table.layers]
    table["level"] = table.level.astype(float).round(_LEVEL_DIGITS)
    table["seed"] = table.seed.astype(int)
    table["value"] = table[value].astype(float)
    chance = CHANCE.get(value)
    table["chance_value"] = table[chance].astype(float) if chance in table else math.nan
    if value == "score":
        for (model, task), part in table.groupby(["model", "task"]):
            found = sorted({str(m) for m in part.metric.dropna()})
            if len(found) > 1:
                raise HealingError(
                    f"{model} on {task} was scored by several metrics: {', '.join(found)}; "
                    "compare them by value='score_f1' or 'score_accuracy'"
                )
    return table


def layer_tuple(value) -> tuple[int, ...]:
    """Layers as a tuple, from a tuple, a list, or the text that a CSV file holds."""
    if isinstance(value, str):
        value = [x for x in value.strip("()[] ").replace(",", " ").split() if x]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    return tuple(int(x) for x in value)


def _no_duplicates(rows: pd.DataFrame, names: list[str], what: str) -> None:
    twice = rows[rows.duplicated(names, keep="first")]
    if len(twice):
        first = ", ".join(f"{name} {twice.iloc[0][name]}" for name in names)
        raise HealingError(
            f"{_count(len(twice), 'duplicate cell')} ({what}); the first is {first}. "
            "Select one recipe, part and strength before comparing."
        )


def evidence_of_side(model: str) -> str:
    """What a comparison of bottom with other layers is worth on a model."""
    return DEMONSTRATION if _is_organism(model) else "evidence"


def _is_organism(model: str) -> bool:
    return str(model).rstrip("/\\").replace("\\", "/").split("/")[-1] == "organism"


def _one(column: pd.Series) -> str:
    return ", ".join(dict.fromkeys(str(v) for v in column.dropna()))


def _count(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


def _sides(sides: list[str]) -> str:
    return " and ".join(sides) if sides else "all layers"
