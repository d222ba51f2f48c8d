"""The four kinds of plot that every figure is made of: curve, interval, heat map, points; and what
the words of figures share.

A figure gives its table a column `panel` (the panel's title), and `line` or `row` where curves or
rows have names. Colours are those of Okabe and Ito (2008), told apart with any colour vision;
bottom is always vermilion and top always blue.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import style as matplotlib_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from healing_utils.analysis.effects import t_interval
from healing_utils.analysis.harm import place
from healing_utils.base.errors import HealingError

PAGE = 6.9  # inches
LAYER = "layer (0: embeddings)"
DEMONSTRATION = (
    "The organism was built so that pre-training matters: what it shows of bottom against top is a "
    "demonstration, never evidence."
)
GREY, PALE = "#555555", "#ECECEC"
COLORS = {  # of sides and states; none is the embeddings
    "intact": "#000000", "scratch": "#6B6B6B", "untrained": "#6B6B6B", "none": "#009E73",
    "bottom": "#D55E00", "top": "#0072B2", "custom": "#009E73", "random": "#B07C00",
    "scattered": "#B07C00",
    "all": "#9A4C87",  # Okabe and Ito's purple, darkened to be read on white
}  # fmt: skip
METRICS = {"f1": "macro-F1", "matthews": "Matthews correlation", "spearman": "Spearman correlation"}
DASH, DOTS, DASH_DOT = (0, (4, 1.5)), (0, (2, 1.5)), (0, (6, 2, 1, 2))
Panels = list[tuple[Axes, pd.DataFrame]]  # each panel with its rows of the table


def style():
    """The one style of all figures, as a context or a decorator."""
    return matplotlib_style.context(Path(__file__).with_name("figures.mplstyle"))


def captioned(x: str, y: str = "") -> Callable:
    """For functions that draw a table and return the figure, its rows, and, where it is not always
    `y`, the name of the y axis, or those of each column's. Their docstring is the caption; what the
    rows are of, the note, and what a comparison of sides is worth end it."""

    def wrapped(draw: Callable) -> Callable:
        @wraps(draw)
        def drawn(*args: Any, **kwargs: Any) -> Figure:
            with style():
                figure, frame, *names = draw(*args, **kwargs)
                named = getattr(figure, "measure", x)
                _lay_out(figure, named, (names or [y])[0])
            sides = {"bottom", "top"} & set(frame.get("side", ())) or "claim" in frame
            organism = sides and "organism" in set(frame.get("model", ()))
            made = "; ".join(filter(None, [context(frame), figure.note]))
            made = made if made.startswith("n =") else made[:1].upper() + made[1:]
            caption = f"{draw.__doc__ or ''} {made}. "
            caption += DEMONSTRATION if organism else ""
            figure.caption = " ".join(caption.split())
            alt = f"{figure.kind} by {named.format('score')}: {figure.said}."
            figure.alt = " ".join(alt.split())
            return figure

        return drawn

    return wrapped


def _lay_out(figure: Figure, x: str, y: str | list[str]) -> None:
    """Name the outer axes, or all where their metrics differ, for which ``{}`` stands; and put what
    is labelled below, under the note."""
    names, lowest = dict(enumerate([y] if isinstance(y, str) else y)), {}
    found: dict[str, Any] = {}
    for axis in figure.axes:  # they come row by row
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if spec := axis.get_subplotspec():
            column = 0 if figure.apart else spec.colspan.start
            lowest[axis if figure.apart else column] = axis
            axis.set(xlabel="", ylabel=names.get(column, "").format(axis.metric))
    for axis in lowest.values():
        axis.set_xlabel(x.format(axis.metric))
    if found or figure.note:
        # In inches: the handle with its space, and the longest label.
        most = max(1, figure.get_figwidth() // (0.46 + 0.067 * max(map(len, found), default=0)))
        rows = math.ceil(len(found) / most)
        look = {"ncols": math.ceil(len(found) / max(rows, 1)) or 1, "title": figure.note}
        figure.set_figheight(figure.get_figheight() + 0.17 * rows)
        figure.legend(found.values(), found, loc="outside lower center", **look)
    # Once: a figure with an engine is laid out and drawn twice for each file of it.
    ConstrainedLayoutEngine().execute(figure)


def panels(
    frame: pd.DataFrame, heights: float | Sequence[float], columns: int = 3, scores: str = "",
    **share: Any,
) -> tuple[Figure, Panels]:  # fmt: skip
    """A figure with a panel for each `panel`, in at most so many columns. `heights`: inches of each
    row of panels within their frames. They share the y axis unless `share` says else; the axis of
    `scores` (x or y), where there is one, those of one metric. What draws into them sets the
    figure's kind, what is said of it, and its note."""
    groups = dict(list(frame.groupby("panel", sort=False)))
    columns = 2 if len(groups) == 4 and columns == 3 else min(len(groups), columns)
    heights = np.broadcast_to(heights, math.ceil(len(groups) / columns))
    width = PAGE if len(groups) > 1 else 0.68 * PAGE
    room = int((width / columns - 0.3) / 0.075)  # characters of a bold title
    titles = ["\n".join(textwrap.fill(x, room) for x in title.split("\n")) for title in groups]
    around = 0.27 + 0.15 * (1 + max(title.count("\n") for title in titles))  # with the ticks
    figure = Figure(figsize=(width, heights.sum() + around * len(heights) + 0.4))
    figure.kind, figure.said, figure.note = "Dot plot", "", ""
    share = {"sharey": True, "height_ratios": heights, "squeeze": False, **share}
    figure.apart = bool(scores) and len(set(frame.get("metric", ()))) > 1
    share |= {f"share{scores}": False} if figure.apart else {}
    grid = list(figure.subplots(len(heights), columns, **share).flat)
    for axis, title in zip(grid, titles, strict=False):
        axis.set_title(title)
    for axis in grid[len(groups) :]:
        axis.remove()
    drawn = [(axis, groups[title].copy()) for axis, title in zip(figure.axes, groups, strict=True)]
    firsts: dict[str, Axes] = {}
    for axis, rows in drawn:
        axis.metric = measure(rows)
        if figure.apart and axis is not firsts.setdefault(axis.metric, axis):
            getattr(axis, f"share{scores}")(firsts[axis.metric])
    return figure, drawn


