"""How many bits the labels of words take, given a layer's activations: the online code.

Voita and Titov (2020, *Information-Theoretic Probing with Minimum Description Length*, section
2.2.2). Labels are sent in growing blocks. The first is sent with a uniform code; for every other
one, sender and receiver fit the same probe on all that was sent before, and the block takes the
cross-entropy that this probe has on it. So the length tells both how well the labels can be read
and how many words it takes to learn to; unlike accuracy it cannot be bought by memorising.

The blocks are Voita and Titov's fractions of the words, each filled up to the end of a sentence.
The probe is that of `probes` with l1 = 0 and l2 = precision / words, a Gaussian prior on the
weights that is the same at every block; features are standardised over the words sent before. Of
the `PRECISIONS` the one with the shortest code is taken, layer by layer, and the bits that say
which are part of the length. What a probe says is mixed with a uniform code, as if each class had
been seen once more than it was: a class that comes for the first time would else take infinitely
many bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import softmax

from healing_utils.base.errors import HealingError
from healing_utils.probing.probes import fit_probes

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
# Inverse variances of the weights. Parts of speech ask for 5 to 40 of MiniLM-L6, shuffled labels
# for the last; the organism's easiest layers would be some 10 % shorter with one still weaker.
PRECISIONS = (0.64, 5.0, 40.0, 320.0, 2560.0)
TOLERANCE = 1e-2  # of the probes: far below what a block more or less would change


def block_ends(groups: np.ndarray) -> list[int]:
    """Where the blocks of words end, (blocks,), whole groups each; neighbours of one group alike in
    `groups` (words,) and side by side."""
    words = len(groups)
    whole = np.flatnonzero(np.append(groups[1:] != groups[:-1], True)) + 1
    places = np.searchsorted(whole, [max(1, round(f * words)) for f in FRACTIONS])
    return sorted({int(whole[i]) for i in places})


def online_codelength(
    activations: Any, labels: Any, groups: Any = None, *, seed: int = 0, device: Any = None
) -> pd.DataFrame:
    """The length of the online code of `labels` (words,), layer by layer.

    `activations` (layers, words, features), of any float type; `groups` (words,), the sentence of
    each word, neighbours side by side, or None for words on their own. `seed` gives the order of
    the sentences. Returns a row a layer: `layer`, `codelength`, in bits for all words, and
    `uniform`, what a uniform code over the classes takes; `precision`, the one that was taken.
    Raises HealingError for labels of one class, and as `probes.fit_probes` does.
    """
    names, ids = np.unique(np.asarray(labels), return_inverse=True)
    if len(names) < 2:
        raise HealingError(f"every label is {names[0].item()!r}: a code needs two classes")
    words, classes = len(ids), len(names)
    groups = np.arange(words) if groups is None else np.asarray(groups)
    turn = np.random.default_rng(seed).permutation(np.unique(groups))
    place = np.empty(int(groups.max()) + 1, dtype=np.int64)
    place[turn] = np.arange(len(turn))
    order = np.argsort(place[groups], kind="stable")
    ids, ends = ids[order], block_ends(groups[order])
    rows = []
    for layer in range(len(activations)):
        x = np.asarray(activations[layer])[order][None]  # (1, words, features)
        lengths = sum(
            _block(x, ids, sent, end, classes, device)
            for sent, end in zip(ends, ends[1:], strict=False)
        )
        bits = np.log2(len(PRECISIONS)) + ends[0] * np.log2(classes) + lengths.min()
        precision = PRECISIONS[lengths.argmin()]
        rows.append((layer, float(bits), float(words * np.log2(classes)), precision))
    return pd.DataFrame(rows, columns=["layer", "codelength", "uniform", "precision"])


def _block(
    x: np.ndarray, ids: np.ndarray, sent: int, end: int, classes: int, device: Any
) -> np.ndarray:
    """Bits of the words from `sent` to `end`, when those before are known: one for each prior."""
    seen, known = np.unique(ids[:sent], return_inverse=True)
    said = np.zeros((len(PRECISIONS), end - sent, classes))
    if len(seen) == 1:
        said[..., seen] = 1
    else:
        probes = fit_probes(
            x[:, :sent], known, len(seen), 0.0, [precision / sent for precision in PRECISIONS],
            tolerance=TOLERANCE, device=device,
        )  # fmt: skip
        scores = probes.scores(
            np.broadcast_to(x[:, sent:end], (len(PRECISIONS), end - sent, x.shape[2]))
        )
        said[..., seen] = softmax(scores.astype(float), axis=-1)
    mixed = (sent * said + 1) / (sent + classes)
    return -np.log2(mixed[:, np.arange(end - sent), ids[sent:end]]).sum(axis=1)
