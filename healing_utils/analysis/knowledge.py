"""What fine-tuning and healing do to linguistic knowledge.

Knowledge is what a layer's probe reads: its accuracy; beside it *selectivity*, the accuracy minus
that of the same probe on control labels, random per word type (Hewitt and Liang 2019, arXiv
1909.03368, section 2), and the online codelength (Voita and Titov 2020, arXiv 2003.12298). A unit
is averaged over corpora and columns; differences are paired by seed.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from healing_utils.analysis.effects import (
    LEVEL_DIGITS,
    as_fraction,
    bounds,
    count,
    groups,
    no_duplicates,
    t_interval,
)
from healing_utils.analysis.recovery import CORRELATIONS, SIDES, clean, healing, measures
from healing_utils.base.errors import HealingError, choose

MEASURES = ("accuracy", "selectivity", "codelength")
_CELL = ["model", "state", "task", "side", "level", "kind", "seed"]
_UNIT = ["model", "task", "side", "level", "seed"]


def deeper_half(curves: pd.DataFrame) -> pd.Series:
    """Mean over the layers > n_layers / 2 (4 to 6 of 6, 3 to 5 of 5) of (cells, layers + 1)."""
    return curves.iloc[:, (curves.shape[1] + 1) // 2 :].mean(axis=1, skipna=False)


def above_chance(task_results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tasks whose fine-tuned (intact) score is above chance, the interval over seeds of score -
    chance above zero, and those that learnt nothing; a row a model and task, with a `reason`. Of
    classes the accuracy is compared: guesses have a higher macro-F1 than the majority label."""
    intact = task_results[task_results.state == "intact"].copy()
    if {"score_accuracy", "chance_accuracy"} <= set(intact):
        classes = ~intact.metric.isin(CORRELATIONS) & intact.score_accuracy.notna()
        for name in ("score", "chance"):
            intact.loc[classes, name] = intact.loc[classes, f"{name}_accuracy"]
        intact.loc[classes, "metric"] = "accuracy"
    no_duplicates(intact, ["model", "task", "seed"], "intact")
    rows = []
    for names, part in groups(intact, ["model", "task"], sort=True):
        part = part[part.score.notna() & part.chance.notna()]
        above = t_interval(part.score - part.chance)
        reason = "" if above.low > 0 else f"score - chance is {above}, not above zero"
        if above.n < 2:
            reason = f"{count(above.n, 'seed')}, no interval for score - chance"
        metric = ", ".join(sorted(set(part.metric)))
        means = (part.score.mean(), part.chance.mean())
        rows.append([*names.values(), metric, *means, *above, reason])
    names = ["model", "task", "metric", "score", "chance", "above", "low", "high", "n", "reason"]
    found = pd.DataFrame(rows, columns=names)
    return found[found.reason == ""], found[found.reason != ""]


def checked(frame: pd.DataFrame, stage: str = "probing") -> pd.DataFrame:
    """The table of the stage `probing` or `neurons` with rounded levels. Raises HealingError on
    what cannot be compared."""
    table = frame.reset_index(drop=True)
    table["level"] = table.level.astype(float).round(LEVEL_DIGITS)
    depths = table.groupby("model").n_layers.nunique()
    for model in depths.index[depths != 1]:
        raise HealingError(f"{model} has cells of different depths in the {stage} table")
    layer = ["layer"] if stage == "probing" else []
    no_duplicates(table, [*_CELL, "corpus", "column", *layer], stage)
    return table


