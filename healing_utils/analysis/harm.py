"""What harm costs, before healing and after: the tables behind the scans of a run.

Every function takes the table of `gather`: all scored cells of a run, the main grid and the scans,
each beside the intact score of the same model, task, seed and budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pandas as pd

from healing_utils.analysis import results
from healing_utils.analysis.effects import (
    LEVEL_DIGITS,
    as_fraction,
    bounds,
    groups,
    means,
    one_metric,
)
from healing_utils.base.errors import HealingError

# What makes a training another one; the moments at which it is looked at do not.
BUDGET = ["train_size", "epochs", "learning_rate", "head"]
_UNIT = ["model", "task", "seed"]
# What makes a cell another one.
CELL = [*_UNIT, *BUDGET, "state", "start", "harm", "part", "recipe", "side", "level", "layers"]
SAME_DAMAGE = [name for name in CELL if name not in ("state", "part", "recipe")]


def gather(
    run: str | Path, stages: Sequence[str] = (*results.TASK_STAGES, *results.SCAN_STAGES)
) -> pd.DataFrame:
    """All scored cells of some stages of a run, as `beside_intact` gives them."""
    tables = [results.load_results(run, s) for s in stages if results.has_stage(run, s)]
    none = pd.DataFrame(columns=results.COLUMNS["scans"])
    return beside_intact(pd.concat(tables, ignore_index=True) if tables else none)


def beside_intact(cells: pd.DataFrame) -> pd.DataFrame:
    """The tables of task stages put together, with further columns: `scan`, ``main`` for the main
    grid; `harm`, the kind with its strength; `place`, in words; `intact`, the score of the intact
    model of the same model, task, seed and budget (also `score_intact`), and `key_intact`; `loss` =
    intact - score; `retained` = score / intact; `usual`, whether the budget is that of the study's
    parameters, and `budget`, in words how it differs; `variant`, harm, recipe, start and budget."""
    cells = cells[cells["state"] != "untrained"].reset_index(drop=True)  # a floor, no harm
    one_metric(cells)
    cells["scan"] = cells["scan"].fillna("main") if "scan" in cells else "main"
    numbers = dict.fromkeys(["level", "strength", "train_size", "steps"], float)
    cells = cells.astype(numbers).round({"level": LEVEL_DIGITS})
    cells["harm"] = spell_harms(cells)
    cells["place"] = list(map(place, cells["side"], cells["level"], cells["layers"]))
    intact = once(cells[cells["state"] == "intact"], [*_UNIT, *BUDGET])
    # What is broken was not trained and records no examples: those of its fine-tuned model.
    rest = [*_UNIT, *BUDGET[1:]]
    sizes = intact.drop_duplicates(rest)[[*rest, "train_size"]]
    sizes = cells[rest].merge(sizes, on=rest, how="left")["train_size"]
    cells["train_size"] = cells["train_size"].fillna(sizes)
    # Its steps too, which a training that broke off, or warmed up first, has fewer of.
    own = intact[[*_UNIT, *BUDGET, "score", "key", "steps"]]
    own = own.rename(columns={"score": "intact", "key": "key_intact", "steps": "whole_main"})
    cells = cells.merge(own, on=[*_UNIT, *BUDGET], how="left")
    main = intact[intact["scan"] == "main"][[*_UNIT, *BUDGET, "steps"]]
    cells = cells.merge(main, on=_UNIT, how="left", suffixes=("", "_main"))
    cells["usual"] = (cells[BUDGET].to_numpy() == cells[[f"{n}_main" for n in BUDGET]]).all(axis=1)
    cells["budget"] = [_budget(row) for row in cells.itertuples()]
    cells["variant"] = [_variant(row) for row in cells.itertuples()]
    cells["loss"], cells["score_intact"] = cells["intact"] - cells["score"], cells["intact"]
    cells["retained"] = (cells["score"] / cells["intact"]).where(cells["intact"] > 0)
    words = dict.fromkeys(["harm", "place", "budget", "variant"], str)  # of no cells too
    return cells.drop(columns=[name for name in cells if name.endswith("_main")]).astype(words)


def _variant(row) -> str:
    recipe = "" if row.recipe == "full" else "by " + harm_name(row.recipe)
    start = "" if row.start == "pre-trained" else row.start
    return ", ".join(filter(None, [harm_name(row.harm), recipe, start, row.budget]))


def _budget(row) -> str:
    """``1/3 of the steps, 500 examples``: what differs from the study's own budget."""
    steps = row.whole_main if row.whole_main > 0 else row.steps
    known = steps > 0 and row.steps_main > 0
    ratio = Fraction(steps / row.steps_main if known else 1).limit_denominator(12)
    words = [f"{ratio} {'times' if ratio > 1 else 'of'} the steps"] if ratio != 1 else []
    words += [f"{row.train_size:,.0f} examples"] if row.train_size != row.train_size_main else []
    words += [f"rate {row.learning_rate:g}"] if row.learning_rate != row.learning_rate_main else []
    return ", ".join(words + ([f"{row.head} head"] if row.head != row.head_main else []))


