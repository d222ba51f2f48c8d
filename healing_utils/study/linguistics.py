"""A cell of the stages `probing` and `neurons` becomes a result: what a model knows about words.

A cell is one model on one column of one corpus, for one seed, which draws the training sentences,
the inner split and the control labels: models are compared on the same words.
"""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch

from healing_utils.healing import models
from healing_utils.healing.training import evaluate
from healing_utils.probing import activations, neurons
from healing_utils.probing.probes import online_codelength, probe_layers
from healing_utils.study.cells import CORRUPTED, Cell
from healing_utils.study.compute import network, similarity

ABLATION_EXAMPLES = 200  # training sentences over which a neuron's mean is taken
ABLATED = (0.01, 0.05, 0.2)  # shares of all neurons
OVERLAP = 50  # strongest neurons whose overlap between rankings is given
SHOWN = 20  # strongest neurons that a record names


def _words(study: Any, cell: Cell) -> tuple[Any, ...]:
    """The model; activations (layers + 1, words, hidden) and labels of training and of test words;
    the words of both; the sentence of each training word; what reading met that a reader should
    know; and the settings of every probe."""
    if cell.network is not None:
        model = network(study, cell.network)
    else:
        untrained, revision = cell.state == "untrained", study.parameters["model_revision"]
        model = models.load_classifier(cell.model, 2, cell.seed, revision, untrained)
        model = model.to(study.device)
    drawn = study.corpus(*cell.source, cell.seed)
    train, test = drawn.train, drawn.test
    both, counts = activations.compact_activations(
        model, study.tokenizer(cell.model), [*train.words, *test.words],
        study.parameters["aggregation"], device=study.device,
    )  # fmt: skip
    labels = [list(chain(*part.labels)) for part in (train, test)]
    words = [list(chain(*part.words)) for part in (train, test)]
    sentences = np.repeat(np.arange(len(train)), [len(sentence) for sentence in train.words])
    given = both[:, : train.size], labels[0], both[:, train.size :], labels[1]
    read = {
        "train_words": train.size, "test_words": test.size, **counts, "unseen": drawn.unseen,
        "dropped": drawn.dropped,
    }  # fmt: skip
    settings = {"seed": cell.seed, "device": study.device}
    return model, given, words, sentences, read, settings


def _probe(study: Any, cell: Cell) -> dict[str, Any]:
    model, given, words, sentences, read, settings = _words(study, cell)
    table = probe_layers(*given, *words, sentences, **settings)
    code = online_codelength(*given[:2], sentences, **settings)
    layers = table.merge(code, on="layer").to_json(orient="records", double_precision=15)
    like = similarity(study, cell, model) if cell.state in CORRUPTED else {}
    return {"layers": json.loads(layers), "read": read, **like}


def _neurons(study: Any, cell: Cell) -> dict[str, Any]:
    model, given, _, sentences, read, settings = _words(study, cell)
    delta = study.parameters["neuron_delta"]
    minimal = neurons.minimal_neurons(*given, delta=delta, groups=sentences, **settings)
    ranking, count = minimal.ranking, len(minimal.ranking)
    sizes = [4**i for i in range(count.bit_length()) if 4**i < count]
    curve = neurons.accuracy_curve(*given, ranking, [*sizes, count], **settings)
    seen = minimal.ranked_on  # the words that its ranking saw: the others are to see the same
    same = (given[0][:, seen], [given[1][i] for i in seen])
    rankings = {"lca": ranking}
    for method in ("probeless", "gaussian"):
        rankings[method] = neurons.rank_neurons(*same, method=method, **settings)
    agreement = neurons.ranking_agreement(rankings, [min(OVERLAP, count - 1)])
    told = ("k", "delta", "dev_full", "dev_minimal", "test_full", "test_minimal", "by_layer")
    ablated = json.loads(cell.determinants)["ablated"]
    return {
        **{name: getattr(minimal, name) for name in told},
        "read": read,
        "neurons": count,
        "center_of_mass": neurons.center_of_mass(minimal.by_layer) if minimal.k else None,
        "strongest": ranking[:SHOWN],
        "curve": curve.to_dict("records"),
        "agreement": agreement.to_dict("records"),
        "ablation": _ablation(study, cell, model, ranking) if ablated else [],
    }


def _ablation(
    study: Any, cell: Cell, model: torch.nn.Module, ranking: list
) -> list[dict[str, Any]]:
    """The task's score with neurons held, at every position, at their mean over the tokens of the
    task's own training sentences: at zero, or at the mean of another corpus, the model would see
    states that it never sees."""
    test, metric = study.examples(cell)[2], study.task(cell.task).metric
    means = activations.sentence_activations(
        model, study.tokenizer(cell.model), study.draw(cell)[0].texts[:ABLATION_EXAMPLES], "mean",
        max_length=study.settings(cell)["max_length"], device=study.device,
    ).mean(axis=1)  # (layers + 1, hidden)  # fmt: skip
    sizes = sorted({max(1, round(share * len(ranking))) for share in ABLATED})
    scores = neurons.ablation_scores(
        model, test, ranking, sizes, values=means, seed=cell.seed, device=study.device
    )
    whole = pd.DataFrame([{"k": 0, "which": "none"} | evaluate(model, test, device=study.device)])
    rows = pd.concat([whole, scores]).rename(columns={metric: "score"}).assign(metric=metric)
    return rows[["k", "which", "score", "metric"]].to_dict("records")


COMPUTE = {"probing": _probe, "neurons": _neurons}


# -- for notebooks ---------------------------------------------------------------------------------


def reading_notes(study: Any) -> list[str]:
    """What a reader of the `Study`'s probing table should know of how words were read, a line a
    corpus column and model."""
    notes: dict[tuple[Any, ...], str] = {}
    for cell in study.plan("probing"):
        record, of = study.store.read(cell.stage, cell.key), (cell.model, cell.corpus, cell.column)
        if record is None or of in notes:
            continue
        read = record["result"]["read"]
        words = f"{read['train_words']:,} training and {read['test_words']:,} test words"
        said = [f"{cell.corpus} {cell.column}, {cell.model}, seed {cell.seed}: {words}"]
        unseen = "test words with labels unseen in training count as errors"
        counts = {f"{what} left out": count for what, count in read["dropped"].items()} | {
            unseen: sum(read["unseen"].values()),
            "sentences were read in several windows": read["windowed"],
            "words are unknown to the tokenizer": read["unknown"],
        }
        said += [f"{count:,} {what}" for what, count in counts.items() if count]
        notes[of] = "; ".join(said)
    return list(notes.values())
