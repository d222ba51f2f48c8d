"""Figures: what they draw, what they say, and that their files are whole and repeatable."""

import base64
import io
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from healing_utils.analysis import statistics as st
from healing_utils.base.errors import HealingError
from healing_utils.report import figures

LEVELS = {1 / 6: 1, 0.5: 3, 1.0: 6}


def results(tasks=("sst2",), seeds=(0, 1, 2), model="lab/tiny", init=True, chance=0.5):
    """A study in which bottom half retains 0.8, top half 0.95, all layers 0.75 of the intact."""
    retained = {("bottom", 1 / 6): 0.9, ("bottom", 0.5): 0.8, ("top", 1 / 6): 0.97}
    retained |= {("top", 0.5): 0.95, ("all", 1.0): 0.75}
    rows = []
    for task in tasks:
        for seed in seeds:
            base = 0.9 + 0.002 * seed
            common = dict(model=model, task=task, seed=seed, metric="f1", chance=chance)
            common |= dict(part="all", test_size=400)

            def add(state, side, level, kind, score, common=common):
                n = LEVELS.get(level, 0)
                row = dict(state=state, side=side, level=level, kind=kind, score=score)
                rows.append(common | row | dict(layers=tuple(range(n))))

            add("intact", "none", 0.0, "none", base)
            add("scratch", "all", 1.0, "scratch", 0.6)
            for (side, level), share in retained.items():
                add("healed", side, level, "reinit", base * share + 0.001 * (seed - 1))
                add("broken", side, level, "reinit", 0.55)
                if init and level == 0.5:
                    add("healed", side, level, "init", base * (share + 0.03))
    return pd.DataFrame(rows)


def similarities(seeds=(0, 1)):
    return pd.DataFrame(
        [
            dict(layer=k, side=side, level=0.5, kind="reinit", seed=s, similarity=1 - 0.1 * k * w,
                 measure="cka")
            for k in range(7) for s in seeds for side, w in (("bottom", 1.5), ("top", 0.2))
        ]
    )  # fmt: skip


def curves():
    rows = []
    for state, side, level in (("intact", "none", 0.0), ("healed", "bottom", 0.5)):
        for seed in (0, 1):
            for step in (0, 10, 20):
                score = 0.5 + step / (50 if state == "intact" else 100) + 0.01 * seed
                rows.append(
                    dict(step=step, score=score, state=state, side=side, level=level,
                         kind="reinit" if level else "none", seed=seed)
                )  # fmt: skip
    return pd.DataFrame(rows)


def report():
    rows = []
    for layer in (0, 1):
        for role, width in (("query", 0.04), ("feed_forward", 0.05)):
            for name, before, after in (("weight", width, 0.177), ("bias", 0.02, 0.0)):
                rows.append(
                    dict(name=f"{layer}.{role}.{name}", layer=layer, role=role, std_before=before,
                         std_after=after, relative_change=4.0, elements=100)
                )  # fmt: skip
    return pd.DataFrame(rows)


DRAWN = {
    "recovery_curves": lambda: figures.recovery_curves(results(("sst2", "imdb"))),
    "score_points": lambda: figures.score_points(results(("sst2", "imdb"))),
    "claims_figure": lambda: figures.claims_figure(st.claims(results(("sst2", "imdb")))),
    "weight_change": lambda: figures.weight_change(report(), model="lab/tiny"),
    "similarity": lambda: figures.similarity(similarities(), model="lab/tiny"),
    "learning_curves": lambda: figures.learning_curves(curves(), model="lab/tiny"),
}


@pytest.fixture(scope="module")
def drawn():
    return {name: draw() for name, draw in DRAWN.items()}


def line(axis, color, style="-"):
    """x and y of the line of a colour that is drawn in a style."""
    found = [
        x for x in axis.get_lines() if to_hex(x.get_color()) == color.lower()
        and x.get_linestyle() == style and len(x.get_xdata()) > 1 and x.get_marker() == "None"
    ]  # fmt: skip
    assert len(found) == 1
    return np.asarray(found[0].get_xdata()), np.asarray(found[0].get_ydata())


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_says_what_it_shows_and_can_be_read(drawn, name):
    figure = drawn[name]
    assert len(figure.caption) > 60 and len(figures.alt_text(figure)) > 40
    assert "tiny" in figure.caption
    if name != "weight_change":  # one corruption, no seeds
        assert "95 % t-interval" in figure.caption or name == "score_points"
        assert re.search(r"n = \d", figure.caption)
    assert "nan" not in figure.alt.lower()
    assert figure.get_figwidth() <= figures.PAGE
    figure.draw_without_rendering()
    assert all(t.get_fontsize() >= 8 for t in figure.findobj(Text) if t.get_text())
    drawn_box = figure.get_tightbbox()  # inches: nothing may be cut off at the edges
    assert drawn_box.x0 > -0.02 and drawn_box.x1 < figure.get_figwidth() + 0.02
    assert drawn_box.y0 > -0.02 and drawn_box.y1 < figure.get_figheight() + 0.02
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axis.get_tightbbox()) for axis in figure.axes)
    titles = [axis.get_tightbbox() for axis in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i])


