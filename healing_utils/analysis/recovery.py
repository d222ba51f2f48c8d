"""What a corruption costs, and how much of it fine-tuning brings back.

Paper A: Han, Zhang and Simion (2024), Healing Powers of BERT, arXiv 2406.14459.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from healing_utils.analysis.effects import (
    LEVEL_DIGITS,
    Interval,
    binomial_error,
    bounds,
    groups,
    no_duplicates,
    one_metric,
    t_interval,
)

SIDES = ("bottom", "top", "all")  # corruptions of chosen layers belong to other questions
CORRELATIONS = ("matthews", "spearman")  # metrics that are no share of right answers
_SETTING = ["model", "task", "side", "level", "kind", "part", "strength", "layers"]


def clean(results: pd.DataFrame) -> pd.DataFrame:
    """Result rows with rounded levels, and missing strengths as numbers."""
    level, strength = (results[name].astype(float) for name in ("level", "strength"))
    return results.assign(level=level.round(LEVEL_DIGITS), strength=strength)


def measures(results: pd.DataFrame) -> pd.DataFrame:
    """Damage and recovery of every corrupted cell, one row per setting and seed, of the baseline,
    corruption and recovery tables put together: beside `intact`, `broken`, `healed`, `scratch` and
    `chance` of the same model, task and seed, `retained` = healed / intact, `retained_above_chance`
    = (healed - chance) / (intact - chance), and `healing`. What cannot be computed is NaN and
    `reason` says why. Raises HealingError on duplicate cells, and on a task scored by two metrics.
    """
    one_metric(results)
    table = clean(results)
    unit, cell = ["model", "task", "seed"], [*_SETTING, "seed"]
    damaged = table[table.state.isin(["broken", "healed"])]
    # What both states say is the healed one's word, where there is one.
    damaged = damaged.sort_values("state", ascending=False, kind="stable")
    said = ["metric", "test_size", "chance"]
    rows = damaged.groupby(cell, dropna=False, as_index=False)[said].first()
    for state, keys in {"intact": unit, "scratch": unit, "broken": cell, "healed": cell}.items():
        part = table[table.state == state]
        no_duplicates(part, keys, state)
        rows = rows.merge(part[[*keys, "score"]].rename(columns={"score": state}), "left", keys)
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
    measured: pd.DataFrame, columns=("intact", "broken", "healed", "retained", "healing")
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
