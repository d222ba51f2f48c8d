"""Figures of what harm costs and what first aid does, from the tables of `harm`: of its
`vulnerability`, `by_harm` and `league`, of all cells, and of the similarity of its `most_kinds`."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import offset_copy

from healing_utils.analysis.claims import MARGIN
from healing_utils.analysis.effects import groups
from healing_utils.analysis.harm import BUDGET, harm_name, place
from healing_utils.analysis.price import SHARES, beside_end, by_examples, ordered
from healing_utils.base.errors import HealingError
from healing_utils.report import plots
from healing_utils.report.plots import COLORS, DASH, DASH_DOT, DOTS, GREY, captioned

PARTS = ["all", "attention", "query", "key", "value", "attention_output", "feed_forward",
         "layernorm"]  # fmt: skip


@captioned("corrupted " + plots.LAYER)
def vulnerability_map(table: pd.DataFrame):
    """Score as a share of the intact model's when one layer, or one part of it, is redrawn
    (reinit). Broken: fine-tuned, redrawn, not trained again; healed: redrawn, then fine-tuned.
    Blank: not run."""
    table = plots.usable(table, "retained")
    # A task of which only the ends were corrupted, by level, has no map.
    seen = table.groupby(["model", "task"])["layer"].transform("nunique").where(lambda n: n > 2)
    table = plots.usable(table[seen == seen.groupby(table["model"]).transform("max")], "retained")
    order = table["part"].map(PARTS.index).sort_values(kind="stable").index
    table = table.assign(
        title=table["state"] + ", " + table["task"],
        part=table["part"].replace("all", "whole layer").map(harm_name),
        layer=table["layer"] + 1,
    ).loc[order]
    table = plots.titled(table, "title", "model").sort_values("panel", kind="stable")
    label = "share of intact score"
    figure, _ = plots.heat_maps(table, "part", "layer", "retained", label, low=0.5)
    figure.note = plots.seeds(table["n"])
    return figure, table


@captioned(plots.LAYER)
def harm_similarity(similarity: pd.DataFrame):
    """Similarity of each layer's output to the intact model's on the same sentences by kind of harm
    with its strength, before any healing; 1 is the same arrangement of tokens. Blank: outputs not
    finite, or the same for every token. Sorted by the mean."""
    rows = plots.usable(similarity[similarity["measure"] == "cka"], "similarity")
    # Where outputs are not finite, nothing is the same.
    mean = rows.pivot_table("similarity", "harm", "layer").fillna(0).mean(axis=1)
    places, mean = list(map(plots.place, rows["side"], rows["level"])), rows["harm"].map(mean)
    rows = rows.assign(harm=rows["harm"].map(harm_name), panel=places, mean=mean)
    rows = rows.sort_values("mean", ascending=False, kind="stable")
    figure, _ = plots.heat_maps(rows, "harm", "layer", "similarity", "linear CKA to intact")
    figure.note = plots.seeds(rows.groupby("harm")["seed"].nunique())
    figure.said = plots.means(rows, ["panel", "harm"], "mean")
    return figure, rows.drop(columns="kind")


@captioned("share of intact score")
def harm_curves(table: pd.DataFrame):
    """Score as a share of the intact model's by kind of harm, with its strength, and share of the
    layers hit: from broken, not trained again, to healed by full fine-tuning."""
    table = plots.titled(plots.usable(table, "retained"), "task", "model")
    broken = table["state"] == "broken"
    where = table["level"].map(lambda x: plots.place("all" if x == 1 else "", x).strip())
    table = table.assign(
        **{end: table[end].mask(broken) for end in ("retained_low", "retained_high")},
        worst=-table.groupby("harm")["retained"].transform("min"),
        row=table["harm"].map(harm_name) + ", " + where,
        color=table["side"].map(COLORS),
        dodge=table["side"].map({"bottom": -0.16, "top": 0.16, "all": 0.0}),
        marker=broken.map({True: "x", False: "o"}),
        filled=True,
    ).sort_values(["panel", "worst", "harm", "level"], kind="stable")
    figure, drawn = plots.intervals(table, "retained", [1])
    for axis, rows in drawn:
        axis.axvline(1, color=COLORS["intact"], lw=1, label="intact")
        for (at, color), pair in rows.groupby(["at", "color"]):
            axis.plot(pair["retained"], [at] * len(pair), color=color, lw=1, ls=":")
    for side in [side for side in ("bottom", "top", "all") if (table["side"] == side).any()]:
        plots.key(figure, f"{side} layers", lw=5, color=COLORS[side])
    for state, marker in (("healed", "o"), ("broken", "x")):
        plots.key(figure, state, marker=marker, ls="")
    figure.said = plots.means(table, ["panel", "row", "side", "state"], "retained")
    return figure, table


@captioned("gain over full fine-tuning (points)")
def league_figure(table: pd.DataFrame):
    """First aid: score of each recipe minus that of full fine-tuning of the same corrupted model at
    the same budget, paired; means over n seeds with 95 % t-intervals. Filled: the whole interval
    beyond the margin of one point; open: not."""
    table = plots.usable(table, "gain")
    better, worse = table["gain_low"] > MARGIN, table["gain_high"] < -MARGIN
    table = table.assign(
        **{end: 100 * table[end] for end in ("gain", "gain_low", "gain_high")},
        **{"dodge": 0, "marker": "o", "filled": better | worse},
        title=table["place"] + ", " + table["harm"].map(harm_name),
        row=table["recipe"].map(harm_name),
        color=np.where(better | worse, COLORS["intact"], GREY),  # no side's
        order=-table.groupby("recipe")["gain"].transform("mean"),
    ).sort_values("order", kind="stable")
    table = plots.titled(table, "title", "start", "budget", "model")
    figure, drawn = plots.intervals(table, "gain", [-2, 2], form="+z.1f")
    for axis, _ in drawn:
        axis.axvspan(-1, 1, color=plots.PALE, lw=0, zorder=0, label="margin of one point")
        axis.axvline(0, color=GREY, lw=0.8, label="full fine-tuning")
    return figure, table


@captioned("labelled examples", "share of intact score")
def price_curves(cells: pd.DataFrame):
    """The price of healing in labelled examples: score after fine-tuning on so many, as a share of
    the intact model's with the most of them; for equally many passes or steps."""
    cells = by_examples(cells[(cells["recipe"] == "full") & (cells["start"] == "pre-trained")])
    cells = cells.assign(retained=cells["score"] / cells["intact"])
    sides = cells["side"].isin(["bottom", "top", "all"]) & (cells["part"] == "all")
    cells = cells[(cells["state"] == "healed") & sides | cells["state"].isin(["intact", "scratch"])]
    cells = plots.titled(plots.shortened(cells.drop_duplicates(["key", "side"])), "task", "model")
    cells, looks = plots.sided(cells.assign(name=cells["harm"].map(harm_name)), "name")
    sizes = cells.groupby(["panel", "line"])["train_size"].transform("nunique")
    if not (sizes > 1).any():
        raise HealingError("nothing was trained on several numbers of examples: nothing to draw")
    cells = plots.usable(cells[sizes > 1], "retained")
    looks = {line: {**look, "marker": "o"} for line, look in looks.items()}
    figure, drawn = plots.curves(cells, "train_size", "retained", looks, height=2.2)
    for axis, rows in drawn:
        _mark_shares(axis)
        axis.set_xscale("log", base=2)
        sizes = sorted(rows["train_size"].unique())
        axis.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axis.minorticks_off()
    return figure, cells


