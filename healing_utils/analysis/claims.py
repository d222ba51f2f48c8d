"""One builder for every claim of the ledger: from the effects of units to a verdict in words.

An entry (`ledger` has them) says what one unit's effect is; interval, test, correction, verdict and
sentence are made here alone. Effects are averaged over the tasks of a seed, the unit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from healing_utils.analysis.effects import (
    ALPHA,
    clearance,
    count,
    groups,
    holm,
    named,
    no_duplicates,
    p_values,
    t_interval,
    units_needed,
)
from healing_utils.base.errors import choose

MARGIN = 0.01  # one point of score: a smaller effect is of no interest, whatever its p
# Named before any run, on the main grid: as many as six seeds can decide under Holm. All other
# verdicts are uncorrected, and exploratory.
PRIMARY = ("A1", "A3", "H")
DEMONSTRATION = "demonstration, never evidence: the organism was built so that pre-training matters"
COLUMNS = [
    "claim", "statement", "source", "model", "variant", "effect", "low", "high", "n", "tasks",
    "without_low", "without_high", "test_error", "cells", "censored", "direction", "margin", "unit",
    "p", "smallest_p", "p_corrected", "primary", "verdict", "reason", "seeds_needed", "evidence",
]  # fmt: skip
BY_TASK = ["claim", "model", "variant", "task", "effect", "low", "high", "n"]
UNIT = ["model", "variant", "main", "task", "seed", "effect", "sure", "cells"]


@dataclass(frozen=True)
class Claim:
    """An entry of the ledger.

    `units(tables)` yields what `units` or `contrast` make. `direction`: *more*, *not worse* or
    *same* (`effects.p_values`); `needs`: what a run must hold; `stages`: where its cells stand;
    `unit`: of a hundredth of the effect, points being of the score.
    """

    name: str
    statement: str
    source: str
    needs: str
    units: Callable[[Any], Iterator[pd.DataFrame]]
    direction: str = "more"
    margin: float = MARGIN
    stages: Sequence[str] = ("baseline", "recovery")
    unit: str = "points"
    caveat: str = ""


LEDGER: dict[str, Claim] = {}


def claim(
    name: str, statement: str, source: str, needs: str, **more: Any
) -> Callable[[Callable], Callable]:
    """Makes an entry of the ledger of the function that yields a claim's units."""

    def entry(units: Callable) -> Callable:
        LEDGER[name] = Claim(name, statement, source, needs, units, **more)
        return units

    return entry


def entries(*names: str) -> dict[str, Claim]:
    """These claims of the ledger, by name."""
    return {name: LEDGER[choose(name, LEDGER, "claim")] for name in names}


def units(
    names: dict[str, Any], effects: pd.Series, cells: pd.DataFrame | None = None
) -> pd.DataFrame:
    """A frame of units: `effects` has the index (task, seed), `names` the model, the variant, and
    whether all cells are the ``main`` grid's. `cells` names the cells behind them: ``task seed
    key`` and, where the effect is the sum of weight x score, ``weight``."""
    frame = effects.rename("effect").rename_axis(["task", "seed"]).reset_index()
    made: dict[tuple, dict[str, float]] = {}
    if cells is not None:
        for row in cells.assign(weight=cells.get("weight", math.nan)).itertuples():
            own = made.setdefault((row.task, row.seed), {})
            own[row.key] = own.get(row.key, 0.0) + row.weight
    frame["cells"] = [made.get(at, {}) for at in zip(frame.task, frame.seed, strict=True)]
    names = {"variant": "", "main": False} | names
    return frame.assign(**names, sure=frame["effect"])[UNIT]


def contrast(
    names: dict[str, Any], rows: pd.DataFrame, weight: float | pd.Series = 1.0, other: str = ""
) -> pd.DataFrame:
    """Units whose effect is the sum of weight x score over rows ``task seed key score``, or, with
    an `other` whose ``score_OTHER`` and ``key_OTHER`` stand beside them, of weight x (score - score
    of the other). A unit that lacks one of the rows has none; beside the main grid it is left out,
    as scans have their own seeds. A column ``sure`` is the score that a claim of a lack of recovery
    may count on."""
    rows = rows.assign(weight=weight, sure=rows["sure"] if "sure" in rows else rows["score"])
    if other:
        score = rows[f"score_{other}"]
        theirs = {"key": rows[f"key_{other}"], "score": score, "sure": score}
        rows = pd.concat([rows, rows.assign(**theirs, weight=-rows["weight"])])
    sums = {"effect": rows["weight"] * rows["score"], "sure": rows["weight"] * rows["sure"]}
    each = rows[["task", "seed"]].assign(**sums).groupby(["task", "seed"])
    total = each.sum(min_count=each.size().max())
    frame = units(names, total["effect"], rows).assign(sure=total["sure"].to_numpy())
    return frame if names.get("main") else frame.dropna(subset="effect")


