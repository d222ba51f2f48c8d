"""The study's figures, from the tables of tasks: what healing brings back, and how surely.

Each takes a table and returns a Figure with `caption` (model, n, units, what the bands are) and
`alt` (what one would see, with the main numbers), which `save` writes beside the image and `show`
puts into a notebook. A new figure is one function, here or in `probe_figures` or `harm_figures`.
"""

from __future__ import annotations

import math
import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from healing_utils.analysis.effects import as_fraction
from healing_utils.analysis.recovery import measures
from healing_utils.base.errors import HealingError
from healing_utils.report import plots, words
from healing_utils.report.plots import COLORS, DASH, DASH_DOT, DOTS, GREY, Look, finish, style
from healing_utils.report.show import alt_text, read_captions, save, show

__all__ = ["alt_text", "claims_figure", "learning_curves", "read_captions", "recovery_curves",
           "save", "score_points", "show", "similarity", "weight_change"]  # fmt: skip
PLACES = ("bottom", "top", "custom", "all")  # of whole layers, in the order of rows and lines
SCORES: dict[str, Look] = {  # how a score is marked, by what was done to the model
    "after fine-tuning": {"marker": "o", "alpha": 0.75, "mew": 0},
    "init": {"marker": "D", "ms": 3.2, "mfc": "white"},
    "broken": {"marker": "x", "alpha": 0.6},
    "untrained": {"marker": "+", "ms": 5},
}
MEAN: Look = {"marker": "|", "ms": 11, "mew": 1.1}
OPEN: Look = {"mfc": "white", "ls": DASH, "lw": 1.2}


@style()
def recovery_curves(results: pd.DataFrame) -> Figure:
    """Retained score (healed / intact) against the corrupted share, a line a side and a panel a
    task, of the tables that `recovery.measures` takes: `reinit` with bands, `init` as open
    diamonds, broken models faint, and intact, scratch and the majority label as lines."""
    results = words.titled(words.shortened(results), "task", "model")
    table = words.titled(measures(results), "task", "model")
    table = table[(table.part == "all") & table.side.isin(PLACES) & (table.intact > 0)]
    if table.retained.isna().all():
        raise HealingError("no healed cell with its intact model: nothing to draw")
    order = list(results.panel.unique())  # the study's; that of the measures is the alphabet
    table = table.sort_values("panel", key=lambda c: c.map(order.index), kind="stable")
    shares = [f"share_{state}" for state in ("broken", "scratch", "chance")]
    for share in shares:
        table[share] = table[share.removeprefix("share_")] / table.intact
    figure, drawn = plots.panels(table, 2.35)
    for axis, rows in drawn:
        for side in PLACES:
            color, shift = COLORS[side], {"bottom": -0.01, "top": 0.01}.get(side, 0.0)
            own = rows[(rows.side == side) & (rows.kind == "reinit")]
            name = "chosen layers" if side == "custom" else f"{side} layers"
            if side in ("bottom", "top") and len(own):
                line = rows[rows.side.isin([side, "all"]) & (rows.kind == "reinit")]
                start = line.drop_duplicates("seed").assign(level=0, retained=1, share_broken=1)
                line = pd.concat([start, line])
                faint = {"ls": DOTS, "lw": 1, "alpha": 0.5, "band": False, "zorder": 1}
                plots.curve(axis, line, "level", "share_broken", color=color, **faint)
                plots.curve(axis, line, "level", "retained", color=color, label=name, zorder=3)
            else:
                look = {"color": color, "marker": "s", **OPEN}
                plots.curve(axis, own, "level", "retained", bars=True, label=name, **look)
            plots.points(axis, own.level + shift, own.retained, color=color, marker=".")
            init = rows[(rows.side == side) & (rows.kind == "init")]
            init = init.assign(level=init.level + (3 * shift or 0.03))
            look = {"color": color, "marker": "D", **OPEN}
            plots.curve(axis, init, "level", "retained", bars=True, **look)
        axis.axhline(1, color=COLORS["intact"], lw=1, zorder=1, label="intact")
        for name, dash in (("scratch", DASH_DOT), ("chance", ":")):
            if rows[name].notna().any():
                at = rows[f"share_{name}"].mean()
                axis.axhline(at, color=COLORS["scratch"], lw=1, ls=dash, zorder=1, label=name)
        _level_axis(axis, rows)
    if (table.kind == "init").any():
        plots.key(figure, "init", marker="D", **OPEN)
    if table.broken.notna().any():
        plots.key(figure, "broken", ls=DOTS, lw=1)
    top, lowest = max(1.0, table.retained.max()), table[["retained", *shares]].min().min()
    # Healed scores must stay legible where chance is far below, as with many classes.
    low = max(lowest, top - max(2.5 * (top - table.retained.min()), 0.25))
    figure.axes[0].set_ylim(low - 0.04 * (top - low), top + 0.08 * (top - low))
    caption = f"""
        Score after corruption and healing as a share of the intact model's of the same seed,
        {words.models(table)}, mean over {words.seeds(table, "panel", "side", "level", "kind")};
        bands and bars are 95 % t-intervals (none for one seed; cut at the panel's edge), dots
        single seeds. Lines: layers redrawn Kaiming-uniform (reinit), ending at all layers (purple);
        open diamonds: redrawn by the model's own initialiser (init), which tells the effect of the
        draw's scale; faint: broken, not trained again; scratch: from random values; chance: always
        the majority label. {"Values below the panels are not drawn. " if lowest < low else ""}
        Metric: {words.metrics(table)}. {words.demonstration(table)}"""
    main = table[table.kind == ("reinit" if (table.kind == "reinit").any() else "init")]
    main = main.assign(place=list(map(words.place, main.side, main.level)))
    said = words.means(main[main.retained.notna()], ["panel", "place"], "retained")
    alt = f"Line chart of healed score as a share of intact: {said}."
    return finish(figure, caption, alt, "corrupted layers: share, number", "share of intact score")


