"""Sentences as HTML, every word tinted by the activation of a neuron."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import numpy as np

from healing_utils.base.errors import HealingError

STRONG, FULL = 1.0, 3.0  # standard deviations: from here a word has its number; the full tint
# Orange above the mean, sky blue below (Okabe and Ito). At most 60 % opaque over the page's own
# background, so that its own text keeps a contrast of 4.5 whether it is dark on light or not.
TINTS, OPACITY = ("230,159,0", "86,180,233"), 0.6
NOTE = (
    "Activation per word, in standard deviations from the neuron's mean: orange above, blue "
    f"below; from {STRONG:g} on the rounded number stands behind the word."
)


class Marked(str):
    """HTML that carries its plain text as `alt`."""

    alt: str


def word_activations(
    sentences: Sequence[Sequence[str]],
    activations: np.ndarray,
    neurons: Iterable[tuple[int, int]],
    reference: np.ndarray | None = None,
) -> Marked:
    """The sentences, once per neuron, every word tinted by that neuron's activation.

    `sentences`: lists of words; `activations` (layers, words, hidden) of all their words in order,
    as `extract_activations` gives them; `neurons`: (layer, index) pairs, strongest first. Values
    are in standard deviations from the neuron's mean over the words of `reference` (layers, words,
    hidden), or over these sentences; from one on they are also written behind the word, rounded,
    so that nothing hangs on colour. Inline styles only. Returns HTML; `.alt` is the plain text.
    """
    reference = activations if reference is None else reference
    total = sum(map(len, sentences))
    if np.ndim(activations) != 3 or activations.shape[1] != total:
        shape = np.shape(activations)
        raise HealingError(
            f"activations of {total} words have (layers, {total}, hidden), not {shape}"
        )
    if reference.shape[::2] != activations.shape[::2]:
        raise HealingError(f"a reference of {reference.shape} for activations {activations.shape}")
    blocks, lines = [], [NOTE]
    for layer, index in neurons:
        if not (0 <= layer < activations.shape[0] and 0 <= index < activations.shape[2]):
            raise HealingError(f"no neuron ({layer}, {index}) in activations {activations.shape}")
        raw = np.asarray(activations[layer, :, index], dtype=float)  # (words,)
        if not np.isfinite(raw).all():
            raise HealingError(f"neuron ({layer}, {index}) has activations that are not finite")
        known = np.asarray(reference[layer, :, index], dtype=float)
        values = iter(zip((raw - known.mean()) / (known.std() or np.inf), raw, strict=True))
        name = f"layer {layer}, neuron {index}"
        blocks.append(f'<div style="margin-top:0.7em;font-weight:bold">{name}</div>')
        lines.append(f"{name}:")
        for sentence in sentences:
            marked = [_marked(word, *next(values)) for word in sentence]
            blocks.append(f'<div style="margin:2px 0">{" ".join(x for x, _ in marked)}</div>')
            lines.append("  " + " ".join(plain for _, plain in marked))
    text = Marked(
        f'<figure style="margin:0.5em 0;line-height:1.9">{"".join(blocks)}'
        f'<figcaption style="font-size:90%;line-height:1.4">{NOTE}</figcaption></figure>'
    )
    text.alt = "\n".join(lines)
    return text


def _marked(word: str, value: float, raw: float) -> tuple[str, str]:
    """A word as HTML and as plain text, `value` being its activation in standard deviations."""
    number = f"{value:+.0f}".replace("-", "\N{MINUS SIGN}") if abs(value) >= STRONG else ""
    tint = f"{TINTS[int(value < 0)]},{OPACITY * min(1.0, abs(value) / FULL):.2f}"
    signed = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    shown = f'<sup style="font-size:80%">{number}</sup>' if number else ""
    span = (
        f'<span title="{signed} sd (activation {raw:.3g})" style="padding:1px 3px;'
        f'border-radius:3px;background-color:rgba({tint})">{html.escape(word)}{shown}</span>'
    )
    return span, f"{word}[{number}]" if number else word
