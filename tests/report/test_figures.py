"""Figures: what they draw, what they say, and that they can be read."""

import functools
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from healing_utils.analysis import harm, price
from healing_utils.analysis.claims import COLUMNS
from healing_utils.analysis.effects import t_interval
from healing_utils.analysis.results import load_curves
from healing_utils.base.errors import HealingError
from healing_utils.report import figures, harm_figures, plots
from healing_utils.report import probe_figures as pf

QUICK = Path(__file__).resolve().parents[2] / "data" / "results" / "quick"
LEVELS = {1 / 6: 1, 0.5: 3, 1.0: 6}
PLACES = (("conll2000", "chunk"), ("en_ewt", "upos"))
HALVES = {"bottom": (0, 1, 2), "top": (3, 4, 5)}
KNOWN = {"pretrained": 0.5, "untrained": 0.1, "intact": 0.4, "broken": 0.05, "healed": 0.25}
SIZES = (1, 10, 100, 1000, 2688)
LESS = {"top": 0.3, "random": 0.5, "bottom": 0.6}


def results(tasks=("sst2",), seeds=(0, 1, 2), model="lab/tiny", init=True, chance=0.5):
    """A study in which bottom half retains 0.8, top half 0.95, all layers 0.75 of the intact."""
    retained = {("bottom", 1 / 6): 0.9, ("bottom", 0.5): 0.8, ("top", 1 / 6): 0.97}
    retained |= {("top", 0.5): 0.95, ("all", 1.0): 0.75}
    rows = []
    for task in tasks:
        for seed in seeds:
            base = 0.9 + 0.002 * seed
            made = [("intact", "none", 0.0, "none", base), ("scratch", "all", 1.0, "scratch", 0.6),
                    ("untrained", "all", 1.0, "scratch", 0.51)]  # fmt: skip
            for (side, level), share in retained.items():
                made.append(("healed", side, level, "reinit", base * share + 0.001 * (seed - 1)))
                made.append(("broken", side, level, "reinit", 0.55))
                if init and level == 0.5:
                    made.append(("healed", side, level, "init", base * (share + 0.03)))
            for state, side, level, kind, score in made:
                rows.append(
                    dict(model=model, task=task, seed=seed, metric="f1", chance=chance, kind=kind,
                         part="none" if state == "intact" else "all", test_size=400, state=state,
                         side=side, level=level, score=score, strength=math.nan,
                         layers=tuple(range(LEVELS.get(level, 0))))
                )  # fmt: skip
    return pd.DataFrame(rows)


def grid(**columns):
    """A row for each combination of the lists among the columns."""
    lists = [value if isinstance(value, list) else [value] for value in columns.values()]
    return pd.DataFrame(itertools.product(*lists), columns=list(columns))


def similarities(harms=("reinit",)):
    table = grid(
        model="lab/tiny", task="sst2", state="broken", layer=[*range(7)], seed=[0, 1],
        side=["bottom", "top"], harm=[*harms], level=0.5, kind="reinit", measure="cka",
    )  # fmt: skip
    return table.assign(
        similarity=1 - 0.1 * table.layer * table.side.map({"bottom": 1.5, "top": 0.2})
    )


def curves():
    table = grid(model="lab/tiny", task="sst2", state=["intact", "healed"], seed=[0, 1],
                 step=[0, 10, 20])  # fmt: skip
    intact = table.state == "intact"
    score = 0.5 + table.step * np.where(intact, 0.02, 0.01) + 0.01 * table.seed
    words = {"side": ("none", "bottom"), "level": (0.0, 0.5), "kind": ("none", "reinit")}
    words = {name: np.where(intact, *pair) for name, pair in words.items()}
    return table.assign(score=score, **words)


def report():
    table = grid(layer=[0, 1], role=["query", "feed_forward"], end=["weight", "bias"], elements=100)
    weight = table.end == "weight"
    width = table.role.map({"query": 0.04, "feed_forward": 0.05})
    name = table.layer.astype(str) + "." + table.role + "." + table.end
    after = np.where(weight, 0.177, 0.0)
    return table.assign(name=name, std_before=width.where(weight, 0.02), std_after=after)


