"""The study's figures, from the tables of tasks: what healing brings back, and how surely.

Each takes a table and returns a Figure with `caption` and `alt` (what one would see, with the main
numbers). A new one is one function, here or in `probe_figures` or `harm_figures`: the names of its
axes, its caption as the docstring, a table, and how its lines look.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from healing_utils.analysis.claims import censoring
from healing_utils.analysis.effects import as_fraction
from healing_utils.analysis.recovery import measures
from healing_utils.base.errors import HealingError
from healing_utils.base.paths import file_name
from healing_utils.base.records import read_json, write_atomically
from healing_utils.report import plots
from healing_utils.report.plots import COLORS, DASH, DASH_DOT, DOTS, GREY, captioned, style

SIDES = ["bottom", "top", "custom", "all"]  # of whole layers


@captioned("corrupted layers: share, number", "share of intact score")
def recovery_curves(results: pd.DataFrame):
    """Score after corruption and healing as a share of the intact model's of the same seed. Layers
    were redrawn Kaiming-uniform, or by the model's own initialiser (init), which tells the effect
    of the draw's scale. Broken: not trained again; scratch: from random values; chance: always the
    majority label."""
    table = plots.titled(measures(plots.shortened(results)), "task", "model")
    after = {"reinit": "", "init": ", init", "broken": ", broken"}
    table = table[(table.part == "all") & table.side.isin(SIDES) & table.kind.isin(after)]
    table = plots.usable(table, "retained")
    broken = table[table.kind == "reinit"].assign(kind="broken")
    broken["retained"] = broken.broken / broken.intact
    # Both sides start where nothing is corrupted and end at all layers.
    frame = pd.concat([table, broken.dropna(subset="retained")])
    frame = plots.everywhere(frame, frame.side == "all", "side")
    frame["line"] = frame.side + " layers" + frame.kind.map(after)
    start = frame.drop_duplicates(["panel", "line", "seed"])
    frame = pd.concat([start.assign(level=0.0, retained=1.0, layers=""), frame])
    kinds = {"": {"marker": "o"}, ", init": {"marker": "D", "ls": DASH},
             ", broken": {"ls": DOTS, "alpha": 0.5}}  # fmt: skip
    looks = {
        f"{side} layers{kind}": {"color": COLORS[side], **look}
        for side in SIDES
        for kind, look in kinds.items()
    }
    figure, drawn = plots.curves(frame, "level", "retained", looks, height=1.9)
    for axis, rows in drawn:
        for name, dash in (("intact", "-"), ("scratch", DASH_DOT), ("chance", ":")):
            look = {"color": COLORS.get(name, GREY), "lw": 1, "ls": dash, "zorder": 1}
            if rows[name].notna().any():
                axis.axhline((rows[name] / rows.intact).mean(), label=name, **look)
        counts = dict(sorted(zip(rows.level, rows.layers.map(len), strict=True)))
        axis.set_xticks(list(counts), [f"{as_fraction(k)}\n{n}" for k, n in counts.items()])
    return figure, table


@captioned("score")
def score_points(results: pd.DataFrame):
    """Every score, by corrupted side, share of layers and kind (reinit, a Kaiming redraw, where
    none is named). Broken: not trained again; untrained: random weights; chance: always the
    majority label."""
    table = plots.usable(results, "score")
    table, looks = plots.sided(table[table.part.isin(["all", "none"])])
    one = len(table[["task", "metric"]].drop_duplicates()) == table.task.nunique()
    table = plots.titled(table, "task", "model", *([] if one else ["metric"]))
    marks = {s: m for s, m in (("broken", "x"), ("untrained", "+")) if (table.state == s).any()}
    dots = table.assign(
        **{"score_low": math.nan, "score_high": math.nan, "n": 1, "filled": True},
        dodge=0.8 * (table.seed.rank(method="dense") / (table.seed.nunique() + 1) - 0.5),
        order=table.line.map(list(looks).index),
        row=table.line,
        marker=table.state.map(marks).fillna("o"),
    ).sort_values(["panel", "order"])
    figure, drawn = plots.intervals(dots, "score", [], scores="x")
    for axis, part in drawn:
        if part.chance.notna().any():
            axis.axvline(part.chance.mean(), color=GREY, lw=1, ls=":", label="chance")
    for name, mark in {"after fine-tuning": "o", **marks}.items():
        plots.key(figure, name, ls="", marker=mark, ms=5)
    counts = table.groupby(["panel", "line", "state"]).seed.nunique()
    figure.measure = "{}"
    figure.said = plots.means(table, ["panel", "line", "state"], "score")
    figure.note = plots.seeds(counts, "a mark each of ")
    return figure, table


@captioned("effect (hundredths)")
def claims_figure(claims: pd.DataFrame):
    """Effects of the claims in hundredths (of the score; of accuracy, the damage, the depth or a
    rank correlation, where a claim is about these), means over n seeds with 95 % t-intervals, and
    the verdicts. p: exact sign-flip test against the margin (grey), corrected for the primary
    claims. Filled: decided; open: undecided. Items: standard error of the test items. A censored
    cell was still healing when training ended. Rows may be about different tasks."""
    claims = plots.usable(claims, "verdict").sort_values("claim", kind="stable")
    alone = claims.model.nunique() == 1
    who = ("" if alone else claims.model + ", ") + claims.variant
    text = (claims.claim + "  " + claims.statement).map(lambda text: textwrap.fill(text, 44))
    text = text.where(~claims.claim.duplicated(), claims.claim)  # a claim is told once
    points = 100 * claims[["effect", "low", "high"]].astype(float)
    claims = claims.assign(
        **dict(zip(("effect", "effect_low", "effect_high"), points.T.to_numpy(), strict=True)),
        **{"panel": "", "dodge": 0, "marker": "o", "filled": claims.verdict != "undecided"},
        row=text + (np.where(claims.claim.duplicated(), "  ", "\n") + who).where(who != "", ""),
        color=np.where(claims.verdict == "undecided", GREY, COLORS["intact"]),  # no side's
        p=claims.p_corrected.fillna(claims.p),
        note=claims.evidence.str.extract("^(demonstration)")[0].fillna(""),
    )
    shown = claims.dropna(subset="effect")
    lines = np.maximum(claims.row.str.count("\n"), 1 + (claims.censored > 0) + (claims.note != ""))
    each = 0.23 + 0.13 * lines.max()
    figure, [(axis, rows)] = plots.intervals(shown, "effect", [-2, 4], each)
    figure.set_figwidth(plots.PAGE)
    axis.axvline(0, color=GREY, lw=0.8, zorder=1)
    for row in rows.itertuples():
        within = {"color": plots.PALE, "lw": 0, "zorder": 0, "label": "within the margin"}
        axis.barh(row.at, 200 * row.margin, 1, -100 * row.margin, **within)
        p = "" if math.isnan(row.p) else f", p = {row.p:.2g}"
        items = f", items ± {100 * row.test_error:.1f}" if row.test_error > 0 else ""
        note = [f"{row.verdict}{p}", f"n = {row.n}{items}", censoring(row), row.note]
        beside = {"transform": axis.get_yaxis_transform(), "va": "center", "color": row.color}
        axis.text(1.01, row.at, "\n".join(filter(None, note)), **beside)
    effects = claims.effect.map("{:.1f} ".format) + claims.unit
    effects = effects.mask(claims.effect.isna(), "no estimate")
    figure.said = "; ".join(claims.claim + " (" + who + ") " + claims.verdict + ", " + effects)
    return figure, claims


@captioned(plots.LAYER)
def weight_change(report: pd.DataFrame, model: str = ""):
    """Standard deviation of the weights before and after a corruption, tensors of one layer and
    role pooled by variance."""
    report = plots.usable(report, "std_after")
    ends = np.where(report.name.str.endswith("bias"), " bias", " weight")
    report = report.assign(role=report.role.str.replace("_", " ") + ends, layer=report.layer + 1)
    squares = {when: report.elements * report[f"std_{when}"] ** 2 for when in ("before", "after")}
    sums = report.assign(**squares).groupby(["role", "layer"], sort=False)
    sums = sums[["elements", *squares]].sum()
    pooled = np.sqrt(sums[[*squares]].div(sums.elements, axis=0)).reset_index()
    frame = pooled.melt(["role", "layer"], var_name="panel", value_name="std")
    frame = plots.shortened(frame.assign(panel=frame.panel + " corruption", model=model))
    label = "standard deviation"
    figure, _ = plots.heat_maps(frame, "role", "layer", "std", label, columns=2, fmt=".2g")
    return figure, frame


@captioned(plots.LAYER)
def similarity(frame: pd.DataFrame):
    """Similarity of each layer's output to the intact model's on the same sentences; 1 = the same.
    Darker: more layers corrupted."""
    frame = plots.usable(frame, "similarity")
    frame = plots.everywhere(frame, frame.state == "untrained", "kind")
    frame = plots.titled(frame, "task", "measure", "kind", "model")
    frame, looks = plots.sided(frame.assign(one="reinit"), "one")
    figure, _ = plots.curves(frame, "layer", "similarity", looks)
    measure = " or ".join(frame.measure.replace("cka", "linear CKA").unique())
    return figure, frame, f"{measure} to intact"


@captioned("fine-tuning step")
def learning_curves(frame: pd.DataFrame):
    """Score during fine-tuning on held-out training examples. Scratch: from random values; else
    healing after a corruption (reinit, where no kind is named), darker for more layers."""
    frame = plots.usable(frame, "score")
    both = frame.state.isin(["intact", "scratch"]) | frame.side.isin(["all", "none"])
    frame, looks = plots.sided(frame.assign(where=(frame.side + " layers").mask(both, "")))
    frame = plots.everywhere(frame, both, "where")
    frame = plots.titled(frame, "task", "where", "model").sort_values("panel", kind="stable")
    columns = max(2, frame["where"].nunique())
    figure, drawn = plots.curves(frame, "step", "score", looks, columns, scores="y")
    for axis, _ in drawn:
        axis.set_xlim(left=0)
    return figure, frame, "held-out {}"


# --- on their way out ------------------------------------------------------------------------


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write ``NAME.png`` (200 dpi) and ``NAME.svg``; return the PNG's path. Caption and alternative
    text go into both files and into ``captions.json`` of the folder, which the page of a run reads;
    an index that cannot be read is begun anew. Files hold no date: the same figure gives the same
    bytes."""
    folder = Path(folder)
    name = file_name(name)  # a task's may be in it, which may be a path
    texts = {"caption": figure.caption, "alt": figure.alt}
    for suffix, undated in (("svg", "Date"), ("png", "Software")):
        said = {"Title": texts["caption"], "Description": texts["alt"], undated: None}
        write_atomically(folder / f"{name}.{suffix}", _drawn(figure, suffix, 200, metadata=said))
    index = folder / "captions.json"
    captions = {**read_json(index), name: texts}
    write_atomically(index, json.dumps(captions, indent=1, ensure_ascii=False) + "\n")
    return folder / f"{name}.png"


