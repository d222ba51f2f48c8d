"""What leaves as a file or as HTML: whole, repeatable, and with its words."""

import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from healing_utils.base.errors import HealingError
from healing_utils.report import figures, plots, tables
from healing_utils.report import probe_figures as pf

SENTENCES = [["the", "<b>film", "was", "awful"], ["a", "fine", "day"]]


@plots.captioned("layer", "score")
def drawn(alt='Two lines, "falling" <fast>'):
    """What  is
    shown."""
    frame = pd.DataFrame({"panel": "", "line": "a", "x": [0, 1, 2], "y": [3, 2, 1], "seed": 0})
    figure, _ = plots.curves(frame, "x", "y", {"a": {"color": "#D55E00"}})
    figure.said = alt
    return figure, frame


def test_saving_is_repeatable_and_keeps_the_words_beside_one_another(tmp_path):
    for folder in ("a", "b"):
        path = figures.save(drawn(), tmp_path / folder, "stream")
        assert path == tmp_path / folder / "stream.png"
    names = {"stream.png", "stream.svg", "captions.json"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    image = Image.open(tmp_path / "a" / "stream.png")
    assert image.info["Description"] == drawn().alt and round(image.info["dpi"][0]) == 200
    assert "What is shown. n = 1 seed." in (tmp_path / "a" / "stream.svg").read_text("utf-8")
    figures.save(drawn(), tmp_path / "a", "two")
    index = tmp_path / "a" / "captions.json"
    assert list(json.loads(index.read_text("utf-8"))) == ["stream", "two"]
    index.write_text("{broken", encoding="utf-8")
    figures.save(drawn(), tmp_path / "a", "three")
    words = {"caption": "What is shown. n = 1 seed.", "alt": drawn().alt}
    assert json.loads(index.read_text("utf-8")) == {"three": words}
    # A task's name may be a hub's or a path: the file lies in the folder all the same.
    for name in ("../elsewhere", "healed_owner/set:one", "healed_/a b/c.csv", "healed_/x/c.csv"):
        path = figures.save(drawn(), tmp_path / "c", name)
        assert path.parent == tmp_path / "c" and path.exists()
    saved = sorted(p.stem for p in (tmp_path / "c").glob("*.png"))
    assert saved == sorted(json.loads((tmp_path / "c" / "captions.json").read_text()))
    kinds = [re.sub("-[0-9a-f]{6}$", "", stem) for stem in saved]
    assert kinds == ["elsewhere", "healed_c.csv", "healed_c.csv", "healed_set-one"]


def test_a_shown_figure_is_an_image_with_words_and_no_object_name(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    assert figures.show(drawn()) is None
    assert shown[0]["text/plain"] == f"Figure: {drawn().alt}"
    text = shown[0]["text/html"]
    assert len(text) <= 120_000 and "<figcaption" in text
    assert 'by layer: Two lines, &quot;falling&quot; &lt;fast&gt;."' in text
    data = re.search(r"base64,([^\"]+)", text).group(1)
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    colors = {c for _, c in image.convert("RGB").getcolors(1 << 16)}
    bottom = (0xD5, 0x5E, 0x00)
    assert min(sum((a - b) ** 2 for a, b in zip(c, bottom, strict=True)) for c in colors) < 60


def test_a_table_shows_dashes_and_fractions(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    row = {"level": 1 / 6, "x": np.nan, "x_low": np.nan, "x_high": np.nan}
    frame = pd.DataFrame([row, row | {"x": 0.5}, row | {"x": 0.5, "x_low": 0.4, "x_high": 0.6}])
    texts = tables.with_interval(frame, "x", digits=1)
    assert texts == ["–", "0.5", "0.5 [0.4, 0.6]"]
    tables.show_table(frame[["level", "x"]].assign(the_text="<a>"), "Caption.")
    assert shown[0]["text/plain"].splitlines()[:3] == [
        "Caption.", "level | x | the text", "1/6 | – | <a>"]  # fmt: skip
    assert "<td>&lt;a&gt;</td>" in shown[0]["text/html"]


def planted():
    """(layers, words, hidden) = (3, 7, 5): neuron (2, 4) is high at "awful", low at "fine"."""
    values = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    values[2, :, 4] = [0, 0, 0, 3, 0, -3, 0]
    return values


def spans(text):
    """(standard deviations, tint, opacity, word, raised number) of every word."""
    pattern = r'title="(.*?) sd".*?rgba\((.*?),([\d.]+)\)">(.*?)(?:<sup.*?>(.*?)</sup>)?</span>'
    return re.findall(pattern, text)


def test_words_carry_the_value_of_their_neuron():
    text = pf.word_activations(SENTENCES, planted(), [(2, 4), (0, 1)])
    assert isinstance(text, str) and "<script" not in text and "<style" not in text
    found = spans(text)
    words = [w.replace("<", "&lt;").replace(">", "&gt;") for s in SENTENCES for w in s]
    assert [word for *_, word, _ in found] == words * 2
    assert [number for *_, number in found[:7]] == ["", "", "", "+2", "", "−2", ""]
    spread = np.std([0, 0, 0, 3, 0, -3, 0])
    assert found[3][0] == f"+{3 / spread:.2f}"
    # Orange above and blue below, as the note says.
    assert found[3][1:3] == ("230,159,0", "0.37") and found[5][1:3] == ("86,180,233", "0.37")
    assert float(found[0][2]) == 0
    assert "layer 2, neuron 4:\n  the <b>film was awful[+2]\n  a fine[−2] day" in text.alt
    reference = np.zeros((3, 100, 5), np.float32)
    reference[2, :, 4] = np.tile([-1, 1], 50) + 2  # mean 2, standard deviation 1
    text = pf.word_activations(SENTENCES, planted(), [(2, 4)], reference)
    assert [number for *_, number in spans(text)] == ["−2"] * 3 + ["+1", "−2", "−5", "−2"]


@pytest.mark.parametrize("page", [0, 255])
@pytest.mark.parametrize("tint", pf.TINTS)
def test_the_strongest_tint_keeps_the_text_readable_on_dark_and_light_pages(page, tint):
    def luminance(rgb):  # WCAG 2, relative luminance
        c = np.asarray(rgb) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    color = np.array(tint.split(","), dtype=float)
    lights = [luminance(pf.OPACITY * color + (1 - pf.OPACITY) * page), luminance([255 - page] * 3)]
    assert (max(lights) + 0.05) / (min(lights) + 0.05) >= 4.5


def test_words_and_activations_have_to_fit():
    values = planted()
    values[1, 2, 3] = np.nan
    for sentences, array, neuron, message in (
        ([["one"]], values, (0, 0), r"of 1 words have \(layers, 1, hidden\), not \(3, 7, 5\)"),
        (SENTENCES, values[0], (0, 0), r"\(layers, 7, hidden\), not \(7, 5\)"),
        (SENTENCES, values, (1, 3), r"neuron \(1, 3\).*not finite"),
    ):
        with pytest.raises(HealingError, match=message):
            pf.word_activations(sentences, array, [neuron])