def test_recovery_curves_draw_the_retained_score_of_each_side():
    figure = figures.recovery_curves(results())
    (axis,) = figure.axes
    x, y = line(axis, figures.COLORS["bottom"])
    assert x == pytest.approx([0, 1 / 6, 0.5, 1], abs=1e-5)
    assert y == pytest.approx([1, 0.9, 0.8, 0.75], abs=2e-3)
    _, y = line(axis, figures.COLORS["top"])
    assert y == pytest.approx([1, 0.97, 0.95, 0.75], abs=2e-3)
    ticks = [t.get_text() for t in axis.get_xticklabels()]
    assert ticks == ["0\n0", "1/6\n1", "1/2\n3", "1\n6"]
    assert "bottom 1/2 0.80" in figure.alt and "top 1/2 0.95" in figure.alt
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert {"init, healed", "scratch", "chance", "broken", "intact"} <= set(labels)


def test_recovery_bands_are_t_intervals():
    table = results()
    measured = st.measures(table)
    half = measured[(measured.side == "bottom") & (measured.level == 0.5)]
    expected = st.t_interval(half[half.kind == "reinit"].retained)
    (axis,) = figures.recovery_curves(table).axes
    band = axis.collections[0].get_paths()[0].vertices
    at = band[np.isclose(band[:, 0], 0.5), 1]
    assert (at.min(), at.max()) == pytest.approx((expected.low, expected.high))


def test_a_study_without_init_scratch_or_intervals_says_so():
    table = results(seeds=(0,), init=False)
    figure = figures.recovery_curves(table[table.state != "scratch"])
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert "init, healed" not in labels and "scratch" not in labels
    assert "one seed gives no interval" in figure.caption
    assert "initialiser" not in figure.caption


def test_chosen_layers_and_a_study_of_init_alone_are_drawn():
    table = results()
    table = table[table.state.isin(["intact", "scratch"]) | (table.side == "bottom")]
    corrupted = table.state.isin(["healed", "broken"])
    table = table[~corrupted | ((table.level == 0.5) & (table.kind == "reinit"))]
    chosen = table.assign(side=table.side.replace("bottom", "custom"))
    figure = figures.recovery_curves(chosen)
    assert "chosen layers 0.80" in figure.alt
    (drawn,) = figure.axes[0].containers
    assert drawn.lines[0].get_ydata() == pytest.approx([0.8], abs=2e-3)
    alone = figures.recovery_curves(table.assign(kind=table.kind.replace("reinit", "init")))
    assert "bottom 1/2 0.80" in alone.alt
    assert "Solid" not in alone.caption and "macro-F1 (sst2)" in alone.caption


def test_healed_scores_stay_legible_above_a_distant_chance():
    table = results(chance=0.05)
    table.loc[table.state == "broken", "score"] = 0.05
    figure = figures.recovery_curves(table)
    low, _ = figure.axes[0].get_ylim()
    assert 0.3 < low < 0.6
    assert "below the panels are not drawn" in figure.caption


def test_the_organism_is_called_a_demonstration():
    for draw in (figures.recovery_curves, figures.score_points):
        assert "never evidence" in draw(results(model="organism")).caption
        assert "never evidence" not in draw(results()).caption
    claims = st.claims(results(("a", "b"), model="organism"))
    assert "demonstration" in figures.claims_figure(claims).caption


def test_score_points_hold_every_score():
    table = results()
    (axis,) = figures.score_points(table).axes
    xs = [x.get_xdata()[0] for x in axis.get_lines() if len(x.get_xdata()) == 1]
    assert sorted(xs) == pytest.approx(sorted(table.score))
    names = [t.get_text() for t in axis.get_yticklabels()]
    assert names == ["intact", "bottom 1/6", "bottom 1/2", "top 1/6", "top 1/2", "all layers",
                     "scratch"]  # fmt: skip
    assert axis.get_xlabel() == "macro-F1"


def test_claims_figure_tells_verdicts_in_words():
    claims = st.claims(results(("a", "b")))
    claims.loc[2, ["effect", "low", "high", "p_corrected"]] = math.nan
    claims.loc[2, "verdict"] = "undecided"
    figure = figures.claims_figure(claims)
    words = [t.get_text() for t in figure.axes[0].texts]
    assert any(w.startswith("holds, p = 0.047") for w in words)
    assert "undecided" in words
    assert "no estimate" in figure.alt


