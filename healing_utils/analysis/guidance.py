"""What a reader with a damaged encoder can take from a run, in sentences.

Every line is written from the tables of `harm`, with its numbers: other data give other advice, and
a question that no cell of the run speaks to is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from healing_utils.analysis import harm, price
from healing_utils.analysis.claims import MARGIN
from healing_utils.analysis.effects import groups
from healing_utils.analysis.harm import harm_name
from healing_utils.analysis.price import place_name, setting_name


def advice(cells: pd.DataFrame, curves: pd.DataFrame | None = None) -> list[str]:
    """The guidance of `harm.gather` and, where given, of learning curves, as lines of Markdown."""
    lines = []
    for names, part in groups(cells, ["model"]):
        found = [
            *_where_to_look(harm.vulnerability(part)),
            *_which_harm(harm.by_harm(part)),
            *_beyond_healing(harm.trained(part)),
            *_keep_or_start_anew(harm.worth(part)),
            *_which_aid(harm.league(part)),
            *_repair_or_redo(harm.deployed(part)),
            *_at_what_price(price.price(part)),
        ]
        if curves is not None:
            own = curves[curves["model"] == names["model"]]
            found += _more_training(price.training_control(part, own))
        if found:
            lines += [f"**{names['model']}**", "", *(f"- {line}" for line in found), ""]
    return lines


def _ci(row: pd.Series, name: str, scale: float = 1.0, digits: int = 2, sign: str = "") -> str:
    mean, low, high = (scale * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if math.isnan(low):
        return f"{mean:{sign}.{digits}f} (one seed)"
    return f"{mean:{sign}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _points(row: pd.Series, name: str, sign: str = "+") -> str:
    return _ci(row, name, 100, 1, sign)


def _where_to_look(table: pd.DataFrame) -> Iterator[str]:
    for names, part in groups(table, ["task"]):
        whole = part[(part["state"] == "healed") & (part["part"] == "all")]
        if len(whole) > 2:  # more than the two ends, which a level can hit too
            worst, best = (
                whole.loc[getattr(whole["retained"], end)()] for end in ("idxmin", "idxmax")
            )
            yield (
                f"On {names['task']}, look first at layer {worst['layer']}: redrawn alone and "
                f"healed, it leaves {_ci(worst, 'retained')} of the intact score, layer "
                f"{best['layer']} {_ci(best, 'retained')}."
            )
        parts = part[(part["state"] == "broken") & (part["part"] != "all")]
        if parts["part"].nunique() > 1:
            means = parts.groupby("part")["retained"].mean().sort_values()
            said = ", ".join(f"{p.replace('_', ' ')} {v:.2f}" for p, v in means.items())
            yield (
                f"Before healing, one part of one layer redrawn leaves, on {names['task']} and on "
                f"average over the layers: {said}."
            )


def _which_harm(table: pd.DataFrame) -> Iterator[str]:
    half = table[(table["side"] == "bottom") & (table["level"] == 0.5)]
    kinds = half[half["state"] == "healed"].groupby("task")["harm"].nunique()
    if kinds.empty or kinds.max() < 2:
        return
    half = half[half["task"] == kinds.idxmax()]  # on one task, where the kinds can be compared
    healed = half[half["state"] == "healed"].sort_values("retained")
    worst, best = healed.iloc[0], healed.iloc[-1]
    yield (
        f"Of the kinds of harm to the bottom half on {worst['task']}, {harm_name(worst['harm'])} "
        f"is the hardest to heal ({_ci(worst, 'retained')} of intact) and "
        f"{harm_name(best['harm'])} the easiest ({_ci(best, 'retained')})."
    )
    broken = half[half["state"] == "broken"].groupby("harm")["retained"].min()
    harmless = ", ".join(harm_name(h) for h, value in broken.items() if value >= 0.99)
    if harmless:
        yield f"Harmless without any healing, at 0.99 of intact or more: {harmless}."


def _beyond_healing(trained: pd.DataFrame) -> Iterator[str]:
    """Harm after which the loss is not finite: no gradient to heal by."""
    for names, part in groups(trained, ["harm"]):
        failed = int((part["diverged"] != "").sum())
        if failed:
            yield (
                f"After {harm_name(names['harm'])} the training of {failed} of {len(part)} models "
                "broke off: their loss was not finite."
            )


def _keep_or_start_anew(table: pd.DataFrame) -> Iterator[str]:
    where = pd.Series(
        [f"{place_name(row)} {harm_name(row['harm'])}" for _, row in table.iterrows()],
        index=table.index, dtype=object,
    )  # fmt: skip
    keep, anew = table["effect_low"] > MARGIN, table["effect_high"] < -MARGIN
    if keep.any():
        least = table[keep]["effect"].idxmin()
        yield (
            f"Heal rather than train from random values in {keep.sum()} of {len(table)} cases of "
            f"whole-layer harm (the smallest of these gains: {where[least]}, "
            f"{_points(table.loc[least], 'effect', '')} points)."
        )
    if anew.any():
        yield f"Start anew after {', '.join(where[anew])}: random values do better."
    if not (keep | anew).all():
        yield f"Undecided between the two: {', '.join(where[~keep & ~anew])}."


def _which_aid(table: pd.DataFrame) -> Iterator[str]:
    by = ["start", "side", "level", "where", "harm"]
    for names, part in groups(table, by) if len(table) else ():
        others = part[part["recipe"] != "full"]
        if others.empty:
            continue
        start = "" if names["start"] == "pre-trained" else f", {names['start']}"
        place = f"{place_name(part.iloc[0])} ({harm_name(names['harm'])}{start})"
        best = others.loc[others["gain"].idxmax()]
        name, gains = best["recipe"].replace("_", " "), f"{_points(best, 'gain')} points"
        if best["verdict"] == "better":
            yield f"First aid for the {place}: {name}, {gains} over full fine-tuning."
        else:
            yield (
                f"For the {place} no recipe is clearly better than full fine-tuning; the best, "
                f"{name}, gains {gains}."
            )
        worse = others[others["verdict"] == "worse"]["recipe"].str.replace("_", " ")
        if len(worse):
            yield f"Clearly worse there: {', '.join(worse)}."


def _repair_or_redo(table: pd.DataFrame) -> Iterator[str]:
    for _, row in table.iterrows():
        yield (
            f"A deployed {row['task']} model whose {place_name(row)} is hit ({row['harm']}) falls "
            f"from {row['intact']:.2f} to {row['broken']:.2f}; healing it as it is gives "
            f"{row['healed_deployed']:.2f}, {_points(row, 'gain')} points against healing the "
            "pre-trained model."
        )


def _at_what_price(table: pd.DataFrame) -> Iterator[str]:
    for names, part in groups(table[table["share"] == price.SHARES[0]], ["task"]):
        said = "; ".join(f"{setting_name(row)} {row['needed']}" for _, row in part.iterrows())
        yield f"Labelled examples to reach 90 % of the intact score on {names['task']}: {said}."


def _more_training(table: pd.DataFrame) -> Iterator[str]:
    for names, part in groups(table[table["gained"].notna()], ["task", "more"]):
        said = "; ".join(
            f"{setting_name(row)} {_points(row, 'gained')}"
            + (", still rising" if row["rising"] else "")
            for _, row in part.iterrows()
        )
        yield (
            f"{names['more']:g} times the steps change the score on {names['task']} by (points): "
            f"{said}."
        )
