"""What a cure costs: labelled examples, steps of training, and whether more of them would help.

The functions take the table of `harm.gather` or the learning curves of `results.load_curves`.
"""

from __future__ import annotations

import math

import pandas as pd

from healing_utils.analysis.effects import Interval, as_fraction, bounds, groups, t_interval
from healing_utils.analysis.harm import BUDGET, harm_name, once, spell_harms

SETTING = ["model", "task", "state", "side", "level", "layers", "harm", "part", "start", "recipe"]
SHARES = (0.9, 0.95, 0.99)  # of the intact score, whose price is asked


def price(cells: pd.DataFrame) -> pd.DataFrame:
    """Labelled examples needed to reach `SHARES` of the intact score, a row a setting and share.

    Of each setting (state, side, level, harm, recipe, ...) that was trained on several numbers of
    examples; see `_needed` for what `needed` says.
    """
    trained = once(cells[(cells["state"] != "broken") & (cells["side"] != "random")])
    same = [name for name in BUDGET if name != "train_size"]
    usual = trained[trained["usual"]][same].drop_duplicates()
    trained = trained.merge(usual, on=same)  # only the examples differ
    return _prices(trained.rename(columns={"train_size": "budget"}), least=2)


def price_in_steps(curves: pd.DataFrame) -> pd.DataFrame:
    """Steps needed to reach `SHARES` of the intact score, by curves on held-out examples.

    Of each setting its longest training at the usual rate counts; the intact score is the held-out
    one at the end of the intact model's usual training. Recipes that warm up are left out, since
    their curves begin after it, and so are random layers, which differ from seed to seed.
    """
    warm = curves["recipe"].isin(["mlm_warm_up", "distillation"])
    curves = curves[curves["score"].notna() & ~warm & (curves["side"] != "random")].copy()
    curves["harm"] = spell_harms(curves)
    unit, same = ["model", "task", "seed"], ["learning_rate", "train_size", "head"]
    main = curves[(curves["state"] == "intact") & (curves["scan"] == "main")]
    ends = main.sort_values("step").groupby(unit, sort=False).tail(1)
    ends = ends[[*unit, *same, "score"]].rename(columns={"score": "intact"})
    curves = curves.merge(ends, on=[*unit, *same])
    for longest in ("epochs", "evaluations"):  # and of these the finest
        most = curves.groupby([*SETTING, "seed"], dropna=False)[longest].transform("max")
        curves = curves[curves[longest] == most]
    curves = once(curves, ["key", "step"])
    return _prices(curves.rename(columns={"step": "budget"}), least=3)


def _prices(table: pd.DataFrame, least: int) -> pd.DataFrame:
    rows = [
        {**names, "share": share, **_needed(part, share)}
        for names, part in groups(table, SETTING)
        if part["budget"].nunique() >= least
        for share in SHARES
    ]
    return pd.DataFrame(rows, columns=[*SETTING, "share", "needed", "from", "to", "largest", "n"])


def _needed(part: pd.DataFrame, share: float) -> dict[str, object]:
    """The smallest budget of `part` that reaches `share` of the intact score, in words and bounds:
    the first from which the mean of score - share x intact stays at or above zero, with the range
    from the first from which the upper end of its interval does to the first of its lower end; more
    than the largest, where the interval lies below zero there; else not resolvable."""
    found = {}
    for budget, rows in part.groupby("budget"):
        found[int(budget)] = t_interval(rows["score"] - share * rows["intact"])
        if rows["seed"].nunique() < part["seed"].nunique():  # a training broke off before
            found[int(budget)] = Interval(*[-math.inf] * 3, len(rows))

    def stays(end: str) -> int | None:
        """The first budget from which on this end of the interval is at or above zero."""
        first = None
        for budget, interval in reversed(found.items()):
            if not getattr(interval, end) >= 0:
                break
            first = budget
        return first

    (smallest, *_, largest), last = found, list(found.values())[-1]
    low, mean, high = stays("high"), stays("mean"), stays("low")
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
    return {"needed": needed, "from": low, "to": high, "largest": largest, "n": last.n}


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
    wide["what"] = [setting_name(row) for _, row in wide.iterrows()]
    shares = [name for name in wide if str(name).endswith("%")]
    return wide[["model", "task", "what", *shares]].rename_axis(columns=None)