def by_layer(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """`value` of every cell of a `checked` table, averaged over corpora and columns: a row a cell,
    a column a layer (0 for the table of neurons); NaN where a corpus or a layer is missing."""
    table = table.assign(layer=table["layer"] if "layer" in table else 0)
    wide = table.pivot(index=[*_CELL, "corpus", "column"], columns="layer", values=value)
    cells = wide.astype(float).groupby(level=_CELL, sort=False)
    full = cells.size() == table[["corpus", "column"]].drop_duplicates().shape[0]
    return cells.mean().where(cells.count().eq(cells.size(), axis=0)).where(full, axis=0)


def before_after(table: pd.DataFrame, value: str, model: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`value` by layer before and after fine-tuning, two frames (task and seed, layers) of the
    seeds that either has; NaN where one lacks it. The pre-trained model is every task's."""
    curves = by_layer(table[table.model == model], value).droplevel(["model", *_CELL[3:6]])
    after = curves[curves.index.get_level_values("state") == "intact"].droplevel("state")
    before = curves[curves.index.get_level_values("state") == "pretrained"].droplevel("state")
    tasks = pd.DataFrame({"task": after.index.unique("task")})
    before = tasks.merge(before.droplevel("task").reset_index(), how="cross")
    return before.set_index(["task", "seed"]).align(after, join="outer", axis=0)


def kept_depth(probing: pd.DataFrame) -> pd.DataFrame:
    """What fine-tuning leaves of the accuracy in the deeper half of the layers, `kept_share` of
    what was there, where it was above zero: means with t-intervals over the `n` complete seeds, a
    row a model and task."""
    table, rows = checked(probing), []
    for model in dict.fromkeys(table.model):
        before, after = before_after(table, "accuracy", model)
        whole, had = (before.notna() & after.notna()).all(axis=1), deeper_half(before)
        shares = (deeper_half(after) / had).where(whole & (had > 0))
        for task, own in shares.groupby(level="task"):
            kept = bounds("kept_share", own.dropna())
            rows.append({"model": model, "task": task, **kept, "n": int(whole[task].sum())})
    return pd.DataFrame(rows)


def healing_by_cell(
    probing: pd.DataFrame, task_results: pd.DataFrame, measure="accuracy"
) -> pd.DataFrame:
    """Losses and healing of score and of knowledge, one row per corrupted setting and seed:
    `task_loss` = intact - healed score; `knowledge_loss` and `knowledge_healing` of the `measure`
    (`MEASURES`) averaged over the corrupted layers, corpora and columns, of which `knew`, `broke`
    and `knows` are intact, broken and healed; `knowledge_loss_all` over every layer; `cka`, healed
    to intact. What cannot be computed is NaN and `reason` says why."""
    choose(measure, MEASURES, "measure of knowledge")
    table, scores = checked(probing), clean(task_results)
    corrupted = table.state.isin(["broken", "healed"]) & (table.kind == "reinit")
    corrupted = table[corrupted & table.side.isin(SIDES)]
    if corrupted.empty:
        raise HealingError("no broken or healed cell of kind reinit in the probing table")
    fits = (scores.kind == "reinit") & (scores.part == "all") & scores.side.isin(SIDES)
    measured = measures(scores[(scores.state == "intact") | fits])
    no_duplicates(measured, _UNIT, "scores of broken and healed")  # of several strengths
    rows = _of_knowledge(table, corrupted, measure)
    damaged = rows.rename(columns={"knew": "intact", "broke": "broken", "knows": "healed"})
    rows["knowledge_healing"], rows["why"] = healing(damaged, ["model", "task", "side", "level"])
    rows["knowledge_loss"] = rows.knew - rows.knows
    measured = measured.rename(columns={"healing": "task_healing", "reason": "task_reason"})
    rows = rows.merge(measured.drop(columns=["kind", "layers"]), on=_UNIT, how="left")
    rows["task_loss"] = rows.intact - rows.healed
    rows["reason"] = [_reason(row, measure) for row in rows.itertuples()]
    return rows[
        ["model", "task", "side", "level", "kind", "part", "strength", "layers", "seed", "metric",
         "test_size", "intact", "broken", "healed", "knew", "broke", "knows", "task_loss",
         "knowledge_loss", "knowledge_loss_all", "task_healing", "knowledge_healing", "cka",
         "reason"]
    ]  # fmt: skip


def _reason(row, measure: str) -> str:
    """Why a row of `healing_by_cell` lacks what it lacks."""
    states = {"intact": row.knew, "broken": row.broke, "healed": row.knows}
    missing = [state for state, value in states.items() if math.isnan(value)]
    said = [row.task_reason if isinstance(row.task_reason, str) else "no scores of this cell"]
    said.append(f"{measure} missing: {', '.join(missing)}" if missing else "")
    said.append(f"knowledge {row.why}" if row.why and not missing else "")
    return "; ".join(filter(None, said))


def _of_knowledge(table: pd.DataFrame, corrupted: pd.DataFrame, measure: str) -> pd.DataFrame:
    """`measure` of the corrupted layers, intact, broken and healed, a row a setting and seed; NaN
    where a layer, corpus or column is missing."""
    place = ["model", "side", "level"]
    for names, part in groups(corrupted.drop_duplicates([*place, "layers"]), place):
        if len(part) > 1:
            raise HealingError(
                f"{names['model']}, {names['side']} {as_fraction(names['level'])}: cells of "
                f"different layers, {' and '.join(map(str, sorted(part.layers)))}"
            )
    units = corrupted.drop_duplicates(_UNIT)[[*_UNIT, "kind", "layers", "n_layers"]]
    units = units.sort_values([*place, "task", "seed"], ignore_index=True)
    # Hidden state i + 1 is the output of layer i; what is no layer is the embeddings, 0.
    hits = [[layer + 1 for layer in layers] or [0] for layers in units.layers]
    every = [range(n + 1) for n in units.n_layers]

    def known(state: str, curves: pd.DataFrame) -> np.ndarray:  # (units, layers + 1)
        whole = {"side": "none", "level": 0.0, "kind": "none"} if state == "intact" else {}
        cells = units.assign(state=state, **whole)[_CELL]
        return curves.reindex(pd.MultiIndex.from_frame(cells)).to_numpy()

    def mean(values: np.ndarray, layers: list) -> list[float]:
        return [own[read].mean() for own, read in zip(values, layers, strict=True)]

    curves = by_layer(table, measure)
    intact, broken, healed = (known(state, curves) for state in ("intact", "broken", "healed"))
    return units.assign(
        knew=mean(intact, hits), broke=mean(broken, hits), knows=mean(healed, hits),
        cka=mean(known("healed", by_layer(table, "cka")), hits),
        knowledge_loss_all=mean(intact - healed, every),
    )  # fmt: skip