def _level_axis(axis, part: pd.DataFrame) -> None:
    """Levels as fractions with the number of layers; a tick too close to the last is left out."""
    counts = {0.0: 0, **dict(zip(part.level, part.layers.map(len), strict=True))}
    ticks: list[float] = []
    for level in sorted(counts):
        if not ticks or level - ticks[-1] > 0.11 * max(counts):
            ticks.append(level)
    axis.set_xticks(ticks, [f"{as_fraction(t)}\n{counts[t]}" for t in ticks])
    axis.set_xlim(-0.04, max(counts) + 0.06)


@style()
def score_points(results: pd.DataFrame) -> Figure:
    """Every single score of the study: one dot per seed, by state, side and level."""
    names = "model task state side level kind seed part metric chance"
    table = words.titled(words.usable(results, "score", names), "task", "model")
    table = table[table.part.isin(["all", "none"])]
    rows = [_row(cell) for cell in table.itertuples(index=False)]
    place = {row: at for at, row in enumerate(sorted(set(rows)))}
    init = table.state.eq("healed") & table.kind.eq("init")
    mark = table.state.where(table.state.isin(["broken", "untrained"]), "after fine-tuning")
    plain = table.state.isin(["intact", "scratch", "untrained"])
    table = table.assign(
        at=[place[row] for row in rows] + 0.24 * table.kind.eq("init"),
        mark=mark.mask(init, "init"),
        hue=table.state.where(plain, table.side),
    )
    figure, drawn = plots.named_rows(table, [row[-1] for row in place])
    said = []
    for axis, part in drawn:
        for (kind, hue), mine in part.groupby(["mark", "hue"], sort=False):
            plots.points(axis, mine.score, mine["at"], color=COLORS[hue], **SCORES[kind])
        dots = part[part["mark"] == "after fine-tuning"].groupby("at").score
        mean = dots.mean()[dots.count() > 1]
        plots.points(axis, mean, mean.index, color=GREY, **MEAN)
        if part.chance.notna().any():
            axis.axvline(part.chance.mean(), color=GREY, lw=1, ls=":", label="chance")
        axis.set_xlabel(words.metric(part.metric.iloc[0]))
        for state, found in part.groupby("state", sort=False).score:
            said.append(f"{part.task.iloc[0]}, {state} {found.min():.2f} to {found.max():.2f}")
    for kind, look in {**SCORES, "mean": MEAN}.items():
        if kind == "mean" or (table["mark"] == kind).any():
            plots.key(figure, kind, ls="", **look)
    caption = f"""
        Every score, one mark per seed ({words.seeds(table, "panel", "at")}), {words.models(table)},
        by corrupted side and share of layers. Filled: fine-tuned, after a Kaiming redraw (reinit)
        where layers were corrupted; open diamonds: after the model's own initialiser (init);
        crosses: broken, not trained again; plus signs: random weights, not trained; ticks: means of
        the filled dots; dotted: always the majority label. {words.demonstration(table)}"""
    return finish(figure, caption, f"Dot plot of all scores: {'; '.join(said)}.")


