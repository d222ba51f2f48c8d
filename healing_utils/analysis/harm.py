"""What harm costs and which recipe of first aid works: the tables behind the scans of a run.

Every function takes the table of `gather`: all scored cells of a run, the main grid and the scans,
each beside the intact score of the same model, task and seed. Differences are paired within a
(task, seed) unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from healing_utils.analysis import results
from healing_utils.analysis.claims import COLUMNS, MARGIN, Effect, decide, evidence, recovery_claims
from healing_utils.analysis.effects import Interval, bounds, groups, means, t_interval, units_needed
from healing_utils.base.errors import HealingError

# What makes a training another one; the moments at which it is looked at do not.
BUDGET = ["train_size", "epochs", "learning_rate", "head"]
CONTROLS = {
    "random": "as many layers drawn at random",
    "scattered": "as many values scattered over all layers",
}


def gather(
    run: str | Path, stages: Sequence[str] = (*results.TASK_STAGES, *results.SCAN_STAGES)
) -> pd.DataFrame:
    """All scored cells of some stages of a run: the columns of its tables, and `scan`, ``main`` for
    the main grid; `harm`, the kind with its strength; `intact`, the score of the intact model of
    the same model, task and seed, trained as the study's parameters say; `loss` = intact - score;
    `retained` = score / intact; `usual`, whether a cell's training is that of the parameters (true
    of what is broken)."""
    tables = [results.load_results(run, s) for s in stages if results.has_stage(run, s)]
    if not tables:
        raise HealingError(f"run {run} has no scored cells: run 01 to 03 first")
    cells = pd.concat([t for t in tables if len(t)], ignore_index=True)
    cells = cells[cells["state"] != "untrained"].reset_index(drop=True)  # a floor, no harm
    cells["scan"] = cells["scan"].fillna("main") if "scan" in cells else "main"
    cells["level"] = cells["level"].astype(float).round(6)
    cells["harm"] = spell_harms(cells)
    cells["part"] = cells["part"].fillna("none")
    unit = ["model", "task", "seed"]
    main = cells[(cells["state"] == "intact") & (cells["scan"] == "main")]
    main = main[[*unit, "score", *BUDGET]].rename(columns={"score": "intact"})
    cells = cells.merge(main, on=unit, how="left", suffixes=("", "_usual"))
    usual = [f"{name}_usual" for name in BUDGET]
    same = (cells[BUDGET].to_numpy() == cells[usual].to_numpy()).all(axis=1)
    cells["usual"] = same | (cells["state"] == "broken")
    cells["loss"] = cells["intact"] - cells["score"]
    cells["retained"] = (cells["score"] / cells["intact"]).where(cells["intact"] > 0)
    return cells.drop(columns=usual)


def spell_harms(cells: pd.DataFrame) -> list[str]:
    """Each row's kind with its strength, as a profile spells it: ``noise=0.5``."""
    pairs = zip(cells["kind"], cells["strength"].astype(float), strict=True)
    return [kind if math.isnan(strength) else f"{kind}={strength:g}" for kind, strength in pairs]


def harm_name(harm: str) -> str:
    """``bits_bfloat16=0.001`` for people: ``bits bfloat16 0.001``."""
    return harm.replace("_", " ").replace("=", " ")


def once(cells: pd.DataFrame, by: Sequence[str] = ("key",)) -> pd.DataFrame:
    """Each cell once, under the main grid's name where it is there."""
    first = cells.assign(_other=cells["scan"] != "main").sort_values("_other", kind="stable")
    return first.drop_duplicates(list(by)).drop(columns="_other").sort_index()


