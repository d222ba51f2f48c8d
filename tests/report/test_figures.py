"""Figures: what they draw, what they say, and that they can be read."""

import functools
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from healing_utils.analysis import harm
from healing_utils.analysis.claims import recovery_claims
from healing_utils.analysis.effects import t_interval
from healing_utils.analysis.recovery import measures
from healing_utils.base.errors import HealingError
from healing_utils.report import figures, harm_figures, plots, words
from healing_utils.report import probe_figures as pf

ROOT = Path(__file__).resolve().parents[2]
LEVELS = {1 / 6: 1, 0.5: 3, 1.0: 6}
PLACES = (("conll2000", "chunk"), ("en_ewt", "upos"))
HALVES = {"bottom": (0, 1, 2), "top": (3, 4, 5)}
KNOWN = {"pretrained": 0.5, "untrained": 0.1, "intact": 0.4, "broken": 0.05, "healed": 0.25}
SIZES = (1, 10, 100, 1000, 2688)


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
                         side=side, level=level, score=score,
                         layers=tuple(range(LEVELS.get(level, 0))))
                )  # fmt: skip
    return pd.DataFrame(rows)


def similarities(harms=("reinit",)):
    return pd.DataFrame(
        [
            dict(model="lab/tiny", task="sst2", state="broken", layer=k, side=side, level=0.5,
                 kind="reinit", harm=harm, seed=s, similarity=1 - 0.1 * k * w, measure="cka")
            for k in range(7) for s in (0, 1) for side, w in (("bottom", 1.5), ("top", 0.2))
            for harm in harms
        ]
    )  # fmt: skip


def curves():
    return pd.DataFrame(
        [
            dict(model="lab/tiny", task="sst2", step=step, state=state, side=side, level=level,
                 score=0.5 + step * pace + 0.01 * seed, kind="reinit" if level else "none",
                 seed=seed)
            for state, side, level, pace in (("intact", "none", 0.0, 0.02),
                                             ("healed", "bottom", 0.5, 0.01))
            for seed in (0, 1) for step in (0, 10, 20)
        ]
    )  # fmt: skip


def report():
    return pd.DataFrame(
        [
            dict(name=f"{layer}.{role}.{name}", layer=layer, role=role, std_before=before,
                 std_after=after, elements=100)
            for layer in (0, 1) for role, width in (("query", 0.04), ("feed_forward", 0.05))
            for name, before, after in (("weight", width, 0.177), ("bias", 0.02, 0.0))
        ]
    )  # fmt: skip


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
    return pd.DataFrame(
        [
            cell | dict(layer=layer, selectivity=value, accuracy=value + 0.4, majority=0.3,
                        n_test=1200, cka=value)
            for cell in networks(tasks, KNOWN, seeds, model)
            for layer in range(n + 1) for value in [known(cell["state"], layer, cell["seed"])]
        ]
    )  # fmt: skip


def minimal(tasks=("sst2", "rte"), seeds=(0, 1, 2)):
    """Before: the same share in every layer. After: all of it in the lower half."""
    rows = []
    for cell in networks(tasks, ("pretrained", "intact"), seeds, "lab/tiny"):
        moved = 0.02 * cell["seed"]
        after = [0.2 + moved, 0.4 - moved, 0.4, 0, 0, 0, 0]
        shares = after if cell["state"] == "intact" else [1 / 7] * 7
        rows += [cell | dict(layer=layer, share=share) for layer, share in enumerate(shares)]
    return pd.DataFrame(rows)


def curve(tasks=("sst2",), seeds=(0, 1, 2)):
    return pd.DataFrame(
        [
            cell | dict(k=k, share=k / 2688, which=which, accuracy=0.9 - slow * (1 - k / 2688))
            for cell in networks(tasks, ("pretrained", "intact"), seeds, "lab/tiny")
            for k in SIZES for which, slow in (("top", 0.3), ("random", 0.5), ("bottom", 0.6))
        ]
    )  # fmt: skip


