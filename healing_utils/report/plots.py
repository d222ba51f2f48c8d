"""The four kinds of plot that every figure is made of: curve, interval, heat map, points.

A figure gives its table a column `panel` (the panel's title) and, for curves, `line` (the line's
label), draws with these functions under ``@style()``, and ends with `finish`. Colours are those of
Okabe and Ito (2008), told apart with any colour vision; bottom is always vermilion and top always
blue. Figures are drawn at the width at which they are read: no text is smaller than 8 points.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from healing_utils.analysis.effects import t_interval

PAGE = 6.9  # inches
GREY, PALE, DARK = "#555555", "#ECECEC", "#222222"
BLUE, ORANGE = "#2E8BC7", "#D55E00"  # of heat maps: light enough for numbers in black
COLORS = {
    "intact": "#000000",
    "scratch": "#6B6B6B",
    "untrained": "#6B6B6B",
    "bottom": "#D55E00",
    "top": "#0072B2",
    "custom": "#009E73",
    "random": "#B07C00",
    "scattered": "#B07C00",
    "all": "#9A4C87",  # Okabe and Ito's purple, darkened to be read on white
}
DASH, DOTS, DASH_DOT = (0, (4, 1.5)), (0, (2, 1.5)), (0, (6, 2, 1, 2))
Look = dict[str, Any]  # what matplotlib draws a line or a mark with


def style():
    """The one style of all figures, as a context or a decorator."""
    names = ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    return rc_context(
        {
            **sns.axes_style("whitegrid"),
            **dict.fromkeys(names, 8),
            "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure everywhere
            "axes.titlesize": 9,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.linewidth": 0.7,
            **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "legend.handlelength": 1.8,
            "legend.columnspacing": 1.4,
            "lines.linewidth": 1.4,
            "lines.markersize": 3.6,
            "svg.hashsalt": "healing",  # element ids, and so the file's bytes, do not change
        }
    )


Panels = list[tuple[Axes, pd.DataFrame]]  # each panel with its rows of the table


def panels(
    frame: pd.DataFrame, height: float, columns: int = 3, sharex: bool = False
) -> tuple[Figure, Panels]:
    """A figure with a panel for each `panel`, in rows of at most `columns`, sharing the y axis."""
    groups = dict(list(frame.groupby("panel", sort=False)))
    columns = 2 if len(groups) in (2, 4) else min(len(groups), columns)
    rows = math.ceil(len(groups) / columns)
    width = PAGE if len(groups) > 1 else 0.68 * PAGE
    figure = Figure(figsize=(width, rows * height + 0.62), layout="constrained")
    grid = list(figure.subplots(rows, columns, sharey=True, sharex=sharex, squeeze=False).flat)
    room = int((width / columns - 0.3) / 0.075)  # characters of a bold title
    for axis, title in zip(grid, groups, strict=False):
        lines = [wrapped for line in title.split("\n") for wrapped in textwrap.wrap(line, room)]
        axis.set_title("\n".join(lines))
    for axis in grid[len(groups) :]:
        axis.remove()
    return figure, list(zip(grid, groups.values(), strict=False))


def finish(figure: Figure, caption: str, alt: str, x: str = "", y: str = "") -> Figure:
    """Name the outer axes (`x` below every column, `y` beside every row), set what is labelled as
    the legend below, lay out, and attach the words."""
    placed = [(axis, axis.get_subplotspec()) for axis in figure.axes]
    lowest = {spec.colspan.start: axis for axis, spec in placed if spec}  # axes come row by row
    for axis, spec in placed:
        if x and axis in lowest.values():
            axis.set_xlabel(x)
        if y and spec and spec.is_first_col():
            axis.set_ylabel(y)
    _legend(figure)
    # Laid out once: else each file that is written of it is laid out and drawn twice.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.caption = " ".join(caption.split())
    figure.caption = figure.caption[:1].upper() + figure.caption[1:]
    figure.alt = " ".join(alt.split())
    return figure


def _legend(figure: Figure) -> None:
    """In as few rows as fit the figure's width."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = list(found)
    for rows in range(1, len(labels) + 1):
        columns = [labels[i : i + rows] for i in range(0, len(labels), rows)]
        # In inches: the handle with its space, and the longest label of the column.
        if sum(0.46 + 0.067 * max(map(len, c)) for c in columns) <= figure.get_figwidth():
            figure.legend(found.values(), labels, loc="outside lower center", ncols=len(columns))
            return


def key(figure: Figure, label: str, **look: Any) -> None:
    """An entry of the legend that stands for no single thing drawn."""
    figure.axes[0].plot([], [], label=label, **{"color": GREY, "solid_capstyle": "butt", **look})


# --- curve -----------------------------------------------------------------------------------


def curve(
    axis: Axes, rows: pd.DataFrame, x: str, y: str, band: bool = True, bars: bool = False, **look
) -> None:
    """The mean of y over seeds at each x, with its t-interval as a band, or as bars."""
    if rows[y].notna().any():
        sns.lineplot(
            data=rows, x=x, y=y, ax=axis, legend=False,
            errorbar=(lambda seeds: t_interval(seeds)[1:3]) if band else None,
            err_style="bars" if bars else "band",
            err_kws={"elinewidth": 1.1} if bars else {"alpha": 0.14, "lw": 0},
            **{"mec": look["color"], **look},
        )  # fmt: skip
        axis.set(xlabel="", ylabel="")


