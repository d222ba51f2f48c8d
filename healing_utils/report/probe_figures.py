"""Figures of what layers and neurons know: before, after, broken and healed.

They take the tables of the stages `probing` and `neurons` and return Figures with `caption` and
`alt`, in the style of `figures`, whose `save` and `show` they share; the words of
`word_activations` are HTML. A table may hold several models (a panel for each, or one by `model`),
corpora and columns (panels), tasks (colours or panels) and one or more seeds.

Bottom and top always mean layers here: neurons are strongest, random or weakest.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullLocator

from healing_utils.analysis.statistics import _no_duplicates, layer_tuple
from healing_utils.base.errors import HealingError, choose
from healing_utils.report.figures import (
    COLORS,
    PAGE,
    SIDES,
    _bands,
    _few_lines,
    _figure,
    _label_columns,
    _left_of_rows,
    _lines,
    _metric,
    _metrics,
    _models,
    _name,
    _need,
    _organism_note,
    _panels,
    _shade,
    _short,
    _side_level_legend,
    _split,
    _summary,
)

VALUES = {
    "selectivity": "selectivity",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "control_accuracy": "accuracy on the control task",
    "cka": "linear CKA to intact",
}
_MEANING = {
    "selectivity": "Selectivity: accuracy less the accuracy on random labels per word type.",
    "control_accuracy": "The control task has a random label for every word type.",
    "cka": "Linear CKA to the same layer of the intact model of that task and seed; 1 = the same.",
}
_CELL = ("model", "task", "state", "seed", "corpus", "column")
_DAMAGE = ("side", "level", "kind", "layers")
_PALE = "#ECECEC"  # behind the curves of corrupted layers
_PRETRAINED = {"color": COLORS["intact"], "marker": "o", "ls": "-"}
_UNTRAINED = {"color": COLORS["scratch"], "marker": "x", "ls": (0, (6, 2, 1, 2))}
_MAJORITY = {"color": COLORS["chance"], "ls": ":", "lw": 1}
# Okabe and Ito's colours that stand for no side of the model; told apart by marker and dash too.
_TASK_COLORS = (COLORS["custom"], "#E69F00", COLORS["all"], "#56B4E9")
_MARKERS = ("s", "^", "D", "v", "P", "X", "*", "<")
_RANKED = {
    "top": {"color": COLORS["custom"], "marker": "o", "ls": "-", "label": "strongest"},
    "random": {"color": COLORS["scratch"], "marker": "s", "ls": (0, (4, 1.5)), "label": "random"},
    "bottom": {"color": "#E69F00", "marker": "v", "ls": (0, (1, 1)), "label": "weakest"},
}
_HEAT = "#2E8BC7"  # light enough for numbers in black
_WRITTEN = 16  # layers (embeddings included) up to which the cells of a heat map hold numbers


# --- layers ----------------------------------------------------------------------------------


@_figure
def layer_curves(
    probing: pd.DataFrame, value: str = "selectivity", model: str | None = None, columns: int = 3
) -> Figure:
    """What each layer knows before and after fine-tuning: `value` over layers, 0 = embeddings.

    `probing`: cell columns, `layer` and `value` (one of `VALUES`), and `majority` for accuracy. A
    panel per corpus and column (and model); lines for the pre-trained model, the one of random
    weights and the intact one of each task, mean over seeds with 95 % t-bands.
    """
    frame = _probes(probing, value, model, ("pretrained", "untrained", "intact"))
    by = ["state", "task"]
    looks = _task_looks(frame)
    lines = [("pretrained", "none"), ("untrained", "none"), *(("intact", task) for task in looks)]
    look = dict(zip(lines, [_PRETRAINED, _UNTRAINED, *looks.values()], strict=True))
    frame = frame.assign(task=frame.task.where(frame.state == "intact", "none"))
    _no_duplicates(frame, [*_CELL, "layer"], "probes of one layer")
    panels = _by_corpus(frame)
    figure, axes = _panels(len(panels), columns, height=2.35)
    banded = _few_lines(panels, by)
    for axis, (title, part) in zip(axes, panels, strict=True):
        _title(axis, title)
        for key in lines:
            mine = part[(part.state == key[0]) & (part.task == key[1])]
            _line(axis, mine, "layer", value, {**look[key], "label": _state_name(*key)}, banded)
        _majority(axis, part, value)
        _layer_axis(axis, part)
    for axis in _left_of_rows(figure):
        axis.set_ylabel(VALUES[value])
    _label_columns(figure, "layer (0: embeddings)")
    present = set(frame[by].itertuples(index=False, name=None))
    handles = [
        Line2D([], [], **look[key], label=_state_name(*key)) for key in lines if key in present
    ]
    _grouped_legend(figure, handles + _majority_handle(value))
    figure.caption = f"""
        {_capital(VALUES[value])} of linear probes by layer, {_who(frame)}; mean over
        {_seeds(frame, by, banded)}. {_MEANING.get(value, "")} Fine-tuned models are intact.
        {_majority_note(value)}"""
    said = []
    for title, part in panels:
        for key in lines:
            mean = part[(part.state == key[0]) & (part.task == key[1])].groupby("layer")[value]
            if len(mean := mean.mean()):
                said.append(
                    f"{_flat(title)}, {_state_name(*key)}: highest {mean.max():.2f} at layer "
                    f"{mean.idxmax()}, at the last {mean.iloc[-1]:.2f}"
                )
    figure.alt = f"Line chart of {VALUES[value]} by layer. {'; '.join(said)}."
    return figure


@_figure
def healed_curves(
    probing: pd.DataFrame,
    value: str = "selectivity",
    task: str | None = None,
    model: str | None = None,
) -> Figure:
    """What each layer knows when intact, broken and healed, the corrupted layers shaded.

    `probing` as in `layer_curves`, with ``side level kind layers`` (the corrupted encoder layers,
    counted from 0: layer i's output is row i + 1). A panel per corruption, corpus and column. Only
    one task is drawn: name it where there are several.
    """
    frame = _probes(probing, value, model, ("intact", "broken", "healed"), _DAMAGE)
    harmed = frame[frame.state.isin(["broken", "healed"])]
    if harmed.empty:
        raise HealingError("no broken or healed cell: nothing to draw")
    tasks = list(dict.fromkeys(harmed.task))
    if task is None and len(tasks) > 1:
        raise HealingError(
            f"broken and healed cells of several tasks, {', '.join(tasks)}; name one"
        )
    task = choose(task or tasks[0], tasks, "task with broken or healed cells")
    frame, harmed = frame[frame.task == task], harmed[harmed.task == task]
    _no_duplicates(frame, [*_CELL, *_DAMAGE, "layer"], "probes of one layer")
    kinds = harmed.kind.nunique()
    where = ["model", "corpus", "column"]
    panels = []
    for place, part in harmed.groupby(where, sort=False):
        intact = frame[frame.state == "intact"].groupby(where, sort=False)
        found = intact.get_group(place) if place in intact.groups else frame.head(0)
        panels += [(place, damage, rows, found) for damage, rows in _damages(part)]
    several = frame.model.nunique() > 1
    conditions = max(sum(p == place for p, *_ in panels) for place, *_ in panels)
    figure, axes = _panels(len(panels), conditions if 1 < conditions < 5 else 3, height=2.35)
    said = []
    for axis, (place, damage, rows, intact) in zip(axes, panels, strict=True):
        named = _damage_name(*damage, kinds)
        _title(axis, f"{named}\n{_place(*place, several)}")
        for low, high in _runs(damage[3]):
            axis.axvspan(low + 0.5, high + 1.5, color=_PALE, lw=0, zorder=0)
        states = _state_looks(COLORS.get(damage[0], COLORS["custom"]))
        for state, look in states.items():
            part = intact if state == "intact" else rows[rows.state == state]
            _line(axis, part, "layer", value, {**look, "label": state}, True)
        _majority(axis, rows, value)
        _layer_axis(axis, rows)
        inside = pd.concat([intact, rows])
        inside = inside[inside.layer.isin([layer + 1 for layer in damage[3]])]
        means = inside.groupby("state")[value].mean().reindex(list(states)).dropna()
        numbers = ", ".join(f"{state} {x:.2f}" for state, x in means.items())
        said.append(f"{named}, {_flat(_place(*place, several))}: {numbers}")
    for axis in _left_of_rows(figure):
        axis.set_ylabel(VALUES[value])
    _label_columns(figure, "layer (0: embeddings)")
    drawn = pd.concat([harmed, frame[frame.state == "intact"]])
    handles: list = [
        Line2D([], [], **look, label=state)
        for state, look in _state_looks("#555555").items()
        if (drawn.state == state).any()
    ]
    handles.append(Patch(color=_PALE, label="corrupted layers"))
    _grouped_legend(figure, handles + _majority_handle(value))
    figure.caption = f"""
        {_capital(VALUES[value])} of linear probes by layer, {_who(drawn)}, fine-tuned on
        {_short(task)}: intact, broken (corrupted, not trained again) and healed (corrupted, then
        fine-tuned); kind {", ".join(dict.fromkeys(harmed.kind))}. Shaded: the outputs of the
        corrupted layers. Mean over {_seeds(drawn, ["state", *_DAMAGE], True)}.
        {_MEANING.get(value, "")} {_majority_note(value)} {_organism(drawn)}"""
    figure.alt = (
        f"Line chart of {VALUES[value]} by layer. Mean over the corrupted layers: "
        f"{'; '.join(said)}."
    )
    return figure


@_figure
def state_heatmap(
    probing: pd.DataFrame, value: str = "selectivity", model: str | None = None
) -> Figure:
    """Heat map of `value`: layers across, states down, corrupted layers outlined.

    `probing` as in `healed_curves`. A row for the pre-trained model, the one of random weights and
    each fine-tuned task, then its broken and healed models; mean over seeds, written into the
    cells up to 15 encoder layers. A panel per corpus and column (and model).
    """
    frame = _probes(probing, value, model, None, _DAMAGE)
    _no_duplicates(frame, [*_CELL, *_DAMAGE, "layer"], "probes of one layer")
    kinds = frame[frame.state.isin(["broken", "healed"])].kind.nunique()
    panels = [(title, _state_rows(part, kinds)) for title, part in _by_corpus(frame)]
    heights = [len(rows) for _, rows in panels]
    figure = Figure(
        figsize=(PAGE, 0.45 + sum(0.24 * n + 0.48 for n in heights)), layout="constrained"
    )
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    tables = [
        pd.DataFrame({name: rows.groupby("layer")[value].mean() for name, _, rows in states})
        .reindex(range(max(rows.layer.max() for _, _, rows in states) + 1))
        .T
        for _, states in panels
    ]
    everything = np.concatenate([t.to_numpy(dtype=float).ravel() for t in tables])
    low, high = min(0.0, np.nanmin(everything)), np.nanmax(everything)
    palette = sns.light_palette(_HEAT, as_cmap=True)
    said = []
    for axis, (title, states), table in zip(axes, panels, tables, strict=True):
        written = table.shape[1] <= _WRITTEN
        sns.heatmap(
            table, ax=axis, vmin=low, vmax=high, cmap=palette, linewidths=0.8, linecolor="white",
            annot=_two_digits(table) if written else None, fmt="",
            annot_kws={"size": 8, "color": "black"},
            cbar=False, xticklabels=1 if written else 3, yticklabels=1,
        )  # fmt: skip
        _title(axis, title)
        axis.set(xlabel="layer (0: embeddings)" if axis is axes[-1] else "", ylabel="")
        axis.tick_params(length=0)
        axis.tick_params(axis="both", rotation=0)
        axis.grid(False)
        for y, (_, layers, _) in enumerate(states):
            for start, end in _runs(layers):
                outline = Rectangle(
                    (start + 1, y), end - start + 1, 1, fill=False, ec="black", lw=1.5,
                    clip_on=False, zorder=3,
                )  # fmt: skip
                axis.add_patch(outline)
        numbers = "; ".join(f"{name} {row.mean():.2f}" for name, row in table.iterrows())
        said.append(f"{_flat(title)}: {numbers}.")
    tall = figure.get_figheight() / 0.16  # a bar 0.16 inches wide
    bar = figure.colorbar(axes[0].collections[0], ax=list(axes), pad=0.01, aspect=tall)
    bar.set_label(VALUES[value])
    bar.outline.set_visible(False)
    outlined = frame.state.isin(["broken", "healed"]).any()
    figure.caption = f"""
        {_capital(VALUES[value])} of linear probes by layer and state, {_who(frame)}; mean over
        {_seeds(frame, ["task", "state", *_DAMAGE])}.
        {"Outlined: the corrupted layers." if outlined else ""} {_MEANING.get(value, "")}
        {_organism(frame) if outlined else ""}"""
    figure.alt = f"Heat map of {VALUES[value]}. Mean over the layers. {' '.join(said)}"
    return figure


# --- neurons ---------------------------------------------------------------------------------


@_figure
def neuron_histogram(by_layer: pd.DataFrame, model: str | None = None) -> Figure:
    """In which layers the minimal neuron set lies, before and after fine-tuning.

    `by_layer`: cell columns, `layer` and `share` (of the minimal set). A panel per task, corpus
    and column; bars are means over seeds, dots single seeds, triangles the mean layer.
    """
    frame = _cells(by_layer, ("layer", "share"), "share", model, ("pretrained", "intact"))
    frame = frame.assign(task=frame.task.where(frame.state == "intact", "none"))
    _no_duplicates(frame, [*_CELL, "layer"], "minimal sets")
    looks = _task_looks(frame)
    tasks = list(dict.fromkeys(frame[frame.state == "intact"].task)) or ["none"]
    several = frame.model.nunique() > 1
    panels = []
    for place, part in frame.groupby(["model", "corpus", "column"], sort=False):
        before = part[part.state == "pretrained"]
        for task in tasks:
            after = part[(part.state == "intact") & (part.task == task)]
            if len(after) or task == "none":
                panels.append((place, task, before, after))
    one_place = len({place for place, *_ in panels}) == 1
    figure, axes = _panels(len(panels), len(tasks) if len(tasks) in (2, 3, 4) else 3, height=2.0)
    said = []
    grey = "#9A9A9A"
    for axis, (place, task, before, after) in zip(axes, panels, strict=True):
        where = _place(*place, several)
        title = where if task == "none" else _short(task) + ("" if one_place else f"\n{where}")
        _title(axis, title)
        numbers = []
        for part, name, color, shift in (
            (before, "pre-trained", grey, -0.21),
            (after, "fine-tuned", looks.get(task, _PRETRAINED)["color"], 0.21),
        ):
            mean = part.groupby("layer").share.mean()
            if mean.empty:
                continue
            axis.bar(mean.index + shift, mean, width=0.38, color=color, lw=0, label=name)
            if part.seed.nunique() > 1:
                axis.plot(part.layer + shift, part.share, ".", color="#222222", ms=3.4, mew=0)
            center = float((mean.index * mean).sum() / mean.sum()) if mean.sum() else math.nan
            axis.plot(
                [center], [0.96], "v", color="#555555" if color == grey else color, ms=5,
                transform=axis.get_xaxis_transform(), label=f"mean layer, {name}",
            )  # fmt: skip
            numbers.append(f"{name} {center:.1f} ({100 * mean.max():.0f} % in {mean.idxmax()})")
        _layer_axis(axis, pd.concat([before, after]))
        said.append(f"{_flat(title)}: {', '.join(numbers)}")
    axes[0].set_ylim(0, 1.16 * frame.share.max())  # room for the triangles; the y axis is shared
    for axis in _left_of_rows(figure):
        axis.set_ylabel("share of minimal set")
    _label_columns(figure, "layer (0: embeddings)")
    handles: list = [
        Patch(color=look["color"], label=_state_name("intact", task))
        for task, look in looks.items()
    ]
    if (frame.state == "pretrained").any():
        handles.insert(0, Patch(color=grey, label="pre-trained"))
    handles.append(Line2D([], [], marker="v", ls="", ms=5, color="#555555", label="mean layer"))
    _grouped_legend(figure, handles)
    place = f"; {_flat(_place(*panels[0][0], False))}" if one_place else ""
    dots = "; dots are single seeds" if frame.seed.nunique() > 1 else "; one seed: no spread"
    figure.caption = f"""
        Share of the minimal neuron set by layer, before and after fine-tuning,
        {_who(frame)}{place}: mean over {_seeds(frame, ["task", "state"])}{dots}.
        Triangles: the set's mean layer. The minimal set is the smallest number of strongest neurons
        whose own probe is within a fixed distance of the probe on all neurons."""
    figure.alt = (
        "Bar chart of the minimal neuron set by layer. Mean layer, and the largest share: "
        f"{'; '.join(said)}."
    )
    return figure


@_figure
def accuracy_by_neurons(curve: pd.DataFrame, model: str | None = None, columns: int = 3) -> Figure:
    """Accuracy of probes on k neurons only: the strongest, random ones, and the weakest.

    `curve`: cell columns, ``k which accuracy`` (`which`: top, random, bottom), and `share` (k over
    all neurons) where known. A panel per state, task, corpus and column.
    """
    frame = _cells(curve, ("k", "which", "accuracy"), "accuracy", model)
    frame = frame[frame.k > 0]
    _ranked(frame)
    _no_duplicates(frame, [*_CELL, "k", "which"], "accuracies")
    panels, columns = _by_network(frame, columns)
    figure, axes = _panels(len(panels), columns, height=2.15)
    said = []
    for axis, (title, part) in zip(axes, panels, strict=True):
        _title(axis, title)
        for which, look in _RANKED.items():
            _line(axis, part[part.which == which], "k", "accuracy", look, True)
        axis.set_xscale("log")
        ends = dict.fromkeys([part.k.min(), part.k.max()])
        tens = [10**i for i in range(9) if part.k.min() <= 10**i <= part.k.max()]
        # Written out: the exponents of powers would be too small to read.
        _write_ticks(axis, tens if len(tens) > 1 else list(ends), lambda k: f"{k:,.0f}")
        numbers = "; ".join(
            f"{k:,} neuron{'' if k == 1 else 's'}: " + _spoken_ranks(part[part.k == k], "accuracy")
            for k in ends
        )
        said.append(f"{_flat(title)}, {numbers}.")
    for axis in _left_of_rows(figure):
        axis.set_ylabel("accuracy")
    _label_columns(figure, "neurons kept (log scale)")
    _grouped_legend(figure, _ranked_handles(frame))
    total = " neurons"
    if "share" in frame and (frame.share > 0).any():
        sizes = (frame.k / frame.share).round().astype(int)
        total = f" of the {_range(sizes)} neurons of all layers"
    figure.caption = f"""
        Accuracy of linear probes that see only k{total}, trained again at every k,
        {_who(frame)}: the strongest by rank, as many drawn at random, the weakest. Mean over
        {_seeds(frame, ["task", "state"], True)}."""
    figure.alt = f"Line chart of accuracy by number of neurons. {' '.join(said)}"
    return figure


@_figure
def ablation_curves(ablation: pd.DataFrame, model: str | None = None, columns: int = 3) -> Figure:
    """The task's score when the strongest, random or weakest neurons are ablated.

    `ablation`: cell columns of intact models, ``k share which score metric``; rows with k = 0
    (`which` is none) are where every curve starts. A panel per task, corpus and column.
    """
    frame = _cells(ablation, ("k", "share", "which", "score", "metric"), "score", model)
    _ranked(frame[frame.k > 0])
    _no_duplicates(frame, [*_CELL, "k", "which"], "ablations")
    panels, columns = _by_network(frame, columns)
    figure, axes = _panels(len(panels), columns, height=2.15)
    said = []
    for axis, (title, part) in zip(axes, panels, strict=True):
        _title(axis, title)
        whole = part[part.k == 0]
        for which, look in _RANKED.items():
            mine = part[(part.which == which) & (part.k > 0)]
            if len(mine):
                _line(axis, pd.concat([whole, mine]), "share", "score", look, True)
        if len(whole):
            axis.axhline(whole.score.mean(), color=COLORS["intact"], lw=1, zorder=1)
        _share_axis(axis, sorted(part.share.unique()))
        numbers = [f"nothing ablated {whole.score.mean():.2f}"] if len(whole) else []
        ablated = part[part.k > 0]
        for share in dict.fromkeys([ablated.share.min(), ablated.share.max()]):
            ranks = _spoken_ranks(ablated[ablated.share == share], "score")
            numbers.append(f"{_percent(share)} % of neurons: {ranks}")
        said.append(f"{_flat(title)}, {'; '.join(numbers)}.")
    metrics = {_metric(m) for m in frame.metric.dropna()}
    for axis in _left_of_rows(figure):
        axis.set_ylabel(metrics.copy().pop() if len(metrics) == 1 else "score")
    _label_columns(figure, "neurons ablated (% of all)")
    handles = _ranked_handles(frame)
    if (frame.k == 0).any():
        handles.append(Line2D([], [], color=COLORS["intact"], lw=1, label="nothing ablated"))
    _grouped_legend(figure, handles)
    tasks = frame.assign(task=frame.task.map(_short))
    figure.caption = f"""
        Score of the fine-tuned task when neurons are ablated, {_who(frame)}: the strongest for
        the tags named in the panel's title, as many drawn at random, the weakest. Mean over
        {_seeds(frame, ["task"], True)}. Metric: {_metrics(tasks)}."""
    figure.alt = f"Line chart of task score by share of neurons ablated. {' '.join(said)}"
    return figure


# --- task and knowledge ----------------------------------------------------------------------


@_figure
def loss_against_loss(table: pd.DataFrame, model: str | None = None, columns: int = 3) -> Figure:
    """What healing leaves lost: of the task's score against linguistic knowledge, a dot a seed.

    `table`: ``task side level seed task_loss knowledge_loss`` (intact - healed, in score and in
    selectivity), with `model` (and ``corpus column``) where there are several: a panel each. Large
    marks are means over seeds; below the diagonal more knowledge than score is lost.
    """
    losses = ("task_loss", "knowledge_loss")
    _need(table, ("task", "side", "level", "seed", *losses))
    frame = table[table[list(losses)].notna().all(axis=1)]
    if model is not None:
        _need(table, ("model",))
        frame = frame[frame.model == _model(model, frame)]
    if frame.empty:
        raise HealingError("no pair of task loss and knowledge loss: nothing to draw")
    frame = frame.assign(level=frame.level.astype(float).round(6))
    by = [n for n in ("model", "corpus", "column") if n in frame and frame[n].nunique() > 1]
    _no_duplicates(frame, [*by, "task", "side", "level", "seed"], "losses")
    panels = _split(frame, by)
    markers = {task: look["marker"] for task, look in _looks(frame.task).items()}
    figure, axes = _panels(len(panels), columns, height=3.0)
    ends = [0.0, *frame[list(losses)].to_numpy(dtype=float).ravel()]
    pad = 0.06 * (max(ends) - min(ends) or 1)
    low, high = min(ends) - pad, max(ends) + pad
    said = []
    for axis, (names, part) in zip(axes, panels, strict=True):
        _title(axis, "\n".join(_short(n) for n in names))
        axis.axhline(0, color="#555555", lw=0.8, zorder=1)
        axis.axvline(0, color="#555555", lw=0.8, zorder=1)
        axis.plot([low, high], [low, high], color=COLORS["chance"], lw=1, ls=":", zorder=1)
        for (side, level), here in _lines(part, ["side", "level"]):
            color = _shade(side, level, frame)
            for task, dots in here.groupby("task", sort=False):
                point = dict(marker=markers[task], ls="", color=color, zorder=3)
                x, y = dots.knowledge_loss, dots.task_loss
                if len(dots) > 1:
                    axis.plot(x, y, ms=3, alpha=0.8, mew=0, **point)
                axis.plot([x.mean()], [y.mean()], ms=6.5, mec="black", mew=0.7, **point)
                who = ", ".join([*map(_short, names), _short(task), _name(side, level)])
                said.append(f"{who}: task {y.mean():.3f}, linguistic {x.mean():.3f}")
        axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in _left_of_rows(figure):
        axis.set_ylabel("task loss (score)")
    _label_columns(figure, "linguistic loss (selectivity)")
    marks = [
        Line2D([], [], marker=marker, ls="", color="#555555", ms=5, label=_short(task))
        for task, marker in markers.items()
    ]
    marks.append(Line2D([], [], color=COLORS["chance"], lw=1, ls=":", label="equal losses"))
    _grouped_legend(figure, _side_level_legend(frame), marks)
    dots = "Small: single seeds; large: means. " if frame.seed.nunique() > 1 else ""
    figure.caption = f"""
        What is still lost after healing (intact - healed), of the task's score and of linguistic
        knowledge (selectivity of linear probes){", " + _who(frame) if "model" in frame else ""};
        {_seeds(frame, ["task", "side", "level"])}. {dots}Below the dotted diagonal
        more selectivity than score is still lost: a guide for the eye, not a test. Colour: the
        corrupted side and share of layers; mark: the task.
        {_organism(frame) if "model" in frame else ""}"""
    figure.alt = f"Scatter plot of losses after healing. Means: {'; '.join(said)}."
    return figure


# --- words -----------------------------------------------------------------------------------


class Marked(str):
    """HTML that carries its plain text as `alt`; a notebook shows the one or the other."""

    alt: str

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"text/html": str(self), "text/plain": self.alt}


STRONG = 1.0  # standard deviations from which on a word carries its number
_FULL = 3.0  # standard deviations at which the colour is at its strongest
# Orange above the mean, sky blue below (Okabe and Ito). At most 60 % opaque over the page's own
# background, so that its own text keeps a contrast of 4.5 whether it is dark on light or not.
_TINTS, _OPACITY = ((230, 159, 0), (86, 180, 233)), 0.6


def word_activations(
    sentences: Sequence[Sequence[str]],
    activations: np.ndarray,
    neurons: Iterable[tuple[int, int]],
    reference: np.ndarray | None = None,
) -> Marked:
    """The sentences, once per neuron, every word tinted by that neuron's activation.

    `sentences`: lists of words; `activations` (layers, words, hidden) of all their words in order,
    as `extract_activations` gives them; `neurons`: (layer, index) pairs, strongest first. Values
    are in standard deviations from the neuron's mean over the words of `reference` (layers, words,
    hidden), or over these sentences; from one on they are also written behind the word, rounded,
    so that nothing hangs on colour. Inline styles only. Returns HTML; `.alt` is the plain text.

    Raises HealingError for sentences, activations and neurons that do not fit one another.
    """
    neurons = [(int(layer), int(index)) for layer, index in neurons]
    reference = activations if reference is None else reference
    _check_words(sentences, activations, neurons, reference)
    blocks, lines = [], []
    for layer, index in neurons:
        raw = np.asarray(activations[layer, :, index], dtype=float)  # (words,)
        known = np.asarray(reference[layer, :, index], dtype=float)
        spread = known.std()
        scaled = (raw - known.mean()) / spread if spread > 0 else np.zeros_like(raw)
        name = f"layer {layer}, neuron {index}"
        lines.append(f"{name}:")
        rows, start = [], 0
        for words in sentences:
            stop = start + len(words)
            triples = list(zip(words, scaled[start:stop], raw[start:stop], strict=True))
            rows.append(f'<div style="margin:2px 0">{" ".join(_tinted(*t) for t in triples)}</div>')
            lines.append("  " + " ".join(_plain(word, value) for word, value, _ in triples))
            start = stop
        blocks.append(
            f'<div style="margin:0.7em 0"><div style="font-weight:bold">{name}</div>'
            f"{''.join(rows)}</div>"
        )
    note = (
        "Activation per word, in standard deviations from the neuron's mean: orange above, blue "
        f"below; from {STRONG:g} on the rounded number stands behind the word."
    )
    marked = Marked(
        f'<figure style="margin:0.5em 0;line-height:1.9">{"".join(blocks)}'
        f'<figcaption style="font-size:90%;line-height:1.4">{note}</figcaption></figure>'
    )
    marked.alt = "\n".join([note, *lines])
    return marked


def _tinted(word: str, value: float, raw: float) -> str:
    """One word as a span: `value` in standard deviations as tint and number, both in its title."""
    red, green, blue = _TINTS[int(value < 0)]
    opacity = _OPACITY * min(1.0, abs(value) / _FULL)
    number = _number(value)
    shown = f'<sup style="font-size:80%">{number}</sup>' if number else ""
    signed = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    return (
        f'<span title="{signed} sd (activation {raw:.3g})" style="padding:1px 3px;'
        f'border-radius:3px;background-color:rgba({red},{green},{blue},{opacity:.2f})">'
        f"{html.escape(word)}{shown}</span>"
    )


def _plain(word: str, value: float) -> str:
    number = _number(value)
    return f"{word}[{number}]" if number else word


def _number(value: float) -> str:
    """The rounded value with its sign, nothing below `STRONG`."""
    if abs(value) < STRONG:
        return ""
    return f"{value:+.0f}".replace("-", "\N{MINUS SIGN}")


def _check_words(sentences, activations, neurons, reference) -> None:
    total = sum(len(words) for words in sentences)
    if not total or not neurons:
        raise HealingError("no word or no neuron: nothing to show")
    for name, array in (("activations", activations), ("reference", reference)):
        if np.ndim(array) != 3:
            raise HealingError(
                f"{name} are (layers, words, hidden), not of shape {np.shape(array)}"
            )
    layers, words, hidden = activations.shape
    if words != total:
        raise HealingError(f"the sentences have {total} words, the activations {words}")
    if (reference.shape[0], reference.shape[2]) != (layers, hidden):
        raise HealingError(
            f"the reference has {reference.shape[0]} layers of {reference.shape[2]} neurons, the "
            f"activations {layers} of {hidden}"
        )
    for layer, index in neurons:
        if not (0 <= layer < layers and 0 <= index < hidden):
            raise HealingError(
                f"no neuron ({layer}, {index}): layers are 0 to {layers - 1}, neurons 0 to "
                f"{hidden - 1}"
            )
        if not np.isfinite(activations[layer, :, index]).all():
            raise HealingError(f"neuron ({layer}, {index}) has activations that are not finite")


# --- tables ----------------------------------------------------------------------------------


def _cells(
    table: pd.DataFrame,
    names: Iterable[str],
    value: str,
    model: str | None,
    states: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The rows of one model (or all) and of some states that hold a value."""
    _need(table, (*_CELL, *names))
    frame = table if model is None else table[table.model == _model(model, table)]
    if states is not None:
        frame = frame[frame.state.isin(states)]
    frame = frame[frame[value].notna()]
    if frame.empty:
        among = f" of {_listed(states)} models" if states else ""
        raise HealingError(f"no {value}{among}: nothing to draw")
    return frame


