"""Figures of what harm costs and what first aid does, from the tables of `harm`."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from healing_utils.analysis.harm import harm_name
from healing_utils.base.errors import HealingError
from healing_utils.report import plots, words
from healing_utils.report.plots import COLORS, GREY, Look, finish, style

PARTS = ("all", "attention", "query", "key", "value", "attention_output", "feed_forward",
         "layernorm")  # fmt: skip
RECIPES = {"full": "full fine-tuning", "drop": "layers dropped", "mlm_warm_up": "masked warm-up",
           "transplant": "transplanted neighbour", "matched_redraw": "scale-matched redraw",
           "distillation": "distilled hidden states", "low_rank": "low-rank adapters",
           "corrupted_only": "corrupted layers only", "corrupted_frozen": "corrupted layers frozen",
           "layerwise_decay": "layer-wise decay"}  # fmt: skip


@style()
def vulnerability_map(table: pd.DataFrame) -> Figure:
    """Heat maps of the retained score, part by layer, broken and healed, of `harm.vulnerability`; a
    row of panels for each model and task."""
    if table.empty:
        raise HealingError("no single layer was corrupted: nothing to draw")
    # A task of which only the ends were corrupted, by level, has no map.
    seen = table.groupby(["model", "task"])["layer"].transform("nunique")
    table = words.shortened(table[seen == seen.groupby(table["model"]).transform("max")])
    table = words.titled(table, "task", "model")
    states = [state for state in ("broken", "healed") if (table["state"] == state).any()]
    parts = [part for part in PARTS if (table["part"] == part).any()]
    layers = sorted(table["layer"].unique())
    table = table.assign(part=table["part"].replace("all", "whole layer").map(harm_name))
    names = ["whole layer" if part == "all" else harm_name(part) for part in parts]
    grids = []
    for title, rows in table.groupby("panel", sort=False):
        for state in states:
            grid = rows[rows["state"] == state].pivot(index="part", columns="layer")["retained"]
            grids.append((f"{state}, {title}", grid.reindex(index=names, columns=layers)))
    columns = len(states) if len(layers) * len(states) <= 16 else 1
    looks = {"columns": columns, "color": plots.ORANGE, "reverse": True}
    figure, _ = plots.heat_maps(grids, "share of intact", low=0.5, high=1.0, **looks)
    caption = f"""
        Vulnerability map: score as a share of the intact model's when one layer, or one part of
        it, is redrawn (reinit), {words.models(table)}. Broken: the fine-tuned model, not trained
        again; healed: the pre-trained model, then fine-tuned. Means over n =
        {words.span(table["n"])} seeds; blank: not run. {words.demonstration(table)}"""
    worst = table.loc[table.groupby(["state", "part"], sort=False)["retained"].idxmin()]
    worst = worst.assign(at="layer " + worst["layer"].astype(str))
    said = words.means(worst, ["state", "part", "at"], "retained")
    alt = f"Heat maps of retained score by part and layer, the lowest of each part: {said}."
    return finish(figure, caption, alt, "corrupted layer (0: next to the embeddings)")


@style()
def harm_similarity(similarity: pd.DataFrame, measure: str = "cka") -> Figure:
    """Heat map, kind of harm by layer, of the broken model's similarity to the intact one, of
    `results.load_similarity` at one place (side, level), with a column `harm`."""
    rows = words.shortened(similarity[similarity["measure"] == measure])
    if rows.empty:
        raise HealingError(f"no similarity {measure!r}: nothing to draw")
    grid = rows.groupby(["harm", "layer"])["similarity"].mean().unstack("layer")
    grid = grid.loc[grid.fillna(0).mean(axis=1).sort_values(ascending=False).index]
    grid = grid.rename(index=harm_name)
    figure, _ = plots.heat_maps([("", grid)], "linear CKA" if measure == "cka" else measure)
    places = {
        words.place(side, level) for side, level in zip(rows["side"], rows["level"], strict=True)
    }
    caption = f"""
        Similarity ({measure}) of each layer's output to the intact model's on the same sentences,
        {words.models(rows)}, by kind of harm with its strength, {", ".join(sorted(places))}
        hit, before any healing; 1 is the same arrangement of tokens. Blank: outputs not finite, or
        the same for every token. Sorted by the mean; {words.seeds(rows, "harm")}."""
    last = rows[rows["layer"] == rows["layer"].max()].assign(
        harm=lambda r: r["harm"].map(harm_name)
    )
    said = words.means(last, ["harm", "side"], "similarity")
    alt = f"Heat map of similarity by kind of harm and layer, at the last layer: {said}."
    return finish(figure, caption, alt, "layer (0: embeddings)")


@style()
def harm_curves(table: pd.DataFrame) -> Figure:
    """Retained score by kind of harm and level, bottom beside top, of `harm.by_harm`: healed as
    dots with t-intervals, broken as crosses. A panel for each model and task."""
    if table.empty:
        raise HealingError("no harm to whole layers by side: nothing to draw")
    table = words.titled(words.shortened(table), "task", "model")
    worst = table.groupby("harm")["retained"].transform("min")
    table = table.assign(worst=-worst).sort_values(["worst", "harm", "level"], kind="stable")
    shares = table["level"].map(lambda level: words.place("", level))
    table["row"] = table["harm"].map(harm_name) + "," + shares
    place = {name: at for at, name in enumerate(table["row"].unique())}
    table = table.sort_values("panel", kind="stable")
    figure, drawn = plots.named_rows(table, list(place))
    dodge = {"bottom": -0.16, "top": 0.16, "all": 0.0}
    for axis, rows in drawn:
        axis.axvline(1, color=COLORS["intact"], lw=1)
        for row in rows.itertuples():
            at, color = place[row.row] + dodge[row.side], COLORS[row.side]
            if row.state == "broken":
                plots.points(axis, [row.retained], [at], marker="x", color=color, alpha=0.6)
            else:
                plots.interval(axis, at, row, "retained", color)
        low, high = max(rows["retained"].min(), 0.0), max(1.0, rows["retained"].max())
        axis.set_xlim(low - 0.03, high + 0.06)
    for side in dodge:
        if (table["side"] == side).any():
            plots.key(figure, f"{side}, healed", marker="o", ls="", color=COLORS[side])
    plots.key(figure, "broken", marker="x", ls="")
    caption = f"""
        Retained score by kind of harm (with its strength) and share of the layers hit,
        {words.models(table)}: healed by full fine-tuning, mean over n = {words.span(table["n"])}
        seeds with 95 % t-intervals (none for one seed; cut at the panel's edge); crosses: broken,
        not trained again. Line at 1: intact. {words.demonstration(table)}"""
    healed = table[table["state"] == "healed"]
    said = words.means(healed, ["panel", "row", "side"], "retained")
    alt = f"Dot plot of retained score by kind of harm, healed: {said}."
    return finish(figure, caption, alt, "share of intact score")


@style()
def league_figure(table: pd.DataFrame) -> Figure:
    """Gain of each recipe over full fine-tuning, of `harm.league`: a panel for each place."""
    if table.empty:
        raise HealingError("no recipe beside full fine-tuning: nothing to draw")
    table = words.shortened(table)
    table["title"] = [
        (f"layer {row.where}" if row.where else words.place(row.side, row.level))
        + f", {harm_name(row.harm)}"
        for row in table.itertuples()
    ]
    table = words.titled(table, "title", "start", "model")
    table["name"] = table["recipe"].replace(RECIPES).map(harm_name)
    names = table.groupby("name")["gain"].mean().sort_values(ascending=False).index
    figure, drawn = plots.named_rows(table, names, sharex=True)
    colors = {"better": COLORS["top"], "worse": COLORS["bottom"]}
    for axis, rows in drawn:
        axis.axvspan(-1, 1, color=plots.PALE, lw=0, zorder=0)
        axis.axvline(0, color=GREY, lw=0.8)
        axis.grid(axis="y", visible=False)
        for row in rows.itertuples():
            at, color = names.get_loc(row.name), colors.get(row.verdict, GREY)
            if row.recipe == "full":
                plots.points(axis, [0], [at], marker="|", ms=8, mew=1.4, color=plots.DARK)
            else:
                plots.interval(axis, at, row, "gain", color, row.verdict in colors, scale=100)
    caption = f"""
        First aid: score of each recipe minus that of full fine-tuning of the same corrupted model,
        {words.models(table)}, paired over n = {words.span(table["n"])} (task, seed) units, with
        95 % t-intervals. Filled: beyond the margin of one point (grey) after Bonferroni's
        correction; open: not. All recipes train on as many tokens, at one learning rate.
        {words.demonstration(table)}"""
    others = table[table["recipe"] != "full"].assign(gain=lambda rows: 100 * rows["gain"])
    said = words.means(others, ["panel", "name"], "gain", "+.1f")
    alt = f"Dot plot of gains over full fine-tuning in points: {said}."
    return finish(figure, caption, alt, "gain over full fine-tuning (points)")


@style()
def price_curves(cells: pd.DataFrame) -> Figure:
    """Score as a share of the intact model's against the number of labelled examples, a line a
    state and side; of `harm.gather`'s cells that were trained on several numbers."""
    cells = cells[(cells["recipe"] == "full") & (cells["start"] == "pre-trained")]
    same = ["epochs", "learning_rate", "head"]  # only the examples differ
    cells = words.shortened(cells.merge(cells[cells["usual"]][same].drop_duplicates(), on=same))
    healed = cells["state"] == "healed"
    whole = (cells["part"] == "all") & cells["side"].isin(["bottom", "top", "all"])
    cells = cells[(healed & whole) | cells["state"].isin(["intact", "scratch"])].assign(
        line=lambda rows: [
            row.state
            if row.state != "healed"
            else f"{words.place(row.side, row.level)} {harm_name(row.harm)}, healed"
            for row in rows.itertuples()
        ]
    )
    cells = words.titled(cells.drop_duplicates(["key", "line"]), "task", "model")
    sizes = cells.groupby(["panel", "line"])["train_size"].transform("nunique")
    cells = cells[sizes > 1].sort_values(["state", "side", "level"])
    if cells.empty:
        raise HealingError("nothing was trained on several numbers of examples: nothing to draw")
    first = cells.drop_duplicates("line").set_index("line")
    colors = first["side"].where(first["state"] == "healed", first["state"]).map(COLORS)
    looks: dict[str, Look] = {line: {"color": c, "marker": "o"} for line, c in colors.items()}
    figure, drawn = plots.curves(cells, "train_size", "retained", looks)
    for axis, rows in drawn:
        for share in (0.9, 0.95, 0.99):
            axis.axhline(share, color=GREY, lw=0.8, ls=":", zorder=1)
        axis.set_xscale("log", base=2)
        numbers = sorted(int(size) for size in rows["train_size"].unique())
        axis.set_xticks(numbers, [f"{size:,}" for size in numbers])
        axis.minorticks_off()
    caption = f"""
        The price of healing in labelled examples: score after fine-tuning on so many, as a share of
        the intact model's with all of them, {words.models(cells)}, mean over {words.bands(cells)}.
        Dotted: 90, 95 and 99 % of the intact score. The same number of passes, so fewer examples
        are fewer steps too. {words.demonstration(cells)}"""
    alt = f"Line chart of score by examples: {words.spoken(cells, 'train_size', 'retained')}."
    return finish(figure, caption, alt, "labelled examples", "share of intact score")
