"""What a cure costs: time to heal in steps, labelled examples, and whether training was too short.

The functions take the table of `harm.gather` and the learning curves of `results.load_curves`.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from healing_utils.analysis.claims import MARGIN
from healing_utils.analysis.effects import Interval, bounds, groups, t_interval
from healing_utils.analysis.harm import harm_name, once, place, spell_harms

SETTING = ["model", "task", "state", "side", "level", "layers", "harm", "part", "start", "recipe"]
SHARES = (0.9, 0.95, 0.99)  # of the intact score, whose price is asked
FOUND = ["needed", "reached", "from", "to", "largest", "n"]
_UNIT = ["model", "task", "seed"]
_ALIKE = ["learning_rate", "head"]
_TRAINING = [*SETTING, "train_size", "epochs", *_ALIKE]


def by_examples(cells: pd.DataFrame) -> pd.DataFrame:
    """The trained cells of settings that were trained on several numbers of examples; `intact` is
    the score of the intact model with the most of them. Trainings are alike that have the same
    epochs, or the same steps where more sizes share those."""
    trained = once(cells[(cells["state"] != "broken") & (cells["side"] != "random")])
    found = [trained.head(0)]
    for _, part in groups(trained, ["model", "task", *_ALIKE]):
        sweeps = [g for same in ("epochs", "steps") for _, g in part.groupby(same)]
        sizes = [sweep["train_size"].nunique() for sweep in sweeps]
        if max(sizes, default=0) > 1:
            sweep = sweeps[int(np.argmax(sizes))]
            most = sweep[sweep["state"] == "intact"].sort_values("train_size")
            best = most.drop_duplicates(_UNIT, keep="last")[[*_UNIT, "score"]]
            best = best.rename(columns={"score": "intact"})
            found.append(sweep.drop(columns="intact").merge(best, on=_UNIT))
    sized = pd.concat(found[1:] or found, ignore_index=True)
    # Only the seeds that were trained on every size of their setting: sizes are compared.
    own = sized.groupby([*SETTING, "seed"], dropna=False)["train_size"].transform("nunique")
    return sized[own == sized.groupby(SETTING, dropna=False)["train_size"].transform("nunique")]


def price(cells: pd.DataFrame) -> pd.DataFrame:
    """Labelled examples needed to reach `SHARES` of what the intact model reaches with the most of
    them: a row a setting of `by_examples` and share; see `_needed`."""
    found = by_examples(cells).drop(columns="budget")
    return _prices(found.rename(columns={"train_size": "budget"}), SETTING, 2)


def time_to_heal(curves: pd.DataFrame) -> pd.DataFrame:
    """Steps needed to reach `SHARES` of the score that the intact model has at the end of the same
    training, by the curves on held-out examples: a row a setting, length of training (`epochs`,
    `train_size`) and share; see `_needed`. Recipes that warm up are left out, since their curves
    begin after it, and so are random layers, which differ from seed to seed."""
    warm = curves["recipe"].isin(["mlm_warm_up", "distillation"])
    curves = beside_end(curves[~warm & (curves["side"] != "random")])
    curves = once(curves, ["key", "step"]).rename(columns={"step": "budget"})
    return _prices(curves, _TRAINING, 3)


def beside_end(curves: pd.DataFrame) -> pd.DataFrame:
    """Curves, each setting's where it was looked at most often, with columns `harm` and `intact`,
    the score that the intact model has at the end of the same training."""
    curves = curves[curves["score"].notna()]
    curves = curves.assign(harm=spell_harms(curves))
    same = [*_UNIT, *_ALIKE, "train_size", "epochs"]
    ends = curves[curves["state"] == "intact"].sort_values(["evaluations", "step"])
    ends = ends.drop_duplicates(same, keep="last")[[*same, "score"]]
    curves = curves.merge(ends.rename(columns={"score": "intact"}), on=same)
    each = curves.groupby([*_TRAINING, "seed"], dropna=False)
    return curves[curves["evaluations"] == each["evaluations"].transform("max")]


def _prices(table: pd.DataFrame, by: list[str], least: int) -> pd.DataFrame:
    rows = [
        {**names, "share": share, **_needed(part, share)}
        for names, part in groups(table, by)
        if part["budget"].nunique() >= least
        for share in SHARES
    ]
    return pd.DataFrame(rows, columns=[*by, "share", *FOUND])


def _needed(part: pd.DataFrame, share: float) -> dict[str, object]:
    """The smallest budget of `part` that reaches `share` of the intact score, in words and bounds:
    the first from which the mean of score - share x intact stays at or above zero (`reached`), with
    the range from the first from which the upper end of its interval does to the first of its lower
    end; more than the largest, where the interval lies below zero there; else not resolvable."""
    found = {}
    for budget, rows in part.groupby("budget"):
        found[int(budget)] = t_interval(rows["score"] - share * rows["intact"])
        if rows["seed"].nunique() < part["seed"].nunique():  # a training broke off before
            found[int(budget)] = Interval(*[-math.inf] * 3, len(rows))
    stays = pd.DataFrame(found, index=Interval._fields).T.iloc[::-1].ge(0).cummin()
    low, mean, high = (min(stays.index[stays[x]], default=None) for x in ("high", "mean", "low"))
    (smallest, *_, largest), last = found, list(found.values())[-1]
    if last.n < 2:
        needed = "not resolvable: one seed"
    elif last.high < 0:
        needed = f"more than {largest:,}"
    elif high is None:
        needed = "not resolvable"
    elif low == high == smallest:
        needed = f"at most {mean:,}"
    else:
        needed = f"{mean:,}" if low == high else f"{mean:,} ({low:,} to {high:,})"
    reached = mean if high is not None else None
    return dict(zip(FOUND, (needed, reached, low, high, largest, last.n), strict=True))


def ordered(priced: pd.DataFrame) -> pd.DataFrame:
    """`price` or `time_to_heal` in the order for people, each setting in words as `what`."""
    order = {"intact": 0, "healed": 1, "scratch": 2}
    by = ["model", "task", "state", "harm", "level", "side", "layers", "recipe", "share"]
    table = priced.sort_values(
        by, key=lambda x: x.map(order) if x.name == "state" else x, ignore_index=True
    )
    return table.assign(what=[setting_name(row) for _, row in table.iterrows()])


def price_list(priced: pd.DataFrame) -> pd.DataFrame:
    """`price` or `time_to_heal` for people: a row a setting, a column a share."""
    by = [*priced.columns[: list(priced.columns).index("share")], "what", "share"]
    wide = ordered(priced).set_index(by)["needed"].unstack("share", sort=False)
    shares = wide.columns = [f"{share:.0%}" for share in wide.columns]
    wide = wide.reset_index()
    told = [name for name in ("train_size", "epochs") if name in wide and wide[name].nunique() > 1]
    return wide[["model", "task", "what", *told, *shares]]


def setting_name(row: pd.Series) -> str:
    """A setting in words: ``healed: bottom 1/2, noise 1, by transplant``."""
    if row["state"] != "healed":
        return str(row["state"])
    part, nowhere = harm_name(row["part"]), row["side"] == "none"  # as embeddings are
    recipe = "" if row["recipe"] == "full" else "by " + harm_name(row["recipe"])
    if row["recipe"] == "corrupted_only" and len(row["layers"]) == 1:
        recipe = "its neighbours frozen"
    words = [
        part if nowhere else place(row["side"], row["level"], row["layers"]),
        harm_name(row["harm"]), "" if nowhere or part == "all" else part,
        row["start"].replace("pre-trained", ""), recipe,
    ]  # fmt: skip
    return "healed: " + ", ".join(filter(None, words))


def censored(cells: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Which trainings ended before healing was over: a row a setting and length of training.

    `gained` is what the next longer training on the same examples added, paired by seed, and
    `censored` says that it is more than the margin; where none is longer, `rise` of the last
    quarter of the held-out curve speaks, if the whole interval is above zero. A censored cell says
    something about speed, never about what can be recovered."""
    trained = once(cells[(cells["state"] != "broken") & (cells["side"] != "random")])
    trained = trained.merge(_rises(curves), on="key", how="left")
    rows = []
    for names, part in groups(trained, [*SETTING, *_ALIKE, "train_size"]):
        lengths = [length for _, length in part.groupby("epochs")]
        for length, longer in zip(lengths, [*lengths[1:], None], strict=True):
            row = {**names, "epochs": length["epochs"].iloc[0], "steps": length["steps"].iloc[0]}
            row |= bounds("score", length["score"]) | {"n": len(length)}
            row |= bounds("rise", length["rise"].dropna())
            row["censored"] = bool(row["rise_low"] > 0)
            if longer is not None:
                both = length.merge(longer, on="seed", suffixes=("", "_longer"))
                row |= bounds("gained", both["score_longer"] - both["score"])
                if len(both):
                    row["censored"] = bool(row["gained"] > MARGIN)
            rows.append(row)
    ends = ("", "_low", "_high")
    names = [f"{name}{end}" for name in ("score", "gained", "rise") for end in ends]
    head = [*SETTING, *_ALIKE, "train_size", "epochs", "steps", "n"]
    return pd.DataFrame(rows, columns=[*head, *names, "censored"])


def censored_keys(cells: pd.DataFrame, table: pd.DataFrame) -> set[str]:
    """The cells that the table of `censored` says ended before healing was over."""
    same = [*SETTING, *_ALIKE, "train_size", "epochs"]
    return set(cells.merge(table.loc[table["censored"], same], on=same)["key"])


def _rises(curves: pd.DataFrame) -> pd.DataFrame:
    """How much of the held-out score of each training came in its last quarter (half at most,
    where it was looked at seldom; else it is not known)."""
    known = curves[curves["score"].notna()].sort_values("step")
    last = known.groupby("key")["step"].transform("max")
    ends = known[known["step"] == last].set_index("key")["score"]
    before = known[known["step"].between(0.5 * last, 0.75 * last)].groupby("key")["score"].last()
    return (ends - before).rename("rise").rename_axis("key").reset_index()