def key(figure: Figure, label: str, **look: Any) -> None:
    """An entry of the legend that stands for no single thing drawn."""
    figure.axes[0].plot([], [], label=label, **{"color": GREY, "solid_capstyle": "butt", **look})


def curves(
    frame: pd.DataFrame, x: str, y: str, looks: Mapping, columns=3, height=1.7, **share: Any
) -> tuple[Figure, Panels]:
    """In each `panel` the mean of y over seeds at each x, a curve for each `line`, drawn as `looks`
    says: up to three seeds as thin lines of their own, more as the band of their t-interval. Of a
    look with an alpha, which is background, the mean alone."""
    figure, drawn = panels(frame, height, columns, **share)
    wide = frame.groupby(["panel", "line", x, "seed"])[y].mean().unstack("seed")
    n = wide.count(axis=1)
    spread = "" if n.max() == 1 else "; thin lines: single seeds"
    figure.note = seeds(n) + (spread if n.max() < 4 else "; bands: 95 % t-intervals")
    figure.kind, figure.said = "Line chart", at_ends(frame, x, y)
    for line in [line for line in looks if (frame["line"] == line).any()]:
        key(figure, line, **looks[line])
    for axis, rows in drawn:
        most = 8 if frame[x].max() < 1000 else 4  # numbers as long as these side by side
        axis.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
        # As many before as after the layout.
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for line, part in wide.loc[rows["panel"].iloc[0]].groupby(level=0):
            part, look = part.droplevel(0), looks[line]
            axis.plot(part.mean(axis=1), **look)
            if n.max() > 3 and "alpha" not in look:
                limits = [t_interval(row.dropna())[1:3] for _, row in part.iterrows()]
                band = {"color": look["color"], "alpha": 0.14, "lw": 0}
                axis.fill_between(part.index, *np.transpose(limits), **band)
            elif n.max() > 1 and "alpha" not in look:
                thin = {"lw": 0.6, "alpha": 0.45, "marker": "", "zorder": 1.5}
                axis.plot(part, **{**look, **thin})
    return figure, drawn


