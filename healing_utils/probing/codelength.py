"""How many bits the labels of words take, given a layer's activations: the online code.

Voita and Titov (2020, *Information-Theoretic Probing with Minimum Description Length*, section
2.2.2). Labels are sent in blocks, their fractions of the words, each filled up to the end of a
sentence: the first with a uniform code, every other one with the cross-entropy of a probe that
sender and receiver fit on all that was sent before. So the length tells how well the labels can be
read and how many words it takes to learn to.

The probe has a Gaussian prior, l2 = precision / words, that is the same at every block. The best of
`PRECISIONS` is taken, and the bits that say which are part of the length. What a probe says is
mixed with a uniform code, as if each class had been seen once more: a new one would else take
infinitely many bits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import softmax

from healing_utils.base.errors import HealingError
from healing_utils.probing.probes import Words, column, fit_probes, labelled, shuffled

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
# Inverse variances of the weights. Parts of speech ask for 5 to 40 of MiniLM-L6, shuffled labels
# for the last; the organism's easiest layers would be some 10 % shorter with one still weaker.
PRECISIONS = (0.64, 5.0, 40.0, 320.0, 2560.0)
TOLERANCE = 1e-2  # of the probes: far below what a block more or less would change


def block_ends(groups: np.ndarray) -> list[int]:
    """Where the blocks of words end, (blocks,): at the ends of groups, which lie side by side."""
    words = len(groups)
    whole = np.flatnonzero(np.append(groups[1:] != groups[:-1], True)) + 1
    places = np.searchsorted(whole, [max(1, round(f * words)) for f in FRACTIONS])
    return sorted({int(whole[i]) for i in places})


def online_codelength(
    activations: Any, labels: Any, groups: Any = None, *, seed: int = 0, device: Any = None
) -> pd.DataFrame:
    """The length of the online code of `labels` (words,) given `activations` (layers, words,
    features); `groups` (words,): the sentence of each word, put into an order drawn by `seed`.

    Returns a row a layer: `layer`; `codelength` and `uniform`, the bits that it and a uniform code
    take for all words; the `precision` taken. Raises HealingError as `probes.probe_layers` does.
    """
    words = labelled(activations, labels)
    names, group = np.unique(column(groups, len(words.ids), "groups"), return_inverse=True)
    if len(names) < 2:
        raise HealingError("1 group (sentence): need at least 2, one to learn from")
    place = np.argsort(shuffled(len(names), seed))
    order = np.argsort(place[group], kind="stable")
    words, ends = words.at(order), block_ends(group[order])
    uniform, rows = np.log2(len(words.names)), []
    for layer in range(len(activations)):
        lengths = sum(_block(words, layer, sent, end, device) for sent, end in pairwise(ends))
        bits = np.log2(len(PRECISIONS)) + ends[0] * uniform + lengths.min()
        precision = PRECISIONS[lengths.argmin()]
        rows.append((layer, float(bits), float(len(words.ids) * uniform), precision))
    return pd.DataFrame(rows, columns=["layer", "codelength", "uniform", "precision"])


def _block(words: Words, layer: int, sent: int, end: int, device: Any) -> np.ndarray:
    """Bits of the words from `sent` to `end`, when those before are known: one for each prior."""
    before, block, classes = words.at(slice(sent)), words.at(slice(sent, end)), len(words.names)
    said = np.zeros((len(PRECISIONS), len(block.ids), classes))
    if (before.ids == before.ids[0]).all():
        said[..., before.ids[0]] = 1
    else:
        priors = [(0.0, precision / sent) for precision in PRECISIONS]
        x = before.features(layer)
        probes = fit_probes(x, before.ids, priors, tolerance=TOLERANCE, device=device)
        scores = probes.scores(block.features(layer)).numpy()
        said[..., probes.names] = softmax(scores.astype(float), axis=-1)
    mixed = (sent * said + 1) / (sent + classes)
    return -np.log2(mixed[:, np.arange(len(block.ids)), block.ids]).sum(axis=1)