def _mark_shares(axis: Axes) -> None:
    for share, side in zip(SHARES, ("top", "center", "bottom"), strict=True):
        axis.axhline(share, color=GREY, lw=0.8, ls=":", zorder=1)
        beside = {"transform": axis.get_yaxis_transform(), "va": side, "color": GREY}
        axis.text(1.01, share, f"{100 * share:.0f} %", **beside)


@captioned("fine-tuning step", "share of intact score")
def healing_over_time(curves: pd.DataFrame):
    """How layers heal: score on held-out examples after the bottom or the top layers were redrawn
    (reinit), as a share of what the intact model of the same seed ends at, in the longest training
    of each task. Kept: all is trained; taken out: the redrawn layers are dropped. Floor: the better
    of two linear models that need no layer, on the test set."""
    whole = curves["part"].isin(["all", "none"]) & (curves["start"] == "pre-trained")
    hit = curves["side"].isin(["bottom", "top"]) & (curves["kind"] == "reinit")
    hit &= curves["recipe"].isin(["full", "drop"])
    table = beside_end(curves[whole & (hit | (curves["state"] == "intact"))])
    kept = []
    for _, own in groups(table, ["model", "task"]):
        trainings = [part for _, part in own.groupby(BUDGET) if part["state"].nunique() == 2]
        if trainings:
            longest = max(trainings, key=lambda part: (part["step"].max(), part["seed"].nunique()))
            kept.append(longest[longest["level"].isin([0, longest["level"].max()])])
    if not kept:
        raise HealingError("no healed model beside its intact one: nothing to draw")
    table = pd.concat(kept)
    table["retained"] = (table["score"] / table["intact"]).where(table["intact"] > 0)
    how = table["recipe"].map({"full": "kept", "drop": "taken out"})
    intact = table["state"] == "intact"
    table["line"] = (table["side"] + ", " + how).mask(intact, "intact")
    table["where"] = list(map(place, table["side"], table["level"]))
    table = plots.titled(plots.usable(table, "retained"), "task", "model")
    looks = {"intact": {"color": COLORS["intact"]}}
    for side in ("bottom", "top"):
        looks[f"{side}, kept"] = {"color": COLORS[side]}
        looks[f"{side}, taken out"] = {"color": COLORS[side], "ls": DASH}
    figure, drawn = plots.curves(table, "step", "retained", looks, height=2.4, sharey=False)
    for axis, rows in drawn:
        if rows["floor"].notna().any():
            look = {"color": GREY, "lw": 1.2, "ls": DASH_DOT, "zorder": 1}
            axis.axhline(rows["floor"].mean(), label="floor: no layers", **look)
        _mark_shares(axis)
        axis.set_xlim(left=0)
    figure.note += "; " + ", ".join(table.loc[table["side"] != "none", "where"].unique())
    return figure, table