def sided(frame: pd.DataFrame, kind: str = "kind") -> tuple[pd.DataFrame, dict[str, dict]]:
    """With columns `line`, of the state of whole networks and else of side, level and kind, and
    `color`; and how each line looks: darker for more layers, dashed for kinds but reinit."""
    layers = frame["layers"] if "layers" in frame else [()] * len(frame)
    whole = frame["state"].isin(["intact", "scratch", "untrained"])
    other = frame[kind].where(~whole & (frame[kind] != "reinit"), "")
    line = pd.Series(map(place, frame["side"], frame["level"], layers), frame.index, dtype=str)
    line = line.mask(frame["side"] == "none", "embeddings")
    line = frame["state"].where(whole, line) + (", " + other).where(other != "", "")
    frame, looks = frame.assign(line=line, dash=other, shade=frame["level"].round(6)), {}
    dashes = {
        "": "-",
        **dict(zip(other[other != ""].unique(), [DASH, DOTS, DASH_DOT] * 9, strict=False)),
    }
    for name, color in COLORS.items():
        own = frame[frame["state"].where(whole, frame["side"]) == name].sort_values("shade")
        palette = sns.light_palette(color, own["shade"].nunique() + 1).as_hex()[1:]
        shades = dict(zip(own["shade"].unique(), palette, strict=True))
        for row in own.drop_duplicates("line").itertuples():
            looks[row.line] = {"color": shades[row.shade], "ls": dashes[row.dash]}
    color = frame["line"].map({name: look["color"] for name, look in looks.items()})
    return frame.assign(color=color), looks


def intervals(
    frame: pd.DataFrame, value: str, show: Sequence[float], each=0.24, form="z.2f", scores=""
) -> tuple[Figure, Panels]:
    """A dot with its t-interval for each `row`, of ``value value_low value_high color filled dodge
    marker`` (dodge: down, in rows), at the height `at`. Panels stand side by side where all have
    the same rows, else below one another, each with its own. The axis holds all values, those to
    `show`, and as much again to both sides where intervals need it; an arrow stands where its end
    cuts one. `each`: inches of a row; `scores`: as of `panels`, with their `chance` on the axis."""
    names = [list(part["row"].unique()) for _, part in frame.groupby("panel", sort=False)]
    alike = all(set(rows) == set(names[0]) for rows in names)
    names = names[:1] * len(names) if alike else names
    layout = (each * len(names[0]), 3) if alike else ([each * len(rows) for rows in names], 1)
    figure, drawn = panels(frame, *layout, scores, sharex=True, sharey=alike)
    figure.note = seeds(frame["n"]) + "; bars: 95 % t-intervals"
    figure.said = means(frame, ["panel", "row"], value, form)
    for (axis, part), rows in zip(drawn, names, strict=True):
        along = frame[frame["metric"].isin(part["metric"])] if figure.apart else frame
        span = [*along[[value, "chance"] if scores else [value]].stack().dropna(), *show]
        least, most, pad = min(span), max(span), 0.04 * (np.ptp(span) or 1)
        left = max(2 * least - most, np.fmin(least, along[f"{value}_low"].min())) - pad
        right = min(2 * most - least, np.fmax(most, along[f"{value}_high"].max())) + pad
        axis.set_yticks(range(len(rows)), rows)
        axis.set(xlim=(left, right), ylim=(len(rows) - 0.5, -0.5))
        part["at"] = part["row"].map(rows.index) + part["dodge"]
        for (color, marker, filled), dots in part.groupby(["color", "marker", "filled"]):
            at, mean, mark = dots["at"], dots[value], {"color": color, "ls": "", "zorder": 3}
            low, high = dots[f"{value}_low"].fillna(mean), dots[f"{value}_high"].fillna(mean)
            axis.hlines(at, low, high, color=color, lw=1.4)
            axis.plot(mean, at, marker, ms=4.4, mfc=color if filled else "white", **mark)
            axis.plot(mean[low < left] * 0 + left, at[low < left], "<", ms=6, **mark)
            axis.plot(mean[high > right] * 0 + right, at[high > right], ">", ms=6, **mark)
    return figure, drawn


def heat_maps(
    frame: pd.DataFrame, row: str, column: str, value: str, label: str, columns=1, low=0.0,
    fmt="z.2f",
) -> tuple[Figure, Panels]:  # fmt: skip
    """A heat map of the means of each `panel`, its rows in the order in which they come, on one
    scale from `low` on. Cells hold their number up to 14 across; missing ones are blank."""
    across = np.sort(frame[column].unique())
    mean = frame.groupby(["panel", row, column], sort=False)[value].mean()
    heights = frame.groupby("panel", sort=False)[row].nunique()[::columns] * 0.24
    figure, drawn = panels(frame, heights.to_numpy(), columns, sharey="row")
    figure.set_figwidth(PAGE)
    figure.kind, figure.said = f"Heat map of {label}", means(frame, ["panel", row], value)
    look = {"vmin": min(low, mean.min()), "vmax": mean.max(), "cbar": False, "linewidths": 0.8}
    look |= {"cmap": sns.light_palette("#2E8BC7", as_cmap=True), "linecolor": "white"}
    if len(across) * columns <= 14:
        look |= {"annot": True, "fmt": fmt, "annot_kws": {"size": 8, "color": "black"}}
    for axis, part in drawn:
        grid = mean[part["panel"].iloc[0]].unstack(column)
        grid = grid.reindex(part[row].unique(), columns=across)
        sns.heatmap(grid, ax=axis, xticklabels=1 if "annot" in look else 3, yticklabels=1, **look)
        axis.tick_params(length=0, rotation=0)
        axis.grid(False)
    thin = {"pad": 0.01, "aspect": figure.get_figheight() / 0.16}  # 0.16 inches wide
    bar = figure.colorbar(axis.collections[0], ax=figure.axes, label=label, **thin)
    bar.outline.set_visible(False)
    return figure, drawn


