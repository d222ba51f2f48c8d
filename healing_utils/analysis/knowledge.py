"""What fine-tuning and healing do to linguistic knowledge.

Knowledge is the *selectivity* of a layer's probe: its accuracy minus that of the same probe on
control labels, random per word type (Hewitt and Liang 2019, arXiv 1909.03368, section 2). A unit is
averaged over corpora and columns. The same seed means the same sentences, inner split and control
labels, so differences are paired; the units of one seed share one pre-trained model's probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd

from healing_utils.analysis.effects import (
    LEVEL_DIGITS,
    Cells,
    as_fraction,
    bounds,
    count,
    groups,
    layer_tuple,
    named_gaps,
    no_duplicates,
    t_interval,
)
from healing_utils.analysis.recovery import (
    CORRELATIONS,
    SIDES,
    clean,
    healing,
    measures,
    places,
    summary,
)
from healing_utils.base.errors import HealingError, choose

_GRID = ("tasks", "seeds", "corpora", "healed_tasks", "sides", "levels")
_CELL = ["model", "task", "state", "side", "level", "kind", "seed", "corpus", "column"]
_UNIT = ["model", "task", "side", "level", "seed"]


def half_depth(before: np.ndarray, after: np.ndarray) -> float:
    """The deepest layer that keeps at least half of its pre-trained selectivity, as a share of
    depth; both (layers + 1,), embeddings first. A layer that had none is passed over; 0 where no
    layer keeps half, NaN where no layer had any."""
    had = before > 0
    if not had.any():
        return math.nan
    kept = np.flatnonzero(had & (after >= before / 2))
    return float(kept.max() / (len(before) - 1)) if len(kept) else 0.0


def kept_share(before: np.ndarray, after: np.ndarray) -> float:
    """Fine-tuned selectivity of the deeper half of the layers as a share of the pre-trained one,
    NaN where that is not above zero. `half_depth` moves in steps and hangs on one layer's noise."""
    had, has = deeper_half(before), deeper_half(after)
    return float(has / had) if had > 0 else math.nan


