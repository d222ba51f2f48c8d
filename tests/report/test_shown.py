"""What leaves as a file or as HTML: whole, repeatable, and with its words."""

import base64
import io
import json
import re

import numpy as np
import pandas as pd
from PIL import Image

from healing_utils.report import figures, plots, tables


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