def networks(tasks, states, seeds, model):
    """The cells of networks, of both corpora, with the layers that were hit."""
    found = [(s, "none", "none") for s in states if s in ("pretrained", "untrained")]
    found += [("intact", task, "none") for task in tasks if "intact" in states]
    found += [(s, tasks[0], side) for side in HALVES for s in states if s in ("broken", "healed")]
    for corpus, column in PLACES:
        for state, task, side in found:
            for seed in seeds:
                yield dict(model=model, task=task, state=state, side=side, seed=seed,
                           level=0.0 if side == "none" else 0.5, layers=HALVES.get(side, ()),
                           kind="none" if side == "none" else "reinit", corpus=corpus,
                           column=column)  # fmt: skip


def known(state, layer, seed):
    """What is drawn: falls by a hundredth a layer, and differs between seeds."""
    return KNOWN[state] - 0.01 * layer + 0.005 * (seed - 1) * (1 + layer % 2)


def probing(tasks=("sst2",), seeds=(0, 1, 2), model="lab/tiny", n=6):
    cells = pd.DataFrame(networks(tasks, KNOWN, seeds, model))
    table = cells.merge(grid(layer=[*range(n + 1)], majority=0.3, n_test=1200), how="cross")
    found = [known(*row) for row in table[["state", "layer", "seed"]].to_numpy()]
    return table.assign(accuracy=found, cka=found, selectivity=np.subtract(found, 0.2))


def minimal(tasks=("sst2", "rte"), seeds=(0, 1, 2)):
    """Before: the same share in every layer. After: all of it in the lower half."""
    rows = []
    for cell in networks(tasks, ("pretrained", "intact"), seeds, "lab/tiny"):
        moved = 0.02 * cell["seed"]
        after = [0.2 + moved, 0.4 - moved, 0.4, 0, 0, 0, 0]
        shares = after if cell["state"] == "intact" else [1 / 7] * 7
        rows += [cell | dict(layer=layer, share=share) for layer, share in enumerate(shares)]
    return pd.DataFrame(rows)


def neurons(cells, sizes=SIZES):
    """Of networks at numbers of neurons, with how much less than the strongest others hold."""
    table = pd.DataFrame(cells).merge(grid(k=[*sizes], which=[*LESS]), how="cross")
    return table.assign(share=table.k / 2688, less=table.which.map(LESS))


def curve(tasks=("sst2",), seeds=(0, 1, 2)):
    table = neurons(networks(tasks, ("pretrained", "intact"), seeds, "lab/tiny"))
    return table.assign(accuracy=0.9 - table.less * (1 - table.share))


def ablation(tasks=("sst2", "cola"), seeds=(0, 1, 2)):
    table = neurons(networks(tasks, ("intact",), seeds, "lab/tiny"), (0, *SIZES[1:]))
    table = table[(table.k > 0) | (table.which == "top")]
    score = 0.8 - (1.1 - table.less) * table.share**0.5 + 0.01 * table.seed
    metric = table.task.map({"cola": "matthews"}).fillna("f1")
    return table.assign(score=score, metric=metric)


def losses(tasks=("sst2", "rte")):
    table = grid(model="lab/tiny", task=[*tasks], side=["bottom", "top"], level=[1 / 6, 0.5],
                 seed=[0, 1, 2], kind="reinit")  # fmt: skip
    lost = table.side.map({"bottom": 0.2, "top": 0.05}) * table.level
    task_loss = lost + 0.01 * table.seed + 0.02 * (table.task == "rte")
    return table.assign(task_loss=task_loss, knowledge_loss=2 * lost - 0.01 * table.seed)


