"""Figures of what layers and neurons know: before, after, broken and healed.

They take the tables of the stages `probing` and `neurons`, and draw as `figures` does. A `value` of
the probes is ``accuracy``, ``selectivity`` or ``cka``. Bottom and top always mean layers: neurons
are strongest, random or weakest.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.patches import Rectangle

from healing_utils.analysis.effects import means
from healing_utils.base.errors import choose
from healing_utils.report import plots
from healing_utils.report.plots import COLORS, DASH, DASH_DOT, DOTS, captioned

NAMES = {"accuracy": "accuracy", "selectivity": "selectivity", "cka": "linear CKA to intact"}
BEFORE = {"pretrained": "pre-trained", "untrained": "random weights"}
STATES = [*BEFORE, "intact", "broken", "healed"]
NETWORK = ["model", "task", "state", "seed", "place"]
POINT = ["model", "place", "seed", "layer"]  # what probes of several networks are compared at
RANKS = {
    "top": ("strongest", {"color": COLORS["intact"], "marker": "o"}),
    "random": ("random", {"color": COLORS["scratch"], "marker": "s", "ls": DASH}),
    "bottom": ("weakest", {"color": COLORS["scratch"], "marker": "v", "ls": DOTS}),
}


@captioned(plots.LAYER)
def layer_curves(probing: pd.DataFrame, value: str = "accuracy"):
    """What linear probes of each layer find before fine-tuning, and what fine-tuning on a task
    changes, paired by seed. Random weights: the untrained model, their floor."""
    choose(value, NAMES, "value of the probes")
    return _before_after(_cells(probing, value, [*BEFORE, "intact"]), value, NAMES[value])


@captioned(plots.LAYER)
def neuron_histogram(by_layer: pd.DataFrame):
    """In which layers the minimal neuron set lies before fine-tuning, and what fine-tuning on a
    task changes, paired by seed. It is the smallest number of strongest neurons whose own probe is
    within a fixed distance of the probe on all neurons."""
    cells = _cells(by_layer, "share", ["pretrained", "intact"])
    return _before_after(cells, "share", "share of set")


def _before_after(frame: pd.DataFrame, value: str, name: str, x: str = "layer"):
    """A row of panels for each place: before, and the change; or all as it is, where only the one
    or the other was probed."""
    before, after = frame[frame.state != "intact"], frame[frame.state == "intact"]
    known = before[before.network.isin(["pre-trained", "strongest"])]
    at = [*POINT[:-1], x]
    change = after.merge(known[[*at, value]], on=at, suffixes=("", "_before"))
    layout, names = {}, [name]
    if len(change):
        change[value] -= change[f"{value}_before"]
        before = before.merge(change[["model", "place"]].drop_duplicates()).assign(part="before")
        frame = pd.concat([before, change.assign(part="change by fine-tuning")])
        frame = frame.sort_values(["model", "place"], kind="stable")
        layout, names = {"columns": 2, "sharey": "col"}, [name, f"change in {name}"]
    frame = plots.titled(frame.assign(line=frame.network), "place", "model", "part")
    looks = {
        "pre-trained": {"color": COLORS["intact"], "marker": "o"},
        "random weights": {"color": COLORS["scratch"], "marker": "x", "ls": DASH_DOT},
        **dict(RANKS.values()),
        **plots.task_looks(after.network),
    }
    figure, _ = plots.curves(frame, x, value, looks, **layout)
    return figure, frame, names


@captioned(plots.LAYER)
def healed_curves(probing: pd.DataFrame, value: str = "accuracy", task: str | None = None):
    """What linear probes find less in broken models (corrupted, not trained again) and in healed
    ones (corrupted, then fine-tuned) than in the intact model of that task and seed."""
    if task is not None:
        known = probing.task[probing.state.isin(["broken", "healed"])].unique()
        probing = probing[probing.task == choose(task, known, "task with broken or healed cells")]
    frame = _cells(probing, value, STATES[2:])
    harmed = plots.usable(frame[frame.state != "intact"], value)
    if value != "cka":  # which compares with intact itself
        intact = frame.loc[frame.state == "intact", [*POINT, "task", value]]
        harmed = harmed.merge(intact, on=[*POINT, "task"], suffixes=("", "_intact"))
        harmed[value] -= harmed[f"{value}_intact"]
    frame = plots.usable(harmed, value).sort_values(["task", "place"], kind="stable")
    frame = plots.titled(frame, "damage", "place", "task", "model")
    frame["line"] = frame.side + ", " + frame.state
    looks = {
        f"{side}, {state}": {"color": COLORS[side], "marker": marker, "ls": dash}
        for side in frame.side.unique()
        for state, marker, dash in (("healed", "s", "-"), ("broken", "x", DOTS))
    }
    figure, drawn = plots.curves(frame, "layer", value, looks, _columns(frame.damage))
    for axis, rows in drawn:
        axis.axhline(value == "cka", color=COLORS["intact"], lw=1, zorder=1, label="intact")
        for layer in rows.layers.iloc[0]:  # whose output is that of the next number
            axis.axvspan(layer + 0.5, layer + 1.5, color=plots.PALE, lw=0, zorder=0)
    plots.key(figure, "corrupted layers", color=plots.PALE, lw=6)
    return figure, frame, NAMES[value] + ("" if value == "cka" else " minus intact")


@captioned(plots.LAYER)
def state_heatmap(probing: pd.DataFrame, value: str = "accuracy"):
    """What linear probes find by layer and state. Outlined: the corrupted layers."""
    frame = plots.titled(_cells(probing, value, STATES), "place", "model")
    figure, drawn = plots.heat_maps(frame, "network", "layer", value, NAMES[value])
    box = {"fill": False, "ec": "black", "lw": 1.2, "clip_on": False, "zorder": 3}
    for axis, rows in drawn:
        for y, layers in enumerate(rows.drop_duplicates("network").layers):
            for layer in layers:
                axis.add_patch(Rectangle((layer + 1, y), 1, 1, **box))
    figure.note = plots.seeds(frame.groupby(["panel", "network"]).seed.nunique())
    return figure, frame


@captioned("neurons kept (log scale)", "accuracy")
def accuracy_by_neurons(curve: pd.DataFrame):
    """Accuracy of linear probes that see only k of the neurons of all layers, trained again at
    every k: the strongest by rank, as many drawn at random, the weakest; and what fine-tuning on a
    task changes for its own strongest, paired by seed."""
    frame = _cells(curve, "accuracy", ["pretrained", "intact"])
    frame = frame[(frame.k > 0) & ((frame.state == "pretrained") | (frame.which == "top"))]
    ranks = frame.which.map({which: name for which, (name, _) in RANKS.items()})
    frame["network"] = frame.network.mask(frame.state == "pretrained", ranks)
    figure, frame, names = _before_after(frame, "accuracy", "accuracy", "k")
    for axis in figure.axes:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:,g}")
        axis.minorticks_off()
    return figure, frame, names


@captioned("neurons ablated (% of all)")
def ablation_curves(ablation: pd.DataFrame):
    """Score of the fine-tuned task when neurons are ablated, minus that of the same model with all
    of them: the strongest for the tags named in the panel's title, as many drawn at random, the
    weakest."""
    frame = _cells(ablation, "score", ["intact"])
    whole, ablated = frame[frame.k == 0], frame[frame.k > 0]
    starts = [whole.assign(which=which) for which in ablated.which.unique()]
    frame = pd.concat([*starts, ablated])
    frame = frame.merge(whole[[*NETWORK, "score"]], on=NETWORK, suffixes=("", "_whole"))
    frame = frame.assign(percent=100 * frame.share, change=frame.score - frame.score_whole)
    frame["line"] = frame.which.map({which: name for which, (name, _) in RANKS.items()})
    frame = plots.titled(frame.assign(title=frame.network + "\n" + frame.place), "title", "model")
    look = (dict(RANKS.values()), _columns(frame.place), 1.3)
    figure, drawn = plots.curves(frame, "percent", "change", *look, scores="y")
    for axis, _ in drawn:
        axis.axhline(0, color=plots.GREY, lw=1, zorder=1, label="nothing ablated")
    return figure, frame, "change in {}"


@captioned("loss: intact - healed")
def loss_against_loss(table: pd.DataFrame):
    """What is still lost after healing: of linguistic knowledge (accuracy of the corrupted
    layers) and of the task (its score)."""
    frame, _ = plots.sided(plots.usable(table, "task_loss").assign(state="healed"))
    losses = {"knowledge_loss": ("o", -0.16), "task_loss": ("s", 0.16)}
    parts = []
    for loss, (marker, dodge) in losses.items():
        part = frame.assign(loss=frame[loss], name=loss.replace("_", " "))
        by = ["model", "task", "side", "line", "color", "name"]
        parts.append(means(part, by, "loss").assign(marker=marker, dodge=dodge))
    shown = pd.concat(parts).assign(row=lambda table: table.line, filled=True)
    shown = plots.titled(shown, "task", "model")
    figure, drawn = plots.intervals(plots.usable(shown, "loss"), "loss", [0], each=0.36)
    for axis, _ in drawn:
        axis.axvline(0, color=COLORS["intact"], lw=1, label="intact")
    for loss, (marker, _) in losses.items():
        plots.key(figure, loss.replace("_", " "), marker=marker, ls="")
    figure.said = plots.means(shown, ["panel", "row", "name"], "loss", "z.3f")
    return figure, shown


def _cells(table: pd.DataFrame, value: str, states: list[str]) -> pd.DataFrame:
    """The usable rows of some states, in the order in which figures have them, with `place` (corpus
    and column), `damage` (where the layers were hit) and `network` (the model, in words)."""
    frame = plots.usable(table[table.state.isin(states)] if len(table) else table, value)
    frame = frame.assign(damage="", place=frame.corpus + " \N{MIDDLE DOT} " + frame["column"])
    harmed = frame.state.isin(["broken", "healed"])
    damage = pd.Series(map(plots.place, frame.side, frame.level, frame.layers), frame.index)
    damage += ", " + frame.kind if frame.kind[harmed].nunique() > 1 else ""
    frame["damage"] = damage.where(harmed, "")
    after = (frame.state + ", " + damage).where(harmed, "fine-tuned")
    frame["network"] = frame.state.map(BEFORE).fillna(frame.task + ", " + after)
    frame["task"] = frame.task.mask(frame.state.isin(BEFORE), "")
    orders = {"state": STATES, "side": list(COLORS)}
    by = ["model", "task", "side", "level", "kind", "state", "place"]
    return frame.sort_values(
        by, kind="stable", key=lambda c: c.map(orders[c.name].index) if c.name in orders else c
    )


def _columns(names: pd.Series) -> int:
    """As many columns of panels as there are names, where they fit."""
    return names.nunique() if 1 < names.nunique() < 5 else 3