def decide(tables: Any, ledger: dict[str, Claim] = LEDGER) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of claims, a row a claim, model and variant, and their effects by task, of a run's
    `ledger.Tables`. p is corrected (Holm) over a model's `PRIMARY` claims on the main grid. A
    planned cell that is missing leaves what rests on it *undecided*; a claim for which a run has no
    cell is *not tested*, with what it would need."""
    rows, by_task = [], []
    for entry in ledger.values():
        found = [frame for frame in entry.units(tables) if len(frame)]
        every = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=UNIT)
        for names, part in groups(every, ["model", "variant", "main"]):
            row, tasks = _row(entry, names, part, tables)
            rows.append(row)
            by_task += tasks
        untested = {"n": 0, "tasks": "", "primary": False, "verdict": "not tested",
                    "reason": f"it needs {entry.needs}"}  # fmt: skip
        for model in () if every.model.eq("all").any() else tables.models:
            if not every.model.eq(model).any():
                rows.append(_what(entry, {"model": model, "variant": ""}) | untested)
    table = pd.DataFrame(rows, columns=[*COLUMNS, "each", "sure", "problems", "opposite"])
    table["primary"] = table["primary"].astype(bool)
    for _, part in groups(table[table.primary], ["model"]):
        absent = [math.nan] * (len(PRIMARY) - len(part))  # not made, and still of the family
        for name, p in (("p_corrected", part.p), ("opposite", part.opposite)):
            table.loc[part.index, name] = holm([*p, *absent])[: len(part)]
    for i, row in table.iterrows():
        if row.verdict != "not tested":
            alpha = ALPHA / len(PRIMARY) if row.primary else ALPHA
            said = verdict(row, alpha)
            table.loc[i, ["verdict", "reason", "seeds_needed"]] = said
    return table[COLUMNS], pd.DataFrame(by_task, columns=BY_TASK)


def _row(
    entry: Claim, names: dict[str, Any], part: pd.DataFrame, tables: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A claim's row before its verdict, and the effects by task."""
    no_duplicates(part, ["task", "seed"], f"{entry.name}, {names['variant']}")
    wide = part.pivot(index="seed", columns="task", values="effect").astype(float)
    wide = wide.replace([math.inf, -math.inf], math.nan)
    complete = wide.dropna()
    values = complete.mean(axis=1).to_numpy()
    kept = part[part["seed"].isin(complete.index)]
    keys = {key for made in kept["cells"] for key in made}
    stages = [s for s in entry.stages if not names["main"] or s not in ("scans", "harms")]
    missing = [name for stage in stages for name in tables.missing(stage)]
    gaps = [f"{task} seed {seed}" for seed, task in wide.isna().stack().loc[lambda gap: gap].index]
    problems = []
    if missing:
        problems.append(f"{count(len(missing), 'planned cell')} missing: {named(missing)}")
    if gaps:
        problems.append(f"{count(len(gaps), 'unit')} without an effect: {named(gaps)}")
    without = [complete.drop(columns=task).mean(axis=None) for task in wide if wide.shape[1] > 1]
    p, opposite = p_values(values, entry.direction, entry.margin)
    row = {
        **_what(entry, names), **dict(zip(BY_TASK[4:], t_interval(values), strict=True)),
        "tasks": ", ".join(wide), "without_low": min(without, default=math.nan),
        "without_high": max(without, default=math.nan), "p": p,
        "test_error": _test_error(kept, tables.answers) if keys else math.nan,
        "cells": len(keys) or math.nan,
        "censored": len(keys & tables.censored_keys) if keys else math.nan,
        "smallest_p": 0.5 ** len(values) if len(values) else math.nan, "p_corrected": math.nan,
        "primary": entry.name in PRIMARY and bool(names["main"]), "verdict": "", "reason": "",
        "seeds_needed": math.nan, "each": values, "problems": problems, "opposite": opposite,
        "sure": kept.groupby("seed")["sure"].mean().astype(float).to_numpy(),
    }  # fmt: skip
    own = {name: row[name] for name in BY_TASK[:3]}
    by_task = [
        {**own, "task": task, **dict(zip(BY_TASK[4:], t_interval(complete[task]), strict=True))}
        for task in wide
    ]
    return row, by_task