def task_looks(tasks: pd.Series) -> dict[str, dict]:
    """Colour and marker of every task: by name, so the same in every figure of a study."""
    colors, names = ("#009E73", "#E69F00", "#9A4C87", "#56B4E9"), sorted(set(tasks))  # of no side
    return {
        task: {"color": colors[i % 4], "marker": "s^DvPX*<"[i % 8]} for i, task in enumerate(names)
    }


# --- words -----------------------------------------------------------------------------------


def usable(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """The rows that hold a value, with short names; raises HealingError where there are none."""
    if table.empty or table[value].isna().all():
        raise HealingError(f"no {value}: nothing to draw")
    return shortened(table[table[value].notna()].reset_index(drop=True))


def shortened(table: pd.DataFrame) -> pd.DataFrame:
    """Models, tasks and corpora without folders and owners, unless two would become one."""
    for name in {"model", "task", "corpus"} & set(table):
        short = table[name].astype(str).str.rstrip("/").str.split("/").str[-1]
        if short.nunique() == table[name].nunique():
            table = table.assign(**{name: short})
    return table


def titled(frame: pd.DataFrame, always: str, *others: str) -> pd.DataFrame:
    """With a column `panel`: a title of one column, and of the others that tell panels apart."""
    several = [name for name in others if name in frame and frame[name].nunique() > 1]
    lines = frame[[always, *several]].to_numpy()
    return frame.assign(panel=["\n".join(filter(None, line)) for line in lines])


def everywhere(frame: pd.DataFrame, rows: pd.Series, column: str) -> pd.DataFrame:
    """Some rows once more for every value that a column has in the others."""
    values = frame.loc[~rows, column].unique()
    copies = [frame[rows].assign(**{column: value}) for value in values]
    return pd.concat([*(copies or [frame[rows]]), frame[~rows]])


def seeds(counts: Iterable[float], of: str = "mean of ") -> str:
    """``mean of n = 3 seeds``, or a range where it is not everywhere the same."""
    low, high = int(min(counts)), int(max(counts))
    n = f"n = {low}" if low == high else f"n = {low} to {high}"
    return f"{n} seed" if high == 1 else f"{of}{n} seeds"


def context(frame: pd.DataFrame) -> str:
    """What the rows behind a figure are of, as far as they say it."""
    said = []
    for name in [n for n in ("model", "corpus", "kind", "metric") if n in frame]:
        found = frame[name].replace(METRICS).astype(str).unique()
        found = [x for x in found if x not in ("", "none", "scratch", "nan")]
        said += [f"{name}: {' and '.join(found)}"] if found else []
    return "; ".join(said)


def measure(frame: pd.DataFrame) -> str:
    """The metrics of scores, by name."""
    found = frame["metric"].dropna() if "metric" in frame else pd.Series(["score"])
    return " or ".join(found.replace(METRICS).unique())


def at_ends(frame: pd.DataFrame, x: str, y: str) -> str:
    """The curves in words: of every panel and line the means at its ends."""
    said = []
    for names, part in frame.groupby(["panel", "line"], sort=False):
        mean = part.groupby(x)[y].mean().iloc[[0, -1]]
        at = " to ".join(f"{value:z.2f} at {round(k, 2):,g}" for k, value in mean.items())
        said.append(f"{', '.join(names)}: {at}")
    return "; ".join(said)


def means(frame: pd.DataFrame, by: list[str], value: str, form: str = "z.2f") -> str:
    """The mean of every group in words."""
    found = frame.groupby(by, sort=False)[value].mean().dropna()
    return "; ".join(f"{', '.join(filter(None, names))} {x:{form}}" for names, x in found.items())
