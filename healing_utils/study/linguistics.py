"""A cell of the stages `probing` and `neurons` becomes a result: what a model knows about words.

Both look into the same models: before fine-tuning (*pretrained*), with random weights
(*untrained*), fine-tuned (*intact*), and, for some tasks, *broken* and *healed*. A cell is one of
them on one column of one corpus, for one seed. The seed draws the training sentences, the inner
split and the control labels, so that models are compared on the same words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from healing_utils.base.errors import HealingError
from healing_utils.healing import models
from healing_utils.healing.training import evaluate
from healing_utils.probing.activations import (
    compact_activations,
    extract_activations,
    sentence_activations,
)  # fmt: skip
from healing_utils.probing.codelength import online_codelength
from healing_utils.probing.neurons import (
    ablation_scores,
    accuracy_curve,
    center_of_mass,
    minimal_neurons,
    rank_neurons,
    ranking_agreement,
)  # fmt: skip
from healing_utils.probing.probes import probe_layers
from healing_utils.study.cells import Cell
from healing_utils.study.compute import network, similarity
from healing_utils.study.sources import Sources
from healing_utils.texts.corpora import Corpus, load_corpus
from healing_utils.texts.tasks import TaskData

ABLATION_EXAMPLES = 200  # training sentences over which a neuron's mean is taken
ABLATED = (0.01, 0.05, 0.2)  # shares of all neurons
OVERLAP = 50  # strongest neurons whose overlap between rankings is given
SHOWN = 20  # strongest neurons that a record names


@dataclass(frozen=True)
class Words:
    """One part of a corpus, a row a word: activations (layers + 1, words, hidden), labels, words,
    and the sentence of each word, (words,)."""

    activations: np.ndarray
    labels: list[str]
    words: list[str]
    sentences: np.ndarray

    @classmethod
    def of(cls, activations: np.ndarray, part: Any) -> Words:
        return cls(
            activations,
            [label for sentence in part.labels for label in sentence],
            [word for sentence in part.words for word in sentence],
            np.repeat(np.arange(len(part)), [len(sentence) for sentence in part.words]),
        )


def _words(
    study: Sources, cell: Cell, model: torch.nn.Module
) -> tuple[Words, Words, dict[str, Any]]:
    """Training and test words, and what reading them met that a reader should know."""
    drawn = study.corpus(*cell.source, cell.seed)
    both, counts = compact_activations(
        model,
        study.tokenizer(cell.model),
        [*drawn.train.words, *drawn.test.words],
        study.parameters["aggregation"],
        device=study.device,
    )
    train = Words.of(both[:, : drawn.train.size], drawn.train)
    test = Words.of(both[:, drawn.train.size :], drawn.test)
    read = {
        "train_words": len(train.labels), "test_words": len(test.labels), **counts,
        "unseen": drawn.unseen, "dropped": drawn.dropped,
    }  # fmt: skip
    return train, test, read


def _model(study: Sources, cell: Cell) -> torch.nn.Module:
    if cell.network is not None:
        return network(study, cell.network)
    untrained, revision = cell.state == "untrained", study.parameters["model_revision"]
    return models.load_classifier(cell.model, 2, cell.seed, revision, untrained).to(study.device)


def _probe(study: Sources, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
    model = _model(study, cell)
    train, test, read = _words(study, cell, model)
    settings = {"seed": cell.seed, "device": study.device}
    table = probe_layers(
        train.activations, train.labels, test.activations, test.labels, train.words, test.words,
        train.sentences, **settings,
    )  # fmt: skip
    code = online_codelength(train.activations, train.labels, train.sentences, **settings)
    table = table.merge(code, on="layer")
    layers = json.loads(table.to_json(orient="records", double_precision=15))
    result: dict[str, Any] = {"layers": layers, "read": read}
    if cell.state in ("broken", "healed"):
        result |= similarity(study, cell, model)
    return result


def _neurons(study: Sources, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
    model = _model(study, cell)
    train, test, read = _words(study, cell, model)
    fitted = (train.activations, train.labels)
    scored = (test.activations, test.labels)
    settings = {"seed": cell.seed, "device": study.device}
    delta = study.parameters["neuron_delta"]
    minimal = minimal_neurons(*fitted, *scored, delta=delta, groups=train.sentences, **settings)
    neurons = len(minimal.ranking)
    sizes = [4**i for i in range(neurons.bit_length()) if 4**i < neurons]
    curve = accuracy_curve(*fitted, *scored, minimal.ranking, [*sizes, neurons], **settings)
    seen = minimal.ranked_on  # the words that its ranking saw: the others are to see the same
    same = (train.activations[:, seen], [train.labels[i] for i in seen])
    rankings = {
        "lca": minimal.ranking,
        **{m: rank_neurons(*same, method=m, **settings) for m in ("probeless", "gaussian")},
    }
    result = {
        "read": read,
        "neurons": neurons,
        "k": minimal.k,
        "delta": minimal.delta,
        "dev_full": minimal.dev_full,
        "dev_minimal": minimal.dev_minimal,
        "test_full": minimal.test_full,
        "test_minimal": minimal.test_minimal,
        "by_layer": minimal.by_layer,
        "center_of_mass": center_of_mass(minimal.by_layer) if minimal.k else None,
        "strongest": minimal.ranking[:SHOWN],
        "curve": curve.to_dict("records"),
        "agreement": ranking_agreement(rankings, [min(OVERLAP, neurons - 1)]).to_dict("records"),
        "ablation": [],
    }
    if json.loads(cell.determinants)["ablated"]:
        result["ablation"] = _ablation(study, cell, model, minimal.ranking)
    return result


def _ablation(
    study: Sources, cell: Cell, model: torch.nn.Module, ranking: list
) -> list[dict[str, Any]]:
    """The task's score with neurons held, at every position, at their mean over the tokens of the
    task's own training sentences: at zero, or at the mean of another corpus, the model would see
    states that it never sees."""
    test, metric = study.examples(cell).test, study.task(cell.task).metric
    means = sentence_activations(
        model, study.tokenizer(cell.model), study.draw(cell)[0].texts[:ABLATION_EXAMPLES], "mean",
        max_length=study.settings(cell)["max_length"], device=study.device,
    ).mean(axis=1)  # (layers + 1, hidden)  # fmt: skip
    sizes = sorted({max(1, round(share * len(ranking))) for share in ABLATED})
    scores = ablation_scores(
        model, test, ranking, sizes, values=means, seed=cell.seed, device=study.device
    )
    whole = evaluate(model, test, device=study.device)[metric]
    rows = [{"k": 0, "which": "none", "score": whole, "metric": metric}]
    for row in scores.to_dict("records"):
        rows.append({"k": row["k"], "which": row["which"], "score": row[metric], "metric": metric})
    return rows


COMPUTE = {"probing": _probe, "neurons": _neurons}


# -- for notebooks ---------------------------------------------------------------------------------


def probe_task(
    model: torch.nn.Module,
    tokenizer: Any,
    task: TaskData,
    pooling: str = "first",
    *,
    seed: int = 0,
    train_size: int | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """What each layer tells about whole sentences: probes for any task of the project.

    A sentence is the state of its first token ([CLS], wherever the tokenizer puts it) or the
    ``mean`` over its tokens. The training sentences are those that `seed` draws, all of them where
    `train_size` is None; scored are the task's test sentences. Returns `probe_layers`' table, a row
    a layer, without selectivity: a control task needs word types. Raises HealingError for a
    regression task.
    """
    if task.regression:
        raise HealingError(f"task {task.name!r} is a regression: a probe needs classes")
    train, _ = task.draw(seed, train_size, 0)
    device = settings.get("device")
    both = [
        sentence_activations(model, tokenizer, split.texts, pooling, device=device)
        for split in (train, task.test)
    ]
    return probe_layers(both[0], train.labels, both[1], task.test.labels, seed=seed, **settings)


def score_networks(study: Any) -> None:
    """See that every fine-tuned, broken and healed model that is probed is scored on its task too,
    whatever the task stages of the `Study` planned."""
    study.compute(study.plan("networks"), "networks")


def reading_notes(study: Any) -> list[str]:
    """What a reader of the `Study`'s probing table should know of how the words were read, a line a
    corpus column: words, what was left out, labels that no probe can know, windows."""
    notes = {}
    for cell in study.plan("probing"):
        record = study.store.read(cell.stage, cell.key)
        read = record["result"].get("read") if record else None
        if not read or (cell.model, cell.corpus, cell.column) in notes:
            continue
        words = f"{read['train_words']:,} training and {read['test_words']:,} test words"
        said = [f"{cell.corpus} {cell.column}, {cell.model}, seed {cell.seed}: {words}"]
        said += [f"{count:,} {what} left out" for what, count in read["dropped"].items()]
        if read["unseen"]:
            unseen = sum(read["unseen"].values())
            said.append(f"{unseen:,} test words with labels unseen in training count as errors")
        if read["windowed"]:
            said.append(f"{read['windowed']:,} sentences were read in several windows")
        if read["unknown"]:
            said.append(f"{read['unknown']:,} words are unknown to the tokenizer")
        notes[cell.model, cell.corpus, cell.column] = "; ".join(said)
    return list(notes.values())


def strongest_neurons(neurons: pd.DataFrame, count: int = 3) -> list[tuple[int, int]]:
    """The first `count` neurons of a table of `load_neurons(..., "strongest")`, by their best rank
    and then by how often they reach it. Of one model and column: neurons of several have nothing to
    do with each other."""
    for name in ("model", "column"):
        if neurons[name].nunique() > 1:
            raise HealingError(f"the strongest neurons of one {name} at a time, please")
    best = neurons.groupby(["layer", "neuron"])["rank"].agg(["min", "count"]).reset_index()
    best = best.sort_values(
        ["min", "count", "layer", "neuron"], ascending=[True, False, True, True]
    )
    return [(int(row.layer), int(row.neuron)) for row in best.head(count).itertuples()]


def own_sentences(
    study: Sources, model: str, count: int = 4
) -> tuple[list[list[str]], np.ndarray, np.ndarray]:
    """A few of the project's own sentences, with the pre-trained `model`'s activations of them and
    of a hundred more to compare with: (layers, words, hidden) each."""
    p = study.parameters
    loaded = models.load_classifier(model, 2, 0, p["model_revision"]).to(study.device)
    own: Corpus = load_corpus("organism", "pos")
    sentences = own.test.words[: count + 100]
    both = extract_activations(
        loaded, study.tokenizer(model), sentences, p["aggregation"], device=study.device
    )
    words = sum(map(len, sentences[:count]))
    return sentences[:count], both[:, :words], both[:, words:]
