"""Figures of probes and neurons: what they draw, what they say, and that they can be read."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from healing_utils.analysis.statistics import t_interval
from healing_utils.base.errors import HealingError
from healing_utils.report import figures
from healing_utils.report import probe_figures as pf

LAYERS = 6
HALVES = {"bottom": (0, 1, 2), "top": (3, 4, 5)}
PLACES = (("conll2000", "chunk"), ("en_ewt", "upos"))
LEVEL = {"pretrained": 0.5, "untrained": 0.1, "intact": 0.4, "broken": 0.05, "healed": 0.25}


def cell(state, task="none", side="none", seed=0, model="lab/tiny", place=PLACES[0], n=LAYERS):
    layers = tuple(k for k in range(n) if side != "none" and (k < n / 2) == (side == "bottom"))
    return dict(
        model=model, task=task, state=state, side=side, level=0.5 * bool(layers), layers=layers,
        kind="reinit" if layers else "none", n_layers=n, seed=seed, corpus=place[0],
        column=place[1], key=f"{state}{task}{side}{seed}",
    )  # fmt: skip


def states(tasks=("sst2",), harmed=("sst2",)):
    yield from (("pretrained", "none", "none"), ("untrained", "none", "none"))
    for task in tasks:
        yield "intact", task, "none"
    for task in harmed:
        for side in HALVES:
            yield "broken", task, side
            yield "healed", task, side


def value(state, layer, seed):
    """What is drawn: falls by a hundredth a layer, and differs between seeds."""
    return LEVEL[state] - 0.01 * layer + 0.005 * (seed - 1) * (1 + layer % 2)


def probing(
    tasks=("sst2",), seeds=(0, 1, 2), places=PLACES, model="lab/tiny", n=LAYERS, harmed=("sst2",)
):
    rows = []
    for place in places:
        for state, task, side in states(tasks, harmed):
            for seed in seeds:
                for layer in range(n + 1):
                    found = value(state, layer, seed)
                    rows.append(
                        cell(state, task, side, seed, model, place, n)
                        | dict(layer=layer, selectivity=found, accuracy=found + 0.4, majority=0.3,
                               macro_f1=found + 0.2, control_accuracy=0.4, n_test=1200,
                               cka=0.9 if state == "healed" else np.nan)
                    )  # fmt: skip
    return pd.DataFrame(rows)


def minimal(tasks=("sst2", "rte"), seeds=(0, 1, 2), places=PLACES[:1], model="lab/tiny"):
    """Before: the same share in every layer. After: all of it in the lower half."""
    rows = []
    for place in places:
        for state, task in (("pretrained", "none"), *(("intact", t) for t in tasks)):
            for seed in seeds:
                shares = np.full(LAYERS + 1, 1 / (LAYERS + 1))
                if state == "intact":
                    shares = np.array([0.2, 0.4, 0.4, 0, 0, 0, 0]) + 0
                    shares[:2] += np.array([0.02, -0.02]) * seed
                for layer, share in enumerate(shares):
                    rows.append(
                        cell(state, task, seed=seed, model=model, place=place)
                        | dict(layer=layer, count=round(50 * share), share=share)
                    )
    return pd.DataFrame(rows)


SIZES = (1, 10, 100, 1000, 2688)


def curve(tasks=("sst2",), seeds=(0, 1, 2), places=PLACES[:1], model="lab/tiny"):
    rows = []
    for place in places:
        for state, task in (("pretrained", "none"), *(("intact", t) for t in tasks)):
            for seed in seeds:
                for k in SIZES:
                    for which, slow in (("top", 0.3), ("random", 1), ("bottom", 3)):
                        accuracy = 0.9 - 0.6 * (1 - k / 2688) ** (10 / slow) + 0.01 * seed
                        rows.append(
                            cell(state, task, seed=seed, model=model, place=place)
                            | dict(k=k, share=k / 2688, which=which, accuracy=accuracy)
                        )
    return pd.DataFrame(rows)


def ablation(tasks=("sst2", "cola"), seeds=(0, 1, 2), places=PLACES[:1], model="lab/tiny"):
    rows = []
    for place in places:
        for task in tasks:
            for seed in seeds:
                common = cell("intact", task, seed=seed, model=model, place=place)
                common |= dict(metric="matthews" if task == "cola" else "f1")
                rows.append(common | dict(k=0, share=0.0, which="none", score=0.8 + 0.01 * seed))
                for k in SIZES[1:]:
                    for which, harm in (("top", 0.8), ("random", 0.5), ("bottom", 0.2)):
                        score = 0.8 - harm * (k / 2688) ** 0.5 + 0.01 * seed
                        rows.append(common | dict(k=k, share=k / 2688, which=which, score=score))
    return pd.DataFrame(rows)


def losses(tasks=("sst2", "rte"), seeds=(0, 1, 2), levels=(1 / 6, 0.5)):
    return pd.DataFrame(
        [
            dict(model="lab/tiny", task=task, side=side, level=level, seed=seed,
                 task_loss=harm * level + 0.01 * seed + 0.02 * (task == "rte"),
                 knowledge_loss=2 * harm * level - 0.01 * seed)
            for task in tasks for side, harm in (("bottom", 0.2), ("top", 0.05))
            for level in levels for seed in seeds
        ]
    )  # fmt: skip


DRAWN = {
    "layer_curves": lambda: pf.layer_curves(probing(("sst2", "emotion", "cola", "rte"))),
    "layer_accuracy": lambda: pf.layer_curves(probing(), value="accuracy"),
    "healed_curves": lambda: pf.healed_curves(probing()),
    "state_heatmap": lambda: pf.state_heatmap(probing(("sst2", "rte"))),
    "neuron_histogram": lambda: pf.neuron_histogram(minimal(places=PLACES)),
    "accuracy_by_neurons": lambda: pf.accuracy_by_neurons(curve(places=PLACES)),
    "ablation_curves": lambda: pf.ablation_curves(ablation(places=PLACES)),
    "loss_against_loss": lambda: pf.loss_against_loss(losses()),
}


@pytest.fixture(scope="module")
def drawn():
    return {name: draw() for name, draw in DRAWN.items()}


def titled(figure, title):
    """The one panel of that title."""
    (found,) = [a for a in figure.axes if a.get_title(loc="left").replace("\n", ", ") == title]
    return found


def line(axis, label):
    """x and y of the line of that label."""
    (found,) = [x for x in axis.get_lines() if x.get_label() == label]
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def band(axis, color, at):
    """The limits of the band of a colour at one x."""
    found = [c for c in axis.collections if to_hex(c.get_facecolor()[0]) == color.lower()]
    (points,) = [c.get_paths()[0].vertices for c in found]
    heights = points[np.isclose(points[:, 0], at), 1]
    return heights.min(), heights.max()


def texts(figure):
    """What is written, with the place where it is."""
    hidden = set()  # labels of ticks outside the panel
    for axis in (x for panel in figure.axes for x in (panel.xaxis, panel.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = axis.get_major_ticks()
        hidden |= {t.label1 for t in ticks if not low - 1e-9 <= t.get_loc() <= high + 1e-9}
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return [(t.get_text(), t.get_window_extent().padded(-1)) for t in found if t not in hidden]


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_says_what_it_shows_and_can_be_read(drawn, name):
    figure = drawn[name]
    assert len(figure.caption) > 60 and "tiny" in figure.caption
    assert "n = 3 seeds" in figure.caption
    banded = name not in ("state_heatmap", "neuron_histogram", "loss_against_loss")
    assert ("bands are 95 % t-intervals" in figure.caption) == banded
    assert re.search(r"\d\.\d", figures.alt_text(figure)) and "nan" not in figure.alt.lower()
    assert " ," not in figure.caption + figure.alt and " ;" not in figure.caption
    assert figure.get_figwidth() <= figures.PAGE
    figure.draw_without_rendering()
    assert all(t.get_fontsize() >= 8 for t in figure.findobj(Text) if t.get_text())
    drawn_box = figure.get_tightbbox()  # inches: nothing may be cut off at the edges
    assert drawn_box.x0 > -0.02 and drawn_box.x1 < figure.get_figwidth() + 0.02
    assert drawn_box.y0 > -0.02 and drawn_box.y1 < figure.get_figheight() + 0.02
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


LONG = ("twitter-financial-news-topic", "sst2", "dbpedia_14", "stsb")
CROWDED = {
    "layer_curves": lambda: pf.layer_curves(
        pd.concat([probing(LONG, (0,), PLACES[:1], m, 12) for m in ("a/bert-base", "xlnet-base")])
    ),
    "healed_curves": lambda: pf.healed_curves(probing(LONG, (0,), PLACES[:1], n=12)),
    "state_heatmap": lambda: pf.state_heatmap(probing(LONG, (0,), PLACES[:1], n=12)),
    "state_heatmap of many layers": lambda: pf.state_heatmap(probing(LONG, (0,), n=24)),
    "neuron_histogram": lambda: pf.neuron_histogram(minimal(("sst2", "rte", "cola", "stsb"))),
    "accuracy_by_neurons": lambda: pf.accuracy_by_neurons(curve(LONG, (0,))),
    "ablation_curves": lambda: pf.ablation_curves(ablation(LONG[1:], (0,), PLACES)),
    "loss_against_loss": lambda: pf.loss_against_loss(losses(LONG)),
}


@pytest.mark.parametrize("name", CROWDED)
def test_no_text_lies_upon_another(name):
    figure = CROWDED[name]()
    figure.draw_without_rendering()
    found = texts(figure)
    assert len(found) > 8
    upon = [(a, b) for i, (a, p) in enumerate(found) for b, q in found[:i] if p.overlaps(q)]
    assert upon == []
    width, height = figure.bbox.size
    assert all(p.x0 >= 0 and p.y0 >= 0 and p.x1 <= width and p.y1 <= height for _, p in found)


def test_layer_curves_draw_means_and_t_bands_of_every_state():
    table = probing(("sst2", "rte"))
    figure = pf.layer_curves(table)
    assert [a.get_title(loc="left") for a in figure.axes] == ["conll2000 · chunk", "en_ewt · upos"]
    axis = figure.axes[1]
    named = {"pre-trained": "pretrained", "random weights": "untrained"}
    for label, state in {**named, "sst2, fine-tuned": "intact"}.items():
        x, y = line(axis, label)
        assert x.tolist() == list(range(LAYERS + 1))
        assert y == pytest.approx([value(state, layer, 1) for layer in x])
    expected = t_interval([value("pretrained", 3, seed) for seed in range(3)])
    assert band(axis, "#000000", 3) == pytest.approx((expected.low, expected.high))
    assert "en_ewt · upos, pre-trained: highest 0.50 at layer 0, at the last 0.44" in figure.alt
    assert "1,200 test words" in figure.caption


def test_the_majority_label_is_drawn_with_the_accuracy_only():
    assert "majority" not in pf.layer_curves(probing()).caption
    for draw in (pf.layer_curves, pf.healed_curves):
        figure = draw(probing(places=PLACES[:1]), value="accuracy")
        assert "majority label" in figure.caption
        levels = [x.get_ydata() for x in figure.axes[0].get_lines() if x.get_linestyle() == ":"]
        assert levels == [pytest.approx([0.3, 0.3])]
        assert "majority label" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_one_seed_has_no_band_and_unequal_seeds_are_told():
    figure = pf.layer_curves(probing(seeds=(4,)))
    assert not any(axis.collections for axis in figure.axes)
    assert "n = 1 seed." in figure.caption and "t-interval" not in figure.caption
    table = probing()
    fewer = table[(table.state != "pretrained") | (table.seed == 0)]
    assert "n = 1 to 3 seeds; bands" in pf.layer_curves(fewer).caption


def test_a_task_has_the_same_colour_in_every_figure():
    tasks = ("sst2", "rte")
    axis = pf.layer_curves(probing(tasks)).axes[0]
    (curve_,) = [x for x in axis.get_lines() if x.get_label() == "rte, fine-tuned"]
    axis = titled(pf.neuron_histogram(minimal(tasks[::-1])), "rte")
    (bars,) = [c for c in axis.containers if c.get_label() == "fine-tuned"]
    assert to_hex(bars[0].get_facecolor()) == to_hex(curve_.get_color())
    sides = {figures.COLORS["bottom"].lower(), figures.COLORS["top"].lower()}
    drawn = {to_hex(look["color"]) for look in pf._looks(pd.Series(list("abcdefgh"))).values()}
    assert not drawn & sides and len(drawn) == 4
    marks = {(k["color"], k["marker"]) for k in pf._looks(pd.Series(list("abcdefgh"))).values()}
    assert len(marks) == 8


def test_healed_curves_shade_the_layers_that_were_corrupted():
    figure = pf.healed_curves(probing())
    assert len(figure.axes) == 4
    for side, layers in HALVES.items():
        axis = titled(figure, f"{side} 1/2, en_ewt · upos")
        (shade,) = [p for p in axis.patches if isinstance(p, Rectangle)]
        # Hidden state i + 1 is the output of encoder layer i.
        assert shade.get_x() == layers[0] + 0.5 and shade.get_width() == len(layers)
        for state in ("intact", "broken", "healed"):
            _, y = line(axis, state)
            assert y == pytest.approx([value(state, k, 1) for k in range(LAYERS + 1)])
        expected = t_interval([value("healed", 5, seed) for seed in range(3)])
        color = figures.COLORS[side]
        limits = [
            (points[np.isclose(points[:, 0], 5), 1].min(), points[:, 1].max())
            for c in axis.collections if to_hex(c.get_facecolor()[0]) == color.lower()
            for points in [c.get_paths()[0].vertices]
        ]  # fmt: skip
        assert any(low == pytest.approx(expected.low) for low, _ in limits)
    assert "bottom 1/2, en_ewt · upos: intact 0.38, healed 0.23, broken 0.03" in figure.alt


def test_chosen_layers_are_shaded_where_they_are():
    table = probing(places=PLACES[:1])
    table = table[table.side.isin(["none", "bottom"])].copy()
    harmed = table.side == "bottom"
    table.loc[harmed, "side"] = "custom"
    table["layers"] = ["(0, 2, 3)" if x else "()" for x in harmed]  # as a CSV file holds them
    figure = pf.healed_curves(table)
    axis = titled(figure, "layers 0, 2, 3, conll2000 · chunk")
    spans = [(p.get_x(), p.get_x() + p.get_width()) for p in axis.patches]
    assert spans == [(0.5, 1.5), (2.5, 4.5)]


def test_of_several_tasks_one_has_to_be_named():
    table = probing(("sst2", "rte"), harmed=("sst2", "rte"))
    with pytest.raises(HealingError, match="several tasks, sst2, rte; name one"):
        pf.healed_curves(table)
    assert "fine-tuned on rte" in pf.healed_curves(table, task="rte").caption
    with pytest.raises(HealingError, match="unknown task.*Did you mean 'sst2'"):
        pf.healed_curves(table, task="sst")


def test_the_heat_map_holds_every_mean_and_outlines_the_corrupted_layers():
    figure = pf.state_heatmap(probing(("sst2", "rte")))
    axis = titled(figure, "en_ewt · upos")
    names = [t.get_text() for t in axis.get_yticklabels()]
    assert names == [
        "pre-trained", "random weights", "sst2, fine-tuned", "sst2, broken, bottom 1/2",
        "sst2, healed, bottom 1/2", "sst2, broken, top 1/2", "sst2, healed, top 1/2",
        "rte, fine-tuned",
    ]  # fmt: skip
    cells = np.ma.getdata(axis.collections[0].get_array()).reshape(len(names), LAYERS + 1)
    order = ("pretrained", "untrained", "intact", "broken", "healed", "broken", "healed", "intact")
    for row, state in zip(cells, order, strict=True):
        assert row == pytest.approx([value(state, k, 1) for k in range(LAYERS + 1)])
    assert len(axis.texts) == cells.size and axis.texts[0].get_text() == ".50"
    outlines = {(p.get_xy(), p.get_width()) for p in axis.patches if not p.get_fill()}
    assert outlines == {((1, 3), 3), ((1, 4), 3), ((4, 5), 3), ((4, 6), 3)}
    assert "sst2, broken, bottom 1/2 0.02" in figure.alt and "rte, fine-tuned 0.37" in figure.alt


def test_a_heat_map_of_many_layers_leaves_the_numbers_out():
    figure = pf.state_heatmap(probing(n=24, places=PLACES[:1]))
    assert not figure.axes[0].texts
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()][:3] == ["0", "3", "6"]


def test_a_heat_map_leaves_blank_what_is_missing():
    table = probing(places=PLACES[:1])
    table.loc[(table.state == "healed") & (table.layer == 2), "selectivity"] = np.nan
    table = table[table.layer != 0]
    axis = pf.state_heatmap(table).axes[0]
    assert len(axis.texts) == 7 * LAYERS - 2
    outlined = {p.get_xy()[0] for p in axis.patches if not p.get_fill()}
    assert outlined == {1, 4}
    assert "nan" not in {t.get_text() for t in axis.texts}


def test_the_histogram_shows_shares_seeds_and_the_mean_layer():
    figure = pf.neuron_histogram(minimal())
    axis = titled(figure, "rte")
    before, after = axis.containers
    assert [b.get_height() for b in before] == pytest.approx([1 / 7] * 7)
    assert [b.get_height() for b in after] == pytest.approx([0.22, 0.38, 0.4, 0, 0, 0, 0])
    assert line(axis, "mean layer, pre-trained")[0] == pytest.approx([3])
    assert line(axis, "mean layer, fine-tuned")[0] == pytest.approx([0.38 + 0.8])
    dots = [x for x in axis.get_lines() if x.get_marker() == "."]
    assert [len(x.get_xdata()) for x in dots] == [21, 21]
    assert "rte: pre-trained 3.0 (14 % in 0), fine-tuned 1.2 (40 % in 2)" in figure.alt
    assert "conll2000 · chunk" in figure.caption


def test_the_histogram_does_without_the_pretrained_or_the_fine_tuned_model():
    table = minimal()
    for state, words in (("pretrained", "pre-trained"), ("intact", "fine-tuned")):
        figure = pf.neuron_histogram(table[table.state == state])
        assert words in figure.alt and len(figure.axes) == (1 if state == "pretrained" else 2)
        assert len(figure.axes[0].containers) == 1


def test_accuracy_is_drawn_over_the_number_of_neurons():
    table = curve()
    figure = pf.accuracy_by_neurons(table)
    axis = titled(figure, "sst2, fine-tuned, conll2000 · chunk")
    mine = table[(table.task == "sst2") & (table.which == "top")]
    x, y = line(axis, "strongest")
    assert x.tolist() == list(SIZES) and axis.get_xscale() == "log"
    assert y == pytest.approx(mine.groupby("k").accuracy.mean().to_numpy())
    expected = t_interval(mine[mine.k == 100].accuracy)
    assert band(axis, figures.COLORS["custom"], 100) == pytest.approx((expected.low, expected.high))
    figure.draw_without_rendering()
    ticks = [t.get_text() for t in axis.get_xticklabels() if t.get_text()]
    assert "1,000" in ticks and "10" in ticks
    assert "2,688 neurons of all layers" in figure.caption and "1 neuron: strongest" in figure.alt


def test_ablation_starts_from_the_score_with_nothing_ablated():
    table = ablation()
    figure = pf.ablation_curves(table)
    axis = titled(figure, "cola, fine-tuned, conll2000 · chunk")
    for label, harm in (("strongest", 0.8), ("random", 0.5), ("weakest", 0.2)):
        x, y = line(axis, label)
        assert x == pytest.approx(np.array([0, *SIZES[1:]]) / 2688)
        assert y == pytest.approx(0.81 - harm * np.sqrt(x))
    assert "macro-F1 (sst2); matthews (cola)" in figure.caption
    assert axis.get_ylabel() in ("", "score")
    assert "nothing ablated 0.81" in figure.alt and "100 % of neurons: strongest 0.01" in figure.alt
    one = pf.ablation_curves(table[table.task == "sst2"])
    assert one.axes[0].get_ylabel() == "macro-F1"


@pytest.mark.parametrize("shares", [(0.01, 0.05, 0.2), (0.1, 0.2, 0.3, 0.4)])
def test_shares_are_read_in_percent(shares):
    table = ablation(("sst2",))
    given = dict(zip(SIZES[1:], shares, strict=False))
    table = table[table.k.isin([0, *given])]
    table = table.assign(share=table.k.map({0: 0.0, **given}))
    figure = pf.ablation_curves(table)
    figure.draw_without_rendering()
    axis = figure.axes[0]
    assert axis.get_xscale() == ("symlog" if shares[-1] == 0.2 else "linear")
    ticks = [t.get_text() for t in axis.get_xticklabels()]
    assert ticks == ["0", *(f"{100 * s:.0f}" for s in shares)]
    left, right = axis.get_xlim()
    assert left < 0 and right > shares[-1]


def test_losses_are_drawn_against_each_other():
    table = losses()
    figure = pf.loss_against_loss(table)
    (axis,) = figure.axes
    large = [x for x in axis.get_lines() if x.get_markersize() > 6 and x.get_ls() == "None"]
    points = sorted((x.get_xdata()[0], x.get_ydata()[0]) for x in large)
    means = table.groupby(["task", "side", "level"])[["knowledge_loss", "task_loss"]].mean()
    assert np.array(points) == pytest.approx(np.array(sorted(map(tuple, means.to_numpy()))))
    small = [x for x in axis.get_lines() if x.get_markersize() == 3]
    assert sum(len(x.get_xdata()) for x in small) == len(table)
    (diagonal,) = [x for x in axis.get_lines() if x.get_ls() == ":"]
    assert diagonal.get_xydata().T == pytest.approx(np.array([axis.get_xlim()] * 2))
    zero = [x for x in axis.get_lines() if list(x.get_xdata()) == [0, 0]]
    assert len(zero) == 1 and axis.get_xlim() == axis.get_ylim()
    assert "sst2, bottom 1/2: task 0.110, linguistic 0.190" in figure.alt
    alone = pf.loss_against_loss(table.drop(columns="model"))
    assert "model" not in alone.caption


def test_models_are_panels_or_chosen_by_name():
    table = pd.concat([probing(model="lab/tiny"), probing(model="hub/other", n=4)])
    figure = pf.layer_curves(table)
    assert [len(line(a, "pre-trained")[0]) for a in figure.axes] == [7, 7, 5, 5]
    assert figure.axes[2].get_title(loc="left") == "other\nconll2000 · chunk"
    assert "models tiny, other" in figure.caption
    for name in ("hub/other", "other"):
        chosen = pf.layer_curves(table, model=name)
        assert len(chosen.axes) == 2 and "model other" in chosen.caption
    with pytest.raises(HealingError, match="unknown model 'othr'.*Did you mean 'other'"):
        pf.layer_curves(table, model="othr")


def test_the_organism_is_called_a_demonstration_where_sides_are_compared():
    table = probing(model="organism")
    for draw in (pf.healed_curves, pf.state_heatmap):
        assert "never evidence" in draw(table).caption
        assert "never evidence" not in draw(probing()).caption
    assert "never evidence" not in pf.layer_curves(table).caption
    assert "never evidence" in pf.loss_against_loss(losses().assign(model="organism")).caption


@pytest.mark.parametrize(
    ("draw", "table", "column"),
    [
        (pf.layer_curves, probing, "selectivity"),
        (pf.healed_curves, probing, "layers"),
        (pf.state_heatmap, probing, "side"),
        (pf.neuron_histogram, minimal, "share"),
        (pf.accuracy_by_neurons, curve, "which"),
        (pf.ablation_curves, ablation, "metric"),
        (pf.loss_against_loss, losses, "knowledge_loss"),
    ],
)
def test_missing_columns_and_empty_tables_are_refused_in_one_line(draw, table, column):
    with pytest.raises(HealingError, match=f"no column '{column}'") as caught:
        draw(table().drop(columns=column))
    assert "\n" not in str(caught.value)
    with pytest.raises(HealingError, match="nothing to draw"):
        draw(table().head(0))
    if "model" in table():
        with pytest.raises(HealingError, match="duplicate cell"):
            draw(pd.concat([table(), table()]))


def test_what_cannot_be_drawn_is_refused_in_one_line():
    with pytest.raises(HealingError, match="unknown value.*Did you mean 'selectivity'"):
        pf.layer_curves(probing(), value="selectivty")
    with pytest.raises(HealingError, match="no broken or healed cell"):
        pf.healed_curves(probing(harmed=()))
    with pytest.raises(HealingError, match="unknown choice of neurons 'best'"):
        pf.accuracy_by_neurons(curve().replace({"which": {"top": "best"}}))


# --- words -----------------------------------------------------------------------------------

SENTENCES = [["the", "<b>film", "was", "awful"], ["a", "fine", "day"]]


def planted():
    """(layers, words, hidden) = (3, 7, 5): neuron (2, 4) is high at "awful", low at "fine"."""
    values = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    values[2, :, 4] = [0, 0, 0, 3, 0, -3, 0]
    return values


class Spans(HTMLParser):
    """Words with their title, style and raised number."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "span":
            self.found.append({**dict(attributes), "word": "", "number": ""})

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "span" in self.open:
            self.found[-1]["number" if self.open[-1] == "sup" else "word"] += data