def curves(
    frame: pd.DataFrame, x: str, y: str, looks: Mapping[str, Look], columns: int = 3
) -> tuple[Figure, Panels]:
    """In each `panel` of the frame a curve for each `line`, drawn as `looks` says."""
    figure, drawn = panels(frame, 2.3, columns)
    for axis, rows in drawn:
        whole_numbers(axis)
        for line, look in looks.items():
            curve(axis, rows[rows["line"] == line], x, y, banded(frame), **look)
    for line, look in looks.items():
        if (frame["line"] == line).any():
            key(figure, line, **look)
    return figure, drawn


def whole_numbers(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


def banded(frame: pd.DataFrame) -> bool:
    """Whether bands can be told apart: beyond six lines in a panel they only cover one another."""
    return frame.groupby("panel")["line"].nunique().max() <= 6


# --- interval --------------------------------------------------------------------------------


def named_rows(
    frame: pd.DataFrame, names: Sequence[str], sharex: bool = False
) -> tuple[Figure, Panels]:
    """Panels whose rows, from the top at 0, 1, ..., have names."""
    figure, drawn = panels(frame, 0.75 + 0.24 * len(names), sharex=sharex)
    figure.axes[0].set_yticks(range(len(names)), names)
    figure.axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure, drawn


def interval(axis: Axes, at: float, row: Any, name: str, color: str, filled=True, scale=1) -> None:
    """A dot at height `at` with its interval, of ``name name_low name_high`` of a table's row; the
    dot alone where it has none."""
    mean, low, high = (scale * getattr(row, name + end) for end in ("", "_low", "_high"))
    axis.errorbar(
        [mean], [at], xerr=np.nan_to_num([[mean - low], [high - mean]]), fmt="o", ms=4.4,
        color=color, mfc=color if filled else "white", elinewidth=1.4, zorder=3,
    )  # fmt: skip


# --- heat map --------------------------------------------------------------------------------


def heat_maps(
    grids: Sequence[tuple[str, pd.DataFrame]],
    label: str,
    columns: int = 1,
    color: str = BLUE,
    low: float = 0.0,
    high: float | None = None,
    reverse: bool = False,
    digits: str = ".2f",
) -> tuple[Figure, list[Axes]]:
    """A heat map of each titled grid, in rows of `columns`, with one scale and colour bar.

    Cells hold their number up to 16 across the page; missing ones are blank. The highest value is
    the darkest, or with `reverse` the palest.
    """
    heights = [len(grid) for _, grid in grids[::columns]]
    size = (PAGE, 0.45 + sum(0.48 + 0.24 * rows for rows in heights))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(
        len(heights), columns, squeeze=False, sharey="row", height_ratios=heights
    )
    values = np.concatenate([grid.to_numpy(dtype=float).ravel() for _, grid in grids])
    write = np.vectorize(lambda x: _cell(x, digits), otypes=[str])
    for axis, (title, grid) in zip(axes.flat, grids, strict=True):
        written = grid.shape[1] * columns <= 16
        sns.heatmap(
            grid, ax=axis, vmin=min(low, np.nanmin(values)), vmax=high or np.nanmax(values),
            cmap=sns.light_palette(color, as_cmap=True, reverse=reverse), cbar=False,
            annot=write(grid.to_numpy(dtype=float)) if written else None, fmt="",
            annot_kws={"size": 8, "color": "black"}, linewidths=0.8, linecolor="white",
            xticklabels=1 if written else 3, yticklabels=1,
        )  # fmt: skip
        axis.set(title=title, xlabel="", ylabel="")
        axis.tick_params(length=0, rotation=0)
        axis.grid(False)
    tall = figure.get_figheight() / 0.16  # a bar 0.16 inches wide
    bar = figure.colorbar(axes.flat[0].collections[0], ax=axes, pad=0.01, aspect=tall)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return figure, list(axes.flat)


def _cell(x: float, digits: str) -> str:
    """A number as it stands in a cell: without the leading zero, blank where there is none."""
    text = "" if math.isnan(x) else f"{x:{digits}}"
    return re.sub(r"^-(?=[0.]*$)|(?<!\d)0(?=\.)", "", text)


# --- points ----------------------------------------------------------------------------------


def points(axis: Axes, x, y, **look: Any) -> None:
    """A mark at every (x, y), joined by no line."""
    axis.plot(x, y, **{"marker": "o", "ls": "", **look})


# --- looks -----------------------------------------------------------------------------------


def task_looks(tasks: pd.Series) -> dict[str, Look]:
    """Colour, marker and dash of every task: by name, so the same in every figure of a study."""
    colors = ("#009E73", "#E69F00", "#9A4C87", "#56B4E9")  # those that stand for no side
    return {
        task: {
            "color": colors[i % 4],
            "marker": "s^DvPX*<"[i % 8],
            "ls": ("-", DASH, DOTS)[i // 4 % 3],
        }
        for i, task in enumerate(sorted(set(tasks)))
    }


def side_shades(frame: pd.DataFrame) -> dict[tuple[str, float], Any]:
    """The colour of every (side, level), bottom before top, darker for more layers."""
    shades = {}
    for side in [side for side in COLORS if (frame["side"] == side).any()]:
        levels = sorted(set(frame.loc[frame["side"] == side, "level"]))
        palette = sns.light_palette(COLORS[side], len(levels) + 1)[1:]
        shades |= {(side, level): color for level, color in zip(levels, palette, strict=True)}
    return shades
