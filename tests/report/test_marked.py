"""Sentences tinted by a neuron: what a word carries, as HTML and as plain text."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from healing_utils.base.errors import HealingError
from healing_utils.report import marked
from healing_utils.report.marked import word_activations

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
    text = word_activations(SENTENCES, planted(), [(2, 4), (0, 1)])
    assert isinstance(text, str) and "<script" not in text and "<style" not in text
    page = Spans(text)
    assert page.open == []
    words = [w for sentence in SENTENCES for w in sentence]
    assert [s["word"] for s in page.found] == words * 2  # "<b>film" is a word, not a tag
    first = page.found[:7]
    spread = np.std([0, 0, 0, 3, 0, -3, 0])
    assert [s["number"] for s in first] == ["", "", "", "+2", "", "\u22122", ""]
    assert first[3]["title"] == f"+{3 / spread:.2f} sd (activation 3)"
    tint = [re.search(r"rgba\((.*?),([\d.]+)\)", s["style"]).groups() for s in first]
    above, below = ("230,159,0", "86,180,233")  # orange and blue, as the note says
    assert (tint[3][0], tint[5][0]) == (above, below) and tint[3][1] == tint[5][1]
    assert float(tint[3][1]) == pytest.approx(0.6 * 3 / spread / 3, abs=0.006)
    assert float(tint[0][1]) == 0
    assert "layer 2, neuron 4:\n  the <b>film was awful[+2]\n  a fine[\u22122] day" in text.alt


def test_a_reference_sets_mean_and_scale():
    reference = np.zeros((3, 100, 5), np.float32)
    reference[2, :, 4] = np.tile([-1, 1], 50) + 2  # mean 2, standard deviation 1
    text = word_activations(SENTENCES, planted(), [(2, 4)], reference)
    numbers = [s["number"] for s in Spans(text).found]
    assert numbers == ["\u22122"] * 3 + ["+1"] + ["\u22122", "\u22125", "\u22122"]
    silent = word_activations(SENTENCES, np.zeros((3, 7, 5)), [(0, 0)])
    assert not any(s["number"] for s in Spans(silent).found)


@pytest.mark.parametrize("page", [0, 255])
@pytest.mark.parametrize("tint", marked.TINTS)
def test_the_strongest_tint_keeps_the_text_readable_on_dark_and_light_pages(page, tint):
    def luminance(rgb):  # WCAG 2, relative luminance
        c = np.asarray(rgb) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    color = np.array(tint.split(","), dtype=float)
    shown = marked.OPACITY * color + (1 - marked.OPACITY) * page
    lights = sorted([luminance(shown), luminance([255 - page] * 3)])
    assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5


def test_words_and_activations_have_to_fit():
    values = planted()
    for sentences, array, neurons, message in (
        ([["one"]], values, [(0, 0)], r"of 1 words have \(layers, 1, hidden\), not \(3, 7, 5\)"),
        (SENTENCES, values, [(3, 0)], r"no neuron \(3, 0\)"),
        (SENTENCES, values, [(-1, 0)], r"no neuron \(-1, 0\)"),
        (SENTENCES, values[0], [(0, 0)], r"\(layers, 7, hidden\), not \(7, 5\)"),
    ):
        with pytest.raises(HealingError, match=message):
            word_activations(sentences, array, neurons)
    with pytest.raises(HealingError, match="a reference of"):
        word_activations(SENTENCES, values, [(0, 0)], values[:2])
    values[1, 2, 3] = np.nan
    with pytest.raises(HealingError, match=r"neuron \(1, 3\).*not finite"):
        word_activations(SENTENCES, values, [(1, 3)])