def _row(cell) -> tuple:
    """Where a cell stands among the rows, its name last."""
    if cell.state in ("intact", "scratch", "untrained"):
        return ("intact", "", "scratch", "untrained").index(cell.state), 0, 0.0, cell.state
    if cell.side not in ("bottom", "top", "all"):
        return 1, 2, float(cell.level), f"layers {str(cell.layers).strip('()[],')}"
    side, level = PLACES.index(cell.side), round(float(cell.level), 6)
    return 1, side, level, words.place(cell.side, level)


@style()
def claims_figure(claims: pd.DataFrame) -> Figure:
    """Effect and interval of each claim against the margin, with the verdict in words."""
    claims = words.usable(claims, "verdict", "model claim statement effect low high n margin")
    kinds = dict.fromkeys(claims.kind if "kind" in claims else ["reinit"])
    ends = {"effect": "effect", "effect_low": "low", "effect_high": "high"}
    evidence = claims.get("evidence", pd.Series("", claims.index))
    claims = claims.assign(
        panel="",
        who=claims.model + (", " + claims.kind if len(kinds) > 1 else ""),
        p=claims.get("p_corrected", math.nan),
        note=np.where(evidence.str.match("demonstration"), "\n(demonstration)", ""),
        **{name: 100 * claims[end].astype(float) for name, end in ends.items()},
    )
    rows: list = []  # a heading, then its claims
    for heading, part in claims.groupby(["claim", "statement"]):
        rows += ["  ".join(heading), *part.itertuples(index=False)]
    alone = claims.who.nunique() == 1
    labels = ["" if isinstance(row, str) or alone else row.who for row in rows]
    width = plots.PAGE - 0.1 - 0.057 * max(map(len, labels))  # inches left for a heading
    figure, [(axis, _)] = plots.named_rows(claims, labels)
    figure.set_figwidth(plots.PAGE)
    margin = 100 * claims.margin.iloc[0]
    axis.axvspan(-margin, margin, color=plots.PALE, lw=0, zorder=0)
    axis.axvline(0, color=GREY, lw=0.8, zorder=1)
    said = []
    beside = {"transform": axis.get_yaxis_transform(), "va": "center", "zorder": 4}
    for at, row in enumerate(rows):
        if isinstance(row, str):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axis.text(
                0, at, textwrap.fill(row, int(width / 0.063)), weight="bold", bbox=box, **beside
            )
            continue
        color = {"holds": COLORS["top"], "fails": COLORS["bottom"]}.get(row.verdict, GREY)
        plots.interval(axis, at, row, "effect", color, row.verdict != "undecided")
        p = "" if math.isnan(row.p) else f", p = {row.p:.2g}"
        axis.text(1.01, at, row.verdict + p + row.note, color=color, linespacing=1, **beside)
        effect = f"{row.effect:.1f} points [{row.effect_low:.1f}, {row.effect_high:.1f}]"
        estimate = "no estimate" if math.isnan(row.effect) else effect
        said.append(f"{row.claim} on {row.who} {row.verdict}, {estimate}")
    low, high = claims[[*ends]].min().min(), claims[[*ends]].max().max()
    low, high = np.fmin(low, -2 * margin), np.fmax(high, 4 * margin)
    axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)
    note = """Demonstration: on the organism a comparison with the bottom is never evidence, since
        it was built so that pre-training matters."""
    n = " or ".join(str(n) for n in sorted(set(claims.n)) if n) or "0"
    caption = f"""
        Effects of the claims with 95 % t-intervals over n = {n} units (a unit is a task and seed,
        averaged over levels), {words.models(claims)}, corruption {", ".join(kinds)}. p: exact
        one-sided sign-flip test, Holm-corrected over the claims. Grey band: the margin of
        {margin:g} point{"" if margin == 1 else "s"}. Filled: decided; open: undecided.
        {note if claims.note.any() else ""}"""
    alt = f"Intervals of the claims' effects: {'; '.join(said)}."
    return finish(figure, caption, alt, "effect (points of score); grey: within the margin")