def _probes(
    probing: pd.DataFrame,
    value: str,
    model: str | None,
    states: Sequence[str] | None,
    names: Sequence[str] = (),
) -> pd.DataFrame:
    choose(value, VALUES, "value of the probes")
    extra = ("majority",) if value == "accuracy" else ()
    frame = _cells(probing, ("layer", value, *extra, *names), value, model, states)
    if names:
        frame = frame.assign(
            level=frame.level.astype(float).round(6), layers=[layer_tuple(x) for x in frame.layers]
        )
    return frame


def _model(name: str, table: pd.DataFrame) -> str:
    """The table's model of that name, with or without its owner."""
    models = list(dict.fromkeys(table.model))
    short = {_short(m): m for m in models}
    return name if name in models else short[choose(name, short, "model")]


def _by_corpus(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """A title and the rows of every model, corpus and column."""
    several = frame.model.nunique() > 1
    return [
        (_place(*key, several), part)
        for key, part in frame.groupby(["model", "corpus", "column"], sort=False)
    ]


def _by_network(frame: pd.DataFrame, columns: int) -> tuple[list[tuple[str, pd.DataFrame]], int]:
    """A panel per model, state, task, corpus and column; of two or three corpora each a column."""
    where, several = ["corpus", "column"], frame.model.nunique() > 1
    panels = [
        (f"{_state_name(state, task)}\n{_place(model, *place, several)}", rows)
        for (model, state, task), part in frame.groupby(["model", "state", "task"], sort=False)
        for place, rows in part.groupby(where, sort=False)
    ]
    places = frame.groupby(where).ngroups
    whole = places in (2, 3) and len(panels) % places == 0
    return panels, places if whole else columns


def _damages(frame: pd.DataFrame) -> list[tuple[tuple, pd.DataFrame]]:
    """Rows by (side, level, kind, layers), bottom before top, by level."""

    def order(item):
        side, level, kind, layers = item[0]
        return SIDES.index(side) if side in SIDES else len(SIDES), level, kind != "reinit", layers

    return sorted(frame.groupby(list(_DAMAGE), sort=False), key=order)


def _state_rows(frame: pd.DataFrame, kinds: int) -> list[tuple[str, tuple[int, ...], pd.DataFrame]]:
    """Name, corrupted layers and rows of every state, in the order of the heat map."""
    rows = []
    for state in ("pretrained", "untrained"):
        found = frame[frame.state == state]
        if len(found):
            rows.append((_state_name(state, "none"), (), found))
    trained = frame[frame.state.isin(["intact", "broken", "healed"])]
    for task, part in trained.groupby("task", sort=False):
        intact = part[part.state == "intact"]
        if len(intact):
            rows.append((_state_name("intact", task), (), intact))
        for damage, harmed in _damages(part[part.state != "intact"]):
            for state in ("broken", "healed"):
                found = harmed[harmed.state == state]
                if len(found):
                    name = f"{_short(task)}, {state}, {_damage_name(*damage, kinds)}"
                    rows.append((name, damage[3], found))
    return rows


def _ranked(frame: pd.DataFrame) -> None:
    for which in dict.fromkeys(frame.which):
        choose(which, _RANKED, "choice of neurons")


# --- drawing ---------------------------------------------------------------------------------


def _title(axis: Axes, text: str) -> None:
    """The panel's title, long lines of it wrapped to the panel's width."""
    columns = axis.get_subplotspec().get_gridspec().ncols
    room = int((axis.get_figure().get_figwidth() / columns - 0.3) / 0.075)  # characters, bold
    axis.set_title("\n".join(x for line in text.split("\n") for x in textwrap.wrap(line, room)))


def _line(axis: Axes, part: pd.DataFrame, x: str, y: str, look: dict, band: bool) -> None:
    """The mean over seeds at each x, with its t-band."""
    line = _summary(part, x, y)
    if line.empty:
        return
    axis.plot(line.x, line["mean"], lw=1.4, ms=3.4, **look)
    if band and line.n.max() > 1:
        axis.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.14, lw=0)