def claims(model="lab/tiny"):
    """A row that holds, one that fails, and one that nothing was made for."""
    made = [("A1", 0.15, "holds"), ("A3", -0.05, "fails"), ("B1", math.nan, "not tested")]
    rows = [
        dict(claim=name, statement=f"{name} is so", model=model, variant="reinit", effect=effect,
             low=effect - 0.02, high=effect + 0.02, n=6, p=1 / 64, p_corrected=3 / 64, margin=0.01,
             unit="points", primary=True, verdict=verdict,
             evidence="demonstration, never evidence" if "organism" in model else "")
        for name, effect, verdict in made
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


@functools.cache
def shipped(table):
    """A table of `harm` from the shipped records of the organism."""
    return harm.gather(QUICK) if table == "cells" else getattr(harm, table)(shipped("cells"))


STUDY = results(("sst2", "imdb"))
LONG = ("twitter-financial-news-topic", "sst2", "dbpedia_14", "stsb")
DRAWN = {
    "recovery": lambda: figures.recovery_curves(STUDY),
    "scores": lambda: figures.score_points(STUDY),
    "claims": lambda: figures.claims_figure(claims()),
    "weights": lambda: figures.weight_change(report(), model="lab/tiny"),
    "similarity": lambda: figures.similarity(similarities()),
    "learning": lambda: figures.learning_curves(curves()),
    "layers": lambda: pf.layer_curves(probing(LONG)),
    "healed": lambda: pf.healed_curves(probing(LONG)),
    "states": lambda: pf.state_heatmap(probing(LONG)),
    "states, deep": lambda: pf.state_heatmap(probing(n=24), value="accuracy"),
    "neurons": lambda: pf.neuron_histogram(minimal(("sst2", "rte", "cola", "stsb"))),
    "by neurons": lambda: pf.accuracy_by_neurons(curve(LONG)),
    "ablation": lambda: pf.ablation_curves(ablation(LONG)),
    "losses": lambda: pf.loss_against_loss(losses(LONG)),
    "vulnerability": lambda: harm_figures.vulnerability_map(shipped("vulnerability")),
    "harm, similarity": lambda: harm_figures.harm_similarity(similarities(("reinit", "noise=1"))),
    "harms": lambda: harm_figures.harm_curves(shipped("by_harm")),
    "league": lambda: harm_figures.league_figure(shipped("league")),
    "price": lambda: harm_figures.price_curves(shipped("cells")),
    "healing": lambda: harm_figures.healing_over_time(load_curves(QUICK, scans=True)),
    "needed": lambda: harm_figures.needed_figure(price.time_to_heal(load_curves(QUICK))),
    "examples": lambda: harm_figures.needed_figure(price.price(shipped("cells"))),
}


def written(figure):
    """What is written, with the place where it is; labels of ticks outside a panel are not."""
    outside = set()
    for axis in (x for panel in figure.axes for x in (panel.xaxis, panel.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                outside |= {tick.label1, tick.label2}
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return {t: t.get_window_extent().padded(-1) for t in found if t not in outside}


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_says_what_it_shows_and_can_be_read(name):
    figure = DRAWN[name]()
    assert re.search("Model: (tiny|organism)", figure.caption)
    assert figure.caption[0].isupper()
    assert re.search(r"\d", figure.alt) and not re.search(r"\bnan\b", figure.alt)
    assert name == "weights" or re.search(r"n = \d", figure.caption)
    assert " ," not in figure.caption + figure.alt and " ." not in figure.caption
    assert figure.get_figwidth() <= plots.PAGE
    with plots.style():  # as it is saved
        figure.draw_without_rendering()
        texts = written(figure)
    assert len(texts) > 8 and all(t.get_fontsize() >= 8 for t in texts)
    upon = [
        (a, b) for i, a in enumerate(texts) for b in [*texts][:i] if texts[a].overlaps(texts[b])
    ]
    assert upon == []
    width, height = figure.bbox.size
    for at in texts.values():
        assert at.x0 >= 0 and at.y0 >= 0 and at.x1 <= width and at.y1 <= height
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def titled(figure, title):
    """The one panel of that title."""
    (found,) = [a for a in figure.axes if a.get_title(loc="left").replace("\n", ", ") == title]
    return found


def line(axis, color, style="-", thick=True):
    """x and y of the mean of a colour and dash, or of the first seed."""
    found = [
        x for x in axis.get_lines()
        if to_hex(x.get_color()) == color.lower() and x.get_linestyle() == style
        and len(set(x.get_xdata())) > 2 and (x.get_linewidth() > 1) == thick
    ]  # fmt: skip
    return found[0].get_xdata(), found[0].get_ydata()


def band(axis, color, at):
    """The limits of the band of a colour at one x."""
    found = [c for c in axis.collections if color.lower() in map(to_hex, c.get_facecolor())]
    points = np.concatenate([c.get_paths()[0].vertices for c in found])
    heights = points[np.isclose(points[:, 0], at), 1]
    return heights.min(), heights.max()


def labels(figure):
    return [t.get_text() for t in figure.legends[0].get_texts()]


def marks(axis):
    """(x, marker) of everything that is drawn as marks alone."""
    found = [x for x in axis.get_lines() if x.get_linestyle() == "None"]
    return [(v, x.get_marker()) for x in found for v in x.get_xdata()]


@pytest.mark.parametrize("seeds", [(0, 1, 2), (0, 1, 2, 3)])
def test_recovery_curves_draw_retained_scores_of_seeds(seeds):
    figure = figures.recovery_curves(results(seeds=seeds))
    (axis,) = figure.axes
    for side, shares in (("bottom", [1, 0.9, 0.8, 0.75]), ("top", [1, 0.97, 0.95, 0.75])):
        x, y = line(axis, plots.COLORS[side])
        assert x == pytest.approx([0, 1 / 6, 0.5, 1], abs=1e-5)
        assert y == pytest.approx(shares, abs=2e-3)
    single = [0.8 + 0.001 * (seed - 1) / (0.9 + 0.002 * seed) for seed in seeds]
    if len(seeds) > 3:
        (axis,) = figures.recovery_curves(results(seeds=seeds, init=False)).axes
        expected = t_interval(single)
        assert band(axis, plots.COLORS["bottom"], 0.5) == pytest.approx(expected[1:3])
        assert "n = 4 seeds; bands: 95 % t-intervals" in figure.caption
    else:
        assert line(axis, plots.COLORS["bottom"], thick=False)[1][2] == pytest.approx(single[0])
        assert figure.legends[0].get_title().get_text() in figure.caption
        assert "n = 3 seeds; thin lines: single seeds" in figure.caption
    ticks = [t.get_text() for t in axis.get_xticklabels()]
    assert ticks == ["0\n0", "1/6\n1", "1/2\n3", "1\n6"]
    assert "sst2, bottom layers: 1.00 at 0 to 0.75 at 1" in figure.alt
    shown = {"bottom layers, init", "top layers, broken", "scratch", "chance", "intact"}
    assert shown <= set(labels(figure)) and "metric: macro-F1" in figure.caption


def test_recovery_of_chosen_layers_of_init_alone_and_without_scratch():
    table = results(init=False).query("state in ['intact', 'healed'] and side != 'all'")
    chosen = table.assign(side=table.side.replace("bottom", "custom"))
    figure = figures.recovery_curves(chosen)
    assert set(labels(figure)) == {"custom layers", "top layers", "intact", "chance"}
    alone = figures.recovery_curves(table.assign(kind=table.kind.replace("reinit", "init")))
    assert "bottom layers, init: 1.00 at 0 to 0.80 at 0.5" in alone.alt


def test_scores_of_another_metric_have_an_axis_of_their_own():
    table = results(("cola", "sst2", "emotion"))
    cola = table.task == "cola"
    table = table.assign(metric=np.where(cola, "matthews", "f1"), chance=np.where(cola, 0.0, 0.4))
    table["score"] = table.score * np.where(cola, 0.2, 1)
    axes = figures.score_points(table).axes
    names = ["Matthews correlation", "macro-F1", "macro-F1"]
    assert [axis.get_xlabel() for axis in axes] == names
    limits = [axis.get_xlim() for axis in axes]
    assert limits[1] == limits[2] and limits[1][0] > 0.3 and limits[0][1] < 0.3
    told = curves().assign(side=lambda t: t.side.replace("none", "top"))
    told = pd.concat(
        [told.assign(task=name, metric=part.metric.iloc[0]) for name, part in table.groupby("task")]
    )
    told["score"] *= np.where(told.task == "cola", 0.2, 1)
    axes = figures.learning_curves(told).axes
    assert [axis.get_ylabel() for axis in axes] == [f"held-out {name}" for name in names]
    assert axes[0].get_ylim()[1] < 0.3 and axes[1].get_ylim() == axes[2].get_ylim()


def test_score_points_hold_every_score_of_every_state():
    table = results()
    (axis,) = figures.score_points(table).axes
    assert sorted(x for x, _ in marks(axis)) == pytest.approx(sorted(table.score))
    assert axis.get_xlabel() == "macro-F1"
    names = [t.get_text() for t in axis.get_yticklabels()]
    assert names == ["intact", "scratch", "untrained", "bottom 1/6", "bottom 1/2",
                     "bottom 1/2, init", "top 1/6", "top 1/2", "top 1/2, init", "all layers"
                     ]  # fmt: skip
    broken = [x for x, marker in marks(axis) if marker == "x"]
    assert broken == pytest.approx(table[table.state == "broken"].score.tolist())


def test_claims_figure_tells_verdicts_in_words_and_leaves_out_what_has_no_estimate():
    figure = figures.claims_figure(claims())
    (axis,) = figure.axes
    assert len(axis.get_yticks()) == 2
    assert any(t.get_text().startswith("holds, p = 0.047\nn = 6") for t in axis.texts)
    assert "B1 (reinit) not tested, no estimate" in figure.alt
    figure = figures.claims_figure(claims().assign(margin=[0.01, 0.05, 0.02]))
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2, 10]  # points, to both sides


def test_weight_change_separates_weights_from_biases_and_pools_by_variance():
    second = report().query("name == '0.feed_forward.weight'")
    table = pd.concat([report(), second.assign(std_before=0.01, elements=300)])
    figure = figures.weight_change(table, model="lab/tiny")
    before, after = (a.collections[0].get_array().reshape(4, 2) for a in figure.axes[:2])
    roles = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert roles == ["query weight", "query bias", "feed forward weight", "feed forward bias"]
    pooled = math.sqrt((100 * 0.05**2 + 300 * 0.01**2) / 400)
    assert before[2, 0] == pytest.approx(pooled) and before[2, 1] == pytest.approx(0.05)
    assert after[3, 0] == 0
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1", "2"]


UPOS, CHUNK = "en_ewt · upos", "conll2000 · chunk"
BEFORE, CHANGE = f"{UPOS}, before", f"{UPOS}, change by fine-tuning"
BLACK, ORANGE, GREEN = plots.COLORS["intact"], "#E69F00", "#009E73"
TWO = ("sst2", "rte")
FLOOR = similarities().query("side == 'top'").assign(state="untrained", kind="scratch")
MOVED = np.array([0.22, 0.38, 0.4, 0, 0, 0, 0]) - 1 / 7
CURVE = curve().query("which == 'top'").groupby("k").accuracy.mean()
ABLATED = np.array([0, *SIZES[1:]]) / 2688
# A figure, the title of a panel (or its only one), a curve's colour and dash, x and y, and words.
LINES = {
    "similarity": (lambda: figures.similarity(pd.concat([similarities(), FLOOR])), "",
                   plots.COLORS["bottom"], "-", range(7), 1 - 0.15 * np.arange(7), "untrained"),
    "learning": (lambda: figures.learning_curves(curves()), "", BLACK, "-", [0, 10, 20],
                 [0.505, 0.705, 0.905], "intact: 0.51 at 0"),
    "before": (lambda: pf.layer_curves(probing(TWO)), BEFORE, BLACK, "-", range(7),
               [known("pretrained", k, 1) for k in range(7)],
               f"{UPOS} before, pre-trained: 0.50 at 0 to 0.44 at 6"),
    "change": (lambda: pf.layer_curves(probing(TWO)), CHANGE, ORANGE, "-", range(7), [-0.1] * 7,
               "change"),
    "after alone": (lambda: pf.layer_curves(probing(TWO).query("state == 'intact'")), UPOS, ORANGE,
                    "-", range(7), [known("intact", k, 1) for k in range(7)], "sst2, fine-tuned"),
    "set before": (lambda: pf.neuron_histogram(minimal()), BEFORE, BLACK, "-", range(7),
                   [1 / 7] * 7, "pre-trained"),
    "set moves": (lambda: pf.neuron_histogram(minimal()), CHANGE, GREEN, "-", range(7), MOVED,
                  "rte, fine-tuned"),
    "neurons": (lambda: pf.accuracy_by_neurons(curve()), BEFORE, BLACK, "-", SIZES, CURVE,
                "strongest"),
    "neurons change": (lambda: pf.accuracy_by_neurons(curve()), CHANGE, GREEN, "-", SIZES, [0] * 5,
                       "sst2, fine-tuned"),
    "ablation": (lambda: pf.ablation_curves(ablation()), f"cola, fine-tuned, {CHUNK}", BLACK, "-",
                 100 * ABLATED, -0.8 * np.sqrt(ABLATED), "strongest: 0.00 at 0 to -0.80 at 100"),
    **{
        f"{state}, {side}": (
            lambda: pf.healed_curves(probing(TWO), task="sst2"), f"{side} 1/2, {UPOS}",
            plots.COLORS[side], dash, range(7), [KNOWN[state] - KNOWN["intact"]] * 7,
            f"{UPOS}, bottom, healed: -0.15 at 0 to -0.15 at 6",
        ) for side in HALVES for state, dash in (("healed", "-"), ("broken", "--"))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_curve_is_drawn_where_its_mean_is(name):
    draw, title, color, dash, x, y, words = LINES[name]
    figure = draw()
    drawn = line(titled(figure, title) if title else figure.axes[0], color, dash)
    assert drawn[0] == pytest.approx(list(x)) and drawn[1] == pytest.approx(list(y))
    assert words in figure.alt


def test_one_seed_has_no_lines_of_its_own_and_unequal_seeds_are_told():
    figure = pf.layer_curves(probing(seeds=(4,)))
    assert all(x.get_linewidth() > 0.7 for x in figure.axes[0].get_lines())
    assert "n = 1 seed." in figure.caption and "thin" not in figure.caption
    table = probing()
    fewer = table[(table.state != "pretrained") | (table.seed == 0)]
    assert "mean of n = 1 to 3 seeds; thin lines" in pf.layer_curves(fewer).caption


def test_healed_curves_shade_the_corrupted_layers():
    table = probing(TWO)
    figure = pf.healed_curves(table, task="sst2")
    assert len(figure.axes) == 4 and figure.axes[0].get_ylabel() == "accuracy minus intact"
    for side, layers in HALVES.items():
        # Hidden state i + 1 is the output of encoder layer i.
        shaded = titled(figure, f"{side} 1/2, {UPOS}").patches
        assert [p.get_x() for p in shaded] == [layer + 0.5 for layer in layers]
    table.loc[table.side == "bottom", "side"] = "custom"
    chosen = zip(table.side, table.layers, strict=True)
    table["layers"] = [(0, 2) if side == "custom" else layers for side, layers in chosen]
    axis = titled(pf.healed_curves(table), f"layers 1, 3, {UPOS}")
    assert [(p.get_x(), p.get_width()) for p in axis.patches] == [(0.5, 1), (2.5, 1)]


def test_several_healed_tasks_have_panels_of_their_own():
    table = pd.concat([probing(("sst2",)), probing(("rte",)).query("task == 'rte'")])
    assert len(pf.healed_curves(table).axes) == 2 * len(pf.healed_curves(table, task="rte").axes)
    with pytest.raises(HealingError, match="unknown task.*Did you mean 'sst2'"):
        pf.healed_curves(table, task="sst")
    table = table.replace({"task": {"sst2": "a/reviews/", "rte": "b/reviews/"}})
    assert (
        len(pf.healed_curves(table, task="a/reviews/").axes)
        == len(pf.healed_curves(table).axes) / 2
    )


def test_the_heat_map_holds_every_mean_and_outlines_the_corrupted_layers():
    table = probing(("sst2", "rte"))
    table.loc[(table.state == "pretrained") & (table.layer == 2), "accuracy"] = np.nan
    figure = pf.state_heatmap(table)
    axis = titled(figure, "en_ewt · upos")
    names = [t.get_text() for t in axis.get_yticklabels()]
    order = ["pretrained", "untrained", "intact", "intact", "broken", "healed", "broken", "healed"]
    assert names == ["pre-trained", "random weights", "rte, fine-tuned", "sst2, fine-tuned",
                     *(f"sst2, {s}, {side} 1/2" for side in HALVES for s in ("broken", "healed"))
                     ]  # fmt: skip
    cells = np.ma.getdata(axis.collections[0].get_array()).reshape(8, 7)
    for row, state in zip(cells[1:], order[1:], strict=True):
        assert row == pytest.approx([known(state, k, 1) for k in range(7)])
    shown = [t.get_text() for t in axis.texts]
    assert len(shown) == 8 * 7 - 1 and shown[0] == "0.50"  # blank where there is no value
    outlines = {p.get_xy() for p in axis.patches if not p.get_fill()}
    low, high = ({(x, y) for x in range(a, a + 3) for y in rows}
                 for a, rows in ((1, (4, 5)), (4, (6, 7))))  # fmt: skip
    assert outlines == low | high
    assert "en_ewt · upos, rte, fine-tuned 0.37" in figure.alt
    figure = pf.state_heatmap(probing().assign(accuracy=-0.001))
    assert {t.get_text() for t in figure.axes[0].texts} == {"0.00"} and "-0.00" not in figure.alt
    deep = pf.state_heatmap(probing(n=24)).axes[0]
    assert not deep.texts and [t.get_text() for t in deep.get_xticklabels()][:2] == ["0", "3"]


def test_losses_are_drawn_beside_each_other_with_their_intervals():
    table = losses()
    figure = pf.loss_against_loss(table)
    for loss, marker in (("knowledge_loss", "o"), ("task_loss", "s")):
        means = table[table.task == "sst2"].groupby(["side", "level"])[loss].mean()
        drawn = [x for x, mark in marks(titled(figure, "sst2")) if mark == marker]
        assert sorted(drawn) == pytest.approx(sorted(means))
    assert "sst2, bottom 1/2, knowledge loss 0.190" in figure.alt


def test_an_interval_beyond_the_panel_is_marked_where_it_is_cut():
    table = shipped("league")
    wide = table.assign(gain_high=table.gain_high.where(table.recipe != "drop", 9.0))
    (axis,) = harm_figures.league_figure(wide).axes
    assert [x for x, mark in marks(axis) if mark == ">"] == [axis.get_xlim()[1]]
    assert not [x for x, mark in marks(axis) if mark == "<"]


def test_harm_is_drawn_from_the_tables_of_harm():
    table = shipped("vulnerability").query("task == 'sentiment'")
    figure = harm_figures.vulnerability_map(table)
    cells = np.ma.getdata(titled(figure, "broken, sentiment").collections[0].get_array())
    whole = table.query("part == 'all' and state == 'broken'").sort_values("layer").retained
    assert cells.reshape(4, 6)[0] == pytest.approx(whole.to_numpy())
    healed = titled(figure, "healed, sentiment")
    assert [t.get_text() for t in healed.get_yticklabels()] == ["whole layer"]  # no empty rows
    table = shipped("league")
    (axis,) = harm_figures.league_figure(table).axes
    assert {t.get_text() for t in axis.get_yticklabels()} >= {"drop", "corrupted only"}
    gains = 100 * table.gain
    assert sorted(x for x, _ in marks(axis)) == pytest.approx(sorted(gains))
    (axis,) = harm_figures.price_curves(shipped("cells")).axes
    x, y = line(axis, plots.COLORS["intact"])
    assert len(x) > 2 and y[-1] == pytest.approx(1)
    harms = shipped("by_harm")
    axis = titled(harm_figures.harm_curves(harms), "topic")
    harms = harms.query("task == 'topic'")
    broken = harms.query("state == 'broken'").retained
    assert sorted(x for x, mark in marks(axis) if mark == "x") == pytest.approx(sorted(broken))
    assert len(axis.get_yticks()) == harms.groupby(["harm", "level"]).ngroups


def test_models_of_one_name_are_told_apart_by_their_folders():
    table = pd.concat([results(model="a/final"), results(model="b/final")])
    assert "Model: a/final and b/final" in figures.recovery_curves(table).caption
    assert set(plots.shortened(results(model="a/final")).model) == {"final"}


@pytest.mark.parametrize(
    "draw",
    [
        lambda model: figures.recovery_curves(results(model=model)),
        lambda model: pf.healed_curves(probing(model=model)),
        lambda model: pf.loss_against_loss(losses().assign(model=model)),
        lambda model: harm_figures.league_figure(shipped("league").assign(model=model)),
        lambda model: figures.claims_figure(claims(model)),
    ],
)
def test_the_organism_is_called_a_demonstration_where_sides_are_compared(draw):
    assert "never evidence" in draw("data/organism").caption
    assert "never evidence" not in draw("lab/tiny").caption


def test_what_cannot_be_drawn_is_refused_in_one_line():
    with pytest.raises(HealingError, match="unknown value.*Did you mean 'selectivity'"):
        pf.layer_curves(probing(), value="selectivty")
    for draw, table in (
        (figures.similarity, similarities().head(0)),
        (figures.recovery_curves, results().query("state == 'intact'")),
        (pf.healed_curves, probing().query("side == 'none'")),
        (pf.loss_against_loss, losses().head(0)),
        (harm_figures.vulnerability_map, pd.DataFrame()),
        (harm_figures.harm_curves, pd.DataFrame()),
        (harm_figures.league_figure, pd.DataFrame()),
    ):
        with pytest.raises(HealingError, match="nothing to draw"):
            draw(table)