@style()
def weight_change(report: pd.DataFrame, model: str = "") -> Figure:
    """Standard deviation of every tensor before and after a corruption, by role and layer, of a
    corruption report's ``to_frame()``; tensors of one layer and role are pooled by their
    variance."""
    report = words.usable(report, "std_after", "name layer role std_before elements")
    ends = np.where(report.name.str.endswith("bias"), " bias", " weight")
    report = report.assign(role=report.role.str.replace("_", " ") + ends)
    by, grids = [report.role, report.layer], []
    for when in ("before", "after"):
        total = (report.elements * report[f"std_{when}"] ** 2).groupby(by, sort=False).sum()
        pooled = np.sqrt(total / report.elements.groupby(by, sort=False).sum())
        grids.append((f"{when} corruption", pooled.unstack("layer").loc[report.role.unique()]))
    figure, _ = plots.heat_maps(grids, "standard deviation", columns=2, digits=".2g")
    matrices = report[report.std_after > 0]
    caption = f"""
        Standard deviation of the weights{" of " + words.short(model) if model else ""} per tensor
        role and layer (0 is the layer next to the embeddings), before and after corruption. Only
        the corrupted tensors are shown; a constant tensor, such as a bias of 0 or a LayerNorm
        weight of 1, has none (0)."""
    alt = f"""Two heat maps of standard deviations, {report.role.nunique()} roles by
        {report.layer.nunique()} layers; medians of the redrawn matrices: before
        {matrices.std_before.median():.3g}, after {matrices.std_after.median():.3g}."""
    return finish(figure, caption, alt, "layer")


@style()
def similarity(frame: pd.DataFrame) -> Figure:
    """Similarity of a damaged stream to the intact one by layer (0 is the embeddings), a line a
    side and level; of several states, measures, kinds and tasks a panel each."""
    frame = words.usable(frame, "similarity", "model task state layer side level kind seed measure")
    frame, looks = _sided(words.titled(frame, "task", "state", "measure", "kind"))
    figure, _ = plots.curves(frame, "layer", "similarity", looks)
    figure.axes[0].set_ylim(min(0.0, frame.similarity.min()) - 0.03, 1.04)
    measure = " or ".join(frame.measure.replace("cka", "linear CKA").unique())
    caption = f"""
        Similarity of each layer's output to the intact model's on the same sentences ({measure};
        1 = the same), {words.models(frame)}, corruption {", ".join(frame.kind.unique())};
        mean over {words.bands(frame)}. Darker lines: a larger share of layers corrupted."""
    alt = f"Line chart of similarity by layer: {words.spoken(frame, 'layer', 'similarity')}."
    return finish(figure, caption, alt, "layer (0: embeddings)", f"{measure} to intact")


@style()
def learning_curves(frame: pd.DataFrame) -> Figure:
    """Validation score over fine-tuning steps, a line a state, side and level, a panel a task."""
    frame = words.usable(frame, "score", "model task step state side level kind seed")
    frame, looks = _sided(words.titled(frame, "task", "model"), init=frame.kind == "init")
    figure, drawn = plots.curves(frame, "step", "score", looks)
    for axis, _ in drawn:
        axis.set_xlim(left=0)
    caption = f"""
        Validation score during fine-tuning, {words.models(frame)}: mean over
        {words.bands(frame)}. Black: intact; grey: from random values (scratch); vermilion and blue:
        healing after corrupting bottom or top layers, darker for more layers; dashed: redrawn by
        the model's own initialiser (init)."""
    alt = f"Line chart of score over steps: {words.spoken(frame, 'step', 'score')}."
    return finish(figure, caption, alt, "fine-tuning step", "validation score")


def _sided(frame: pd.DataFrame, init=False) -> tuple[pd.DataFrame, dict[str, Look]]:
    """With a column `line`, of the state or of side and level, and how each line looks."""
    sides = frame.assign(level=frame.level.astype(float).round(6))
    places = [words.place(*at) for at in zip(sides.side, sides.level, strict=True)]
    line = pd.Series(places, frame.index) + np.where(init, ", init", "")
    whole = frame.state.isin(["intact", "scratch"])
    looks: dict[str, Look] = {name: {"color": COLORS[name]} for name in ("intact", "scratch")}
    for (side, level), color in plots.side_shades(sides[~whole]).items():
        looks[words.place(side, level)] = {"color": color}
        looks[words.place(side, level) + ", init"] = {"color": color, "ls": DASH}
    return frame.assign(line=line.mask(whole, frame.state)), looks
