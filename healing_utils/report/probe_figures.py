"""Figures of what layers and neurons know: before, after, broken and healed.

They take the tables of the stages `probing` and `neurons`, of one or more models, corpora and tag
columns (a panel each), tasks and seeds, and draw as `figures` does. Bottom and top always mean
layers: neurons are strongest, random or weakest.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from healing_utils.analysis.effects import layer_tuple
from healing_utils.base.errors import HealingError, choose
from healing_utils.report import plots, words
from healing_utils.report.marked import word_activations
from healing_utils.report.plots import COLORS, DASH, DASH_DOT, DOTS, GREY, Look, finish, style

__all__ = ["ablation_curves", "accuracy_by_neurons", "healed_curves", "layer_curves",
           "loss_against_loss", "neuron_histogram", "state_heatmap",
           "word_activations"]  # fmt: skip
VALUES = {  # as an axis names them, and what the caption has to say of them
    "selectivity": (
        "selectivity",
        "Selectivity: accuracy less the accuracy on random labels per word type.",
    ),
    "accuracy": ("accuracy", "Dotted: always the majority label."),
    "cka": ("linear CKA to intact", "To the intact model of that task and seed; 1 = the same."),
}
LAYER = "layer (0: embeddings)"
BEFORE = {"pretrained": "pre-trained", "untrained": "random weights"}
STATES = [*BEFORE, "intact", "broken", "healed"]
CELL = "model task state seed corpus column"
RANKS = {"top": "strongest", "random": "random", "bottom": "weakest"}
RANKED: dict[str, Look] = {
    "strongest": {"color": "#009E73", "marker": "o"},
    "random": {"color": COLORS["scratch"], "marker": "s", "ls": DASH},
    "weakest": {"color": "#E69F00", "marker": "v", "ls": DOTS},
}


@style()
def layer_curves(probing: pd.DataFrame, value: str = "selectivity") -> Figure:
    """What each layer knows before and after fine-tuning: `value` (of `VALUES`) over layers, a line
    for the pre-trained model, for random weights and for the intact model of each task."""
    frame, name, meaning = _probes(probing, value, "layer", [*BEFORE, "intact"])
    frame = words.titled(frame.assign(line=frame.network), "place", "model")
    looks: dict[str, Look] = {
        "pre-trained": {"color": COLORS["intact"], "marker": "o"},
        "random weights": {"color": COLORS["scratch"], "marker": "x", "ls": DASH_DOT},
        **plots.task_looks(frame.network[frame.state == "intact"]),
    }
    figure, drawn = plots.curves(frame, "layer", value, looks)
    _majority(drawn, value)
    caption = f"""
        {name} of linear probes by layer before and after fine-tuning, {_tested(frame)}; mean over
        {words.bands(frame)}. {meaning}"""
    alt = f"Line chart of {name} by layer: {words.spoken(frame, 'layer', value)}."
    return finish(figure, caption, alt, LAYER, name)


@style()
def healed_curves(
    probing: pd.DataFrame, value: str = "selectivity", task: str | None = None
) -> Figure:
    """What each layer knows when intact, broken and healed, the corrupted layers shaded (output
    i + 1 is that of encoder layer i): a panel a corruption and corpus, of one task."""
    names = "layer side level kind layers"
    frame, name, meaning = _probes(probing, value, names, ["intact", "broken", "healed"])
    harmed = frame[frame.state != "intact"]
    tasks = list(dict.fromkeys(harmed.task))
    if not tasks:
        raise HealingError("no broken or healed cell: nothing to draw")
    if task is None and len(tasks) > 1:
        raise HealingError(f"broken and healed cells of {', '.join(tasks)}; name one task")
    task = choose(words.short(task or tasks[0]), tasks, "task with broken or healed cells")
    harmed = harmed[harmed.task == task].sort_values("place", kind="stable")
    spots = harmed[["model", "place", "damage", "side", "layers"]].drop_duplicates()
    intact = frame[(frame.state == "intact") & (frame.task == task)]
    intact = intact.drop(columns=["damage", "side", "layers"]).merge(spots)
    frame = words.titled(pd.concat([harmed, intact]), "damage", "place", "model")
    frame["line"] = frame.state.where(frame.state == "intact", frame.side + ", " + frame.state)
    looks: dict[str, Look] = {"intact": {"color": COLORS["intact"], "marker": "o"}}
    for side in frame.side.unique():
        looks[f"{side}, healed"] = {"color": COLORS[side], "marker": "s"}
        looks[f"{side}, broken"] = {"color": COLORS[side], "marker": "x", "ls": DOTS}
    figure, drawn = plots.curves(frame, "layer", value, looks, _columns(spots.damage))
    for axis, rows in drawn:
        for run in words.stretches(rows.layers.iloc[0]):
            axis.axvspan(run[0] + 0.5, run[-1] + 1.5, color=plots.PALE, lw=0, zorder=0)
    _majority(drawn, value)
    plots.key(figure, "corrupted layers", color=plots.PALE, lw=6)
    caption = f"""
        {name} of linear probes by layer, {_tested(frame)}, fine-tuned on {task}: intact, broken
        (corrupted, not trained again) and healed (corrupted, then fine-tuned), kind
        {", ".join(harmed.kind.unique())}. Shaded: the outputs of the corrupted layers. Mean over
        {words.bands(frame)}. {meaning} {words.demonstration(frame)}"""
    inside = [layer - 1 in hit for layer, hit in zip(frame.layer, frame.layers, strict=True)]
    said = words.means(frame[inside], ["panel", "state"], value)
    alt = f"Line chart of {name}, in the mean over the corrupted layers: {said}."
    return finish(figure, caption, alt, LAYER, name)


@style()
def state_heatmap(probing: pd.DataFrame, value: str = "selectivity") -> Figure:
    """Heat map of `value`, layers across and states down, the corrupted layers outlined: a panel a
    corpus (and model)."""
    frame, name, meaning = _probes(probing, value, "layer side level kind layers", STATES)
    frame = words.titled(frame, "place", "model")
    layers = range(int(frame.layer.max()) + 1)
    means = frame.groupby(["panel", "network", "layer"], sort=False)[value].mean()
    grids = [
        (title, means[title].unstack("layer").reindex(rows.network.unique(), columns=layers))
        for title, rows in frame.groupby("panel", sort=False)
    ]
    figure, axes = plots.heat_maps(grids, name)
    corrupted = frame.drop_duplicates("network").set_index("network").layers
    for axis, (_, grid) in zip(axes, grids, strict=True):
        for y, network in enumerate(grid.index):
            for run in words.stretches(corrupted[network]):
                box = {"fill": False, "ec": "black", "lw": 1.5, "clip_on": False, "zorder": 3}
                axis.add_patch(Rectangle((run[0] + 1, y), len(run), 1, **box))
    caption = f"""
        {name} of linear probes by layer and state, {_tested(frame)}; mean over
        {words.seeds(frame, "panel", "network")}. Outlined: the corrupted layers. {meaning}
        {words.demonstration(frame)}"""
    said = words.means(frame, ["panel", "network"], value)
    return finish(figure, caption, f"Heat map of {name}, means over the layers: {said}.", LAYER)


@style()
def neuron_histogram(by_layer: pd.DataFrame) -> Figure:
    """In which layers the minimal neuron set lies, before and after fine-tuning, of ``layer share``
    (of the set): bars are means over seeds, dots single seeds, triangles the mean layer."""
    frame = _cells(by_layer, "share", "layer", ["pretrained", "intact"])
    before, after = frame[frame.state == "pretrained"], frame[frame.state == "intact"]
    if len(after):  # what was before stands beside what each task made of it
        tasks = after[["model", "place", "task"]].drop_duplicates()
        before = before.drop(columns="task").merge(tasks)
    frame = words.titled(pd.concat([before, after]), "task", "place", "model")
    frame = frame.sort_values(["model", "place", "task"], kind="stable")
    colors = {task: look["color"] for task, look in plots.task_looks(after.task).items()}
    figure, drawn = plots.panels(frame, 2.0, _columns(after.task))
    said = []
    for axis, rows in drawn:
        palette = ["#9A9A9A", colors.get(rows.task.iloc[0], GREY)]
        both = {"data": rows, "x": "layer", "y": "share", "hue": "state", "ax": axis}
        both |= {"hue_order": ["pretrained", "intact"], "native_scale": True, "legend": False}
        sns.barplot(**both, palette=palette, errorbar=None, saturation=1)
        if rows.seed.nunique() > 1:
            sns.stripplot(**both, palette=["#222222"] * 2, dodge=True, jitter=False, size=2)
        axis.set(xlabel="", ylabel="")
        plots.whole_numbers(axis)
        for state, of_state in rows.groupby("state", sort=False):
            mean = of_state.groupby("layer").share.mean()
            middle = (mean.index * mean).sum() / mean.sum()
            look = {"color": GREY if state == "pretrained" else palette[1], "marker": "v", "ms": 5}
            plots.points(axis, [middle], [0.96], transform=axis.get_xaxis_transform(), **look)
            most = f"{100 * mean.max():.0f} % in layer {mean.idxmax()}"
            where = rows.panel.iloc[0].replace("\n", ", ")
            said.append(f"{where}, {state}: mean layer {middle:.1f}, {most}")
    figure.axes[0].set_ylim(0, 1.16 * frame.share.max())  # room for the triangles
    for label, color in {"pre-trained": "#9A9A9A", **colors}.items():
        plots.key(figure, label, color=color, lw=6)
    plots.key(figure, "mean layer", marker="v", ls="", ms=5)
    caption = f"""
        Share of the minimal neuron set by layer, before and after fine-tuning, {_tested(frame)}:
        mean over {words.seeds(frame, "panel", "state")}; dots are single seeds, triangles the set's
        mean layer. The minimal set is the smallest number of strongest neurons whose own probe is
        within a fixed distance of the probe on all neurons."""
    alt = f"Bar chart of the minimal set by layer: {'; '.join(said)}."
    return finish(figure, caption, alt, LAYER, "share of minimal set")


@style()
def accuracy_by_neurons(curve: pd.DataFrame) -> Figure:
    """Accuracy of probes on k neurons only, of ``k share which accuracy``: the strongest (`which`
    is top), random ones, and the weakest (bottom). A panel a network and corpus."""
    frame = _cells(curve, "accuracy", "k which share", ["pretrained", "intact"])
    frame, figure, drawn = _ranked(frame[frame.k > 0], "k", "accuracy")
    for axis, rows in drawn:
        axis.set_xscale("log")
        ends = sorted({rows.k.min(), rows.k.max()})
        tens = [10**i for i in range(9) if ends[0] <= 10**i <= ends[-1]]
        _ticks(axis, tens if len(tens) > 1 else ends)
    caption = f"""
        Accuracy of linear probes that see only k of the
        {words.span((frame.k / frame.share).round())} neurons of all layers, trained again at every
        k, {_tested(frame)}: the strongest by rank, as many drawn at random, the weakest. Mean over
        {words.bands(frame)}."""
    alt = f"Line chart of accuracy by neurons kept: {words.spoken(frame, 'k', 'accuracy')}."
    return finish(figure, caption, alt, "neurons kept (log scale)", "accuracy")


@style()
def ablation_curves(ablation: pd.DataFrame) -> Figure:
    """The task's score when the strongest, random or weakest neurons are ablated, of ``k share
    which score metric``; every curve starts from k = 0. A panel a task and corpus."""
    frame = _cells(ablation, "score", "k which share metric", ["intact"])
    frame = frame.assign(percent=100 * frame.share)
    whole, ablated = frame[frame.k == 0], frame[frame.k > 0]
    starts = [whole.assign(which=which) for which in ablated.which.unique()]
    frame, figure, drawn = _ranked(pd.concat([*starts, ablated]), "percent", "score")
    for axis, rows in drawn:
        look = {"color": COLORS["intact"], "lw": 1, "zorder": 1, "label": "nothing ablated"}
        axis.axhline(rows.score[rows.k == 0].mean(), **look)
        some = sorted(set(rows.percent[rows.percent > 0]))
        if some[-1] >= 10 * some[0]:
            axis.set_xscale("symlog", linthresh=some[0], linscale=0.4)
            axis.set_xlim(-0.25 * some[0], 1.3 * some[-1])
        _ticks(axis, [0.0, *some])
    metrics = {words.metric(metric) for metric in frame.metric.dropna()}
    caption = f"""
        Score of the fine-tuned task when neurons are ablated, {_tested(frame)}: the strongest for
        the tags named in the panel's title, as many drawn at random, the weakest. Mean over
        {words.bands(frame)}. Metric: {words.metrics(frame)}."""
    said = words.spoken(frame, "percent", "score", " %")
    alt = f"Line chart of task score by share of neurons ablated: {said}."
    name = metrics.pop() if len(metrics) == 1 else "score"
    return finish(figure, caption, alt, "neurons ablated (% of all)", name)


@style()
def loss_against_loss(table: pd.DataFrame) -> Figure:
    """What healing leaves lost: of the task's score against linguistic knowledge, of ``task side
    level seed task_loss knowledge_loss`` (intact - healed); large marks are means over seeds."""
    cell = "model task side level seed"
    frame = words.usable(table, "task_loss", f"{cell} knowledge_loss", cell)
    frame = frame.dropna(subset="knowledge_loss")
    frame = words.titled(frame.assign(level=frame.level.round(6), all=""), "all", "model")
    figure, drawn = plots.panels(frame, 3.0)
    losses = frame[["knowledge_loss", "task_loss"]].stack()
    low, high = min(0.0, losses.min()), max(0.0, losses.max())
    ends = np.array([low, high]) + 0.06 * (high - low or 1) * np.array([-1, 1])
    shades, looks = plots.side_shades(frame), plots.task_looks(frame.task)
    for axis, rows in drawn:
        axis.axhline(0, color=GREY, lw=0.8, zorder=1)
        axis.axvline(0, color=GREY, lw=0.8, zorder=1)
        axis.plot(ends, ends, color=GREY, lw=1, ls=":", zorder=1, label="equal losses")
        for (side, level, task), dots in rows.groupby(["side", "level", "task"], sort=False):
            look = {"marker": looks[task]["marker"], "color": shades[side, level], "zorder": 3}
            x, y = dots.knowledge_loss, dots.task_loss
            plots.points(axis, x, y, ms=3, alpha=0.8, mew=0, **look)
            plots.points(axis, [x.mean()], [y.mean()], ms=6.5, mec="black", mew=0.7, **look)
        axis.set(xlim=ends, ylim=ends, aspect="equal")
    for task, look in looks.items():
        plots.key(figure, task, marker=look["marker"], ls="", ms=5)
    for place, color in shades.items():
        plots.key(figure, words.place(*place), color=color, lw=6)
    caption = f"""
        What is still lost after healing (intact - healed), of the task's score and of linguistic
        knowledge (selectivity of linear probes), {words.models(frame)}; small marks: single seeds,
        large ones: means over {words.seeds(frame, "panel", "task", "side", "level")}. Below the
        dotted diagonal more selectivity than score is still lost: a guide for the eye, not a test.
        Colour: the corrupted side and share of layers; mark: the task.
        {words.demonstration(frame)}"""
    frame["where"] = list(map(words.place, frame.side, frame.level))
    said = [
        words.means(frame, ["panel", "task", "where"], loss, ".3f")
        for loss in losses.index.levels[1]
    ]
    alt = (
        f"Scatter plot of mean losses after healing, linguistic: {said[0]}; of the task: {said[1]}."
    )
    return finish(figure, caption, alt, "linguistic loss (selectivity)", "task loss (score)")


# --- what these figures share ----------------------------------------------------------------


def _cells(table: pd.DataFrame, value: str, names: str, states: list[str]) -> pd.DataFrame:
    """The usable rows of some states, in the order in which figures have them, with `place` (corpus
    and column), `damage` (where the layers were hit) and `network` (the model, in words)."""
    if "layers" in table:
        table = table.assign(layers=table.layers.map(layer_tuple))
    if "state" in table:
        table = table[table.state.isin(states)]
    frame = words.usable(table, value, f"{CELL} {names}", f"{CELL} {names}")
    harmed = frame.state.isin(["broken", "healed"])
    several = "kind" in frame and frame.kind[harmed].nunique() > 1
    damages, networks = [], []
    for cell in frame.itertuples():
        damage = ""
        if cell.state in ("broken", "healed"):
            chosen = f"layers {', '.join(map(str, cell.layers))}"
            damage = chosen if cell.side == "custom" else words.place(cell.side, cell.level)
            damage += f", {cell.kind}" if several else ""
        after = f"{cell.state}, {damage}" if damage else "fine-tuned"
        networks.append(BEFORE.get(cell.state, f"{cell.task}, {after}"))
        damages.append(damage)
    frame = frame.assign(
        damage=damages,
        network=networks,
        place=frame.corpus + " \N{MIDDLE DOT} " + frame["column"],
        task=frame.task.mask(frame.state.isin([*BEFORE]), ""),
    )
    orders = {"state": STATES, "side": ["none", *COLORS]}
    by = [n for n in ("model", "task", "side", "level", "kind", "state", "place") if n in frame]
    return frame.sort_values(
        by, kind="stable", key=lambda c: c.map(orders[c.name].index) if c.name in orders else c
    )


def _probes(probing: pd.DataFrame, value: str, names: str, states: list[str]):
    """Those cells, the value's name and what it means."""
    name, meaning = VALUES[choose(value, VALUES, "value of the probes")]
    names = f"{names} majority" if value == "accuracy" else names
    return _cells(probing, value, names, states), name, meaning


