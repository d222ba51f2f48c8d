"""The study's figures: each takes tables, returns a Figure, and says in words what it shows.

Every Figure carries `caption` (model, n, units, what the bands are) and `alt` (what one would see,
with the main numbers), which `save` writes beside the image and `show` puts into a notebook.
Colours are those of Okabe and Ito (2008), told apart with any colour vision; bottom is always
vermilion and top always blue. Figures are drawn at the width at which they are read, so that no
text is smaller than 8 points.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colors as mcolors
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from healing_utils.analysis.statistics import CHANCE, as_fraction, measures, t_interval
from healing_utils.base.errors import HealingError, nearest
from healing_utils.base.records import write_atomically

COLUMN, PAGE = 3.3, 6.9  # widths in inches
COLORS = {
    "bottom": "#D55E00",
    "top": "#0072B2",
    "all": "#9A4C87",  # Okabe and Ito's purple, darkened to be read on white
    "custom": "#009E73",
    "random": "#B07C00",
    "scattered": "#B07C00",
    "intact": "#000000",
    "none": "#000000",
    "scratch": "#6B6B6B",
    "chance": "#6B6B6B",
}
STATES = ("intact", "healed", "broken", "scratch")
SIDES = ("none", "bottom", "top", "custom", "all")
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure on every machine
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "healing",  # element ids, and so the file's bytes, do not change
}


def style():
    """The one style of all figures, as a context: ``with style(): ...``."""
    return rc_context(_STYLE)


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        with style():
            figure = draw(*args, **kwargs)
            # Laid out once: else each file that is written of it is laid out and drawn twice.
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for name in ("caption", "alt"):
            setattr(figure, name, " ".join(getattr(figure, name).split()))
        return figure

    return drawn


# --- saving and showing ----------------------------------------------------------------------


def alt_text(figure: Figure) -> str:
    """What the figure shows, for a reader who cannot see it."""
    return getattr(figure, "alt", "") or getattr(figure, "caption", "") or "A figure."


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write ``NAME.png`` (200 dpi) and ``NAME.svg``, and note caption and alternative text.

    The texts go into both files' metadata and into ``captions.json`` of the folder, which the
    page of a run reads. Files are written whole or not at all, and hold no date: the same figure
    gives the same bytes. Returns the PNG's path.
    """
    folder = Path(folder)
    if Path(name).name != name or not name:
        raise HealingError(f"a figure's name is a plain file name without a folder, not {name!r}")
    caption, alt = getattr(figure, "caption", ""), alt_text(figure)
    for suffix, options in (
        ("svg", {"metadata": {"Title": caption, "Description": alt, "Date": None}}),
        ("png", {"metadata": {"Title": caption, "Description": alt, "Software": None}}),
    ):
        buffer = io.BytesIO()
        with style():
            figure.savefig(buffer, format=suffix, dpi=200, **options)
        write_atomically(folder / f"{name}.{suffix}", buffer.getvalue())
    index = folder / "captions.json"
    captions = read_captions(folder)
    captions[name] = {"caption": caption, "alt": alt}
    write_atomically(index, json.dumps(captions, indent=1, ensure_ascii=False) + "\n")
    return folder / f"{name}.png"