def _looks(tasks: pd.Series) -> dict[str, dict]:
    """Colour, marker and dash of every task: by name, so the same in every figure of a study."""
    dashes = ("-", (0, (5, 1.2)), (0, (2, 1)))
    names = sorted(set(tasks) - {"none"}, key=str)
    return {
        name: {
            "color": _TASK_COLORS[i % 4],
            "marker": _MARKERS[i % 8],
            "ls": dashes[i // 4 % 3],
        }
        for i, name in enumerate(names)
    }


def _task_looks(frame: pd.DataFrame) -> dict[str, dict]:
    return _looks(frame[frame.state == "intact"].task)


def _state_looks(color: str) -> dict[str, dict]:
    return {
        "intact": {"color": COLORS["intact"], "marker": "o", "ls": "-"},
        "healed": {"color": color, "marker": "s", "ls": "-"},
        "broken": {"color": color, "marker": "x", "ls": (0, (2, 1.5))},
    }


def _layer_axis(axis: Axes, part: pd.DataFrame) -> None:
    layers = sorted(part.layer.unique())
    axis.set_xticks(layers[:: max(1, math.ceil(len(layers) / 7))])


def _share_axis(axis: Axes, shares: list[float]) -> None:
    """Shares in percent; logarithmic above zero where they span a factor of ten."""
    some = [share for share in shares if share > 0]
    if not some:
        return
    low, high = some[0], some[-1]
    logarithmic = high >= 10 * low
    if logarithmic:
        axis.set_xscale("symlog", linthresh=low, linscale=0.4)
        axis.set_xlim(-0.25 * low, 1.3 * high)
    ticks = [0.0] if 0 in shares else []
    for share in some:
        last = ticks[-1] if ticks else -high
        if share >= 3 * last if logarithmic else share - last >= 0.12 * high:
            ticks.append(share)
    _write_ticks(axis, ticks, _percent)


def _write_ticks(axis: Axes, ticks: Sequence[float], text: Callable[[float], str]) -> None:
    axis.set_xticks(ticks, [text(x) for x in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def _majority(axis: Axes, part: pd.DataFrame, value: str) -> None:
    if value == "accuracy":
        axis.axhline(part.majority.mean(), zorder=1, **_MAJORITY)


def _majority_handle(value: str) -> list:
    return [Line2D([], [], label="majority label", **_MAJORITY)] if value == "accuracy" else []


def _ranked_handles(frame: pd.DataFrame) -> list:
    return [Line2D([], [], **look) for which, look in _RANKED.items() if which in set(frame.which)]


def _grouped_legend(figure: Figure, *groups: Sequence) -> None:
    """A legend below, in as few rows as fit the figure's width; a group begins a column."""
    for rows in range(1, 1 + max(map(len, groups))):
        blank = Line2D([], [], ls="", label=" ")
        handles = [h for g in groups for h in [*g, *[blank] * (-len(g) % rows)]]
        # In inches: the handle with its space, and the longest label of the column.
        widths = [
            0.46 + 0.067 * max(len(h.get_label()) for h in handles[start : start + rows])
            for start in range(0, len(handles), rows)
        ]
        if sum(widths) <= figure.get_figwidth():
            break
    figure.legend(handles=handles, loc="outside lower center", ncols=len(widths))


def _runs(layers: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of every stretch of neighbouring layers: (0, 1, 4) gives (0, 1) and (4, 4)."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def _two_digits(table: pd.DataFrame) -> np.ndarray:
    """Two decimals without the leading zero; blank where there is no value."""

    def text(x: float) -> str:
        return "" if math.isnan(x) else f"{round(x, 2) + 0.0:.2f}".replace("0.", ".", 1)

    return np.vectorize(text, otypes=[str])(table.to_numpy(dtype=float))


# --- words of the figures --------------------------------------------------------------------


def _place(model: str, corpus: str, column: str, several: bool) -> str:
    return (f"{_short(model)}\n" if several else "") + f"{_short(corpus)} \N{MIDDLE DOT} {column}"


def _flat(title: str) -> str:
    return title.replace("\n", ", ")


def _state_name(state: str, task: str) -> str:
    if state == "intact":
        return f"{_short(task)}, fine-tuned"
    return {"pretrained": "pre-trained", "untrained": "random weights"}.get(state, state)


def _damage_name(side: str, level: float, kind: str, layers: tuple[int, ...], kinds: int) -> str:
    name = f"layers {', '.join(map(str, layers))}" if side == "custom" else _name(side, level)
    return name if kinds < 2 else f"{name}, {kind}"


def _percent(share: float) -> str:
    """Two significant digits of a share in percent, never as a power of ten."""
    return f"{float(f'{100 * share:.2g}'):g}"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _seeds(frame: pd.DataFrame, by: list[str], banded: bool = False) -> str:
    """The number of seeds behind a mean, as a range where they differ, and what the bands are."""
    where = [n for n in ("model", "corpus", "column") if n in frame]
    counts = frame.groupby([*where, *by]).seed.nunique()
    return f"n = {_range(counts)} seed{'' if counts.max() == 1 else 's'}{_bands(frame, banded)}"


def _who(frame: pd.DataFrame) -> str:
    """The models, and the number of words that their probes were scored on."""
    who = _models(list(dict.fromkeys(frame.model)))
    if "n_test" not in frame or frame.n_test.isna().all():
        return who
    return f"{who}, {_range(frame.n_test.dropna())} test words"


def _organism(frame: pd.DataFrame) -> str:
    return _organism_note(list(dict.fromkeys(frame.model)))


def _majority_note(value: str) -> str:
    return "Dotted: always the majority label." if value == "accuracy" else ""


def _spoken_ranks(part: pd.DataFrame, value: str) -> str:
    means = part.groupby("which")[value].mean()
    return ", ".join(
        f"{look['label']} {means[which]:.2f}" for which, look in _RANKED.items() if which in means
    )