def _by_side(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells whose whole layers were corrupted by side, each once: what a scan calls by its layers
    may be such a cell too, so the side is asked for first."""
    sides = ["bottom", "top", "all"]
    return once(cells[(cells["part"] == "all") & cells["side"].isin(sides)])


def _plain(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells trained as the main grid is: the pre-trained model, all of it, the usual budget."""
    return cells[cells["usual"] & (cells["start"] == "pre-trained") & (cells["recipe"] == "full")]


def trained(cells: pd.DataFrame) -> pd.DataFrame:
    """Healed cells of the usual budget, each once."""
    return once(cells[(cells["state"] == "healed") & cells["usual"]])


def vulnerability(cells: pd.DataFrame, harm: str = "reinit") -> pd.DataFrame:
    """Retained score when one layer, or one part of one layer, is corrupted: a row a model, task,
    state (broken, healed), part and layer, with mean, 95 % t-interval and n seeds."""
    chosen = once(_plain(cells))
    chosen = chosen[
        chosen["state"].isin(["broken", "healed"])
        & (chosen["harm"] == harm)
        & (chosen["layers"].map(len) == 1)
        & (chosen["side"] != "scattered")
    ]
    chosen = chosen.assign(layer=[layers[0] for layers in chosen["layers"]])
    by = ["model", "task", "state", "part", "layer"]
    return means(chosen, by, "retained").sort_values(by, ignore_index=True)


def by_harm(cells: pd.DataFrame) -> pd.DataFrame:
    """Retained score by kind of harm, side and level, broken and healed, of whole layers: a row a
    model, task, state, harm, side and level, with mean, interval and n seeds."""
    chosen = _by_side(_plain(cells))
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


def claims_by_harm(
    cells: pd.DataFrame, grid: Callable[[str], dict | None] = lambda kind: None
) -> pd.DataFrame:
    """A1 to A3 under every kind of harm that hit whole layers by side: `recovery_claims` for each
    harm, corrected within it. What a scan has on fewer tasks or seeds is tested on those; `grid`
    gives what was planned of a kind of the main grid."""
    plain, found = _plain(cells), []
    intact, healed = (plain[plain["state"] == state] for state in ("intact", "healed"))
    intact = once(intact)
    for names, part in groups(_by_side(healed), ["model", "harm"]):
        own = intact[
            (intact["model"] == names["model"])
            & intact["task"].isin(part["task"])
            & intact["seed"].isin(part["seed"])
        ]
        planned = grid(names["harm"]) if (part["scan"] == "main").any() else None
        table = recovery_claims(pd.concat([own, part]), part["kind"].iloc[0], planned)
        broke = int((part["diverged"] != "").sum())
        if broke:  # their scores are those of destroyed models, on either side
            table["reason"] += f"; {broke} of {len(part)} trainings broke off"
        found.append(table.assign(kind=names["harm"]))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def against_controls(cells: pd.DataFrame) -> pd.DataFrame:
    """Is it the bottom, or how much is hit? healed(control) - healed(bottom), paired by task and
    seed, at the same level and kind, for the controls `CONTROLS`: the columns of the claims, and
    ``level control same``. p is corrected over the rows of a model. `same` counts the units whose
    random layers happen to be the bottom ones.
    """
    chosen = _plain(cells)
    chosen = chosen[(chosen["state"] == "healed") & (chosen["part"] == "all")]
    place, paired = ["model", "harm", "level"], ["task", "seed", "model", "harm", "level"]
    bottom = once(chosen[chosen["side"] == "bottom"])[[*paired, "score", "key"]]
    effects = []
    for control, what in CONTROLS.items():
        beside = once(chosen[chosen["side"] == control])[[*paired, "score", "key"]]
        both = beside.merge(bottom, on=paired, how="left", suffixes=("", "_bottom"))
        for names, part in groups(both, place):
            found = part[part["score_bottom"].notna()]
            if found.empty:
                continue
            model, lost = names["model"], len(found) < len(part)
            effects.append(
                Effect(
                    (found["score"] - found["score_bottom"]).to_numpy(),
                    expected=len(part), statement=f"The bottom costs more than {what}",
                    problems=["a bottom cell of its units is missing"] if lost else [],
                    model=model, kind=names["harm"], families=[model], evidence=evidence(model),
                    more={
                        "level": names["level"], "control": control,
                        "same": int((found["key"] == found["key_bottom"]).sum()),
                    },
                )
            )  # fmt: skip
    names = [n for n in COLUMNS if n not in ("claim", "definition", "units", "margin")]
    names[2:2], names[10:10] = ["level", "control"], ["same"]
    return decide(effects, names)


def worth(cells: pd.DataFrame) -> pd.DataFrame:
    """Is a corrupted model worth more than none? healed - scratch, paired by task and seed: a row a
    model, harm, side and level, with effect, interval and n (task, seed) units."""
    chosen, unit = _plain(cells), ["model", "task", "seed"]
    scratch = once(chosen[chosen["state"] == "scratch"])[[*unit, "score"]]
    healed = _by_side(chosen[chosen["state"] == "healed"])
    paired = healed.merge(scratch, on=unit, suffixes=("", "_scratch"))
    paired = paired.assign(effect=paired["score"] - paired["score_scratch"])
    return means(paired, ["model", "harm", "side", "level"], "effect")


def league(cells: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Recipes against full fine-tuning of the same corrupted model, paired by task and seed: a row
    a model, start, harm, side, level and recipe, sorted by gain.

    `gain` = score - score of ``full`` over the n units; `size`, that mean over its standard
    deviation; `units_needed` to show a gain or loss of that size beyond the margin with a power of
    0.8, corrected for as many recipes. `verdict` is *better* or *worse* where the t-interval,
    Bonferroni-corrected for the recipes compared there, lies beyond the margin, *same* within it.
    """
    chosen = cells[cells["usual"] & (cells["state"] == "healed") & (cells["part"] == "all")]
    chosen, place, unit = _placed(once(chosen, ["key", "side"])), _PLACE, ["task", "seed"]
    rows = []
    for names, part in groups(chosen, place):
        part = part.set_index(unit)
        is_full = part["recipe"] == "full"
        full, partners = part[is_full]["score"], part[~is_full]
        others = partners["recipe"].nunique()
        for recipe, scores in part.groupby("recipe", sort=False) if others and len(full) else ():
            # `full` itself on the units on which it is a partner
            both = scores.index.intersection(full.index if recipe != "full" else partners.index)
            if both.empty:  # on none of the tasks that `full` healed
                continue
            gain = (scores.loc[both, "score"] - full.loc[both]).to_numpy()
            beyond = np.abs(gain.mean()) - margin + gain - gain.mean()
            alpha = 0.05 / (2 * others)
            rows.append(
                {
                    **names, "recipe": recipe,
                    **bounds("retained", scores.loc[both, "retained"].dropna()),
                    **bounds("gain", gain), "n": len(gain), "size": _effect_size(gain),
                    "units_needed": units_needed(max(_effect_size(beyond), 0.0), alpha=alpha),
                    "verdict": ""
                    if recipe == "full"
                    else _compared(t_interval(gain, 1 - 2 * alpha), margin),
                }
            )  # fmt: skip
    order = [True] * len(place) + [False]
    table = pd.DataFrame(rows)
    return (
        table.sort_values([*place, "gain"], ascending=order, ignore_index=True) if rows else table
    )


_PLACE = ["model", "start", "harm", "side", "level", "where"]


def _placed(cells: pd.DataFrame) -> pd.DataFrame:
    """With `where`: the layers in words where they were named, else empty."""
    named = [
        ", ".join(map(str, layers)) if side == "custom" else ""
        for side, layers in zip(cells["side"], cells["layers"], strict=True)
    ]
    return cells.assign(where=named)


def _effect_size(difference: np.ndarray) -> float:
    """Mean over standard deviation of paired differences (Cohen's d_z)."""
    if len(difference) < 2 or np.ptp(difference) == 0:
        return math.nan
    return float(difference.mean() / difference.std(ddof=1))


def _compared(interval: Interval, margin: float) -> str:
    if interval.low > margin:
        return "better"
    if interval.high < -margin:
        return "worse"
    return "same" if -margin <= interval.low and interval.high <= margin else "undecided"


def deployed(cells: pd.DataFrame) -> pd.DataFrame:
    """The fault of a deployed model: intact, broken, healed from the fine-tuned and from the
    pre-trained weights, a row a model, task, harm, side and level; means over the n seeds that have
    all four."""
    chosen = cells[cells["usual"] & (cells["recipe"] == "full") & (cells["part"] == "all")]
    chosen = _placed(chosen)
    place = ["model", "task", "harm", "side", "level", "where"]
    merged = None
    for name, state, start in (
        ("healed_deployed", "healed", "fine-tuned"),
        ("healed", "healed", "pre-trained"),
        ("broken", "broken", "pre-trained"),
    ):
        part = chosen[(chosen["state"] == state) & (chosen["start"] == start)]
        part = once(part, ["key", "side"])[[*place, "seed", "intact", "score"]]
        part = part.rename(columns={"score": name})
        merged = part if merged is None else merged.merge(part, on=[*place, "seed", "intact"])
    scores = ["intact", "broken", "healed_deployed", "healed"]
    rows = [
        {**names, "n": len(part), **part[scores].mean(),
         **bounds("gain", part["healed_deployed"] - part["healed"])}
        for names, part in groups(merged, place)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=[*place, "n", *scores, "gain", "gain_low", "gain_high"])