def spell_harms(cells: pd.DataFrame) -> list[str]:
    """Each row's kind with its strength, as a profile spells it: ``noise=0.5``."""
    pairs = zip(cells["kind"], cells["strength"].astype(float), strict=True)
    return [kind if math.isnan(strength) else f"{kind}={strength:g}" for kind, strength in pairs]


def harm_name(harm: str) -> str:
    """``bits_bfloat16=0.001`` for people: ``bits bfloat16 0.001``."""
    return harm.replace("_", " ").replace("=", " ")


def once(cells: pd.DataFrame, by: Sequence[str] = ("key",)) -> pd.DataFrame:
    """Each cell once, under the main grid's name where it is there, else by side before layers."""
    rank = (cells["scan"] != "main") * 2 + (cells["side"] == "custom")
    first = cells.assign(_other=rank).sort_values("_other", kind="stable")
    return first.drop_duplicates(list(by)).drop(columns="_other").sort_index()


def plain(cells: pd.DataFrame, most: Sequence[str]) -> pd.DataFrame:
    """Cells trained in the plain way: the pre-trained model, all of it, and of each model, task and
    state at the one budget that has the most different `most`, the study's own where several do."""
    chosen = cells[(cells["start"] == "pre-trained") & (cells["recipe"] == "full")]

    def worth(own: pd.DataFrame) -> tuple:  # of which the intact model is missing, nothing is known
        known, several = own["train_size"].notna().all(), own.drop_duplicates(list(most))
        return known, len(several), own["usual"].all()

    parts = [part for _, part in groups(chosen, ["model", "task", "state"])]
    kept = [max((own for _, own in groups(part, BUDGET)), key=worth) for part in parts]
    return pd.concat(kept).sort_index() if kept else chosen