def test_words_carry_the_value_of_their_neuron():
    text = pf.word_activations(SENTENCES, planted(), [(2, 4), (0, 1)])
    assert isinstance(text, str) and "<script" not in text and "<style" not in text
    page = Spans(text)
    assert page.open == []
    words = [w for sentence in SENTENCES for w in sentence]
    assert [s["word"] for s in page.found] == words * 2  # "<b>film" is a word, not a tag
    assert "&lt;b&gt;film" in text and "<b>" not in text
    first = page.found[:7]
    spread = np.std([0, 0, 0, 3, 0, -3, 0])
    assert [s["number"] for s in first] == ["", "", "", "+2", "", "\u22122", ""]
    assert first[3]["title"] == f"+{3 / spread:.2f} sd (activation 3)"
    assert first[5]["title"] == f"\u2212{3 / spread:.2f} sd (activation -3)"
    tint = [re.search(r"rgba\((.*?),([\d.]+)\)", s["style"]).groups() for s in first]
    above, below = ("230,159,0", "86,180,233")  # orange and blue, as the note says
    assert (tint[3][0], tint[5][0]) == (above, below) and tint[3][1] == tint[5][1]
    assert float(tint[3][1]) == pytest.approx(0.6 * 3 / spread / 3, abs=0.006)
    assert float(tint[0][1]) == 0


