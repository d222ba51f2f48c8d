"""Figures of what harm costs and what first aid does, from the tables of `harm`: of its
`vulnerability`, `by_harm` and `league`, of all cells, and of the similarity of its `most_kinds`."""

from __future__ import annotations

import numpy as np
import pandas as pd

from healing_utils.analysis.claims import MARGIN
from healing_utils.analysis.harm import harm_name
from healing_utils.analysis.price import by_examples
from healing_utils.base.errors import HealingError
from healing_utils.report import plots
from healing_utils.report.plots import COLORS, GREY, captioned

PARTS = ["all", "attention", "query", "key", "value", "attention_output", "feed_forward",
         "layernorm"]  # fmt: skip


@captioned("corrupted " + plots.LAYER)
def vulnerability_map(table: pd.DataFrame):
    """Score as a share of the intact model's when one layer, or one part of it, is redrawn
    (reinit). Broken: fine-tuned, redrawn, not trained again; healed: redrawn, then fine-tuned.
    Blank: not run."""
    table = plots.usable(table, "retained")
    # A task of which only the ends were corrupted, by level, has no map.
    seen = table.groupby(["model", "task"])["layer"].transform("nunique")
    table = table[seen == seen.groupby(table["model"]).transform("max")]
    order = table["part"].map(PARTS.index).sort_values(kind="stable").index
    table = table.assign(
        title=table["state"] + ", " + table["task"],
        part=table["part"].replace("all", "whole layer").map(harm_name),
        layer=table["layer"] + 1,
    ).loc[order]
    table = plots.titled(table, "title", "model").sort_values("panel", kind="stable")
    figure, _ = plots.heat_maps(
        table, "part", "layer", "retained", "share of intact score", low=0.5
    )
    figure.note = plots.seeds(table["n"])
    return figure, table


@captioned(plots.LAYER)
def harm_similarity(similarity: pd.DataFrame, measure: str = "cka"):
    """Similarity of each layer's output to the intact model's on the same sentences by kind of harm
    with its strength, before any healing; 1 is the same arrangement of tokens. Blank: outputs not
    finite, or the same for every token. Sorted by the mean."""
    rows = plots.usable(similarity[similarity["measure"] == measure], "similarity")
    # Where outputs are not finite, nothing is the same.
    grid = rows.pivot_table(index="harm", columns="layer", values="similarity").fillna(0)
    order = rows["harm"].map(grid.mean(axis=1)).sort_values(ascending=False, kind="stable").index
    places = list(map(plots.place, rows["side"], rows["level"]))
    rows = rows.assign(harm=rows["harm"].map(harm_name), panel=places).loc[order]
    label = f"{measure.replace('cka', 'linear CKA')} to intact"
    figure, _ = plots.heat_maps(rows, "harm", "layer", "similarity", label)
    figure.note = plots.seeds(rows.groupby("harm")["seed"].nunique())
    return figure, rows.drop(columns="kind")


@captioned("share of intact score")
def harm_curves(table: pd.DataFrame):
    """Score as a share of the intact model's by kind of harm, with its strength, and share of the
    layers hit: from broken, not trained again, to healed by full fine-tuning."""
    table = plots.titled(plots.usable(table, "retained"), "task", "model")
    broken, share = table["state"] == "broken", table["level"].map(lambda x: plots.place("", x))
    table = table.assign(
        **{end: table[end].mask(broken) for end in ("retained_low", "retained_high")},
        worst=-table.groupby("harm")["retained"].transform("min"),
        row=table["harm"].map(harm_name) + "," + share,
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
        plots.key(figure, f"{side}, healed", marker="o", ls="", color=COLORS[side])
    plots.key(figure, "broken", marker="x", ls="")
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
        color=np.select([better, worse], [COLORS["top"], COLORS["bottom"]], GREY),
        order=-table.groupby("recipe")["gain"].transform("mean"),
    ).sort_values("order", kind="stable")
    table = plots.titled(table, "title", "start", "budget", "model")
    figure, drawn = plots.intervals(table, "gain", [-2, 2], form="+.1f")
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
        for share, side in ((0.9, "top"), (0.95, "center"), (0.99, "bottom")):
            axis.axhline(share, color=GREY, lw=0.8, ls=":", zorder=1)
            beside = {"transform": axis.get_yaxis_transform(), "va": side, "color": GREY}
            axis.text(1.01, share, f"{100 * share:.0f} %", **beside)
        axis.set_xscale("log", base=2)
        sizes = sorted(rows["train_size"].unique())
        axis.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axis.minorticks_off()
    return figure, cells
