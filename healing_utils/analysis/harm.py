"""What harm costs and which first aid works: the tables behind the scans of a run.

Every function takes the table of `gather`: all scored cells of a run, the main grid and the scans,
each beside the intact score of the same model, task and seed. Differences are paired within a
(task, seed) unit; intervals, tests and verdicts are those of `statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from healing_utils.analysis import results, statistics
from healing_utils.analysis.statistics import MARGIN, t_interval
from healing_utils.base.errors import HealingError
from healing_utils.healing.corruption import spell_kind

SETTING = ["model", "task", "state", "side", "level", "layers", "harm", "part", "start", "recipe"]
# What makes a training another one; the moments at which it is looked at do not.
BUDGET = ["train_size", "epochs", "learning_rate", "head"]
SHARES = (0.9, 0.95, 0.99)  # of the intact score, whose price is asked
CONTROLS = {
    "random": "as many layers drawn at random",
    "scattered": "as many values scattered over all layers",
}


# --- all cells of a run ---------------------------------------------------------------------------


def gather(
    run: str | Path, stages: Sequence[str] = (*results.TASK_STAGES, *results.SCAN_STAGES)
) -> pd.DataFrame:
    """All scored cells of some stages of a run: the columns of its tables, and

    `scan`, ``main`` for the main grid; `harm`, the kind with its strength; `intact`, the score of
    the intact model of the same model, task and seed, trained as the study's parameters say; `loss`
    = intact - score; `retained` = score / intact; `usual`, whether the cell's own training is that
    of the study's parameters (true of what is broken).
    """
    tables = []
    for stage in stages:
        if results.has_stage(run, stage):
            tables.append(results.load_results(run, stage))
    if not tables:
        raise HealingError(f"run {run} has no scored cells: run 01 to 03 first")
    cells = pd.concat([t for t in tables if len(t)], ignore_index=True)
    cells = cells[cells["state"] != "untrained"].reset_index(drop=True)  # a floor, no harm
    cells["scan"] = cells["scan"].fillna("main") if "scan" in cells else "main"
    cells["level"] = cells["level"].astype(float).round(6)
    cells["harm"] = _harms(cells)
    cells["part"] = cells["part"].fillna("none")
    unit = ["model", "task", "seed"]
    main = cells[(cells["state"] == "intact") & (cells["scan"] == "main")]
    cells = cells.merge(
        main[[*unit, "score", *BUDGET]].rename(
            columns={"score": "intact"} | {name: f"usual_{name}" for name in BUDGET}
        ),
        on=unit,
        how="left",
    )
    same = [cells[name] == cells[f"usual_{name}"] for name in BUDGET]
    cells["usual"] = np.logical_and.reduce(same) | (cells["state"] == "broken")
    cells["loss"] = cells["intact"] - cells["score"]
    cells["retained"] = (cells["score"] / cells["intact"]).where(cells["intact"] > 0)
    return cells.drop(columns=[f"usual_{name}" for name in BUDGET])


def _harms(cells: pd.DataFrame) -> list[str]:
    """Each row's kind with its strength."""
    strengths = cells["strength"].astype(float)
    return [spell_kind(k, s) for k, s in zip(cells["kind"], strengths, strict=True)]


def harm_name(harm: str) -> str:
    """``bits_bfloat16=0.001`` for people: ``bits bfloat16 0.001``."""
    return harm.replace("_", " ").replace("=", " ")


def _once(cells: pd.DataFrame, by: Sequence[str] = ("key",)) -> pd.DataFrame:
    """Each cell once, under the main grid's name where it is there."""
    first = cells.assign(_other=cells["scan"] != "main").sort_values("_other", kind="stable")
    return first.drop_duplicates(list(by)).drop(columns="_other").sort_index()