def ablation(tasks=("sst2", "cola"), seeds=(0, 1, 2), sizes=SIZES[1:]):
    rows = []
    for cell in networks(tasks, ("intact",), seeds, "lab/tiny"):
        cell |= dict(metric="matthews" if cell["task"] == "cola" else "f1")
        rows.append(cell | dict(k=0, share=0.0, which="none", score=0.8 + 0.01 * cell["seed"]))
        for k in sizes:
            for which, loss in (("top", 0.8), ("random", 0.5), ("bottom", 0.2)):
                score = 0.8 - loss * (k / 2688) ** 0.5 + 0.01 * cell["seed"]
                rows.append(cell | dict(k=k, share=k / 2688, which=which, score=score))
    return pd.DataFrame(rows)


def losses(tasks=("sst2", "rte")):
    return pd.DataFrame(
        [
            dict(model="lab/tiny", task=task, side=side, level=level, seed=seed,
                 task_loss=lost * level + 0.01 * seed + 0.02 * (task == "rte"),
                 knowledge_loss=2 * lost * level - 0.01 * seed)
            for task in tasks for side, lost in (("bottom", 0.2), ("top", 0.05))
            for level in (1 / 6, 0.5) for seed in (0, 1, 2)
        ]
    )  # fmt: skip


@functools.cache
def shipped(table):
    """A table of `harm` from the shipped records of the organism."""
    every = harm.gather(ROOT / "data" / "results" / "quick")
    return every if table == "cells" else getattr(harm, table)(every)


STUDY = results(("sst2", "imdb"))
LONG = ("twitter-financial-news-topic", "sst2", "dbpedia_14", "stsb")
DRAWN = {
    "recovery": lambda: figures.recovery_curves(STUDY),
    "recovery, many": lambda: figures.recovery_curves(results(tuple("abcde"), (0, 1))),
    "scores": lambda: figures.score_points(STUDY),
    "claims": lambda: figures.claims_figure(recovery_claims(STUDY)),
    "weights": lambda: figures.weight_change(report(), model="lab/tiny"),
    "similarity": lambda: figures.similarity(similarities()),
    "learning": lambda: figures.learning_curves(curves()),
    "layers": lambda: pf.layer_curves(probing(LONG)),
    "layers, two models": lambda: pf.layer_curves(
        pd.concat([probing(LONG), probing(LONG, model="xlnet-base", n=12)])
    ),
    "accuracy": lambda: pf.layer_curves(probing(), value="accuracy"),
    "healed": lambda: pf.healed_curves(probing(LONG)),
    "states": lambda: pf.state_heatmap(probing(LONG)),
    "states, deep": lambda: pf.state_heatmap(probing(n=24)),
    "neurons": lambda: pf.neuron_histogram(minimal(("sst2", "rte", "cola", "stsb"))),
    "by neurons": lambda: pf.accuracy_by_neurons(curve(LONG)),
    "ablation": lambda: pf.ablation_curves(ablation(LONG)),
    "losses": lambda: pf.loss_against_loss(losses(LONG)),
    "vulnerability": lambda: harm_figures.vulnerability_map(shipped("vulnerability")),
    "harm, similarity": lambda: harm_figures.harm_similarity(similarities(("reinit", "noise=1"))),
    "harms": lambda: harm_figures.harm_curves(shipped("by_harm")),
    "league": lambda: harm_figures.league_figure(shipped("league")),
    "price": lambda: harm_figures.price_curves(shipped("cells")),
}