def read_captions(folder: str | Path) -> dict[str, dict[str, str]]:
    """``{name: {"caption": ..., "alt": ...}}`` of a folder, in the order the figures were saved.

    Empty where there is no index or it cannot be read: captions can be written again.
    """
    try:
        captions = json.loads((Path(folder) / "captions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(captions, dict):
        return {}
    return {str(k): v for k, v in captions.items() if isinstance(v, dict)}


def figure_html(figure: Figure, alt: str | None = None, limit: int = 120_000) -> str:
    """The figure as HTML of at most `limit` bytes of text: an image with `alt`, and its caption."""
    from PIL import Image

    alt = alt or alt_text(figure)
    for dpi in (160, 130, 105, 85, 70):
        buffer = io.BytesIO()
        with style():
            figure.savefig(buffer, format="png", dpi=dpi)
        # Few colours are used: an indexed image is a third of the size and looks the same.
        image = Image.open(buffer).convert("RGB")
        image = image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        packed = io.BytesIO()
        image.save(packed, format="png", optimize=True)
        data = base64.b64encode(packed.getvalue()).decode()
        caption = html.escape(getattr(figure, "caption", ""))
        width = round(figure.get_figwidth() * 110)
        text = (
            f'<figure style="margin:0.5em 0;max-width:{width}px">'
            f'<img alt="{html.escape(alt)}" width="{width}" '
            f'style="max-width:100%;height:auto;background:white" '
            f'src="data:image/png;base64,{data}">'
            f'<figcaption style="font-size:90%">{caption}</figcaption></figure>'
        )
        if len(text) <= limit:
            break
    return text


def show(figure: Figure, alt: str | None = None) -> None:
    """Display a figure in a notebook with alternative text and caption.

    Jupyter's own image output has no place for alternative text, so this is an HTML output; the
    plain-text form, which other readers of the notebook see, is the alternative text.
    """
    from IPython.display import display

    words = alt or alt_text(figure)
    display({"text/html": figure_html(figure, words), "text/plain": f"Figure: {words}"}, raw=True)


# --- the study's figures ---------------------------------------------------------------------


@_figure
def recovery_curves(results: pd.DataFrame, value: str = "score", columns: int = 3) -> Figure:
    """Retained score (healed / intact) against the corrupted share, one line per side.

    `results` as in `statistics.measures`. One panel per model and task; `reinit` solid with
    bands, `init` as open diamonds; the broken model faint below; intact, scratch and the majority
    label as reference lines, all as shares of the intact score.
    """
    table = _whole_layers(measures(results, value))
    table = table[table.intact > 0]
    table = table.assign(
        retained_broken=table.broken / table.intact,
        retained_scratch=table.scratch / table.intact,
        retained_chance=table.chance / table.intact,
    )
    if table.retained.notna().sum() == 0:
        raise HealingError("no healed cell with its intact model: nothing to draw")
    groups = {key: part for key, part in table.groupby(["model", "task"], sort=False)}
    order = dict.fromkeys(zip(results.model, results.task, strict=True))
    panels = [(key, groups[key]) for key in order if key in groups]
    models = list(dict.fromkeys(model for (model, _), _ in panels))
    figure, axes = _panels(len(panels), columns, height=2.35)
    top = max(1.0, table.retained.max())
    shown = table[["retained", "retained_broken", "retained_scratch", "retained_chance"]]
    # Healed scores must stay legible where chance is far below, as with many classes.
    legible = top - max(2.5 * (top - table.retained.min()), 0.25)
    low = max(legible, float(np.nanmin(shown.to_numpy())))
    cut = float(np.nanmin(shown.to_numpy())) < low
    for axis, ((model, task), part) in zip(axes, panels, strict=True):
        axis.set_title(task if len(models) == 1 else f"{_short(model)}\n{task}")
        _references(axis, part)
        for side in ("bottom", "top"):
            dodge = -0.009 if side == "bottom" else 0.009
            on_side = part[part.side.isin([side, "all"])]
            if not (on_side.side == side).any():
                continue
            color = COLORS[side]
            reinit = on_side[on_side.kind == "reinit"]
            _curve(axis, reinit, "retained_broken", color, faint=True)
            _curve(axis, reinit, "retained", color)
            own = reinit[reinit.side == side]
            axis.plot(own.level + dodge, own.retained, ".", color=color, ms=3.5, alpha=0.75)
            init = on_side[(on_side.kind == "init") & (on_side.side == side)]
            _intervals(axis, init, "retained", color, dodge=3 * dodge)
        for kind, marker, shift in (("reinit", ".", 0.0), ("init", "D", 0.027)):
            whole = part[(part.side == "all") & (part.kind == kind)]
            if kind == "reinit":
                axis.plot(whole.level, whole.retained, marker, color=COLORS["all"], ms=4)
            else:
                _intervals(axis, whole, "retained", COLORS["all"], dodge=shift)
        for kind, marker in (("reinit", "s"), ("init", "D")):
            chosen = part[(part.side == "custom") & (part.kind == kind)]
            shift = 0.0 if kind == "reinit" else 0.02
            _intervals(axis, chosen, "retained", COLORS["custom"], dodge=shift, marker=marker)
        _level_axis(axis, part)
        axis.set_ylim(low - 0.04 * (top - low), top + 0.08 * (top - low))
    for axis in _left_of_rows(figure):
        axis.set_ylabel("score as share of intact")
    _label_columns(figure, "corrupted layers: share, number")
    _legend(figure, _curve_legend(table), rows=2)

    n = _seeds(table)
    figure.caption = f"""
        Score retained after corruption and healing, as a share of the intact model's score of the
        same seed (1 = intact), {_models(models)}, mean over {n}.
        {_kind_notes(table)} Faint dashed: broken, not trained again. Lines at 1 (intact), from
        random values (scratch) and always the majority label (chance).
        {"Values below the panels are not drawn. " if cut else ""}Metric: {_metrics(table)}.
        {_organism_note(models)}"""
    figure.alt = "Line chart of retained score by share of corrupted layers. " + " ".join(
        _spoken(part, f"{_short(model)} on {task}", brief=len(panels) > 2)
        for (model, task), part in panels
    )
    return figure


@_figure
def score_points(results: pd.DataFrame, value: str = "score", columns: int = 3) -> Figure:
    """Every single score of the study: one dot per seed, by state, side and level."""
    _need(results, ("model", "task", "state", "side", "level", "kind", "seed", value))
    table = results[results[value].notna()]
    if "part" in table:
        table = table[table.part.isna() | (table.part == "all")]
    if table.empty:
        raise HealingError("no scores: nothing to draw")
    rows = _conditions(table)
    panels = list(table.groupby(["model", "task"], sort=False))
    models = list(dict.fromkeys(table.model))
    figure, axes = _panels(len(panels), columns, height=0.62 + 0.19 * len(rows), sharex=False)
    place = {key: i for i, key in enumerate(rows)}
    chance = CHANCE.get(value, "")
    for axis, ((model, task), part) in zip(axes, panels, strict=True):
        axis.set_title(task if len(models) == 1 else f"{_short(model)}\n{task}")
        solid: dict[int, list[float]] = {}
        for row in part.itertuples(index=False):
            y = place[_condition(row)]
            color = COLORS.get(row.state if row.state in ("intact", "scratch") else row.side)
            score = getattr(row, value)
            if row.state == "broken":
                below = 0.24 if row.kind == "init" else 0
                axis.plot(score, y + below, "x", color=color, ms=3.5, mew=0.9, alpha=0.6)
            elif row.kind == "init":
                axis.plot(score, y + 0.24, "D", mfc="white", color=color, ms=3.2, mew=0.9)
            else:
                axis.plot(score, y, "o", color=color, ms=3.6, alpha=0.75, mew=0)
                solid.setdefault(y, []).append(score)
        for y, scores in solid.items():
            if len(scores) > 1:
                axis.plot([np.mean(scores)] * 2, [y - 0.34, y + 0.34], color="#333333", lw=1.1)
        if chance in part and part[chance].notna().any():
            axis.axvline(part[chance].mean(), color=COLORS["chance"], lw=1, ls=":", zorder=1)
        axis.set_yticks(range(len(rows)), [_condition_name(key) for key in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlabel(_metric_name(part, value))
    for axis in axes:
        if axis not in _left_of_rows(figure):
            axis.tick_params(labelleft=False)
    handles = [
        Line2D([], [], marker="o", ls="", color="#555555", ms=4, label="after fine-tuning"),
        Line2D([], [], marker="x", ls="", color="#555555", ms=4, label="broken"),
        Line2D([], [], marker="|", ls="", color="#333333", ms=8, mew=1.1, label="mean"),
    ]
    if (table.kind == "init").any():
        handles.insert(
            1,
            Line2D([], [], marker="D", ls="", mfc="white", color="#555555", ms=3.5, label="init"),
        )
    if chance in table and table[chance].notna().any():
        handles.append(Line2D([], [], color=COLORS["chance"], ls=":", lw=1, label="chance"))
    _legend(figure, handles, rows=1)
    figure.caption = f"""
        Every score, one mark per seed ({_seeds(table)}), {_models(models)}. Rows give the
        corrupted side and share of layers. Filled: healed by fine-tuning after a Kaiming redraw
        (reinit); open diamonds: after the model's own initialiser (init); crosses: broken, not
        trained again; ticks: means of the filled dots; dotted: always the majority label.
        {_organism_note(models)}"""
    spoken = []
    states = STATES if len(panels) <= 2 else ("intact", "healed")
    for (model, task), part in panels:
        for state in states:
            scores = part[part.state == state][value]
            if len(scores):
                spoken.append(
                    f"{_short(model)} on {task}, {state}: {scores.min():.2f} to {scores.max():.2f}."
                )
    figure.alt = "Dot plot of all scores. " + " ".join(spoken)
    return figure


@_figure
def claims_figure(claims: pd.DataFrame) -> Figure:
    """Effect and interval of each claim against the margin, with the verdict in words."""
    names = ("model", "claim", "statement", "effect", "low", "high", "n", "margin", "verdict")
    _need(claims, names)
    if claims.empty:
        raise HealingError("no claims: nothing to draw")
    kinds = claims.kind.nunique() if "kind" in claims else 1
    several = claims.model.nunique() > 1 or kinds > 1
    blocks, y = [], 0.0
    for (claim, statement), part in claims.groupby(["claim", "statement"], sort=True):
        blocks.append((y, f"{claim}  {statement}", part))
        y += len(part) + 1.15
    height = 0.75 + 0.24 * y
    figure = Figure(figsize=(PAGE, height), layout="constrained")
    axis = figure.subplots()
    margin = 100 * float(claims.margin.iloc[0])
    ends = 100 * claims[["effect", "low", "high"]].to_numpy(dtype=float)
    ends = ends[np.isfinite(ends)]
    low = min(-2 * margin, ends.min() if len(ends) else 0)
    high = max(4 * margin, ends.max() if len(ends) else 0)
    span = high - low
    axis.set_xlim(low - 0.04 * span, high + 0.04 * span)
    axis.axvspan(-margin, margin, color="#EDEDED", lw=0, zorder=0)
    axis.axvline(0, color="#555555", lw=0.8, zorder=1)
    ticks, names = [], []
    for start, title, part in blocks:
        axis.text(
            0, start, title, transform=axis.get_yaxis_transform(), va="center", weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8}, zorder=4,
        )  # fmt: skip
        for i, row in enumerate(part.itertuples(index=False), start=1):
            color = {"holds": "#0072B2", "fails": "#D55E00"}.get(row.verdict, "#555555")
            fill = color if row.verdict != "undecided" else "white"
            spread = [[100 * (row.effect - row.low)], [100 * (row.high - row.effect)]]
            axis.errorbar(
                [100 * row.effect], [start + i], xerr=np.nan_to_num(spread), fmt="o", ms=5,
                color=color, mfc=fill, elinewidth=1.6, capsize=0, zorder=3,
            )  # fmt: skip
            p = getattr(row, "p_corrected", math.nan)
            words = row.verdict + ("" if math.isnan(p) else f", p = {p:.2g}")
            if str(getattr(row, "evidence", "")).startswith("demonstration"):
                words += "\n(demonstration)"
            axis.text(
                1.01, start + i, words, transform=axis.get_yaxis_transform(), color=color,
                va="center", linespacing=1.0,
            )  # fmt: skip
            ticks.append(start + i)
            names.append(_short(row.model) + (f", {row.kind}" if kinds > 1 else ""))
    axis.set_yticks(ticks, names if several else [""] * len(ticks))
    axis.set_ylim(y - 0.4, -0.7)
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("effect (points of score); grey: within the margin")
    n = " or ".join(str(v) for v in sorted(set(claims.n)) if v) or "0"
    kind_names = ", ".join(dict.fromkeys(claims.kind)) if "kind" in claims else "reinit"
    evidence = claims.get("evidence", pd.Series(dtype=str)).astype(str)
    demonstration = evidence.str.startswith("demonstration").any()
    note = (
        "A3 on the organism is a demonstration, never evidence: it was built so that pre-training "
        "matters."
    )
    figure.caption = f"""
        Effects of the claims with 95 % t-intervals over n = {n} units (a unit is a task and seed,
        averaged over levels), {_models(list(dict.fromkeys(claims.model)))}, corruption
        {kind_names}. p: exact one-sided sign-flip test, Holm-corrected over the claims. Grey band:
        the margin of {_points(margin)}. Filled: decided; open: undecided.
        {note if demonstration else ""}"""
    figure.alt = "Intervals of the claims' effects. " + " ".join(
        f"{row.claim} on {_short(row.model)}{', ' + row.kind if kinds > 1 else ''}: "
        + (
            f"{row.verdict}, no estimate."
            if math.isnan(row.effect)
            else f"{row.verdict}, {100 * row.effect:.1f} points "
            f"[{100 * row.low:.1f}, {100 * row.high:.1f}]."
        )
        for row in claims.itertuples(index=False)
    )
    return figure


@_figure
def weight_change(report: pd.DataFrame, model: str = "") -> Figure:
    """Standard deviation of every tensor before and after a corruption, by role and layer.

    `report` has one row per changed tensor: ``layer role std_before std_after`` (a corruption
    report's ``to_frame()``), with `name` to tell biases from weights. Tensors that share layer and
    role are pooled by the root of their mean variance, weighted by `elements` where given.
    """
    _need(report, ("layer", "role", "std_before", "std_after"))
    report = report[report.std_before.notna() & report.std_after.notna()]
    if report.empty:
        raise HealingError("the corruption changed no tensor: nothing to draw")
    if "name" in report:
        ends = np.where(report.name.str.endswith("bias"), "bias", "weight")
        report = report.assign(role=report.role.str.replace("_", " ") + " " + ends)
    roles = list(dict.fromkeys(report.role))
    tables = [
        _pooled(report, name).unstack("layer").reindex(roles).sort_index(axis=1)
        for name in ("std_before", "std_after")
    ]
    layers = list(tables[0].columns)
    high = max(float(np.nanmax(t.to_numpy())) for t in tables)
    figure = Figure(figsize=(PAGE, 0.95 + 0.21 * len(roles)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    written = len(layers) <= 7
    palette = sns.light_palette(COLORS["top"], as_cmap=True)
    for axis, table, title in zip(axes, tables, ("before", "after"), strict=True):
        sns.heatmap(
            table, ax=axis, vmin=0, vmax=high, cmap=palette, linewidths=0.8, linecolor="white",
            annot=_short_numbers(table) if written else None, fmt="", annot_kws={"size": 8},
            cbar=False,
        )  # fmt: skip
        axis.set_title(f"{title} corruption")
        axis.set(xlabel="layer", ylabel="")
        axis.tick_params(length=0)
        axis.tick_params(axis="y", rotation=0)
        axis.grid(False)
    bar = figure.colorbar(axes[0].collections[0], ax=axes, pad=0.01, aspect=25)
    bar.set_label("standard deviation")
    bar.outline.set_visible(False)
    named = f" of {_short(model)}" if model else ""
    figure.caption = f"""
        Standard deviation of the weights{named} per tensor role and layer (0 is the layer next to
        the embeddings), before and after corruption. Only the corrupted tensors are shown; a
        constant tensor, such as a bias of 0 or a LayerNorm weight of 1, has none (0)."""
    matrices = report[report.std_after > 0]
    figure.alt = (
        f"Two heat maps of standard deviations for {len(roles)} roles and layers "
        f"{', '.join(map(str, layers))}. "
    )
    if len(matrices):
        figure.alt += (
            f"Redrawn matrices: before {matrices.std_before.median():.3g}, "
            f"after {matrices.std_after.median():.3g} (medians)."
        )
    return figure


@_figure
def similarity(frame: pd.DataFrame, model: str = "", columns: int = 3) -> Figure:
    """Similarity of a damaged stream to the intact one, layer by layer.

    `frame`: ``layer side level kind seed similarity measure``, layer 0 being the embeddings; with
    ``state`` (and ``task``) there is a panel for each. One line per side and level, mean over
    seeds with a 95 % t-band where there are seeds.
    """
    _need(frame, ("layer", "side", "level", "kind", "seed", "similarity", "measure"))
    frame = frame[frame.similarity.notna()]
    if frame.empty:
        raise HealingError("no similarity: nothing to draw")
    by = [n for n in ("task", "state", "measure", "kind") if n in frame and frame[n].nunique() > 1]
    panels = _split(frame, by)
    figure, axes = _panels(len(panels), columns, height=2.2)
    banded = _few_lines(panels, ["side", "level"])
    for axis, (names, part) in zip(axes, panels, strict=True):
        axis.set_title(", ".join(_pretty(n) for n in names) or _pretty(frame.measure.iloc[0]))
        for (side, level), line in _lines(part, ["side", "level"]):
            _mean_line(axis, line, "layer", "similarity", _shade(side, level, frame), band=banded)
        layers = sorted(part.layer.unique())
        step = max(1, math.ceil(len(layers) / 7))
        axis.set_xticks(layers[::step])
        axis.set_ylim(min(0.0, frame.similarity.min()) - 0.03, 1.04)
    for axis in _left_of_rows(figure):
        axis.set_ylabel("similarity to intact")
    _label_columns(figure, "layer (0: embeddings)")
    _legend(figure, _side_level_legend(frame), rows=2)
    kinds = ", ".join(dict.fromkeys(frame.kind))
    figure.caption = f"""
        Similarity of each layer's output to the intact model's on the same sentences
        ({", ".join(_pretty(m) for m in dict.fromkeys(frame.measure))}; 1 = the same),
        corruption {kinds}{", " + _short(model) if model else ""}. Mean over
        {_seeds(frame)}{_bands(frame, banded)}. Darker lines: a larger share of layers
        corrupted."""
    last = frame[frame.layer == frame.layer.max()]
    if len(panels) > 1:
        last = _largest(last)
    figure.alt = "Line chart of similarity by layer. At the last layer: " + "; ".join(
        f"{', '.join([*map(_pretty, names), _name(side, level)])} {line.similarity.mean():.2f}"
        for names, part in _split(last, by)
        for (side, level), line in _lines(part, ["side", "level"])
    )
    figure.alt += "."
    return figure


@_figure
def learning_curves(frame: pd.DataFrame, model: str = "", columns: int = 3) -> Figure:
    """Validation score over fine-tuning steps, one line per state, side and level.

    `frame`: ``step score state side level kind seed`` and, where there are several, ``task``.
    """
    _need(frame, ("step", "score", "state", "side", "level", "kind", "seed"))
    frame = frame[frame.score.notna()]
    if frame.empty:
        raise HealingError("no scores over steps: nothing to draw")
    by = [n for n in ("model", "task") if n in frame and frame[n].nunique() > 1]
    kinds = [k for k in dict.fromkeys(frame.kind) if k in ("reinit", "init")]
    panels = _split(frame, by)
    figure, axes = _panels(len(panels), columns, height=2.3)
    banded = _few_lines(panels, ["state", "side", "level", "kind"])
    for axis, (names, part) in zip(axes, panels, strict=True):
        axis.set_title(", ".join(_short(n) for n in names))
        for (state, side, level, kind), line in _lines(part, ["state", "side", "level", "kind"]):
            color = COLORS[state] if state in ("intact", "scratch") else _shade(side, level, frame)
            dash = (0, (4, 1.5)) if kind == "init" else "-"
            _mean_line(axis, line, "step", "score", color, dash, band=banded)
        axis.set_xlim(left=0)
    for axis in _left_of_rows(figure):
        axis.set_ylabel("validation score")
    _label_columns(figure, "fine-tuning step")
    corrupted = frame[frame.state == "healed"]
    handles = [
        Line2D([], [], color=COLORS[s], label=s)
        for s in ("intact", "scratch")
        if (frame.state == s).any()
    ]
    handles += _side_level_legend(corrupted)
    if len(kinds) > 1:
        handles.append(Line2D([], [], color="#555555", ls=(0, (4, 1.5)), label="init"))
    _legend(figure, handles, rows=2)
    figure.caption = f"""
        Validation score during fine-tuning{" of " + _short(model) if model else ""}: mean over
        {_seeds(frame)}{_bands(frame, banded)}. Black: intact; grey: from random values (scratch);
        vermilion and blue: healing after corrupting bottom or top layers, darker for more layers.
        {"Dashed: redrawn by the model's own initialiser (init)." if len(kinds) > 1 else ""}"""
    spoken = []
    for names, part in panels:
        if len(panels) > 1:
            part = _largest(part)
        for (state, side, level, kind), line in _lines(part, ["state", "side", "level", "kind"]):
            last = line[line.step == line.step.max()].score.mean()
            who = state if state in ("intact", "scratch") else f"{_name(side, level)} {kind}"
            spoken.append(f"{', '.join([*map(_short, names), who])} {last:.2f}")
    figure.alt = "Line chart of score over steps. Last scores: " + "; ".join(spoken) + "."
    return figure


# --- drawing ---------------------------------------------------------------------------------


def _panels(n: int, columns: int, height: float, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """A page-wide figure with n panels that share the y axis, in rows of at most `columns`."""
    columns = 2 if n in (2, 4) else min(n, columns)
    rows = math.ceil(n / columns)
    width = PAGE if n > 1 else 0.68 * PAGE
    figure = Figure(figsize=(width, rows * height + 0.62), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, sharex=sharex, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[n:]:
        axis.remove()
    return figure, axes[:n]


def _left_of_rows(figure: Figure) -> list[Axes]:
    return [a for a in figure.axes if a.get_subplotspec().is_first_col()]


def _label_columns(figure: Figure, label: str) -> None:
    """Name the x axis below the lowest panel of every column."""
    lowest: dict[int, Axes] = {}
    for axis in figure.axes:
        lowest[axis.get_subplotspec().colspan.start] = axis  # axes come row by row
    for axis in lowest.values():
        axis.set_xlabel(label)


def _legend(figure: Figure, handles: Sequence, rows: int) -> None:
    narrow = figure.get_figwidth() < 5
    columns = max(1, math.ceil(len(handles) / (rows + narrow)))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, 5))


def _summary(part: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Mean and t-interval of y over the seeds at each x."""
    rows = [
        (at, *t_interval(found[y].dropna())) for at, found in part.groupby(x) if found[y].count()
    ]
    return pd.DataFrame(rows, columns=["x", "mean", "low", "high", "n"])


def _curve(axis: Axes, part: pd.DataFrame, name: str, color: str, faint: bool = False) -> None:
    """The mean over seeds by level, from 1 at level 0 on, with its t-band."""
    line = _summary(part, "level", name)
    if line.empty:
        return
    origin = pd.DataFrame([(0.0, 1.0, 1.0, 1.0, 1)], columns=line.columns)
    line = pd.concat([origin, line])
    if faint:
        axis.plot(line.x, line["mean"], color=color, lw=1, ls=(0, (2, 1.5)), alpha=0.45, zorder=1)
        return
    axis.plot(line.x, line["mean"], color=color, zorder=3)
    axis.fill_between(
        line.x, line.low.fillna(line["mean"]), line.high.fillna(line["mean"]),
        color=color, alpha=0.16, lw=0, zorder=2,
    )  # fmt: skip


def _intervals(
    axis: Axes, part: pd.DataFrame, name: str, color: str, dodge: float, marker: str = "D"
) -> None:
    """Open markers with t-intervals, joined by dashes where there are several levels."""
    line = _summary(part, "level", name)
    if line.empty:
        return
    spread = np.nan_to_num([line["mean"] - line.low, line.high - line["mean"]])
    axis.errorbar(
        line.x + dodge, line["mean"], yerr=spread, fmt=marker, ls=(0, (4, 1.5)), lw=1.2, ms=4.2,
        mfc="white", color=color, elinewidth=1.1, zorder=4,
    )  # fmt: skip


def _mean_line(
    axis: Axes, part: pd.DataFrame, x: str, y: str, color, dash="-", band: bool = True
) -> None:
    line = _summary(part, x, y)
    axis.plot(line.x, line["mean"], color=color, ls=dash, lw=1.4)
    if band and line.n.max() > 1:
        axis.fill_between(line.x, line.low, line.high, color=color, alpha=0.13, lw=0)


def _few_lines(panels: list, by: list[str]) -> bool:
    """Whether bands can be told apart: beyond six lines in a panel they only cover one another."""
    return max(part.groupby(by).ngroups for _, part in panels) <= 6


def _references(axis: Axes, part: pd.DataFrame) -> None:
    axis.axhline(1, color=COLORS["intact"], lw=1, zorder=1)
    for name, dash in (("scratch", (0, (6, 2, 1, 2))), ("chance", ":")):
        mean = part[f"retained_{name}"].mean()
        if not math.isnan(mean):
            axis.axhline(mean, color=COLORS[name], lw=1, ls=dash, zorder=1)


def _level_axis(axis: Axes, part: pd.DataFrame) -> None:
    """Levels as fractions with the number of layers; a tick too close to the last is left out."""
    counts = {0.0: 0}
    for level, layers in zip(part.level, part.layers, strict=True):
        counts.setdefault(level, len(layers))
    axis.set_xlim(-0.04, max(counts) + 0.06)
    ticks = []
    for level in sorted(counts):
        if not ticks or level - ticks[-1] > 0.11 * max(counts):
            ticks.append(level)
    names = [str(as_fraction(t)) + (f"\n{counts[t]}" if counts[t] or t == 0 else "") for t in ticks]
    axis.set_xticks(ticks, names)


def _curve_legend(table: pd.DataFrame) -> list:
    handles: list = [
        Line2D([], [], color=COLORS[s], marker=".", ms=5, label=f"{s} layers, healed")
        for s in ("bottom", "top")
        if (table.side == s).any()
    ]
    if (table.side == "all").any():
        handles.append(
            Line2D([], [], color=COLORS["all"], marker="o", ls="", ms=4, label="all layers")
        )
    if (table.side == "custom").any():
        handles.append(
            Line2D(
                [], [], color=COLORS["custom"], marker="s", mfc="white", ls="", ms=4.2,
                label="chosen layers, healed",
            )
        )  # fmt: skip
    if (table.kind == "init").any():
        handles.append(
            Line2D(
                [], [], color="#555555", marker="D", mfc="white", ls=(0, (4, 1.5)), lw=1.2,
                label="init, healed",
            )
        )  # fmt: skip
    if table.broken.notna().any():
        handles.append(
            Line2D([], [], color="#555555", lw=1, ls=(0, (2, 1.5)), alpha=0.7, label="broken")
        )
    handles.append(Line2D([], [], color=COLORS["intact"], lw=1, label="intact"))
    if table.scratch.notna().any():
        handles.append(
            Line2D([], [], color=COLORS["scratch"], lw=1, ls=(0, (6, 2, 1, 2)), label="scratch")
        )
    if table.chance.notna().any():
        handles.append(Line2D([], [], color=COLORS["chance"], lw=1, ls=":", label="chance"))
    return handles


def _side_level_legend(frame: pd.DataFrame) -> list:
    return [
        Patch(color=_shade(side, level, frame), label=_name(side, level))
        for (side, level), _ in _lines(frame, ["side", "level"])
    ]


def _shade(side: str, level: float, frame: pd.DataFrame):
    """The side's colour, lighter for smaller levels."""
    base = np.array(mcolors.to_rgb(COLORS.get(side, COLORS["custom"])))
    levels = sorted(frame[frame.side == side].level.round(6).unique())
    if len(levels) < 2:
        return tuple(base)
    strength = 0.42 + 0.58 * levels.index(round(level, 6)) / (len(levels) - 1)
    return tuple(1 - strength * (1 - base))


# --- words -----------------------------------------------------------------------------------


def _need(table: pd.DataFrame, names: Iterable[str]) -> None:
    missing = [n for n in names if n not in table]
    if missing:
        near = nearest(missing[0], [str(c) for c in table.columns])
        raise HealingError(
            f"the table has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(str, table.columns))}." + (f" Did you mean {near!r}?" if near else "")
        )


def _whole_layers(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table.part == "all") & table.side.isin(["bottom", "top", "all", "custom"])]


def _split(frame: pd.DataFrame, by: list[str]) -> list[tuple[tuple, pd.DataFrame]]:
    return list(frame.groupby(by, sort=False)) if by else [((), frame)]


def _lines(frame: pd.DataFrame, by: list[str]) -> list[tuple[tuple, pd.DataFrame]]:
    """Groups in the study's order: intact first, bottom before top, by level."""

    def order(item):
        names = dict(zip(by, item[0], strict=True))
        return (
            STATES.index(names["state"]) if names.get("state") in STATES else 0,
            SIDES.index(names["side"]) if names["side"] in SIDES else 9,
            names["level"],
        )

    return sorted(frame.groupby(by, sort=False), key=order)


def _conditions(table: pd.DataFrame) -> list[tuple]:
    keys = {_condition(row) for row in table.itertuples(index=False)}
    rank = {"intact": 0, "scratch": 2}
    return sorted(keys, key=lambda k: (rank.get(k[0], 1), SIDES.index(k[1]), k[2], k[3]))


def _condition(row) -> tuple:
    """State where it has no corruption of its own, side, level, and the layers if custom."""
    if row.state in ("intact", "scratch"):
        return (row.state, "none" if row.state == "intact" else "all", 0.0, "")
    side = row.side if row.side in SIDES else "custom"
    layers = str(getattr(row, "layers", "")) if side == "custom" else ""
    return ("corrupted", side, round(float(row.level), 6), layers)


def _condition_name(key: tuple) -> str:
    state, side, level, layers = key
    if state != "corrupted":
        return state
    return f"layers {layers.strip('()[],')}" if side == "custom" else _name(side, level)


def _name(side: str, level: float) -> str:
    if side == "custom":
        return "chosen layers"
    return "all layers" if side == "all" else f"{side} {as_fraction(level)}"


def _short(model: object) -> str:
    return str(model).rstrip("/").split("/")[-1]


def _pretty(name: object) -> str:
    return {"cka": "linear CKA", "cosine": "cosine"}.get(str(name), str(name))


def _points(margin: float) -> str:
    return f"{margin:g} point" + ("" if margin == 1 else "s")


def _seeds(table: pd.DataFrame) -> str:
    n = table.seed.nunique()
    return f"n = {n} seed" + ("" if n == 1 else "s")


def _models(models: list) -> str:
    return ("model " if len(models) == 1 else "models ") + ", ".join(_short(m) for m in models)


def _metrics(table: pd.DataFrame) -> str:
    named = table.groupby("metric", sort=False).task.agg(lambda t: ", ".join(dict.fromkeys(t)))
    return "; ".join(f"{_metric(m)} ({tasks})" for m, tasks in named.items())


def _metric(name: object) -> str:
    return {"f1": "macro-F1", "": "score"}.get(str(name), str(name))


def _metric_name(part: pd.DataFrame, value: str) -> str:
    if value != "score":
        return value.removeprefix("score_").replace("f1", "macro-F1")
    found = [str(m) for m in part.get("metric", pd.Series(dtype=str)).dropna().unique()]
    return _metric(found[0]) if len(found) == 1 else "score"


def _bands(frame: pd.DataFrame, banded: bool) -> str:
    several = frame.seed.nunique() > 1
    return "; bands are 95 % t-intervals over seeds" if several and banded else ""


def _kind_notes(table: pd.DataFrame) -> str:
    """What the marks of the recovery curves stand for, of those that are drawn."""
    several = table.seed.nunique() > 1
    notes = []
    if ((table.kind == "reinit") & (table.side != "custom")).any():
        bands = "bands are 95 % t-intervals over seeds" if several else "one seed gives no interval"
        notes.append(
            f"Solid: layers redrawn Kaiming-uniform (reinit); {bands}; dots are single seeds."
        )
    if (table.side == "custom").any():
        notes.append("Open squares: the layers that were chosen, with 95 % t-intervals.")
    if (table.kind == "init").any():
        notes.append(
            "Open diamonds: layers redrawn by the model's own initialiser (init), with 95 % "
            "t-intervals; they tell the effect of the draw's scale."
        )
    if (table.side == "all").any():
        notes.append("All layers corrupted is one cell for both sides (purple).")
    return " ".join(notes)


def _organism_note(models: list) -> str:
    if any(_short(m) == "organism" for m in models):
        return (
            "The organism was built so that pre-training matters: what it shows of bottom against "
            "top is a demonstration, never evidence."
        )
    return ""


def _spoken(part: pd.DataFrame, where: str, brief: bool) -> str:
    """The means of a panel in words; in brief, of the largest level of each side."""
    said = []
    healed = part[part.retained.notna()]
    if (healed.kind == "reinit").any():
        healed = healed[healed.kind == "reinit"]
    if brief:
        healed = _largest(healed)
    for (side, level), found in _lines(healed, ["side", "level"]):
        said.append(f"{_name(side, level)} {found.retained.mean():.2f}")
    return f"{where}, healed share of intact: {', '.join(said)}."


def _largest(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of each side's largest level."""
    return frame[frame.level == frame.groupby("side")["level"].transform("max")]


def _pooled(report: pd.DataFrame, name: str) -> pd.Series:
    """Standard deviations of all elements of a role in a layer, each tensor about its own mean."""
    size = report.elements if "elements" in report else pd.Series(1, report.index)
    by = [report.role, report.layer]
    total = (size * report[name] ** 2).groupby(by, sort=False).sum()
    return np.sqrt(total / size.groupby(by, sort=False).sum())


def _short_numbers(table: pd.DataFrame) -> np.ndarray:
    """Two significant digits without the leading zero, blank where a tensor did not change."""

    def text(x: float) -> str:
        if math.isnan(x):
            return ""
        return "0" if x == 0 else f"{x:.2g}".replace("0.", ".", 1)

    return np.vectorize(text, otypes=[str])(table.to_numpy(dtype=float))