def _by_side(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells whose whole layers were corrupted by side, each once: what a scan calls by its layers
    may be such a cell too, so the side is asked for first."""
    sides = ["bottom", "top", "all"]
    return _once(cells[(cells["part"] == "all") & cells["side"].isin(sides)])


def _plain(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells trained as the main grid is: the pre-trained model, all of it, the usual budget."""
    return cells[
        cells["usual"] & (cells["start"] == "pre-trained") & (cells["recipe"] == "full")
    ]  # fmt: skip


def _means(cells: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Mean and t-interval of `value` over the rows of each group: ``BY value value_low value_high
    n``."""
    rows = []
    for key, part in cells.groupby(by, sort=False, dropna=False):
        interval = t_interval(part[value].dropna())
        names = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        low, high = interval.low, interval.high
        rows.append(
            {**names, value: interval.mean, f"{value}_low": low, f"{value}_high": high,
             "n": interval.n}
        )  # fmt: skip
    return pd.DataFrame(
        rows, columns=[*by, value, f"{value}_low", f"{value}_high", "n"]
    ).reset_index(drop=True)


# --- where an encoder is vulnerable ---------------------------------------------------------------


def vulnerability(cells: pd.DataFrame, harm: str = "reinit") -> pd.DataFrame:
    """Retained score when one layer, or one part of one layer, is corrupted: a row a model, task,
    state (broken, healed), part and layer, with mean, 95 % t-interval and n seeds."""
    chosen = _once(_plain(cells))
    chosen = chosen[
        chosen["state"].isin(["broken", "healed"])
        & (chosen["harm"] == harm)
        & (chosen["layers"].map(len) == 1)
        & (chosen["side"] != "scattered")
    ]
    chosen = chosen.assign(layer=[layers[0] for layers in chosen["layers"]])
    by = ["model", "task", "state", "part", "layer"]
    return _means(chosen, by, "retained").sort_values(by, ignore_index=True)


def by_harm(cells: pd.DataFrame) -> pd.DataFrame:
    """Retained score by kind of harm, side and level, broken and healed, of whole layers: a row a
    model, task, state, harm, side and level, with mean, interval and n seeds."""
    chosen = _by_side(_plain(cells))
    chosen = chosen[chosen["state"].isin(["broken", "healed"])]
    by = ["model", "task", "state", "harm", "side", "level"]
    return _means(chosen, by, "retained").sort_values(by, ignore_index=True)


def most_kinds(broken: pd.DataFrame) -> pd.DataFrame:
    """The rows of `results.load_similarity` or `results.load_changes` at the place (model, task,
    side, level, seed) that the most kinds of harm have in common, of whole layers, with a column
    `harm`."""
    whole = broken.assign(harm=_harms(broken))[(broken["part"] == "all").to_numpy()]
    places = whole.groupby(["model", "task", "side", "level", "seed"], sort=False)
    if whole.empty:
        raise HealingError("no whole layers were corrupted: no place that kinds have in common")
    return max((part for _, part in places), key=lambda part: part["harm"].nunique())


# --- do the claims hold beyond re-initialisation? -------------------------------------------------


def claims_by_harm(
    cells: pd.DataFrame, grid: Callable[[str], dict | None] = lambda kind: None
) -> pd.DataFrame:
    """A1 to A3 under every kind of harm that hit whole layers by side: `statistics.claims` for each
    harm, corrected within it. What a scan has on fewer tasks or seeds is tested on those; `grid`
    gives what was planned of a kind of the main grid."""
    plain = _plain(cells)
    intact, healed = (plain[plain["state"] == state] for state in ("intact", "healed"))
    intact = _once(intact)
    found = []
    for (model, harm), part in _by_side(healed).groupby(["model", "harm"], sort=False):
        own = intact[
            (intact["model"] == model)
            & intact["task"].isin(part["task"])
            & intact["seed"].isin(part["seed"])
        ]
        kind = part["kind"].iloc[0]
        main = (part["scan"] == "main").any()
        table = statistics.claims(
            pd.concat([own, part]), kind=kind, grid=grid(harm) if main else None
        )
        broke = int((part["diverged"] != "").sum())
        if broke:  # their scores are those of destroyed models, on either side
            table["reason"] += f"; {broke} of {len(part)} trainings broke off"
        found.append(table.assign(kind=harm))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def against_controls(cells: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Is it the bottom, or how much is hit? healed(control) - healed(bottom), paired by task and
    seed, at the same level and kind, for the controls `CONTROLS`: a row a model, control, kind and
    level with effect, interval, exact one-sided p, Holm-corrected over the rows of a model, and
    verdict. `same` counts the units whose random layers happen to be the bottom ones.
    """
    chosen = _plain(cells)
    chosen = chosen[(chosen["state"] == "healed") & (chosen["part"] == "all")]
    unit = ["model", "task", "seed", "harm", "level"]
    bottom = _once(chosen[chosen["side"] == "bottom"])[[*unit, "score", "key"]]
    rows = []
    for control, what in CONTROLS.items():
        beside = _once(chosen[chosen["side"] == control])[[*unit, "score", "key"]]
        wanted = beside.set_index(["model", "harm", "level"]).sort_index()
        paired = beside.merge(bottom, on=unit, suffixes=("", "_bottom"))
        for (model, harm, level), part in paired.groupby(["model", "harm", "level"], sort=False):
            effect = part["score"] - part["score_bottom"]
            interval, test = t_interval(effect), statistics.sign_flip(effect)
            rows.append(
                {
                    "model": model, "kind": harm, "level": level, "control": control,
                    "statement": f"The bottom costs more than {what}",
                    "effect": interval.mean, "low": interval.low, "high": interval.high,
                    "n": interval.n, "n_expected": len(wanted.loc[[(model, harm, level)]]),
                    "same": int((part["key"] == part["key_bottom"]).sum()),
                    "p": test.p, "smallest_p": test.smallest_p,
                }
            )  # fmt: skip
    names = [
        "model", "kind", "level", "control", "statement", "effect", "low", "high", "n",
        "n_expected", "same", "p", "smallest_p", "p_corrected", "verdict", "reason", "evidence",
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=names)
    corrected = table.groupby("model", sort=False)["p"].transform(statistics.holm)
    table["p_corrected"] = corrected.astype(float)
    verdicts = [
        statistics.verdict(
            row.low,
            row.high,
            row.p_corrected,
            row.smallest_p,
            margin=margin,
            missing=["a bottom cell of its units is missing"] if row.n < row.n_expected else (),
        )
        for row in table.itertuples()
    ]
    table["verdict"] = [verdict for verdict, _ in verdicts]
    table["reason"] = [reason for _, reason in verdicts]
    table["evidence"] = [statistics.evidence_of_side(model) for model in table["model"]]
    return table


# --- first aid ------------------------------------------------------------------------------------


def league(cells: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Recipes against full fine-tuning of the same corrupted model, paired by task and seed.

    A row a model, start, harm, side, level and recipe: `retained` with its interval; `gain` = score
    - score of ``full``, with its 95 % t-interval over the n units; `size`, that mean over its
    standard deviation; `units_needed` to show a gain or loss of that size beyond the margin with a
    power of 0.8, corrected for as many recipes. `verdict` is *better* or
    *worse* where the t-interval, widened by Bonferroni's correction for the number of recipes
    compared there, lies beyond the margin; *same* where it lies within it; else *undecided*.
    Sorted by gain, ``full`` among them.
    """
    chosen = cells[cells["usual"] & (cells["state"] == "healed") & (cells["part"] == "all")]
    chosen = _placed(_once(chosen, ["key", "side"]))
    place = ["model", "start", "harm", "side", "level", "where"]
    unit = ["task", "seed"]
    rows = []
    for key, part in chosen.groupby(place, sort=False):
        full = part[part["recipe"] == "full"].set_index(unit)["score"]
        others = [r for r in part["recipe"].unique() if r != "full"]
        if not others or full.empty:
            continue
        for recipe, found in part.groupby("recipe", sort=False):
            scores = found.set_index(unit)
            both = scores.index.intersection(full.index)
            if recipe == "full":  # on the units on which it is a partner
                partners = part[part["recipe"] != "full"].set_index(unit).index
                both = both.intersection(partners)
            retained = t_interval(scores.loc[both, "retained"].dropna())
            gain = (scores.loc[both, "score"] - full.loc[both]).to_numpy()
            interval = t_interval(gain)
            wide = t_interval(gain, 1 - 0.05 / len(others))
            size = _effect_size(gain)
            beyond = _effect_size(np.abs(gain.mean()) - margin + gain - gain.mean())
            alpha = 0.05 / (2 * len(others))
            needed = statistics.units_needed(max(beyond, 0.0), alpha=alpha)
            if interval.n == 0:  # on none of the tasks that `full` healed
                continue
            rows.append(
                {
                    **dict(zip(place, key, strict=True)), "recipe": recipe,
                    "retained": retained.mean, "retained_low": retained.low,
                    "retained_high": retained.high, "gain": interval.mean,
                    "gain_low": interval.low, "gain_high": interval.high, "n": interval.n,
                    "size": size, "units_needed": needed,
                    "verdict": "" if recipe == "full" else _compared(wide, margin),
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    order = [*place, "gain"]
    return table.sort_values(order, ascending=[True] * len(place) + [False], ignore_index=True)


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


def _compared(interval: statistics.Interval, margin: float) -> str:
    if math.isnan(interval.low):
        return "undecided"
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
    unit = ["model", "task", "harm", "side", "level", "where", "seed"]
    tables = []
    for name, state, start in (
        ("healed_deployed", "healed", "fine-tuned"),
        ("healed", "healed", "pre-trained"),
        ("broken", "broken", "pre-trained"),
    ):
        part = chosen[(chosen["state"] == state) & (chosen["start"] == start)]
        part = _once(part, ["key", "side"])
        tables.append(part[[*unit, "score", "intact"]].rename(columns={"score": name}))
    merged = tables[0]
    for other in tables[1:]:
        merged = merged.merge(other.drop(columns="intact"), on=unit)
    rows = []
    for key, part in merged.groupby(unit[:-1], sort=False):
        gain = t_interval(part["healed_deployed"] - part["healed"])
        rows.append(
            {
                **dict(zip(unit[:-1], key, strict=True)), "n": len(part),
                **{name: part[name].mean() for name in ("intact", "broken", "healed_deployed",
                                                        "healed")},
                "gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high,
            }
        )  # fmt: skip
    names = ["n", "intact", "broken", "healed_deployed", "healed", "gain", "gain_low", "gain_high"]
    return pd.DataFrame(rows, columns=[*unit[:-1], *names])


# --- the price ------------------------------------------------------------------------------------


def price(cells: pd.DataFrame, shares: Iterable[float] = SHARES) -> pd.DataFrame:
    """Labelled examples needed to reach a share of the intact score, a row a setting and share.

    Of each setting (state, side, level, harm, recipe, ...) that was trained on several numbers of
    examples; see `_needed` for what `needed` says.
    """
    trained = _once(cells[(cells["state"] != "broken") & (cells["side"] != "random")])
    same = [name for name in BUDGET if name != "train_size"]
    usual = trained[trained["usual"]][same].drop_duplicates()
    trained = trained.merge(usual, on=same)  # only the examples differ
    return _prices(trained.rename(columns={"train_size": "budget"}), shares)


def price_in_steps(curves: pd.DataFrame, shares: Iterable[float] = SHARES) -> pd.DataFrame:
    """Steps needed to reach a share of the intact score, from learning curves on held-out examples.

    `curves` is `results.load_curves` with the scans. Of each setting its longest training at the
    usual rate counts; the intact score is the held-out one at the end of the intact model's usual
    training. Held-out examples are fewer than scored ones, so that less can be resolved. Recipes
    that warm up are left out, since their curves begin after it, and so are random layers, which
    differ from seed to seed.
    """
    warm = curves["recipe"].isin(["mlm_warm_up", "distillation"])
    curves = curves[curves["score"].notna() & ~warm & (curves["side"] != "random")].copy()
    curves["harm"] = _harms(curves)
    unit = ["model", "task", "seed"]
    main = curves[(curves["state"] == "intact") & (curves["scan"] == "main")]
    ends = main.sort_values("step").groupby(unit, sort=False).tail(1)
    same = ["learning_rate", "train_size", "head"]
    ends = ends[[*unit, "score", *same]].rename(columns={"score": "intact"})
    curves = curves.merge(ends, on=[*unit, *same])
    longest = curves.groupby([*SETTING, "seed"], dropna=False)["epochs"].transform("max")
    curves = curves[curves["epochs"] == longest]
    finest = curves.groupby([*SETTING, "seed"], dropna=False)["evaluations"].transform("max")
    curves = _once(curves[curves["evaluations"] == finest], ["key", "step"])
    return _prices(curves.rename(columns={"step": "budget"}), shares, least=3)


def price_list(priced: pd.DataFrame) -> pd.DataFrame:
    """`price` or `price_in_steps` for people: a row a setting, a column a share."""
    wide = priced.pivot(index=SETTING, columns="share", values="needed").reset_index()
    wide = wide.rename(columns={share: f"{share:.0%}" for share in priced["share"].unique()})
    order = {"intact": 0, "healed": 1, "scratch": 2}
    wide = wide.sort_values(
        ["model", "task", "state", "harm", "level", "side", "layers", "recipe"],
        key=lambda column: column.map(order) if column.name == "state" else column,
        ignore_index=True,
    )
    wide["what"] = [_setting(row) for _, row in wide.iterrows()]
    shares = [name for name in wide if str(name).endswith("%")]
    return wide[["model", "task", "what", *shares]].rename_axis(columns=None)


def _setting(row: pd.Series) -> str:
    """A setting in words: ``healed: bottom 1/2, noise 1, by transplant``."""
    if row["state"] != "healed":
        return str(row["state"])
    layers = ", ".join(map(str, row["layers"]))
    where = f"layer {layers}" if row["side"] == "custom" else _place(row)
    place = row["part"].replace("_", " ") if row["side"] == "none" else where
    words = [place, harm_name(row["harm"])]
    if row["part"] != "all" and row["side"] != "none":
        words.append(row["part"].replace("_", " "))
    if row["start"] != "pre-trained":
        words.append(row["start"])
    if row["recipe"] != "full":
        words.append("by " + row["recipe"].replace("_", " "))
    return "healed: " + ", ".join(words)


def _prices(table: pd.DataFrame, shares: Iterable[float], least: int = 2) -> pd.DataFrame:
    rows = []
    for key, part in table.groupby(SETTING, sort=False, dropna=False):
        if part["budget"].nunique() < least:
            continue
        for share in shares:
            rows.append(
                {**dict(zip(SETTING, key, strict=True)), "share": share, **_needed(part, share)}
            )
    names = [*SETTING, "share", "needed", "from", "to", "largest", "n"]
    return pd.DataFrame(rows, columns=names)


def _needed(part: pd.DataFrame, share: float) -> dict[str, object]:
    """The smallest budget of `part` that reaches `share` of the intact score, in words and bounds.

    At each budget the paired difference score - share x intact has a mean and a 95 % t-interval
    over the seeds. Where the interval at the largest budget lies below zero, the price is *more
    than* that budget; where it contains zero, it is *not resolvable* with so many seeds. Else the
    price is the first budget from which the mean stays at or above zero, with the range from the
    first budget from which the interval's upper end does to the first from which its lower end
    does.
    """
    found = []
    for budget, rows in part.groupby("budget"):
        interval = t_interval(rows["score"] - share * rows["intact"])
        if rows["seed"].nunique() < part["seed"].nunique():  # a training broke off before
            interval = statistics.Interval(*[-math.inf] * 3, interval.n)
        found.append((budget, interval))
    budgets = [int(budget) for budget, _ in found]

    def stays(end: str) -> int | None:
        """The first budget from which on this end of the interval is at or above zero."""
        first = None
        for budget, interval in zip(budgets, (i for _, i in found), strict=True):
            if getattr(interval, end) >= 0:
                first = budget if first is None else first
            else:
                first = None
        return first

    largest, last = budgets[-1], found[-1][1]
    low, mean, high = stays("high"), stays("mean"), stays("low")
    row = {"from": low, "to": high, "largest": largest, "n": last.n}
    if last.n < 2:
        needed = "not resolvable: one seed"
    elif last.high < 0:
        needed = f"more than {largest:,}"
    elif high is None:
        needed = "not resolvable"
    else:
        needed = f"{mean:,}" if low == high else f"{mean:,} ({low:,} to {high:,})"
        if low == budgets[0] and high == budgets[0]:
            needed = f"at most {mean:,}"
    return {"needed": needed, **row}


# --- healing or under-training? -------------------------------------------------------------------


def training_control(cells: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Would another learning rate or more steps have healed? A row a model, task, state and place.

    `rate` is the learning rate with the best mean held-out score at the end, among those that were
    tried on the same seeds; `score_at_rate` the score there, `usual_at_rate` the score at the usual
    rate on the same seeds. `more` is how many times the usual steps the longest training had,
    `score_at_more` its score, `gained` that minus the usual one, paired, with its interval.
    `rising` says that the held-out score of the longest training still rose over its last third,
    with the whole interval above zero.
    """
    trained = _once(cells[(cells["state"] != "broken") & (cells["side"] != "random")])
    trained = trained[(trained["start"] == "pre-trained") & (trained["recipe"] == "full")]
    trained = trained.merge(_ends(curves), on="key", how="left")
    rows = []
    for key, part in trained.groupby(SETTING, sort=False, dropna=False):
        usual = part[part["usual"]]
        if usual.empty:
            continue
        base = usual.iloc[0]
        part = part[part["head"] == base["head"]]
        rates = part[(part["epochs"] == base["epochs"]) & (part["train_size"] == base.train_size)]
        longer = part[
            (part["learning_rate"] == base["learning_rate"])
            & (part["train_size"] == base["train_size"])
            & (part["epochs"] > base["epochs"])
        ]
        if rates["learning_rate"].nunique() < 2 and longer.empty:
            continue
        row = dict(zip(SETTING, key, strict=True))
        rows.append(row | _best_rate(rates) | _more_steps(usual, longer))
    names = [
        *SETTING, "rate", "rates", "n_rates", "score_at_rate", "usual_at_rate", "more", "n",
        "usual", "score_at_more", "gained", "gained_low", "gained_high", "rising",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=names)


def _ends(curves: pd.DataFrame) -> pd.DataFrame:
    """Held-out score at the end of each training, and how much of it came in the last third."""
    rows = []
    for key, part in curves[curves["score"].notna()].groupby("key", sort=False):
        part = part.sort_values("step")
        last = part.iloc[-1]
        before = part[part["step"] <= last["step"] * 2 / 3]
        rise = last["score"] - before["score"].iloc[-1] if len(before) else math.nan
        rows.append({"key": key, "held_out": last["score"], "rise": rise})
    return pd.DataFrame(rows, columns=["key", "held_out", "rise"])


def _best_rate(part: pd.DataFrame) -> dict[str, object]:
    seeds = part.groupby("seed")["learning_rate"].nunique()
    shared = part[part["seed"].isin(seeds[seeds == part["learning_rate"].nunique()].index)]
    if shared["learning_rate"].nunique() < 2:
        return {}
    held_out = shared.groupby("learning_rate")["held_out"].agg(lambda s: s.mean(skipna=False))
    if held_out.isna().all():  # a rate at which a seed diverged is not the best
        return {}
    best = held_out.idxmax()
    return {
        "rate": best,
        "rates": ", ".join(f"{rate:g}" for rate in sorted(shared["learning_rate"].unique())),
        "n_rates": shared["seed"].nunique(),
        "score_at_rate": shared[shared["learning_rate"] == best]["score"].mean(),
        "usual_at_rate": shared[shared["usual"]]["score"].mean(),
    }


def _more_steps(usual: pd.DataFrame, longer: pd.DataFrame) -> dict[str, object]:
    if longer.empty:
        return {}
    longest = longer[longer["epochs"] == longer["epochs"].max()]
    paired = usual.merge(longest, on="seed", suffixes=("", "_longer"))
    gained = t_interval(paired["score_longer"] - paired["score"])
    rise = t_interval(paired["rise_longer"].dropna())
    return {
        "more": float(longest["epochs"].iloc[0] / usual["epochs"].iloc[0]),
        "n": gained.n,
        "usual": paired["score"].mean(),
        "score_at_more": paired["score_longer"].mean(),
        "gained": gained.mean,
        "gained_low": gained.low,
        "gained_high": gained.high,
        "rising": bool(rise.low > 0),
    }


# --- guidance -------------------------------------------------------------------------------------


def worth(cells: pd.DataFrame) -> pd.DataFrame:
    """Is a corrupted model worth more than none? healed - scratch, paired by task and seed: a row a
    model, harm, side and level, with effect, interval and n (task, seed) units."""
    chosen = _plain(cells)
    scratch = _once(chosen[chosen["state"] == "scratch"])
    unit = ["model", "task", "seed"]
    healed = _by_side(chosen[chosen["state"] == "healed"])
    paired = healed.merge(scratch[[*unit, "score"]], on=unit, suffixes=("", "_scratch"))
    paired = paired.assign(effect=paired["score"] - paired["score_scratch"])
    return _means(paired, ["model", "harm", "side", "level"], "effect")


def guidance(cells: pd.DataFrame, curves: pd.DataFrame | None = None) -> list[str]:
    """What a reader with a damaged encoder can take from this run, a line of Markdown each.

    Every line is written from the tables of this module, with its numbers: other data give other
    advice, and a question that no cell of the run speaks to is passed over.
    """
    lines = []
    for model, part in cells.groupby("model", sort=False):
        own = None if curves is None else curves[curves["model"] == model]
        advice = _advice(part, own)
        if advice:
            lines += [f"**{model}**", "", *(f"- {line}" for line in advice), ""]
    return lines


def _advice(cells: pd.DataFrame, curves: pd.DataFrame | None) -> list[str]:
    found = [
        *_where_to_look(vulnerability(cells)),
        *_which_harm(by_harm(cells)),
        *_beyond_healing(cells),
        *_keep_or_start_anew(worth(cells)),
        *_which_aid(league(cells)),
        *_repair_or_redo(deployed(cells)),
        *_at_what_price(price(cells)),
    ]
    if curves is not None:
        found += _more_training(training_control(cells, curves))
    return found


def _ci(row: pd.Series, name: str, scale: float = 1.0, digits: int = 2, sign: str = "") -> str:
    values = [scale * row[f"{name}{end}"] for end in ("", "_low", "_high")]
    if math.isnan(values[1]):
        return f"{values[0]:{sign}.{digits}f} (one seed)"
    return f"{values[0]:{sign}.{digits}f} [{values[1]:.{digits}f}, {values[2]:.{digits}f}]"


def _where_to_look(table: pd.DataFrame) -> list[str]:
    lines = []
    for task, part in table.groupby("task", sort=False):
        whole = part[(part["state"] == "healed") & (part["part"] == "all")]
        if len(whole) > 2:  # more than the two ends, which a level can hit too
            worst = whole.loc[whole["retained"].idxmin()]
            best = whole.loc[whole["retained"].idxmax()]
            lines.append(
                f"On {task}, look first at layer {worst['layer']}: redrawn alone and healed, it "
                f"leaves {_ci(worst, 'retained')} of the intact score, layer {best['layer']} "
                f"{_ci(best, 'retained')}."
            )
        parts = part[(part["state"] == "broken") & (part["part"] != "all")]
        if parts["part"].nunique() > 1:
            means = parts.groupby("part")["retained"].mean().sort_values()
            said = ", ".join(f"{p.replace('_', ' ')} {v:.2f}" for p, v in means.items())
            lines.append(
                f"Before healing, one part of one layer redrawn leaves, on {task} and on average "
                f"over the layers: {said}."
            )
    return lines


def _which_harm(table: pd.DataFrame) -> list[str]:
    half = table[(table["side"] == "bottom") & (table["level"] == 0.5)]
    kinds = half[half["state"] == "healed"].groupby("task")["harm"].nunique()
    if kinds.empty:
        return []
    half = half[half["task"] == kinds.idxmax()]  # on one task, where the kinds can be compared
    healed = half[half["state"] == "healed"].sort_values("retained")
    if healed["harm"].nunique() < 2:
        return []
    worst, best = healed.iloc[0], healed.iloc[-1]
    lines = [
        f"Of the kinds of harm to the bottom half on {worst['task']}, {harm_name(worst['harm'])} "
        f"is the hardest to heal ({_ci(worst, 'retained')} of intact) and "
        f"{harm_name(best['harm'])} the easiest ({_ci(best, 'retained')})."
    ]
    broken = half[half["state"] == "broken"].groupby("harm")["retained"].min()
    harmless = [h for h, value in broken.items() if value >= 0.99]
    if harmless:
        names = ", ".join(map(harm_name, harmless))
        lines.append(f"Harmless without any healing, at 0.99 of intact or more: {names}.")
    return lines


def _beyond_healing(cells: pd.DataFrame) -> list[str]:
    """Harm after which the loss is not finite: no gradient to heal by."""
    trained = _once(cells[(cells["state"] == "healed") & cells["usual"]])
    lines = []
    for harm, part in trained.groupby("harm", sort=False):
        failed = int((part["diverged"] != "").sum())
        if failed:
            lines.append(
                f"After {harm_name(harm)} the training of {failed} of {len(part)} models broke "
                "off: their loss was not finite."
            )
    return lines


def _keep_or_start_anew(table: pd.DataFrame) -> list[str]:
    if table.empty:
        return []
    where = [f"{_place(row)} {harm_name(row['harm'])}" for _, row in table.iterrows()]
    table = table.assign(where=where)
    keep = table[table["effect_low"] > MARGIN]
    anew = table[table["effect_high"] < -MARGIN]
    open_ = table[~table.index.isin([*keep.index, *anew.index])]
    lines = []
    if len(keep):
        least = keep.loc[keep["effect"].idxmin()]
        lines.append(
            f"Heal rather than train from random values in {len(keep)} of {len(table)} cases of "
            f"whole-layer harm (the smallest of these gains: {least['where']}, "
            f"{_ci(least, 'effect', 100, 1)} points)."
        )
    if len(anew):
        lines.append(f"Start anew after {', '.join(anew['where'])}: random values do better.")
    if len(open_):
        lines.append(f"Undecided between the two: {', '.join(open_['where'])}.")
    return lines


def _which_aid(table: pd.DataFrame) -> list[str]:
    lines = []
    if table.empty:
        return lines
    by = ["start", "side", "level", "where", "harm"]
    for (start, *_), part in table.groupby(by, sort=False):
        first = part.iloc[0]
        kind = harm_name(first["harm"]) + ("" if start == "pre-trained" else f", {start}")
        place = f"{_place(first)} ({kind})"
        others = part[part["recipe"] != "full"]
        if others.empty:
            continue
        best = others.loc[others["gain"].idxmax()]
        gains = f"{_ci(best, 'gain', 100, 1, '+')} points"
        name = best["recipe"].replace("_", " ")
        if best["verdict"] == "better":
            lines.append(f"First aid for the {place}: {name}, {gains} over full fine-tuning.")
        else:
            lines.append(
                f"For the {place} no recipe is clearly better than full fine-tuning; the best, "
                f"{name}, gains {gains}."
            )
        worse = [r.replace("_", " ") for r in others[others["verdict"] == "worse"]["recipe"]]
        if worse:
            lines.append(f"Clearly worse there: {', '.join(worse)}.")
    return lines


def _repair_or_redo(table: pd.DataFrame) -> list[str]:
    lines = []
    for _, row in table.iterrows():
        fall = f"from {row['intact']:.2f} to {row['broken']:.2f}"
        lines.append(
            f"A deployed {row['task']} model whose {_place(row)} is hit ({row['harm']}) falls "
            f"{fall}; healing it as it is gives {row['healed_deployed']:.2f}, "
            f"{_ci(row, 'gain', 100, 1, '+')} points against healing the pre-trained model."
        )
    return lines


def _at_what_price(table: pd.DataFrame) -> list[str]:
    table = table[table["share"] == SHARES[0]]
    return [
        f"Labelled examples to reach 90 % of the intact score on {task}: "
        + "; ".join(f"{_setting(row)} {row['needed']}" for _, row in part.iterrows())
        + "."
        for task, part in table.groupby("task", sort=False)
    ]


def _place(row: pd.Series) -> str:
    if row.get("where"):
        return f"layer {row['where']}"
    whole = row["side"] == "all"
    return "all layers" if whole else f"{row['side']} {statistics.as_fraction(row['level'])}"


def _more_training(table: pd.DataFrame) -> list[str]:
    lines = []
    trained = table[table["gained"].notna()]
    for (task, more), part in trained.groupby(["task", "more"], sort=False):
        said = []
        for _, row in part.iterrows():
            rising = ", still rising" if row["rising"] else ""
            said.append(f"{_setting(row)} {_ci(row, 'gained', 100, 1, '+')}{rising}")
        lines.append(
            f"{more:g} times the steps change the score on {task} by (points): {'; '.join(said)}."
        )
    return lines