@captioned("labelled examples")
def needed_figure(table: pd.DataFrame):
    """What it takes to reach 90, 95 and 99 % of the intact score, in labelled examples or steps.
    Marks: from where the mean stays above; bars: the range that the 95 % t-intervals over seeds
    leave, dashed where they leave no end. Open, with an arrow: more than was tried. Settings of
    which nothing can be told are left out."""
    table = plots.usable(ordered(table) if len(table) else table, "share")
    more = table["needed"].str.startswith("more").astype(bool)
    table = table.assign(needs=table["reached"].mask(more, table["largest"]), filled=~more)
    table["where"] = table["what"].str.removeprefix("healed: ")
    table = plots.titled(table, "task", "model")
    for name, unit in (("epochs", "{:g} epochs"), ("learning_rate", "rate {:g}"), ("head", "{}")):
        if name in table:  # what is not the usual training is named
            usual = table.groupby("panel")[name].transform(lambda values: values.mode()[0])
            other = ", " + table[name].map(unit.format)
            table["where"] += other.where(table[name] != usual, "")
    known = table.groupby(["panel", "where"])["needs"].transform("count") > 0
    table = plots.usable(table[known.astype(bool)], "share")
    color = table["side"].where(table["state"] == "healed", table["state"]).map(COLORS)
    table = table.assign(
        **{"row": table["where"], "needs_low": table["from"], "needs_high": table["to"]},
        color=color.fillna(GREY),
        open=table["to"].isna() & (table["from"] < table["largest"]),
        dodge=table["share"].map(dict(zip(SHARES, (-0.26, 0, 0.26), strict=True))),
        marker=table["share"].map(dict(zip(SHARES, "osD", strict=True))),
    )
    show = [0, 1.06 * table["largest"].max()]
    figure, drawn = plots.intervals(table, "needs", show, each=0.3)
    for axis, rows in drawn:
        for row in rows[rows["open"]].itertuples():
            axis.hlines(row.at, rows["from"][row.Index], row.largest, color=row.color, ls=DOTS)
        beyond = offset_copy(axis.transData, figure, x=8, units="points")
        for row in rows[~rows["filled"]].itertuples():
            look = {"marker": r"$\rightarrow$", "color": row.color, "transform": beyond}
            axis.plot([row.needs], [row.at], ls="", **look)
    for share, marker in zip(SHARES, "osD", strict=True):
        plots.key(figure, f"{100 * share:.0f} %", marker=marker, ls="")
    if table["open"].any():
        plots.key(figure, "not reached for sure", ls=DOTS)
    if more.any():
        plots.key(figure, "more than was tried", marker=r"$\rightarrow$", ls="")
    said = table.groupby(["panel", "where"], sort=False)["needed"].agg(", ".join)
    figure.said = "; ".join(f"{', '.join(names)}: {needed}" for names, needed in said.items())
    figure.note = figure.note.replace("bars:", "bars: from where to where by")
    figure.measure = "fine-tuning steps" if "epochs" in table else "labelled examples"
    return figure, table