def deeper_half(curve: np.ndarray) -> np.ndarray:
    """Mean over the layers > n_layers / 2 (4 to 6 of 6, 3 to 5 of 5) of (..., layers + 1)."""
    return curve[..., (curve.shape[-1] + 1) // 2 :].mean(axis=-1)


def above_chance(task_results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tasks whose fine-tuned (intact) score is above chance, the interval over seeds of score -
    chance above zero, and those left out of B1 to B3; a row a model and task, with a `reason`.

    Of classes it is the accuracy that is compared, with the majority label's: guesses have a higher
    macro-F1 than the majority label, and no higher accuracy.
    """
    table = clean(task_results)
    intact = table[table.state == "intact"].copy()
    if {"score_accuracy", "chance_accuracy"} <= set(intact):
        classes = ~intact.metric.isin(CORRELATIONS) & intact.score_accuracy.notna()
        intact.loc[classes, "value"] = intact.score_accuracy[classes]
        intact.loc[classes, "chance_value"] = intact.chance_accuracy[classes]
        intact.loc[classes, "metric"] = "accuracy"
    no_duplicates(intact, ["model", "task", "seed"], "intact")
    rows = []
    for names, part in groups(intact, ["model", "task"], sort=True):
        part = part[part.value.notna() & part.chance_value.notna()]
        above = t_interval(part.value - part.chance_value)
        reason = ""
        if above.n < 2:
            reason = f"{count(above.n, 'seed')}, no interval for score - chance"
        elif not above.low > 0:
            reason = f"score - chance is {above}, not above zero"
        rows.append(
            {
                **names, "metric": ", ".join(sorted(set(part.metric))), "score": part.value.mean(),
                "chance": part.chance_value.mean(), "above": above.mean, "low": above.low,
                "high": above.high, "n": above.n, "reason": reason,
            }
        )  # fmt: skip
    names = ["model", "task", "metric", "score", "chance", "above", "low", "high", "n", "reason"]
    found = pd.DataFrame(rows, columns=names)
    kept = found.reason == ""
    return found[kept].reset_index(drop=True), found[~kept].reset_index(drop=True)


class Probed:
    """`value` of one model's cells before and after fine-tuning, against those expected: what
    occurs, or what `grid` says. `table` is one of `checked`."""

    def __init__(self, model: str, table: pd.DataFrame, value: str, grid: dict):
        part = table[(table.model == model) & table.state.isin(["pretrained", "intact"])]
        self.model = model
        self.tasks = sorted(grid.get("tasks", part.task[part.state == "intact"].unique()))
        self.seeds = sorted(int(s) for s in grid.get("seeds", part.seed.unique()))
        self.cells = Cells(part, value, _corpora(part, grid))
        self.n_layers = int(part.n_layers.iloc[0]) if len(part) else 0
        self.over = ", ".join(" ".join(c) for c in self.cells.corpora) or "nothing"

    def pairs(
        self, tasks: Iterable[str], seeds: Iterable[int] | None = None
    ) -> tuple[dict[tuple[str, int], tuple[np.ndarray, np.ndarray]], list[str]]:
        """Values by layer before and after, of every complete (task, seed); what is missing."""
        units = list(product(tasks, self.seeds if seeds is None else seeds))
        (before, lost), (after, gone) = (
            self.cells.of(state, units) for state in ("pretrained", "intact")
        )
        missing = [[*a, *b] for a, b in zip(lost, gone, strict=True)]
        found = {u: (before[i], after[i]) for i, u in enumerate(units) if not missing[i]}
        return found, [name for names in missing for name in names]


def kept_depth(probing: pd.DataFrame) -> pd.DataFrame:
    """How deep each task keeps the knowledge: `half_depth` and `kept_share` with t-intervals over
    the `n` complete seeds, one row per model and task."""
    table, rows = checked(probing, "probing"), []
    for model in dict.fromkeys(table.model):
        cells = Probed(model, table, "selectivity", {})
        for task in cells.tasks:
            pairs, missing = cells.pairs([task])
            row, reasons = {"model": model, "task": task}, named_gaps(missing)
            for measure in (half_depth, kept_share):
                values = [measure(*pair) for pair in pairs.values()]
                row |= bounds(measure.__name__, [x for x in values if not math.isnan(x)])
                if any(map(math.isnan, values)):
                    reasons.append(f"{measure.__name__}: no selectivity before fine-tuning")
            rows.append(row | {"n": len(pairs), "reason": "; ".join(reasons)})
    return pd.DataFrame(rows)


def healing_by_cell(
    probing: pd.DataFrame,
    task_results: pd.DataFrame,
    kind: str = "reinit",
    grid: Mapping[str, Sequence] | None = None,
) -> pd.DataFrame:
    """Losses and healing of score and of knowledge, one row per corrupted setting and seed.

    `task_loss` = intact - healed score; `knowledge_loss` and `knowledge_healing` are of the
    selectivity averaged over the corrupted layers (hidden states `layers` + 1), corpora and
    columns, `knowledge_loss_all` over every layer; `cka` is the similarity of healed to intact.
    Every task, side, level and seed of the probing table (or of `grid`, see `knowledge_claims`) has
    a row; what cannot be computed is NaN and `reason` says why.
    """
    table, scores = checked(probing, "probing"), clean(task_results)
    fits = (scores.kind == kind) & (scores.part == "all") & scores.side.isin(SIDES)
    fits &= scores.state.isin(["broken", "healed"])
    measured = measures(scores[(scores.state == "intact") | fits])
    no_duplicates(measured, _UNIT, "scores of broken and healed")  # of several strengths
    measured = measured.rename(columns={"healing": "task_healing", "reason": "task_reason"})
    grid, found = checked_grid(grid), []
    for _, part in groups(table, ["model"]):
        found += _of_knowledge(part, kind, grid)
    if not found:
        raise HealingError(f"no broken or healed cell of kind {kind!r} in the probing table")
    rows = pd.concat(found, ignore_index=True)
    rows["knowledge_healing"], no_healing = healing(rows, ["model", "task", "side", "level"])
    rows["knowledge_loss"] = rows.intact - rows.healed
    rows["knowledge_reason"] = np.where(rows.broken.notna() | rows.healed.notna(), no_healing, "")
    rows = rows.drop(columns=["intact", "broken", "healed"]).merge(
        measured.drop(columns=["kind", "layers"]), on=_UNIT, how="left"
    )
    rows["task_loss"] = rows.intact - rows.healed
    rows["reason"] = ["; ".join(_reasons(row)) for row in rows.itertuples(index=False)]
    return rows[
        ["model", "task", "side", "level", "kind", "part", "strength", "layers", "seed", "metric",
         "test_size", "intact", "broken", "healed", "task_loss", "knowledge_loss",
         "knowledge_loss_all", "task_healing", "knowledge_healing", "cka", "reason"]
    ]  # fmt: skip


def _of_knowledge(table: pd.DataFrame, kind: str, grid: dict) -> list[pd.DataFrame]:
    """Selectivity of one model's corrupted layers, intact, broken and healed: a table per side and
    level, a row a unit."""
    model = table.model.iloc[0]
    corrupted = table[table.state.isin(["broken", "healed"])]
    corrupted = corrupted[(corrupted.kind == kind) & corrupted.side.isin(SIDES)]
    if corrupted.empty:
        return []
    tasks = sorted(grid.get("healed_tasks", corrupted.task.unique()))
    seeds = sorted(int(s) for s in grid.get("seeds", corrupted.seed.unique()))
    units, corpora = list(product(tasks, seeds)), _corpora(corrupted, grid)
    cells = Cells(pd.concat([table[table.state == "intact"], corrupted]), "selectivity", corpora)
    # The similarity of a missing cell is missing with it; it plays no part in a claim.
    similar = Cells(corrupted[corrupted.state == "healed"], "cka", corpora)
    out = []
    for side, level in places(corrupted, grid):
        here = corrupted[(corrupted.side == side) & (corrupted.level == level)]
        layers = sorted(set(here.layers))
        if len(layers) > 1:
            raise HealingError(
                f"{model}, {side} {as_fraction(level)}: cells of different layers, "
                f"{' and '.join(map(str, layers))}"
            )
        layers = layers[0] if layers else ()
        hidden = [layer + 1 for layer in layers] or [0]  # hidden state 0 is the embeddings
        curves, lost = zip(
            cells.of("intact", units),
            cells.of("broken", units, side, level),
            cells.of("healed", units, side, level),
            strict=True,
        )
        intact, broken, healed = curves
        out.append(
            pd.DataFrame(
                {
                    "model": model,
                    "task": [task for task, _ in units],
                    "side": side,
                    "level": level,
                    "kind": kind,
                    "layers": [layers] * len(units),
                    "seed": [seed for _, seed in units],
                    "intact": intact[:, hidden].mean(axis=1),
                    "broken": broken[:, hidden].mean(axis=1),
                    "healed": healed[:, hidden].mean(axis=1),
                    "knowledge_loss_all": (intact - healed).mean(axis=1),
                    "cka": similar.of("healed", units, side, level)[0][:, hidden].mean(axis=1),
                    "lost": [sum(names, []) for names in zip(*lost, strict=True)],
                }
            )  # fmt: skip
        )
    return out


def _reasons(row) -> list[str]:
    """What a row of `healing_by_cell` lacks, and why."""
    out, setting = list(row.lost), f"{row.task} {row.side} {as_fraction(row.level)}"
    if not isinstance(row.task_reason, str):  # no such row among the scores
        return [*out, f"{setting} seed {row.seed} scores missing: broken, healed"]
    for part in row.task_reason.split("; "):
        if part.startswith("healing: "):
            out.append(f"{setting} task {part}")
        elif part.startswith("missing: ") and math.isnan(row.task_healing):
            out.append(f"{setting} seed {row.seed} scores {part}")
    knows = row.knowledge_reason
    return [*out, f"{setting} knowledge {knows}"] if knows else out


def healing_table(by_cell: pd.DataFrame) -> pd.DataFrame:
    """`healing_by_cell` as means and t-intervals over seeds, one row per model, task, side and
    level; see `recovery.summary`."""
    return summary(
        by_cell, ("task_loss", "knowledge_loss", "knowledge_loss_all", "task_healing",
                  "knowledge_healing", "cka"),
    )  # fmt: skip


def checked(frame: pd.DataFrame, stage: str) -> pd.DataFrame:
    """The table of the stage `probing` or `neurons` with plain values; where nothing is corrupted,
    side, level and kind say so. Raises HealingError on what cannot be compared."""
    values = ("layer", "selectivity", "cka") if stage == "probing" else ("center_of_mass",)
    for name in (*_CELL, "layers", "n_layers", *values):
        if name not in frame:
            choose(name, [str(c) for c in frame.columns], f"column of the {stage} table")
    table = frame.reset_index(drop=True).copy()
    table["level"] = table.level.astype(float).round(LEVEL_DIGITS)
    table["seed"] = table.seed.astype(int)
    table["layers"] = [layer_tuple(x) for x in table.layers]
    whole = table.state.isin(["pretrained", "untrained", "intact"])
    table.loc[whole, ["side", "kind"]] = "none"
    table.loc[whole, "level"] = 0.0
    table.loc[whole & (table.state != "intact"), "task"] = "none"
    depths = table.groupby("model").n_layers.nunique()
    for model in depths.index[depths != 1]:
        raise HealingError(f"{model} has cells of different depths in the {stage} table")
    no_duplicates(table, [*_CELL, "layer"] if stage == "probing" else _CELL, stage)
    if stage == "neurons":
        return table.drop(columns="layer", errors="ignore")
    outside = table[(table.layer < 0) | (table.layer > table.n_layers)]
    if len(outside):
        first = outside.iloc[0]
        raise HealingError(
            f"the probing table has layer {first.layer} of {first.model}, whose layers are 0 (the "
            f"embeddings) to {first.n_layers}"
        )
    return table


def checked_grid(grid: Mapping[str, Sequence] | None) -> dict:
    for name in grid or {}:
        choose(name, _GRID, "entry of the grid")
    return dict(grid or {})


def _corpora(rows: pd.DataFrame, grid: dict) -> list[tuple[str, str]]:
    found = zip(rows.corpus, rows.column, strict=True)
    return sorted({tuple(c) for c in grid.get("corpora", found)})