def test_the_plain_text_has_the_same_words_and_numbers():
    text = pf.word_activations(SENTENCES, planted(), [(2, 4)])
    assert "layer 2, neuron 4:\n  the <b>film was awful[+2]\n  a fine[\u22122] day" in text.alt
    assert text._repr_mimebundle_() == {"text/html": str(text), "text/plain": text.alt}


def test_a_reference_sets_mean_and_scale():
    reference = np.zeros((3, 100, 5), np.float32)
    reference[2, :, 4] = np.tile([-1, 1], 50) + 2  # mean 2, standard deviation 1
    text = pf.word_activations(SENTENCES, planted(), [(2, 4)], reference)
    numbers = [s["number"] for s in Spans(text).found]
    assert numbers == ["\u22122"] * 3 + ["+1"] + ["\u22122", "\u22125", "\u22122"]
    silent = pf.word_activations(SENTENCES, np.zeros((3, 7, 5)), [(0, 0)])
    assert not any(s["number"] for s in Spans(silent).found)


@pytest.mark.parametrize("page", [0, 255])
@pytest.mark.parametrize("tint", pf._TINTS)
def test_the_strongest_tint_keeps_the_text_readable_on_dark_and_light_pages(page, tint):
    def luminance(rgb):  # WCAG 2, relative luminance
        c = np.asarray(rgb) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [
            0.2126, 0.7152, 0.0722
        ]  # fmt: skip

    shown = pf._OPACITY * np.array(tint) + (1 - pf._OPACITY) * page
    lights = sorted([luminance(shown), luminance([255 - page] * 3)])
    assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5


def test_words_and_activations_have_to_fit():
    values = planted()
    for sentences, array, neurons, message in (
        ([["one"]], values, [(0, 0)], "sentences have 1 words, the activations 7"),
        (SENTENCES, values, [(3, 0)], r"no neuron \(3, 0\): layers are 0 to 2"),
        (SENTENCES, values, [(-1, 0)], r"no neuron \(-1, 0\)"),
        (SENTENCES, values, [(0, 5)], "neurons 0 to 4"),
        (SENTENCES, values, [], "nothing to show"),
        (SENTENCES, values[0], [(0, 0)], r"\(layers, words, hidden\), not of shape \(7, 5\)"),
    ):
        with pytest.raises(HealingError, match=message):
            pf.word_activations(sentences, array, neurons)
    with pytest.raises(HealingError, match="reference has 2 layers of 5 neurons"):
        pf.word_activations(SENTENCES, values, [(0, 0)], values[:2])
    values[1, 2, 3] = np.nan
    with pytest.raises(HealingError, match=r"neuron \(1, 3\).*not finite"):
        pf.word_activations(SENTENCES, values, [(1, 3)])
