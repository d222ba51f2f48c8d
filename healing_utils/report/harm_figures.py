"""Figures of what harm costs and what first aid does, from the tables of `harm`.

In the style of `figures`: each returns a Figure with `caption` and `alt`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from healing_utils.analysis.harm import harm_name
from healing_utils.analysis.statistics import as_fraction
from healing_utils.base.errors import HealingError
from healing_utils.report.figures import (
    COLORS,
    PAGE,
    _figure,
    _label_columns,
    _left_of_rows,
    _legend,
    _models,
    _organism_note,
    _panels,
    _seeds,
    _short,
    _short_numbers,
    _summary,
)

PARTS = ("all", "attention", "query", "key", "value", "attention_output", "feed_forward",
         "layernorm")  # fmt: skip
RECIPE_NAMES = {
    "full": "full fine-tuning",
    "corrupted_only": "corrupted layers only",
    "corrupted_frozen": "corrupted layers frozen",
    "head_only": "head only",
    "norms_and_biases": "norms and biases",
    "layerwise_decay": "layer-wise decay",
    "low_rank": "low-rank adapters",
    "matched_redraw": "scale-matched redraw",
    "transplant": "transplanted neighbour",
    "drop": "layers dropped",
    "mlm_warm_up": "masked-language warm-up",
    "distillation": "distilled hidden states",
}


@_figure
def vulnerability_map(table: pd.DataFrame) -> Figure:
    """Heat maps of the retained score, part by layer, broken and healed, of `harm.vulnerability`; a
    row of panels for each model and task."""
    if table.empty:
        raise HealingError("no single layer was corrupted: nothing to draw")
    # A task of which only the ends were corrupted, by level, has no map.
    seen = table.groupby(["model", "task"])["layer"].transform("nunique")
    table = table[seen == seen.groupby(table["model"]).transform("max")]
    rows = list(table.groupby(["model", "task"], sort=False))
    states = [s for s in ("broken", "healed") if (table["state"] == s).any()]
    parts = [p for p in PARTS if (table["part"] == p).any()]
    layers = sorted(table["layer"].unique())
    height = 0.5 + len(rows) * (0.75 + 0.26 * len(parts))
    figure = Figure(figsize=(PAGE, height), layout="constrained")
    axes = figure.subplots(len(rows), len(states), squeeze=False)
    palette = sns.light_palette(COLORS["bottom"], as_cmap=True, reverse=True)
    low = min(0.5, float(table["retained"].min()))
    for line, ((model, task), found) in zip(axes, rows, strict=True):
        for axis, state in zip(line, states, strict=True):
            part = found[found["state"] == state]
            grid = part.pivot(index="part", columns="layer", values="retained")
            grid = grid.reindex(index=parts, columns=layers)
            sns.heatmap(
                grid, ax=axis, vmin=low, vmax=1, cmap=palette, linewidths=0.8, linecolor="white",
                annot=_short_numbers(grid.round(2)) if len(layers) <= 12 else None, fmt="",
                annot_kws={"size": 8}, cbar=False,
            )  # fmt: skip
            where = task if table["model"].nunique() == 1 else f"{_short(model)}, {task}"
            axis.set_title(f"{state}, {where}")
            axis.set(xlabel="corrupted layer (0: next to the embeddings)", ylabel="")
            names = ["whole layer" if p == "all" else p.replace("_", " ") for p in parts]
            axis.set_yticks(np.arange(len(parts)) + 0.5, names, rotation=0)
            if axis is not line[0]:
                axis.tick_params(labelleft=False)
            axis.tick_params(length=0)
            axis.grid(False)
    bar = figure.colorbar(axes[0][0].collections[0], ax=axes, pad=0.01, aspect=25)
    bar.set_label("share of intact")
    bar.outline.set_visible(False)
    n = sorted(set(table["n"]))
    models = list(dict.fromkeys(table["model"]))
    blank = len(parts) * len(layers) * len(states) * len(rows) > len(table)
    figure.caption = f"""
        Vulnerability map: score as a share of the intact model's when one layer, or one part of
        it, is redrawn (reinit), {_models(models)}. Broken: the fine-tuned model, not trained
        again; healed: the pre-trained model, then fine-tuned. Means over n =
        {" or ".join(map(str, n))} seeds. {"Blank: not run. " if blank else ""}
        {_organism_note(models)}"""
    spoken = []
    for (state, part), found in table.groupby(["state", "part"], sort=False):
        worst = found.loc[found["retained"].idxmin()]
        spoken.append(
            f"{state}, {part.replace('_', ' ')}: lowest {worst['retained']:.2f} at layer "
            f"{worst['layer']}"
        )
    figure.alt = "Heat maps of retained score by part and layer. " + "; ".join(spoken) + "."
    return figure


@_figure
def harm_similarity(similarity: pd.DataFrame, measure: str = "cka", model: str = "") -> Figure:
    """Heat map, kind of harm by layer, of the broken model's similarity to the intact one.

    `similarity` is `results.load_similarity` of one place (side, level), with a column `harm`.
    """
    part = similarity[similarity["measure"] == measure]
    if part.empty:
        raise HealingError(f"no similarity {measure!r}: nothing to draw")
    grid = part.groupby(["harm", "layer"])["similarity"].mean().unstack("layer")
    grid = grid.loc[grid.fillna(0).mean(axis=1).sort_values(ascending=False).index]
    figure = Figure(figsize=(PAGE, 0.9 + 0.23 * len(grid)), layout="constrained")
    axis = figure.subplots()
    sns.heatmap(
        grid, ax=axis, vmin=0, vmax=1, cmap=sns.light_palette(COLORS["top"], as_cmap=True),
        linewidths=0.8, linecolor="white", annot=grid.shape[1] <= 13, fmt=".2f",
        annot_kws={"size": 8}, cbar_kws={"label": "linear CKA", "pad": 0.01},
    )  # fmt: skip
    axis.set(xlabel="layer (0: embeddings)", ylabel="")
    axis.set_yticks(np.arange(len(grid)) + 0.5, [harm_name(h) for h in grid.index], rotation=0)
    axis.tick_params(length=0)
    axis.grid(False)
    sides = ", ".join(
        f"{side} {as_fraction(level)}"
        for side, level in part[["side", "level"]].drop_duplicates().itertuples(index=False)
    )
    named = f" of {_short(model)}" if model else ""
    gaps = grid.isna().any(axis=None)
    blank = "Blank: outputs not finite, or the same for every token. " if gaps else ""
    figure.caption = f"""
        Linear CKA of each layer's output{named} to the intact model's on the same sentences, by
        kind of harm with its strength, {sides} of the layers hit, before any healing; 1 is the
        same arrangement of tokens. {blank}Sorted by the mean; {_seeds(part)}."""
    last = grid.iloc[:, -1]
    figure.alt = "Heat map of linear CKA by kind and layer. At the last layer: " + "; ".join(
        f"{harm_name(h)} " + ("none" if np.isnan(v) else f"{v:.2f}") for h, v in last.items()
    )
    figure.alt += "."
    return figure


@_figure
def harm_curves(table: pd.DataFrame, columns: int = 2) -> Figure:
    """Retained score by kind of harm and level, bottom beside top, of `harm.by_harm`: healed as
    dots with t-intervals, broken as crosses. A panel for each model and task."""
    if table.empty:
        raise HealingError("no harm to whole layers by side: nothing to draw")
    worst = table.groupby("harm")["retained"].min()
    keys = {(row.harm, row.level) for row in table.itertuples(index=False)}
    keys = sorted(keys, key=lambda key: (-worst[key[0]], key[0], key[1]))
    panels = list(table.groupby(["model", "task"], sort=False))
    figure, axes = _panels(len(panels), columns, height=0.75 + 0.24 * len(keys))
    place = {key: i for i, key in enumerate(keys)}
    dodge = {"bottom": -0.16, "top": 0.16, "all": 0.0}
    for axis, ((model, task), part) in zip(axes, panels, strict=True):
        axis.set_title(task if table["model"].nunique() == 1 else f"{_short(model)}\n{task}")
        axis.axvline(1, color=COLORS["intact"], lw=1)
        for row in part.itertuples(index=False):
            y = place[row.harm, row.level] + dodge[row.side]
            if row.state == "broken":
                axis.plot(row.retained, y, "x", color=COLORS[row.side], ms=4, mew=1, alpha=0.6)
                continue
            ends = [[row.retained - row.retained_low], [row.retained_high - row.retained]]
            axis.errorbar(
                [row.retained], [y], xerr=np.nan_to_num(ends), fmt="o", ms=4,
                color=COLORS[row.side], elinewidth=1.3, capsize=0,
            )  # fmt: skip
        axis.set_yticks(range(len(keys)), [f"{harm_name(h)}, {as_fraction(x)}" for h, x in keys])
        axis.set_ylim(len(keys) - 0.5, -0.5)
        low = max(float(part["retained"].min()), 0.0)
        high = max(1.0, part["retained"].max())
        axis.set_xlim(low - 0.03 if np.isfinite(low) else 0.0, high + 0.06)
        axis.set_xlabel("score as share of intact")
    for axis in axes:
        if axis not in _left_of_rows(figure):
            axis.tick_params(labelleft=False)
    handles = [
        Line2D([], [], marker="o", ls="", color=COLORS[s], ms=4, label=f"{s}, healed")
        for s in ("bottom", "top", "all")
        if (table["side"] == s).any()
    ]
    if (table["state"] == "broken").any():
        handles.append(Line2D([], [], marker="x", ls="", color="#555555", ms=4, label="broken"))
    _legend(figure, handles, rows=1)
    n = sorted(set(table["n"]))
    models = list(dict.fromkeys(table["model"]))
    figure.caption = f"""
        Retained score by kind of harm (with its strength) and share of the layers hit,
        {_models(models)}: healed by full fine-tuning, mean over n = {" or ".join(map(str, n))}
        seeds with 95 % t-intervals (none for one seed; cut at the panel's edge); crosses: broken,
        not trained again. Line at 1: intact. {_organism_note(models)}"""
    healed = table[table["state"] == "healed"]
    figure.alt = "Dot plot of retained score by kind of harm. Healed: " + "; ".join(
        f"{row.task} {harm_name(row.harm)} {row.side} {as_fraction(row.level)} {row.retained:.2f}"
        for row in healed.itertuples(index=False)
    )
    figure.alt += "."
    return figure


@_figure
def league_figure(table: pd.DataFrame) -> Figure:
    """Gain of each recipe over full fine-tuning, of `harm.league`: a panel for each place."""
    if table.empty:
        raise HealingError("no recipe beside full fine-tuning: nothing to draw")
    by = ["model", "start", "harm", "side", "level", "where"]
    panels = list(table.groupby(by, sort=False))
    models = list(dict.fromkeys(table["model"]))
    starts = table["start"].nunique()
    recipes = list(table.groupby("recipe")["gain"].mean().sort_values(ascending=False).index)
    figure, axes = _panels(len(panels), 2, height=0.7 + 0.24 * len(recipes), sharex=True)
    place = {name: i for i, name in enumerate(recipes)}
    colors = {"better": "#0072B2", "worse": "#D55E00"}
    for axis, (key, part) in zip(axes, panels, strict=True):
        model, start, harm, side, level, where = key
        title = f"layer {where}" if where else f"{side} {as_fraction(level)}"
        title += f", {harm_name(harm)}" + (f", {start}" if starts > 1 else "")
        axis.set_title(title if len(models) == 1 else f"{_short(model)}\n{title}")
        axis.axvspan(-1, 1, color="#EDEDED", lw=0, zorder=0)
        axis.axvline(0, color="#555555", lw=0.8)
        for row in part.itertuples(index=False):
            if row.recipe == "full":
                axis.plot(0, place["full"], "|", color="#333333", ms=8, mew=1.4)
                continue
            color = colors.get(row.verdict, "#555555")
            ends = [[100 * (row.gain - row.gain_low)], [100 * (row.gain_high - row.gain)]]
            axis.errorbar(
                [100 * row.gain], [place[row.recipe]], xerr=np.nan_to_num(ends), fmt="o", ms=4.5,
                color=color, mfc=color if row.verdict in colors else "white", elinewidth=1.4,
                capsize=0,
            )  # fmt: skip
        axis.set_yticks(range(len(recipes)), [RECIPE_NAMES.get(r, r) for r in recipes])
        axis.set_ylim(len(recipes) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
    for axis in axes:
        if axis not in _left_of_rows(figure):
            axis.tick_params(labelleft=False)
    _label_columns(figure, "gain over full fine-tuning (points)")
    n = sorted(set(table["n"]))
    figure.caption = f"""
        First aid: score of each recipe minus that of full fine-tuning of the same corrupted model,
        {_models(models)}, paired over n = {" or ".join(map(str, n))} (task, seed) units, with 95 %
        t-intervals. Filled: beyond the margin of one point (grey) after Bonferroni's correction;
        open: not. All recipes train on as many tokens, at one learning rate.
        {_organism_note(models)}"""
    figure.alt = "Dot plot of gains over full fine-tuning in points. " + "; ".join(
        f"{row.side}: {RECIPE_NAMES.get(row.recipe, row.recipe)} {100 * row.gain:+.1f}"
        for row in table[table["recipe"] != "full"].itertuples(index=False)
    )
    figure.alt += "."
    return figure


@_figure
def price_curves(cells: pd.DataFrame, columns: int = 2) -> Figure:
    """Score as a share of the intact model's against the number of labelled examples, one line a
    state and side; of `harm.gather`'s cells that were trained on several numbers."""
    cells = cells[(cells["recipe"] == "full") & (cells["start"] == "pre-trained")]
    same = ["epochs", "learning_rate", "head"]
    usual = cells[cells["usual"]][same].drop_duplicates()
    cells = cells.merge(usual, on=same)  # only the examples differ
    by_side = (cells["part"] == "all") & cells["side"].isin(["bottom", "top", "all"])
    whole = (cells["state"] != "healed") | by_side
    lines = [
        (key, part)
        for key, part in cells[whole & (cells["state"] != "broken")].groupby(
            ["model", "task", "state", "side", "level", "harm"], sort=False
        )
        if part["train_size"].nunique() > 1
    ]
    if not lines:
        raise HealingError("nothing was trained on several numbers of examples: nothing to draw")
    panels: dict[tuple, list] = {}
    for key, part in lines:
        panels.setdefault(key[:2], []).append((key[2:], part))
    figure, axes = _panels(len(panels), columns, height=2.3)
    order = {"intact": 0, "healed": 1, "scratch": 2}
    named: dict[str, str] = {}
    spoken = []
    for axis, ((model, task), found) in zip(axes, panels.items(), strict=True):
        axis.set_title(f"{_short(model)}, {task}")
        for (state, side, level, harm), part in sorted(found, key=lambda f: order[f[0][0]]):
            color = COLORS[state if state in ("intact", "scratch") else side]
            label = state if state != "healed" else f"{side} {as_fraction(level)} {harm}, healed"
            line = _summary(part.drop_duplicates("key"), "train_size", "retained")
            axis.plot(line.x, line["mean"], color=color, marker="o", ms=3)
            axis.fill_between(line.x, line.low, line.high, color=color, alpha=0.14, lw=0)
            named[label] = color
            spoken.append(f"{task}, {label}: {line['mean'].iloc[0]:.2f} with {line.x.iloc[0]:,}")
        for share in (0.9, 0.95, 0.99):
            axis.axhline(share, color="#999999", lw=0.8, ls=":")
        sizes = sorted({int(x) for _, part in found for x in part["train_size"]})
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{x:,}" for x in sizes])
        axis.minorticks_off()
    for axis in _left_of_rows(figure):
        axis.set_ylabel("score as share of intact")
    _label_columns(figure, "labelled examples")
    _legend(figure, [Line2D([], [], color=c, label=name) for name, c in named.items()], rows=2)
    models = list(dict.fromkeys(key[0] for key in panels))
    n = max(part["seed"].nunique() for _, part in lines)
    figure.caption = f"""
        The price of healing in labelled examples: score after fine-tuning on so many, as a share of
        the intact model's with all of them, {_models(models)}, mean over n = {n} seeds with
        95 % t-bands. Dotted: 90, 95 and 99 % of the intact score. The same number of passes, so
        fewer examples are fewer steps too. {_organism_note(models)}"""
    figure.alt = "Line chart of score by labelled examples. " + "; ".join(spoken) + "."
    return figure