def _test_error(kept: pd.DataFrame, answers: Callable[[str], np.ndarray | None]) -> float:
    """Standard error of the effect over the test items, which its cells and seeds share: paired, by
    what each cell answers right; NaN where that is not recorded. A guide for macro-F1."""
    errors = []
    for _, own in kept.groupby("task"):
        weights = [pair for made in own["cells"] for pair in made.items()]
        right = [answers(key) for key, _ in weights]
        if not right or any(x is None or len(x) != len(right[0]) for x in right):
            return math.nan
        effect = np.array([weight for _, weight in weights]) @ np.array(right) / len(own)
        errors.append(effect.std(ddof=1) / math.sqrt(len(effect)))  # of each item
    return float(np.linalg.norm(errors)) / len(errors)


def _what(entry: Claim, names: dict[str, Any]) -> dict[str, Any]:
    folder = str(names["model"]).rstrip("/\\").replace("\\", "/").split("/")[-1]
    return {
        "claim": entry.name, "statement": entry.statement, "source": entry.source,
        "model": names["model"], "variant": names["variant"], "direction": entry.direction,
        "margin": entry.margin, "unit": entry.unit,
        "evidence": "; ".join(filter(None, [DEMONSTRATION * (folder == "organism"), entry.caveat])),
    }  # fmt: skip


def verdict(row: pd.Series, alpha: float) -> tuple[str, str, float]:
    """``holds``, ``fails`` or ``undecided`` of a row before its verdict, the reason, and where it
    is undecided the seeds that an effect of this size would need at `alpha`."""
    values, margin, direction = row.each, row.margin, row.direction
    if row.problems:
        return "undecided", "; ".join(row.problems), math.nan
    if len(values) < 2:
        return "undecided", "fewer than two seeds", math.nan
    points = re.sub(r"^1 (\w+)s\b", r"1 \1", f"{100 * margin:g} {row.unit}")
    if (row.p_corrected if row.primary else row.p) < ALPHA:
        if not p_values(row.sure, direction, margin)[0] < alpha:
            return "undecided", "not sure with the censored cells counted as recovered", math.nan
        where = {"more": f"above {points}", "not worse": f"not below minus {points}"}
        return "holds", where.get(direction, f"within {points} of zero"), math.nan
    if row.opposite < ALPHA:
        if direction == "more":
            small = row.low >= -margin
            how = "reversed" if row.high < 0 else "negligible: " * small + f"not above {points}"
            return "fails", how, math.nan
        return "fails", f"beyond {points}", math.nan
    distance, spread = clearance(np.mean(values), direction, margin), np.std(values, ddof=1)
    needed = units_needed(abs(distance) / spread if spread else math.nan, alpha=alpha)
    # Below that no sign flip reaches alpha; two values tell no spread.
    needed = max(needed, math.ceil(-math.log2(alpha))) if len(values) > 2 else math.nan
    reason = f"not clear of {points}"
    if row.smallest_p >= alpha:
        few = f"{count(len(values), 'seed')} cannot reach p below {alpha:.2g}"
        reason = few if direction == "more" and row.low > margin else f"{reason}, and {few}"
    return "undecided", reason, needed


def censoring(row: Any) -> str:
    """How many of a claim's trained cells ended before healing was over, empty for none."""
    return f"{row.censored:.0f} of {row.cells:.0f} cells censored" if row.censored > 0 else ""


def in_words(claims: pd.DataFrame) -> list[str]:
    """The verdicts of a table of claims as sentences."""
    lines = []
    for row in claims.itertuples():
        opening = f"{row.claim}, {row.model}: {row.statement}"
        opening += f" ({row.variant})" if row.variant else ""
        if not row.n:
            lines.append(f"{opening}. {row.verdict.capitalize()}: {row.reason}.")
            continue
        effect, low, high = (100 * value for value in (row.effect, row.low, row.high))
        p = f"corrected p {row.p_corrected:.3f}" if row.primary else f"p {row.p:.3f}, exploratory"
        said = [
            f"{effect:z.1f} {row.unit}, 95 % interval {low:z.1f} to {high:z.1f}, "
            f"{count(row.n, 'seed')} on {row.tasks}",
            f"{p}, {row.reason}",
        ]
        if row.test_error > 0:
            said[0] += f", standard error of the test items {100 * row.test_error:.1f}"
        if row.seeds_needed > 0:
            holds = clearance(row.effect, row.direction, row.margin) > 0
            would = f"some {row.seeds_needed:.0f} seeds would show that it"
            said.append(f"were it exactly so, {would} {'holds' if holds else 'fails'}")
        if row.censored > 0:
            said.append(censoring(row) + ", which tells how fast they heal and not how far")
        lines.append(
            f"{opening}. {row.verdict.capitalize()}: {'; '.join(said)}."
            + (f" ({row.evidence}.)" if row.evidence else "")
        )
    return lines
