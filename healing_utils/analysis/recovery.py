"""What a corruption costs, and how much of it fine-tuning brings back.

Paper A: Han, Zhang and Simion (2024), Healing Powers of BERT, arXiv 2406.14459.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from healing_utils.analysis.effects import (
    LEVEL_DIGITS,
    Interval,
    binomial_error,
    bounds,
    groups,
    layer_tuple,
    no_duplicates,
    t_interval,
)
from healing_utils.base.errors import HealingError, choose

SIDES = ("bottom", "top", "all")  # corruptions of chosen layers belong to other questions
CHANCE = {"score": "chance", "score_f1": "chance_f1", "score_accuracy": "chance_accuracy"}
CORRELATIONS = ("matthews", "spearman")  # metrics that are no share of right answers

_NEEDED = ("model", "task", "state", "side", "level", "kind", "seed")
_OPTIONAL = {"part": "all", "strength": math.nan, "layers": None, "metric": "", "test_size": 0}
_SETTING = ["model", "task", "side", "level", "kind", "part", "strength", "layers"]


def clean(results: pd.DataFrame, value: str = "score") -> pd.DataFrame:
    """Result rows with `value` and `chance_value` columns, rounded levels and optional columns."""
    for name in (*_NEEDED, value):
        if name not in results:
            choose(name, [str(c) for c in results.columns], "column of the results")
    table = results.reset_index(drop=True).copy()
    for name, default in _OPTIONAL.items():
        if name not in table:
            table[name] = [default] * len(table)
    table["part"] = table.part.where(table.part.notna(), "all")
    table["strength"] = table.strength.astype(float)
    table["layers"] = [layer_tuple(x) for x in table.layers]
    table["level"] = table.level.astype(float).round(LEVEL_DIGITS)
    table["seed"] = table.seed.astype(int)
    table["value"] = table[value].astype(float)
    chance = CHANCE.get(value)
    table["chance_value"] = table[chance].astype(float) if chance in table else math.nan
    for names, part in groups(table, ["model", "task"]) if value == "score" else ():
        found = sorted({str(m) for m in part.metric.dropna()})
        if len(found) > 1:
            raise HealingError(
                f"{names['model']} on {names['task']} was scored by several metrics: "
                f"{', '.join(found)}; compare them by value='score_f1' or 'score_accuracy'"
            )
    return table


def places(corrupted: pd.DataFrame, grid: Mapping[str, Sequence]) -> list[tuple[str, float]]:
    """The (side, level) pairs that occur or that `grid` expects; level 1 has one side, ``all``."""
    sides = set(grid.get("sides", corrupted.side))
    levels = {round(float(x), LEVEL_DIGITS) for x in grid.get("levels", corrupted.level)}
    return [
        (side, level)
        for level in sorted(levels)
        for side in (("all",) if level == 1 else SIDES[:2])
        if side in sides or level == 1
    ]


def measures(results: pd.DataFrame, value: str = "score") -> pd.DataFrame:
    """Damage and recovery of every corrupted cell, one row per setting and seed.

    `results` is the baseline, corruption and recovery tables put together, `value` the score used.
    Beside `intact`, `broken`, `healed`, `scratch` and `chance` of the same model, task and seed
    stand `retained` = healed / intact, `retained_above_chance` = (healed - chance) / (intact -
    chance), and `healing`. What cannot be computed is NaN and `reason` says why. Raises
    HealingError on missing columns, duplicate cells, and a task scored by two metrics.
    """
    table = clean(results, value)
    unit, cell = ["model", "task", "seed"], [*_SETTING, "seed"]
    damaged = table[table.state.isin(["broken", "healed"])]
    # What both states say is the healed one's word, where there is one.
    damaged = damaged.sort_values("state", ascending=False, kind="stable")
    rows = damaged.groupby(cell, dropna=False, as_index=False)[
        ["metric", "test_size", "chance_value"]
    ].first()
    for state, keys in {"intact": unit, "scratch": unit, "broken": cell, "healed": cell}.items():
        part = table[table.state == state]
        no_duplicates(part, keys, state)
        part = part[[*keys, "value", "chance_value"]]
        part = part.rename(columns={"value": state, "chance_value": f"{state}_chance"})
        rows = rows.merge(part, on=keys, how="left")
    rows["chance"] = rows.chance_value.fillna(rows.intact_chance)
    rows = rows.sort_values(cell, na_position="first", ignore_index=True)

    above = rows.intact - rows.chance
    rows["retained"] = (rows.healed / rows.intact).where(rows.intact > 0)
    rows["retained_above_chance"] = ((rows.healed - rows.chance) / above).where(above > 0)
    rows["healing"], no_healing = healing(rows, _SETTING)
    rows["reason"] = [
        _reason(row, why) for row, why in zip(rows.itertuples(), no_healing, strict=True)
    ]
    return rows[
        [*cell, "metric", "test_size", "intact", "broken", "healed", "scratch", "chance",
         "retained", "retained_above_chance", "healing", "reason"]
    ]  # fmt: skip


def healing(rows: pd.DataFrame, by: Sequence[str]) -> tuple[pd.Series, list[str]]:
    """(healed - broken) / (intact - broken) of each row, and why it has none: missing for a whole
    group of `by` where the interval of intact - broken over seeds does not lie above zero."""
    damage = rows.intact - rows.broken
    quotient = ((rows.healed - rows.broken) / damage).replace([math.inf, -math.inf], math.nan)
    reasons = [""] * len(rows)
    for where in rows.groupby(list(by), dropna=False).indices.values():
        known = damage.iloc[where].dropna()
        reason = _no_denominator(t_interval(known)) if len(known) else ""
        if reason:
            quotient.iloc[where] = math.nan
            for i in where:
                reasons[i] = f"healing: {reason}"
    return quotient, reasons


def _no_denominator(damage: Interval) -> str:
    """Why intact - broken cannot be divided by, or an empty string."""
    if damage.n < 2:
        return "one seed gives no interval for intact - broken"
    if damage.high < 0:
        return f"the corruption did no damage, intact - broken is {damage}"
    if damage.low <= 0:
        return f"intact - broken is within its interval of zero, {damage} over {damage.n} seeds"
    return ""


def _reason(row, no_healing: str) -> str:
    missing = [s for s in ("intact", "broken", "healed") if math.isnan(getattr(row, s))]
    said = [f"missing: {', '.join(missing)}" if missing else ""]
    said += ["retained: the intact score is not above zero" if row.intact <= 0 else ""]
    if row.intact <= row.chance:
        said.append("retained above chance: the intact score is not above chance")
    return "; ".join(filter(None, [*said, no_healing]))


def summary(
    measured: pd.DataFrame,
    columns: Sequence[str] = ("intact", "broken", "healed", "retained", "healing"),
) -> pd.DataFrame:
    """Means and t-intervals over seeds of `measures`, one row per setting: `NAME`, `NAME_low` and
    `NAME_high` of the seeds that have a value; `n` counts the seeds, `reason` gathers the rows'
    reasons. `test_error`, the test set's own standard error at the mean intact score, is not
    lowered by more seeds; correlations have none."""
    out = []
    for names, part in groups(measured, [k for k in _SETTING if k in measured], sort=True):
        metric, size = ", ".join(map(str, part.metric.dropna().unique())), part.test_size.min()
        row = {**names, "metric": metric, "n": part.seed.nunique(), "test_size": size}
        share = np.nan if metric in CORRELATIONS else part.intact.mean()
        row["test_error"] = binomial_error(share, size)
        for name in columns:
            row |= bounds(name, part[name].dropna())
        out.append(row | {"reason": "; ".join(dict.fromkeys(filter(None, part.reason)))})
    return pd.DataFrame(out)
