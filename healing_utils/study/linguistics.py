"""The stages `probing` and `neurons`: what the study's models know about words.

Both look into the same models: before fine-tuning (*pretrained*), with random weights
(*untrained*), fine-tuned (*intact*), and, for some tasks, *broken* and *healed*. A cell is one of
them on one column of one corpus, for one seed. The seed draws the training sentences, the inner
split and the control labels, so that models are compared on the same words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from healing_utils import organism
from healing_utils.base.errors import HealingError
from healing_utils.base.records import canonical
from healing_utils.healing import models
from healing_utils.healing.encoders import parse_level
from healing_utils.healing.training import evaluate
from healing_utils.probing.activations import (
    extract_activations,
    sentence_activations,
    stored_activations,
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
from healing_utils.study import scans
from healing_utils.study.study import Cell, Study
from healing_utils.texts.corpora import Corpus, load_corpus
from healing_utils.texts.tasks import TaskData

if TYPE_CHECKING:
    import pandas
    import torch

# Raised whenever a change makes the same parameters give other numbers here.
NUMERICS = 7
ABLATION_EXAMPLES = 200  # training sentences over which a neuron's mean is taken
ABLATED = (0.01, 0.05, 0.2)  # shares of all neurons
OVERLAP = 50  # strongest neurons whose overlap between rankings is given
SHOWN = 20  # strongest neurons that a record names


@dataclass(frozen=True)
class ProbeCell(Cell):
    """A model (`network`, None before any fine-tuning) on one column of one corpus."""

    corpus: str  # for people; what it holds is hashed into the key
    column: str
    source: tuple[str, str | None, str | None]  # what `load_corpus` is given
    network: Cell | None
    architecture: str  # as the model's configuration names it
    scan: str  # whose fine-tuned model it is, `main` for the main grid's

    @property
    def name(self) -> str:
        of = self.network.name if self.network else f"{self.model} {self.state} seed {self.seed}"
        return f"{of} on {self.corpus} {self.column}"

    def columns(self) -> dict[str, Any]:
        return {
            **super().columns(), "corpus": self.corpus, "column": self.column,
            "architecture": self.architecture, "scan": self.scan,
            "network": [self.network.stage, self.network.key] if self.network else None,
        }  # fmt: skip


# -- planning --------------------------------------------------------------------------------------


def sources(parameters: dict[str, Any]) -> list[tuple[str, str | None]]:
    """(corpus, column) pairs: of one corpus every column, of several the column at its place."""
    corpora, columns = parameters["corpus"], parameters["column"] or [None]
    if len(corpora) == 1:
        return [(corpora[0], column) for column in columns]
    if len(columns) == 1:
        columns = columns * len(corpora)
    if len(columns) != len(corpora):
        raise HealingError(
            f"corpus names {len(corpora)} corpora and column {len(columns)} columns: need one "
            "column for each, one for all, or a single corpus"
        )
    return list(zip(corpora, columns, strict=True))


def corpus(study: Study, name: str, column: str | None, seed: int) -> Corpus:
    """The sentences of one seed; what is loaded stays with the study."""
    p = study.parameters
    key = (name, column)
    if key not in study.corpora:
        study.corpora[key] = load_corpus(name, column, p["corpus_test"], words=p["word_column"])
    whole = study.corpora[key]
    return whole.draw(
        seed,
        _at_most(p["probe_train"], len(whole.train)),
        _at_most(p["probe_test"], len(whole.test)),
    )


def _at_most(wanted: int | None, there: int) -> int | None:
    return None if wanted is None else min(wanted, there)


def networks(study: Study, stage: str) -> list[tuple[str, str, int, Cell | None]]:
    """(model, state, seed, task cell or None) of every model that a stage looks into."""
    p = study.parameters
    tasks = p["probe_tasks"] or p["task"]
    levels = _probed_levels(p)
    found: list[tuple[str, str, int, Cell | None]] = []
    for model in p["probe_models"] or p["model"]:
        for seed in p["seeds"]:
            found.append((model, "pretrained", seed, None))
            if stage == "probing":
                found.append((model, "untrained", seed, None))
            for task in tasks:
                found.append((model, "intact", seed, study.cell("intact", model, task, seed)))
            if stage == "neurons":
                continue
            for task in study.healed_tasks:
                if task not in tasks:
                    found.append((model, "intact", seed, study.cell("intact", model, task, seed)))
                for side, level, kind, layers in study.corruptions(model):
                    if kind != "reinit" or level not in levels:
                        continue
                    for state in ("broken", "healed"):
                        cell = study.cell(state, model, task, seed, side, level, kind, layers)
                        found.append((model, state, seed, cell))
    known = {cell.key for *_, cell in found if cell is not None}
    if stage == "probing":
        for cell in scans.probed(study):
            if cell.key not in known:
                found.append((cell.model, "intact", cell.seed, cell))
                known.add(cell.key)
    return found


def _probed_levels(p: dict[str, Any]) -> set[float]:
    """The levels whose broken and healed models are probed; those of the recovery stage alone."""
    there = {parse_level(level) for level in p["levels"]}
    for level in p["probe_levels"]:
        if p["layers"] is None and parse_level(level) not in there:
            known = ", ".join(p["levels"])
            raise HealingError(f"probe_levels has {level!r}, which is not in levels: {known}")
    return {parse_level(level) for level in p["probe_levels"]}


def plan(study: Study, stage: str) -> list[Cell]:
    """The cells of `probing` or `neurons`, in the order in which they are computed; of `networks`
    those of the fine-tuned, broken and healed models that are looked into."""
    if stage == "networks":
        found = {cell.key: cell for *_, cell in networks(study, "probing") if cell is not None}
        return list(found.values())
    p, cells = study.parameters, []
    for model, state, seed, network in networks(study, stage):
        config = models.load_config(model, p["model_revision"])
        for name, column in sources(p):
            drawn = corpus(study, name, column, seed)
            determinants: dict[str, Any] = {
                "stage": stage,
                "numerics": NUMERICS,
                "network": json.loads(network.determinants) if network else {
                    "state": state,
                    "model": models.identity(model, p["model_revision"]),
                    **({"seed": seed} if state == "untrained" else {}),
                },
                "corpus": [drawn.train.sha(), drawn.test.sha()],
                "aggregation": p["aggregation"],
                "seed": seed,
                "threads": p["threads"],
            }  # fmt: skip
            ablated = stage == "neurons" and network and network.task in study.healed_tasks
            if stage == "neurons":
                determinants |= {"delta": p["neuron_delta"], "ablated": bool(ablated)}
            task, side, level, kind, layers = (
                (network.task, network.side, network.level, network.kind, network.layers)
                if network
                else ("none", "none", 0.0, "none", ())
            )
            cells.append(
                ProbeCell(
                    stage, state, model, task, seed, side, level, kind, layers,
                    config.num_hidden_layers, "accuracy", canonical(determinants),
                    drawn.name, drawn.column, (name, column, p["corpus_test"]), network,
                    config.model_type, getattr(network, "scan", "main"),
                )
            )  # fmt: skip
    return cells


# -- computing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """One part of a corpus, a row a word: activations (layers + 1, words, hidden), labels, words,
    and the sentence of each word, (words,)."""

    activations: np.ndarray
    labels: list[str]
    words: list[str]
    sentences: np.ndarray


def _model(study: Study, cell: ProbeCell) -> torch.nn.Module:
    if cell.network is not None:
        return study.network(cell.network)
    untrained = cell.state == "untrained"
    revision = study.parameters["model_revision"]
    return models.load_classifier(cell.model, 2, cell.seed, revision, untrained).to(study.device)


def _words(
    study: Study, cell: ProbeCell, model: torch.nn.Module
) -> tuple[Words, Words, dict[str, Any]]:
    """Training and test words, and what reading them met that a reader should know.

    The file of activations lives as long as the cell is computed, and longer only where the run is
    stopped: it is found again then.
    """
    p = study.parameters
    drawn = corpus(study, *cell.source[:2], cell.seed)
    path = study.run_folder / "activations" / f"{cell.key}.npy"
    counts: dict[str, int] = {}
    both = stored_activations(
        path,
        model,
        models.load_tokenizer(cell.model, p["model_revision"]),
        [*drawn.train.words, *drawn.test.words],
        p["aggregation"],
        identity=canonical(json.loads(cell.determinants)["network"]),
        device=study.device,
        counts=counts,
    )
    parts = []
    for part, rows in (
        (drawn.train, slice(0, drawn.train.size)),
        (drawn.test, slice(drawn.train.size, None)),
    ):
        parts.append(
            Words(
                both[:, rows],
                [label for sentence in part.labels for label in sentence],
                [word for sentence in part.words for word in sentence],
                np.repeat(np.arange(len(part)), [len(sentence) for sentence in part.words]),
            )
        )
    read = {
        "train_words": len(parts[0].labels), "test_words": len(parts[1].labels), **counts,
        "unseen": drawn.unseen, "dropped": drawn.dropped,
    }  # fmt: skip
    return parts[0], parts[1], read


def _forget(study: Study, cell: ProbeCell) -> None:
    for path in (study.run_folder / "activations").glob(f"{cell.key}.npy*"):
        path.unlink(missing_ok=True)


def _probe(study: Study, cell: ProbeCell, on_step: Callable[..., None]) -> dict[str, Any]:
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
        result |= study.similarity(cell, model)
    _forget(study, cell)
    return result


def _neurons(study: Study, cell: ProbeCell, on_step: Callable[..., None]) -> dict[str, Any]:
    p = study.parameters
    model = _model(study, cell)
    train, test, read = _words(study, cell, model)
    fitted = (train.activations, train.labels)
    scored = (test.activations, test.labels)
    settings = {"seed": cell.seed, "device": study.device}
    minimal = minimal_neurons(
        *fitted, *scored, delta=p["neuron_delta"], groups=train.sentences, **settings
    )
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
    _forget(study, cell)
    return result


def _ablation(
    study: Study, cell: ProbeCell, model: torch.nn.Module, ranking: list
) -> list[dict[str, Any]]:
    """The task's score with neurons held, at every position, at their mean over the tokens of the
    task's own training sentences: at zero, or at the mean of another corpus, the model would see
    states that it never sees."""
    p, task = study.settings(cell), study.task(cell.task)
    test = study.examples(cell).test
    texts = task.draw(cell.seed, p["train_size"], p["validation_size"])[0].texts
    means = sentence_activations(
        model, models.load_tokenizer(cell.model, p["model_revision"]),
        texts[:ABLATION_EXAMPLES], "mean", max_length=p["max_length"], device=study.device,
    ).mean(axis=1)  # (layers + 1, hidden)  # fmt: skip
    sizes = sorted({max(1, round(share * len(ranking))) for share in ABLATED})
    scores = ablation_scores(
        model, test, ranking, sizes, values=means, seed=cell.seed, device=study.device
    )
    whole = evaluate(model, test, device=study.device)[task.metric]
    rows = [{"k": 0, "which": "none", "score": whole, "metric": task.metric}]
    for row in scores.to_dict("records"):
        rows.append(
            {"k": row["k"], "which": row["which"], "score": row[task.metric], "metric": task.metric}
        )
    return rows


# -- sentences -------------------------------------------------------------------------------------


def probe_task(
    model: torch.nn.Module,
    tokenizer: Any,
    task: TaskData,
    pooling: str = "first",
    *,
    seed: int = 0,
    train_size: int | None = None,
    **settings: Any,
) -> pandas.DataFrame:
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


# -- for the notebook ------------------------------------------------------------------------------


def score_networks(study: Study) -> None:
    """See that every fine-tuned, broken and healed model that is probed is scored on its task too,
    whatever the task stages planned."""
    study.run("networks", plan=False)


def reading_notes(study: Study) -> list[str]:
    """What a reader of the probing table should know of how the words were read, a line a corpus
    column: words, what was left out, labels that no probe can know, windows."""
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


def strongest_neurons(neurons: pandas.DataFrame, count: int = 3) -> list[tuple[int, int]]:
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
    study: Study, model: str, count: int = 4
) -> tuple[list[list[str]], np.ndarray, np.ndarray]:
    """A few of the project's own sentences, with the pre-trained `model`'s activations of them and
    of a hundred more to compare with: (layers, words, hidden) each."""
    p = study.parameters
    network = models.load_classifier(model, 2, 0, p["model_revision"]).to(study.device)
    tokenizer = models.load_tokenizer(model, p["model_revision"])
    sentences = [words for words, _ in organism.tagged_sentences("validation")[: count + 100]]
    both = extract_activations(network, tokenizer, sentences, p["aggregation"], device=study.device)
    words = sum(map(len, sentences[:count]))
    return sentences[:count], both[:, :words], both[:, words:]


COMPUTE = {"probing": _probe, "neurons": _neurons}