def test_weight_change_separates_weights_from_biases():
    table = report()
    table.loc[len(table)] = dict(
        name="0.feed_forward.second.weight", layer=0, role="feed_forward", std_before=0.01,
        std_after=0.177, relative_change=1.0, elements=300,
    )  # fmt: skip
    figure = figures.weight_change(table)
    before, after = (a.collections[0].get_array().reshape(4, 2) for a in figure.axes[:2])
    roles = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert roles == ["query weight", "query bias", "feed forward weight", "feed forward bias"]
    pooled = math.sqrt((100 * 0.05**2 + 300 * 0.01**2) / 400)
    assert before[2, 0] == pytest.approx(pooled) and before[2, 1] == pytest.approx(0.05)
    assert after[3, 0] == 0


def test_similarity_and_learning_curves_draw_means_over_seeds():
    (axis,) = figures.similarity(similarities()).axes
    _, y = line(axis, figures.COLORS["bottom"])
    assert y == pytest.approx(1 - 0.15 * np.arange(7))
    (axis,) = figures.learning_curves(curves()).axes
    x, y = line(axis, figures.COLORS["intact"])
    assert x.tolist() == [0, 10, 20] and y == pytest.approx([0.505, 0.705, 0.905])


def test_many_panels_wrap():
    figure = figures.recovery_curves(results(tuple("abcde"), seeds=(0, 1), init=False))
    assert len(figure.axes) == 5
    named = [a.get_title(loc="left") for a in figure.axes if a.get_xlabel()]
    assert named == ["c", "d", "e"]  # the lowest of each column


def test_what_cannot_be_drawn_is_refused_in_one_line():
    with pytest.raises(HealingError, match="no column 'measure'"):
        figures.similarity(similarities().drop(columns="measure"))
    with pytest.raises(HealingError, match="nothing to draw"):
        figures.similarity(similarities().head(0))
    with pytest.raises(HealingError, match="nothing to draw"):
        figures.recovery_curves(results().query("state == 'intact'"))
    with pytest.raises(HealingError, match="plain file name"):
        figures.save(figures.similarity(similarities()), ".", "../elsewhere")


def test_saving_is_repeatable_and_keeps_the_words(tmp_path):
    for folder in ("a", "b"):
        path = figures.save(figures.similarity(similarities()), tmp_path / folder, "stream")
        assert path == tmp_path / folder / "stream.png"
    for name in ("stream.png", "stream.svg", "captions.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    figure = figures.similarity(similarities())
    image = Image.open(tmp_path / "a" / "stream.png")
    assert image.info["Description"] == figure.alt and round(image.info["dpi"][0]) == 200
    assert figure.caption in (tmp_path / "a" / "stream.svg").read_text(encoding="utf-8")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "stream.png",
        "stream.svg",
        "captions.json",
    }


def test_captions_are_kept_beside_one_another_and_survive_a_broken_index(tmp_path):
    figure = figures.similarity(similarities())
    figures.save(figure, tmp_path, "one")
    figures.save(figure, tmp_path, "two")
    assert list(figures.read_captions(tmp_path)) == ["one", "two"]
    (tmp_path / "captions.json").write_text("{broken", encoding="utf-8")
    assert figures.read_captions(tmp_path) == {}
    figures.save(figure, tmp_path, "three")
    stored = json.loads((tmp_path / "captions.json").read_text(encoding="utf-8"))
    assert stored == {"three": {"caption": figure.caption, "alt": figure.alt}}


def test_a_shown_figure_is_an_image_with_alternative_text(drawn, capsys):
    for figure in drawn.values():
        text = figures.figure_html(figure)
        assert len(text) <= 120_000
    text = figures.figure_html(drawn["similarity"], alt='a "quoted" <text>')
    assert 'alt="a &quot;quoted&quot; &lt;text&gt;"' in text
    assert "<figcaption" in text
    data = re.search(r"base64,([^\"]+)", text).group(1)
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.width >= 480
    colors = {c for _, c in image.convert("RGB").getcolors(1 << 16)}
    bottom = (0xD5, 0x5E, 0x00)
    assert min(sum((a - b) ** 2 for a, b in zip(c, bottom, strict=True)) for c in colors) < 60


def test_show_leaves_no_object_name_in_the_output(drawn, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    assert figures.show(drawn["similarity"], alt="two lines") is None
    assert shown[0]["text/plain"] == "Figure: two lines"
    assert 'alt="two lines"' in shown[0]["text/html"]
