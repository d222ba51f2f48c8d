"""Figures as files and in notebooks: whole, repeatable, and with their words."""

import base64
import io
import json
import re

import pytest
from matplotlib.figure import Figure
from PIL import Image

from healing_utils.base.errors import HealingError
from healing_utils.report import figures, show
from healing_utils.report.plots import finish, key, style


def drawn(alt='Two lines, "falling" <fast>.'):
    with style():
        figure = Figure(figsize=(4, 3), layout="constrained")
        figure.subplots().plot([0, 1, 2], [3, 2, 1], color="#D55E00", label="bottom")
        key(figure, "top", color="#0072B2")
        return finish(figure, "what  is\n shown.", alt, "layer", "score")


def test_saving_is_repeatable_and_keeps_the_words(tmp_path):
    for folder in ("a", "b"):
        path = figures.save(drawn(), tmp_path / folder, "stream")
        assert path == tmp_path / folder / "stream.png"
    names = {"stream.png", "stream.svg", "captions.json"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    image = Image.open(tmp_path / "a" / "stream.png")
    assert image.info["Description"] == drawn().alt and round(image.info["dpi"][0]) == 200
    assert "What is shown." in (tmp_path / "a" / "stream.svg").read_text(encoding="utf-8")
    with pytest.raises(HealingError, match="plain file name"):
        figures.save(drawn(), tmp_path, "../elsewhere")


def test_captions_are_kept_beside_one_another_and_survive_a_broken_index(tmp_path):
    figures.save(drawn(), tmp_path, "one")
    figures.save(drawn(), tmp_path, "two")
    assert list(figures.read_captions(tmp_path)) == ["one", "two"]
    (tmp_path / "captions.json").write_text("{broken", encoding="utf-8")
    assert figures.read_captions(tmp_path) == {}
    figures.save(drawn(), tmp_path, "three")
    stored = json.loads((tmp_path / "captions.json").read_text(encoding="utf-8"))
    assert stored == {"three": {"caption": "What is shown.", "alt": drawn().alt}}


def test_a_shown_figure_is_an_image_with_words_and_no_object_name(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    assert figures.show(drawn()) is None
    assert shown[0]["text/plain"] == f"Figure: {drawn().alt}"
    text = shown[0]["text/html"]
    assert len(text) <= 120_000 and "<figcaption" in text
    assert 'alt="Two lines, &quot;falling&quot; &lt;fast&gt;."' in text
    data = re.search(r"base64,([^\"]+)", text).group(1)
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    colors = {c for _, c in image.convert("RGB").getcolors(1 << 16)}
    bottom = (0xD5, 0x5E, 0x00)
    assert min(sum((a - b) ** 2 for a, b in zip(c, bottom, strict=True)) for c in colors) < 60
    assert show.alt_text(Figure()) == "A figure."