def _ranked(frame: pd.DataFrame, x: str, y: str):
    """Curves of the strongest, random and weakest neurons, a panel a network and place."""
    for which in frame.which.unique():
        choose(which, RANKS, "choice of neurons")
    frame = frame.assign(line=frame.which.map(RANKS), title=frame.network + "\n" + frame.place)
    frame = words.titled(frame, "title", "model")
    return frame, *plots.curves(frame, x, y, RANKED, _columns(frame.place))


def _columns(names: pd.Series) -> int:
    """As many columns of panels as there are names, where they fit."""
    return names.nunique() if 1 < names.nunique() < 5 else 3


def _ticks(axis, ticks) -> None:
    """Written out: the exponents of powers would be too small to read."""
    axis.set_xticks(ticks, list(map(words.number, ticks)))
    axis.minorticks_off()


def _majority(drawn: plots.Panels, value: str) -> None:
    for axis, rows in drawn if value == "accuracy" else []:
        look = {"color": GREY, "ls": ":", "lw": 1, "zorder": 1, "label": "majority label"}
        axis.axhline(rows.majority.mean(), **look)


def _tested(frame: pd.DataFrame) -> str:
    """The models and corpora, and the number of words that the probes were scored on."""
    where = f"{words.models(frame)} on {' and '.join(frame.place.unique())}"
    return f"{where}, {words.span(frame.n_test)} test words" if "n_test" in frame else where