def setting_name(row: pd.Series) -> str:
    """A setting in words: ``healed: bottom 1/2, noise 1, by transplant``."""
    if row["state"] != "healed":
        return str(row["state"])
    part = row["part"].replace("_", " ")
    layers = ", ".join(map(str, row["layers"]))
    where = f"layer {layers}" if row["side"] == "custom" else place_name(row)
    words = [part if row["side"] == "none" else where, harm_name(row["harm"])]
    if part != "all" and row["side"] != "none":
        words.append(part)
    if row["start"] != "pre-trained":
        words.append(row["start"])
    if row["recipe"] != "full":
        words.append("by " + row["recipe"].replace("_", " "))
    return "healed: " + ", ".join(words)


def place_name(row: pd.Series) -> str:
    """Where layers were hit, in words: ``bottom 1/2``."""
    if row.get("where"):
        return f"layer {row['where']}"
    return "all layers" if row["side"] == "all" else f"{row['side']} {as_fraction(row['level'])}"


def training_control(cells: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Would another learning rate or more steps have healed? A row a model, task, state and place.

    `rate` is the one with the best mean held-out score at the end, among those tried on the same
    seeds. `more` is how many times the usual steps the longest training had, `gained` its score
    minus the usual one, paired; `rising` says that its held-out score still rose over its last
    third, with the whole interval above zero.
    """
    trained = once(cells[(cells["state"] != "broken") & (cells["side"] != "random")])
    trained = trained[(trained["start"] == "pre-trained") & (trained["recipe"] == "full")]
    trained = trained.merge(_ends(curves), on="key", how="left")
    rows = []
    for names, part in groups(trained, SETTING):
        usual = part[part["usual"]]
        if usual.empty:
            continue
        base = usual.iloc[0]
        rate, size, epochs = (part[n] == base[n] for n in ("learning_rate", "train_size", "epochs"))
        alike = (part["head"] == base["head"]) & size
        rates, longer = part[alike & epochs], part[alike & rate & (part["epochs"] > base["epochs"])]
        if rates["learning_rate"].nunique() > 1 or len(longer):
            rows.append(names | _best_rate(rates) | _more_steps(usual, longer))
    names = [
        *SETTING, "rate", "rates", "n_rates", "score_at_rate", "usual_at_rate", "more", "n",
        "usual", "score_at_more", "gained", "gained_low", "gained_high", "rising",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=names)


def _ends(curves: pd.DataFrame) -> pd.DataFrame:
    """Held-out score at the end of each training, and how much of it came in the last third."""
    rows = []
    for names, part in groups(curves[curves["score"].notna()].sort_values("step"), ["key"]):
        last = part.iloc[-1]
        before = part[part["step"] <= last["step"] * 2 / 3]["score"]
        rise = last["score"] - before.iloc[-1] if len(before) else math.nan
        rows.append({**names, "held_out": last["score"], "rise": rise})
    return pd.DataFrame(rows, columns=["key", "held_out", "rise"])


def _best_rate(part: pd.DataFrame) -> dict[str, object]:
    tried = part.groupby("seed")["learning_rate"].transform("nunique")
    shared = part[tried == part["learning_rate"].nunique()]
    held_out = shared.groupby("learning_rate")["held_out"].agg(lambda s: s.mean(skipna=False))
    if len(held_out) < 2 or held_out.isna().all():  # a rate at which a seed diverged is not best
        return {}
    best = held_out.idxmax()
    return {
        "rate": best,
        "rates": ", ".join(f"{rate:g}" for rate in held_out.index),
        "n_rates": shared["seed"].nunique(),
        "score_at_rate": shared[shared["learning_rate"] == best]["score"].mean(),
        "usual_at_rate": shared[shared["usual"]]["score"].mean(),
    }


def _more_steps(usual: pd.DataFrame, longer: pd.DataFrame) -> dict[str, object]:
    if longer.empty:
        return {}
    longest = longer[longer["epochs"] == longer["epochs"].max()]
    paired = usual.merge(longest, on="seed", suffixes=("", "_longer"))
    return {
        "more": float(longest["epochs"].iloc[0] / usual["epochs"].iloc[0]),
        "n": len(paired),
        "usual": paired["score"].mean(),
        "score_at_more": paired["score_longer"].mean(),
        **bounds("gained", paired["score_longer"] - paired["score"]),
        "rising": bool(t_interval(paired["rise_longer"].dropna()).low > 0),
    }