def show(figure: Figure | Callable[[], Figure]) -> None:
    """Display a figure in a notebook with alternative text and caption, in at most 120 kB: as HTML,
    since Jupyter's own image output has no place for them. Of a function the figure that it makes
    or, where the run has nothing to draw, why."""
    from IPython.display import display
    from PIL import Image

    if not isinstance(figure, Figure):
        try:
            figure = figure()
        except HealingError as why:
            return print(f"no figure here: {why}")
    alt, caption = html.escape(figure.alt), html.escape(figure.caption)
    width = round(110 * figure.get_figwidth())
    for dpi in (160, 130, 105, 85, 70):
        # Few colours are used: an indexed image is a third of the size and looks the same.
        image = Image.open(io.BytesIO(_drawn(figure, "png", dpi))).convert("RGB")
        image = image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        packed = io.BytesIO()
        image.save(packed, format="png", optimize=True)
        data = base64.b64encode(packed.getvalue()).decode()
        text = (
            f'<figure style="margin:0.5em 0;max-width:{width}px"><img alt="{alt}" width="{width}" '
            'style="max-width:100%;height:auto;background:white" '
            f'src="data:image/png;base64,{data}"><figcaption style="font-size:90%">{caption}'
            "</figcaption></figure>"
        )
        if len(text) <= 120_000:
            break
    display({"text/html": text, "text/plain": f"Figure: {figure.alt}"}, raw=True)


def _drawn(figure: Figure, suffix: str, dpi: int, **options) -> bytes:
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=suffix, dpi=dpi, **options)
    return buffer.getvalue()