def by_side(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells whose whole layers were corrupted by side, each once, however often it was looked at
    in training: what a scan calls by its layers may be such a cell too, so the side is asked for
    first."""
    sides = ["bottom", "top", "all"]
    return once(cells[(cells["part"] == "all") & cells["side"].isin(sides)], CELL)


def vulnerability(cells: pd.DataFrame) -> pd.DataFrame:
    """Retained score when one layer, or one part of it, is redrawn: a row a model, task, state
    (broken, healed), part and layer, with mean, 95 % t-interval and n seeds."""
    chosen = single_layers(cells[cells["state"].isin(["broken", "healed"])])
    chosen = once(plain(chosen, ["part", "layers"]))
    chosen = chosen.assign(layer=[layers[0] for layers in chosen["layers"]])
    by = ["model", "task", "state", "part", "layer"]
    return means(chosen, by, "retained").sort_values(by, ignore_index=True)


def by_harm(cells: pd.DataFrame) -> pd.DataFrame:
    """Retained score by kind of harm, side and level, broken and healed, of whole layers: a row a
    model, task, state, harm, side and level, with mean, interval and n seeds."""
    chosen = plain(by_side(cells), ["harm"])
    by = ["model", "task", "state", "harm", "side", "level"]
    found = means(chosen[chosen["state"].isin(["broken", "healed"])], by, "retained")
    return found.sort_values(by, ignore_index=True)


def most_kinds(broken: pd.DataFrame) -> pd.DataFrame:
    """The rows of `results.load_similarity` or `results.load_changes` at the place (model, task,
    side, level, seed) that the most kinds of harm have in common, of whole layers, with a column
    `harm`."""
    whole = broken.assign(harm=spell_harms(broken))[(broken["part"] == "all").to_numpy()]
    if whole.empty:
        raise HealingError("no whole layers were corrupted: no place that kinds have in common")
    places = [part for _, part in groups(whole, ["model", "task", "side", "level", "seed"])]
    return max(places, key=lambda part: part["harm"].nunique())


def place(side: str, level: float, layers: Sequence[int] = ()) -> str:
    """Where layers were hit, in words: ``bottom 1/2``, ``all layers``; chosen ones as people and
    figures count them, ``layer 1`` being the first of the encoder and 0 the embeddings."""
    if side == "custom" and len(layers):
        words = ", ".join(str(layer + 1) for layer in layers)
        return f"layer{'s' if len(layers) > 1 else ''} {words}"
    return "all layers" if side == "all" else f"{side} {as_fraction(level)}"


def single_layers(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells of which one layer was redrawn (reinit), whole or in part."""
    one = (cells["layers"].map(len) == 1) & (cells["side"] != "scattered")
    return cells[one & (cells["harm"] == "reinit")]


def healed_layers(cells: pd.DataFrame) -> pd.DataFrame:
    """Healed cells of whole layers, each once."""
    return once(cells[(cells["state"] == "healed") & (cells["part"] == "all")], CELL)


def league(cells: pd.DataFrame) -> pd.DataFrame:
    """Recipes against full fine-tuning of the same corrupted model at the same budget: a row a
    model, start, budget, harm, place and recipe with `gain` and `retained`, sorted by gain; means
    and t-intervals over the `n` seeds, each the mean over its tasks."""
    cells = healed_layers(cells)
    full = cells["recipe"] == "full"
    beside = cells[full][[*SAME_DAMAGE, "score"]]
    chosen = cells[~full].merge(beside, on=SAME_DAMAGE, suffixes=("", "_full"))
    chosen["gain"] = chosen["score"] - chosen["score_full"]
    by = ["model", "start", "budget", "harm", "side", "level", "place", "recipe"]
    rows = []
    for names, part in groups(chosen, by):
        seeds = part.groupby("seed")[["gain", "retained"]].mean()
        found = bounds("gain", seeds["gain"]) | bounds("retained", seeds["retained"].dropna())
        rows.append({**names, **found, "n": len(seeds), "tasks": ", ".join(sorted(set(part.task)))})
    table, order = pd.DataFrame(rows), [*by[:-1], "gain"]
    ascending = [name != "gain" for name in order]
    return table.sort_values(order, ascending=ascending, ignore_index=True) if rows else table


def deployed(cells: pd.DataFrame) -> pd.DataFrame:
    """The fault of a deployed model: intact, broken, healed from the fine-tuned and from the
    pre-trained weights, a row a model, task, harm and place; means over the n seeds that have all
    four, and the `gain` of healing the deployed model."""
    chosen = cells[cells["usual"] & (cells["recipe"] == "full") & (cells["part"] == "all")]
    chosen = once(chosen, ["key", "side"])
    chosen["what"] = chosen["state"] + chosen["start"].map({"fine-tuned": "_deployed"}).fillna("")
    place = ["model", "task", "harm", "side", "level", "place"]
    wide = chosen.pivot_table(index=[*place, "seed", "intact"], columns="what", values="score")
    wide = wide.reindex(columns=["broken", "healed_deployed", "healed"]).dropna().reset_index()
    rows = [
        {**names, "n": len(part),
         **part[["intact", "broken", "healed_deployed", "healed"]].mean(),
         **bounds("gain", part["healed_deployed"] - part["healed"])}
        for names, part in groups(wide, place)
    ]  # fmt: skip
    return pd.DataFrame(rows)