def written(figure):
    """What is written, with the place where it is; labels of ticks outside a panel are not."""
    hidden = set()
    for axis in (x for panel in figure.axes for x in (panel.xaxis, panel.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = axis.get_major_ticks()
        hidden |= {
            x
            for t in ticks
            for x in (t.label1, t.label2)
            if not low - 1e-9 <= t.get_loc() <= high + 1e-9
        }
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return {t: t.get_window_extent().padded(-1) for t in found if t not in hidden}


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_says_what_it_shows_and_can_be_read(name):
    figure = DRAWN[name]()
    assert re.search("model.* (tiny|organism)|weights of tiny", figure.caption)
    assert figure.caption[0].isupper()
    assert re.search(r"\d\.\d", figures.alt_text(figure)) and not re.search(r"\bnan\b", figure.alt)
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


def line(axis, color, style="-"):
    """x and y of the curve of a colour and dash."""
    found = [
        x for x in axis.get_lines()
        if to_hex(x.get_color()) == color.lower() and x.get_linestyle() == style
        and len(set(x.get_xdata())) > 2
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


def test_recovery_curves_draw_retained_scores_with_t_intervals():
    figure = figures.recovery_curves(results())
    (axis,) = figure.axes
    for side, shares in (("bottom", [1, 0.9, 0.8, 0.75]), ("top", [1, 0.97, 0.95, 0.75])):
        x, y = line(axis, plots.COLORS[side])
        assert x == pytest.approx([0, 1 / 6, 0.5, 1], abs=1e-5)
        assert y == pytest.approx(shares, abs=2e-3)
    half = measures(results()).query("side == 'bottom' and level == 0.5 and kind == 'reinit'")
    expected = t_interval(half.retained)
    assert band(axis, plots.COLORS["bottom"], 0.5) == pytest.approx((expected.low, expected.high))
    ticks = [t.get_text() for t in axis.get_xticklabels()]
    assert ticks == ["0\n0", "1/6\n1", "1/2\n3", "1\n6"]
    assert "sst2, bottom 1/2 0.80" in figure.alt and "top 1/2 0.95" in figure.alt
    assert {"init", "scratch", "chance", "broken", "intact", "all layers"} <= set(labels(figure))
    assert "macro-F1 (sst2)" in figure.caption


def test_recovery_of_chosen_layers_of_init_alone_and_without_scratch():
    table = results(init=False).query("state in ['intact', 'healed'] and side != 'all'")
    chosen = table.assign(side=table.side.replace("bottom", "custom"))
    figure = figures.recovery_curves(chosen)
    assert "chosen 1/2 0.80" in figure.alt and "chosen layers" in labels(figure)
    assert not {"init", "scratch", "broken"} & set(labels(figure))
    alone = figures.recovery_curves(table.assign(kind=table.kind.replace("reinit", "init")))
    assert "bottom 1/2 0.80" in alone.alt


def test_healed_scores_stay_legible_above_a_distant_chance():
    table = results(chance=0.05)
    table.loc[table.state == "broken", "score"] = 0.05
    figure = figures.recovery_curves(table)
    assert 0.3 < figure.axes[0].get_ylim()[0] < 0.6
    assert "below the panels are not drawn" in figure.caption


def test_score_points_hold_every_score_of_every_state():
    table = results()
    (axis,) = figures.score_points(table).axes
    marks = [x for x in axis.get_lines() if x.get_linestyle() == "None" and x.get_marker() != "|"]
    xs = np.concatenate([x.get_xdata() for x in marks])
    assert sorted(xs) == pytest.approx(sorted(table.score))
    names = [t.get_text() for t in axis.get_yticklabels()]
    assert names == ["intact", "bottom 1/6", "bottom 1/2", "top 1/6", "top 1/2", "all layers",
                     "scratch", "untrained"]  # fmt: skip
    assert axis.get_xlabel() == "macro-F1"


def test_claims_figure_tells_verdicts_in_words():
    claims = recovery_claims(results(("a", "b")))
    claims.loc[2, ["effect", "low", "high", "p_corrected"]] = math.nan
    claims.loc[2, "verdict"] = "undecided"
    figure = figures.claims_figure(claims)
    shown = [t.get_text() for t in figure.axes[0].texts]
    assert any(w.startswith("holds, p = 0.047") for w in shown) and "undecided" in shown
    assert "no estimate" in figure.alt


def test_weight_change_separates_weights_from_biases_and_pools_by_variance():
    table = report()
    table.loc[len(table)] = ["0.feed_forward.second.weight", 0, "feed_forward", 0.01, 0.177, 300]
    figure = figures.weight_change(table)
    before, after = (a.collections[0].get_array().reshape(4, 2) for a in figure.axes[:2])
    roles = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert roles == ["query weight", "query bias", "feed forward weight", "feed forward bias"]
    pooled = math.sqrt((100 * 0.05**2 + 300 * 0.01**2) / 400)
    assert before[2, 0] == pytest.approx(pooled) and before[2, 1] == pytest.approx(0.05)
    assert after[3, 0] == 0


def test_similarity_and_learning_curves_draw_means_over_seeds():
    (axis,) = figures.similarity(similarities()).axes
    assert line(axis, plots.COLORS["bottom"])[1] == pytest.approx(1 - 0.15 * np.arange(7))
    (axis,) = figures.learning_curves(curves()).axes
    x, y = line(axis, plots.COLORS["intact"])
    assert list(x) == [0, 10, 20] and y == pytest.approx([0.505, 0.705, 0.905])


def test_layer_curves_draw_means_and_t_bands_of_every_state():
    figure = pf.layer_curves(probing(("sst2", "rte")))
    assert [a.get_title(loc="left") for a in figure.axes] == ["conll2000 · chunk", "en_ewt · upos"]
    axis = figure.axes[1]
    for state, color in (("pretrained", "#000000"), ("intact", "#E69F00")):
        x, y = line(axis, color)
        assert list(x) == list(range(7)) and y == pytest.approx([known(state, k, 1) for k in x])
    expected = t_interval([known("pretrained", 3, seed) for seed in range(3)])
    assert band(axis, "#000000", 3) == pytest.approx((expected.low, expected.high))
    assert "en_ewt · upos, pre-trained: 0.50 at 0 to 0.44 at 6" in figure.alt
    assert "n = 3 seeds; bands are 95 % t-intervals" in figure.caption
    assert "1,200 test words" in figure.caption and "majority" not in labels(figure)


def test_one_seed_has_no_band_and_unequal_seeds_are_told():
    figure = pf.layer_curves(probing(seeds=(4,)))
    assert not any(len(c.get_paths()) for axis in figure.axes for c in axis.collections)
    assert "n = 1 seed." in figure.caption and "t-interval" not in figure.caption
    table = probing()
    fewer = table[(table.state != "pretrained") | (table.seed == 0)]
    assert "n = 1 to 3 seeds; bands" in pf.layer_curves(fewer).caption


def test_tasks_are_told_apart_and_never_look_like_a_side():
    looks = plots.task_looks(pd.Series(list("abcdefgh")))
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 8
    assert not {look["color"] for look in looks.values()} & {"#D55E00", "#0072B2"}


def test_healed_curves_shade_the_layers_that_were_corrupted():
    table = probing(("sst2", "rte"))
    figure = pf.healed_curves(table)
    assert len(figure.axes) == 4 and "fine-tuned on sst2" in figure.caption
    for side, layers in HALVES.items():
        axis = titled(figure, f"{side} 1/2, en_ewt · upos")
        (shade,) = [p for p in axis.patches if isinstance(p, Rectangle)]
        # Hidden state i + 1 is the output of encoder layer i.
        assert shade.get_x() == layers[0] + 0.5 and shade.get_width() == len(layers)
        for state, color, style in (("intact", "#000000", "-"), ("healed", plots.COLORS[side], "-"),
                                    ("broken", plots.COLORS[side], "--")):  # fmt: skip
            y = line(axis, color, style)[1]
            assert y == pytest.approx([known(state, k, 1) for k in range(7)])
    assert "bottom 1/2, en_ewt · upos, healed 0.23" in figure.alt
    table.loc[table.side == "bottom", "side"] = "custom"
    table["layers"] = ["(0, 2)" if s == "custom" else str(t) for s, t in
                       zip(table.side, table.layers, strict=True)]  # fmt: skip
    axis = titled(pf.healed_curves(table), "layers 0, 2, en_ewt · upos")
    assert [(p.get_x(), p.get_width()) for p in axis.patches] == [(0.5, 1), (2.5, 1)]


def test_of_several_healed_tasks_one_has_to_be_named():
    table = pd.concat([probing(("sst2",)), probing(("rte",)).query("task == 'rte'")])
    with pytest.raises(HealingError, match="of rte, sst2; name one"):
        pf.healed_curves(table)
    assert "fine-tuned on rte" in pf.healed_curves(table, task="rte").caption
    with pytest.raises(HealingError, match="unknown task.*Did you mean 'sst2'"):
        pf.healed_curves(table, task="sst")


def test_the_heat_map_holds_every_mean_and_outlines_the_corrupted_layers():
    table = probing(("sst2", "rte"))
    table.loc[(table.state == "pretrained") & (table.layer == 2), "selectivity"] = np.nan
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
    assert len(shown) == 8 * 7 - 1 and shown[0] == ".50"  # blank where there is no value
    outlines = {(p.get_xy(), p.get_width()) for p in axis.patches if not p.get_fill()}
    assert outlines == {((1, 4), 3), ((1, 5), 3), ((4, 6), 3), ((4, 7), 3)}
    assert "en_ewt · upos, rte, fine-tuned 0.37" in figure.alt
    deep = pf.state_heatmap(probing(n=24)).axes[0]
    assert not deep.texts and [t.get_text() for t in deep.get_xticklabels()][:2] == ["0", "3"]


def test_the_histogram_shows_shares_seeds_and_the_mean_layer():
    figure = pf.neuron_histogram(minimal())
    axis = titled(figure, "rte, en_ewt · upos")
    before, after = ([b.get_height() for b in c] for c in axis.containers)
    assert before == pytest.approx([1 / 7] * 7)
    assert after == pytest.approx([0.22, 0.38, 0.4, 0, 0, 0, 0])
    marks = [x.get_xdata()[0] for x in axis.get_lines() if x.get_marker() == "v"]
    assert marks[-2:] == pytest.approx([3, 0.38 + 0.8])
    assert sum(len(c.get_offsets()) for c in axis.collections) == 2 * 21
    assert "rte, en_ewt · upos, intact: mean layer 1.2, 40 % in layer 2" in figure.alt
    for state, panels in (("pretrained", 2), ("intact", 4)):
        assert len(pf.neuron_histogram(minimal().query(f"state == '{state}'")).axes) == panels


def test_accuracy_and_ablation_draw_means_over_neurons():
    table = curve()
    axis = titled(pf.accuracy_by_neurons(table), "sst2, fine-tuned, conll2000 · chunk")
    x, y = line(axis, "#009E73")
    assert list(x) == list(SIZES) and axis.get_xscale() == "log"
    assert y == pytest.approx(table[table.which == "top"].groupby("k").accuracy.mean())
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "10", "100", "1,000"]
    figure = pf.ablation_curves(ablation())
    axis = titled(figure, "cola, fine-tuned, conll2000 · chunk")
    x, y = line(axis, "#009E73")
    assert y == pytest.approx(0.81 - 0.8 * np.sqrt(np.asarray(x) / 100))
    assert x == pytest.approx(100 * np.array([0, *SIZES[1:]]) / 2688)
    assert "matthews (cola)" in figure.caption and "macro-F1 (sst2)" in figure.caption
    assert axis.get_ylabel() in ("", "score")
    assert "0.81 at 0 % to 0.01 at 100 %" in figure.alt


@pytest.mark.parametrize(("sizes", "scale"), [((27, 134, 538), "symlog"), ((269, 538), "linear")])
def test_shares_are_read_in_percent(sizes, scale):
    axis = pf.ablation_curves(ablation(("sst2",), sizes=sizes)).axes[0]
    assert axis.get_xscale() == scale and axis.get_ylabel() == "macro-F1"
    shown = [float(t.get_text()) for t in axis.get_xticklabels()]
    assert shown == pytest.approx([0, *(100 * k / 2688 for k in sizes)], rel=0.05)
    assert axis.get_xlim()[0] < 0 and axis.get_xlim()[1] > shown[-1]


def test_losses_are_drawn_against_each_other():
    table = losses()
    figure = pf.loss_against_loss(table)
    (axis,) = figure.axes
    large = [x for x in axis.get_lines() if x.get_markersize() > 6 and len(x.get_xdata()) == 1]
    points = sorted((x.get_xdata()[0], x.get_ydata()[0]) for x in large)
    means = table.groupby(["task", "side", "level"])[["knowledge_loss", "task_loss"]].mean()
    assert np.array(points) == pytest.approx(np.array(sorted(map(tuple, means.to_numpy()))))
    assert axis.get_xlim() == axis.get_ylim()
    assert "sst2, bottom 1/2 0.190" in figure.alt and "sst2, bottom 1/2 0.110" in figure.alt


def test_harm_is_drawn_from_the_tables_of_harm():
    table = shipped("vulnerability").query("task == 'sentiment'")
    figure = harm_figures.vulnerability_map(table)
    cells = np.ma.getdata(figure.axes[0].collections[0].get_array()).reshape(4, 6)
    whole = table.query("part == 'all' and state == 'broken'").sort_values("layer").retained
    assert cells[0] == pytest.approx(whole.to_numpy())
    assert f"broken, whole layer, layer {whole.argmin()} {whole.min():.2f}" in figure.alt
    table = shipped("league").assign(verdict=lambda t: np.where(t.recipe == "drop", "better", ""))
    (axis,) = harm_figures.league_figure(table).axes
    names = {t.get_text() for t in axis.get_yticklabels()}
    assert names >= {"layers dropped", "full fine-tuning"}
    dots = [(c.lines[0].get_xdata()[0], c.lines[0].get_markerfacecolor()) for c in axis.containers]
    gains = 100 * table[table.recipe != "full"].gain
    assert sorted(x for x, _ in dots) == pytest.approx(sorted(gains))
    assert max(dots)[1] == plots.COLORS["top"] and min(dots)[1] == "white"
    (axis,) = harm_figures.price_curves(shipped("cells")).axes
    x, y = line(axis, plots.COLORS["intact"])
    assert len(x) > 2 and y[-1] == pytest.approx(1)


def test_models_of_one_name_are_told_apart_by_their_folders():
    table = pd.concat([results(model="a/final"), results(model="b/final")])
    assert "models a/final, b/final" in figures.recovery_curves(table).caption
    assert set(words.shortened(results(model="a/final")).model) == {"final"}


@pytest.mark.parametrize(
    "draw",
    [
        lambda model: figures.recovery_curves(results(model=model)),
        lambda model: figures.score_points(results(model=model)),
        lambda model: pf.healed_curves(probing(model=model)),
        lambda model: pf.state_heatmap(probing(model=model)),
        lambda model: pf.loss_against_loss(losses().assign(model=model)),
        lambda model: harm_figures.league_figure(shipped("league").assign(model=model)),
        lambda model: figures.claims_figure(recovery_claims(results(("a", "b"), model=model))),
    ],
)
def test_the_organism_is_called_a_demonstration_where_sides_are_compared(draw):
    assert "never evidence" in draw("data/organism").caption
    assert "never evidence" not in draw("lab/tiny").caption


@pytest.mark.parametrize(
    ("draw", "table", "column"),
    [
        (figures.similarity, similarities, "measure"),
        (figures.score_points, results, "side"),
        (pf.layer_curves, probing, "selectivity"),
        (pf.healed_curves, probing, "layers"),
        (pf.neuron_histogram, minimal, "share"),
        (pf.accuracy_by_neurons, curve, "which"),
        (pf.ablation_curves, ablation, "metric"),
        (pf.loss_against_loss, losses, "knowledge_loss"),
    ],
)
def test_tables_that_cannot_be_drawn_are_refused_in_one_line(draw, table, column):
    with pytest.raises(HealingError, match=f"no column '{column}'") as caught:
        draw(table().drop(columns=column))
    assert "\n" not in str(caught.value)
    with pytest.raises(HealingError, match="nothing to draw"):
        draw(table().head(0))
    if draw not in (figures.similarity, figures.score_points):
        with pytest.raises(HealingError, match="duplicate cell"):
            draw(pd.concat([table(), table()]))


def test_what_cannot_be_drawn_is_refused_in_one_line():
    with pytest.raises(HealingError, match="unknown value.*Did you mean 'selectivity'"):
        pf.layer_curves(probing(), value="selectivty")
    with pytest.raises(HealingError, match="no broken or healed cell"):
        pf.healed_curves(probing().query("side == 'none'"))
    with pytest.raises(HealingError, match="unknown choice of neurons 'best'"):
        pf.accuracy_by_neurons(curve().replace({"which": {"top": "best"}}))
    with pytest.raises(HealingError, match="nothing to draw"):
        figures.recovery_curves(results().query("state == 'intact'"))
    for draw in (harm_figures.vulnerability_map, harm_figures.harm_curves,
                 harm_figures.league_figure):  # fmt: skip
        with pytest.raises(HealingError, match="nothing to draw"):
            draw(pd.DataFrame())
