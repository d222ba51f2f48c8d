"""What a profile takes, before anything runs: cells, tokens, operations, disk and time.

Cells, tokens and operations are counted from the plan, the model's shape and the tokenised texts.
Time is those counts times rates that are measured here in some seconds, once a model shape: a few
steps of the real loop, with a neighbour at work for every further worker. The estimate is kept in
the run's folder; when the run has ended, `compare` sets the seconds in its records beside it.

What the time stands on, where it is not measured:

- neurons: the search for the minimal set is taken to end at an eighth of all neurons;
- probes grow with words and layers; fits over neurons with words times features, and, as far as the
  solver takes the features' correlations, with their square;
- the fit that ranks makes a third more passes than others (on MiniLM-L6 51 for 39), and rankings
  without a probe cost nothing beside it;
- a fine-tuned model takes two loads: the pre-trained one, then its own weights;
- the floors of a baseline, seconds each, are left out;
- notebooks add the start of a kernel each and their figures, which are not in it; further workers
  compute meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from healing_utils.base.records import Store, canonical, write_atomically
from healing_utils.run import executors
from healing_utils.run.runner import ESTIMATE, duration

if TYPE_CHECKING:
    import torch

    from healing_utils.healing.training import Encoded
    from healing_utils.study.study import Cell, Study

# In the order in which a run computes them; `networks` are the models of other tasks that the
# probing stages look into.
STAGES = (
    "baseline", "corruption", "harms", "recovery", "scans", "networks", "probing", "neurons",
)  # fmt: skip
BUDGET = 3.0  # seconds that one measurement of a calibration should not exceed
TRIES = 3  # of a short measurement, of which the shortest counts: interruptions only add
STEPS = 3  # that a calibration trains
TEXTS = 256  # that a calibration scores, at most
FEW, MANY = 16, 3072  # neurons in the two fits that are timed
RANKING = 1.3  # see above
SENTENCES = 200  # of a corpus that are read to time the probes
RECORD_BYTES = 6000  # of a record, about
WARMED = ("distillation", "mlm_warm_up")  # recipes that train twice


# -- counting --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What of a classifier costs operations and space; `weights` are those of all its layers."""

    layers: int
    hidden: int
    weights: int
    parameters: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> Shape:
        """That of a classifier, with or without its weights."""
        from healing_utils.healing.encoders import encoder_layers

        layers = encoder_layers(model)
        return cls(
            len(layers),
            model.config.hidden_size,
            sum(p.numel() for layer in layers for p in layer.parameters()),
            sum(p.numel() for p in model.parameters()),
        )

    def forward(self, lengths: np.ndarray, layers: int | None = None) -> int:
        """Operations of a forward pass over texts of so many tokens, padding left out.

        Two a weight of the layers and token; and for the attention of a text of n tokens
        4 n² hidden a layer: the products of queries with keys and of weights with values.
        """
        layers = self.layers if layers is None else layers
        tokens, squares = int(lengths.sum()), int(np.square(lengths).sum())
        weights = self.weights * layers // self.layers
        return 2 * weights * tokens + 4 * self.hidden * layers * squares


@dataclass(frozen=True)
class Work:
    """What a cell, or a stage of them, takes. Every count adds up.

    `trained`, `read`: tokens trained on, and those that are only run through the model, to be
    scored, compared or probed. `training`, `forward`: operations. `compared`: tokens whose states
    in two models are compared. `probed`: words times layers; of a neuron cell, over all its fits,
    `fitted`: words, `features`: words times neurons, `squares`: of the neurons, as far as they are
    correlated. `kept`: bytes of weights.
    """

    trained: int = 0
    read: int = 0
    training: int = 0
    forward: int = 0
    loads: int = 0
    trainings: int = 0
    steps: int = 0
    compared: int = 0
    probed: int = 0
    fitted: int = 0
    features: int = 0
    squares: int = 0
    kept: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))


def trained_lengths(
    lengths: np.ndarray, epochs: float, batch_size: int, seed: int
) -> tuple[np.ndarray, int]:
    """Tokens of every example that `fine_tune` trains on with these settings, and its steps."""
    from healing_utils.healing.training import batches_of

    batches = batches_of(lengths, epochs, batch_size, seed)
    return lengths[np.concatenate(batches)], len(batches)


def neuron_fits(neurons: int, words: int) -> tuple[int, int, int]:
    """Words, words times features, and squares of features up to `probes.CORRELATED`, over all fits
    of a neuron cell: see `minimal_neurons` and `accuracy_curve`. A fifth of the words is held out
    of the search; the first fit, which ranks, counts `RANKING` times."""
    from healing_utils.probing.probes import CORRELATED

    wanted = max(1, neurons // 8)
    grid = [2**i for i in range(neurons.bit_length()) if 2**i < neurons] + [neurons]
    at = next(i for i, k in enumerate(grid) if k >= wanted)
    low, k = (grid[at - 1] if at else 0), grid[at]
    searched = grid[: at + 1]
    while k - low > 1:
        middle = (low + k) // 2
        searched.append(middle)
        low, k = (low, middle) if middle >= wanted else (middle, k)
    curve = [4**i for i in range(neurons.bit_length()) if 4**i < neurons]
    whole = [neurons, k, neurons, *curve * 3]
    inner = round(0.8 * words)
    fits = [(RANKING, inner, neurons)]
    fits += [(1, inner, k) for k in searched] + [(1, words, k) for k in whole]
    return (
        round(sum(times * seen for times, seen, _ in fits)),
        round(sum(times * seen * k for times, seen, k in fits)),
        round(sum(times * min(k, CORRELATED) ** 2 for times, _, k in fits)),
    )


class Counts:
    """Counts the work of a study's cells. Every text is tokenised once a model."""

    def __init__(self, study: Study):
        self.study = study
        self._shapes: dict[str, tuple[Shape, torch.nn.Module]] = {}
        self._tokens: dict[str, dict[Any, int]] = {}
        self._texts: dict[tuple, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._trained: dict[tuple, tuple[np.ndarray, int]] = {}
        self._corpora: dict[tuple, tuple[np.ndarray, int, int]] = {}

    def shape(self, model: str) -> Shape:
        return self._empty(model)[0]

    def _empty(self, model: str) -> tuple[Shape, torch.nn.Module]:
        """A model's shape, and the model without its weights."""
        if model not in self._shapes:
            import torch
            from transformers import AutoModelForSequenceClassification

            from healing_utils.healing import models

            config = models.load_config(model, self.study.parameters["model_revision"])
            with torch.device("meta"):
                empty = AutoModelForSequenceClassification.from_config(config)
            self._shapes[model] = Shape.of(empty), empty
        return self._shapes[model]

    def _lengths(self, model: str, texts: Sequence[Any]) -> np.ndarray:
        """Tokens of each text, cut as the study cuts it."""
        from healing_utils.healing import models
        from healing_utils.healing.training import encode

        p, known = self.study.parameters, self._tokens.setdefault(model, {})
        keys = [text if isinstance(text, str) else tuple(text) for text in texts]
        new = list(dict.fromkeys(key for key in keys if key not in known))
        if new:
            tokenizer = models.load_tokenizer(model, p["model_revision"])
            lengths = encode(tokenizer, new, [0] * len(new), p["max_length"]).lengths
            known.update(zip(new, lengths.tolist(), strict=True))
        return np.array([known[key] for key in keys], dtype=np.int64)

    def texts(self, cell: Cell) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of each training, validation and test example of a cell."""
        p = self.study.settings(cell)
        key = (cell.model, cell.task, cell.seed, p["train_size"])
        if key not in self._texts:
            data = self.study.task(cell.task)
            train, validation = data.draw(cell.seed, p["train_size"], p["validation_size"])
            self._texts[key] = tuple(
                self._lengths(cell.model, split.texts if split else [])
                for split in (train, validation, data.test)
            )
        return self._texts[key]

    def work(self, cell: Cell) -> Work:
        """What computing a cell takes, the models that it starts from being there."""
        if cell.stage == "probing":
            return self._probing(cell)
        if cell.stage == "neurons":
            return self._neurons(cell)
        untrained = cell.state in ("broken", "untrained")
        return self._broken(cell) if untrained else self._trained_cell(cell)

    def _read(self, cell: Cell, *texts: np.ndarray, layers: int | None = None) -> Work:
        """Texts run through the model."""
        shape = self.shape(cell.model)
        return Work(
            read=sum(int(lengths.sum()) for lengths in texts),
            forward=sum(shape.forward(lengths, layers) for lengths in texts),
        )

    def _similarity(self, cell: Cell) -> Work:
        """The first test sentences through a model, compared layer by layer with the intact one,
        whose states are mostly there from the last cell."""
        from healing_utils.healing import models
        from healing_utils.study.study import SIMILARITY_EXAMPLES, keeps_states

        few = self.texts(cell)[2][:SIMILARITY_EXAMPLES]
        config = models.load_config(cell.model, self.study.parameters["model_revision"])
        read = [few] if keeps_states(config, int(few.sum())) else [few, few]
        return self._read(cell, *read) + Work(compared=int(few.sum()))

    def _broken(self, cell: Cell) -> Work:
        scored = self._read(cell, self.texts(cell)[2])
        return scored + self._similarity(cell) + Work(loads=int(cell.state == "untrained"))

    def _training(self, cell: Cell, epochs: float) -> tuple[np.ndarray, int]:
        p = self.study.settings(cell)
        key = (cell.model, cell.task, cell.seed, p["train_size"], epochs, p["batch_size"])
        if key not in self._trained:
            train = self.texts(cell)[0]
            self._trained[key] = trained_lengths(train, epochs, p["batch_size"], cell.seed)
        return self._trained[key]

    def _trained_cell(self, cell: Cell) -> Work:
        from healing_utils.healing.recipes import WARM_UP
        from healing_utils.healing.training import moments

        p, shape = self.study.settings(cell), self.shape(cell.model)
        _, validation, test = self.texts(cell)
        layers = shape.layers - (len(cell.layers) if cell.recipe == "drop" else 0)
        shares = [WARM_UP, 1 - WARM_UP] if cell.recipe in WARMED else [1]
        done = Work(loads=2 if cell.start == "fine-tuned" else 1)
        for share in shares:
            lengths, steps = self._training(cell, share * p["epochs"])
            done += Work(
                trained=int(lengths.sum()), training=3 * shape.forward(lengths, layers),
                trainings=1, steps=steps,
            )  # fmt: skip
            if cell.recipe == "distillation" and share == WARM_UP:  # its teacher
                done += self._read(cell, lengths) + Work(loads=2)
        at = [0, *moments(steps, p["evaluations"])]
        done += self._read(cell, test, *[validation] * len(at), layers=layers)
        beside = cell.key in self.study.probed_beside
        kept = {"intact": cell.plain or beside, "healed": self.study.is_probed(cell)}
        if kept.get(cell.state):
            done += Work(kept=4 * shape.parameters)
        return done

    def corpus(self, cell: Cell) -> tuple[np.ndarray, int, int]:
        """Tokens of every window of a cell's sentences; its training words; all its words."""
        from healing_utils.healing import models
        from healing_utils.probing.activations import align, max_positions
        from healing_utils.study import linguistics

        name, column, _ = cell.source
        key = (cell.model, name, column, cell.seed)
        if key not in self._corpora:
            drawn = linguistics.corpus(self.study, name, column, cell.seed)
            tokenizer = models.load_tokenizer(cell.model, self.study.parameters["model_revision"])
            limit = max_positions(self._empty(cell.model)[1], tokenizer)
            read = align(tokenizer, [*drawn.train.words, *drawn.test.words], limit)
            self._corpora[key] = read.windows.lengths, drawn.train.size, read.words
        return self._corpora[key]

    def _probing(self, cell: Cell) -> Work:
        lengths, words, _ = self.corpus(cell)
        done = self._read(cell, lengths) + Work(
            loads=1 if cell.network is None else 2,
            probed=words * (self.shape(cell.model).layers + 1),
        )
        if cell.state in ("broken", "healed"):
            done += self._similarity(cell)
        return done

    def _neurons(self, cell: Cell) -> Work:
        from healing_utils.probing.neurons import WHICH
        from healing_utils.study.linguistics import ABLATED, ABLATION_EXAMPLES

        lengths, words, _ = self.corpus(cell)
        shape = self.shape(cell.model)
        fitted, features, squares = neuron_fits((shape.layers + 1) * shape.hidden, words)
        done = self._read(cell, lengths)
        loads = 1 if cell.network is None else 2
        done += Work(loads=loads, fitted=fitted, features=features, squares=squares)
        if json.loads(cell.determinants)["ablated"]:
            train, _, test = self.texts(cell)
            scored = 1 + len(ABLATED) * len(WHICH)
            done += self._read(cell, train[:ABLATION_EXAMPLES], *[test] * scored)
        return done


# -- calibrating -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Seconds a unit of `Work`, of one process among those that work at once.

    `load`: a model; `setup`: around a training; `step` and `training`: of a training, a step and
    an operation; `forward`: an operation; `compared`: a token.
    """

    load: float
    setup: float
    step: float
    training: float
    forward: float
    compared: float

    def seconds(self, work: Work) -> float:
        return (
            self.load * work.loads
            + self.setup * work.trainings
            + self.step * work.steps
            + self.training * work.training
            + self.forward * work.forward
            + self.compared * work.compared
        )


@dataclass(frozen=True)
class ProbeRates:
    """Seconds a word and layer of a probe; a word of a fit over neurons, a word and feature of one,
    and a pair of features."""

    probed: float
    fitted: float
    feature: float
    square: float

    def seconds(self, work: Work) -> float:
        return (
            self.probed * work.probed
            + self.fitted * work.fitted
            + self.feature * work.features
            + self.square * work.squares
        )


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Clock:
    """Times calls. Of one thread on a CPU it counts the processor's time: what else the machine is
    doing now is not the study's; of several threads, and on a GPU, the wall clock's."""

    def __init__(self, study: Study):
        alone = study.device.type == "cpu" and study.parameters["threads"] == 1
        self._now = time.process_time if alone else time.perf_counter
        self._wall = self._counted = 0.0

    @property
    def slower(self) -> float:
        """How many times as long as counted all calls took by the wall clock."""
        return self._wall / self._counted if self._counted else 1.0

    def __call__(self, work: Callable[[], Any]) -> tuple[float, float, Any]:
        """Seconds, the same by the wall clock, and what `work` returns: the shortest of `TRIES`, as
        far as they fit into a third of the budget."""
        tries: list[tuple[float, float, Any]] = []
        while len(tries) < TRIES and sum(wall for _, wall, _ in tries) < BUDGET / TRIES:
            start, wall = self._now(), time.perf_counter()
            result = work()
            tries.append((self._now() - start, time.perf_counter() - wall, result))
            self._counted, self._wall = self._counted + tries[-1][0], self._wall + tries[-1][1]
        return min(tries, key=lambda timed: timed[0])


# What another worker does to the caches and the clock of the processor, without its imports.
_NEIGHBOUR = (
    "import os, sys, numpy\n"
    "a = numpy.ones((384, 384), numpy.float32)\n"
    "while os.getppid() == int(sys.argv[1]): a @ a\n"
)


@contextlib.contextmanager
def neighbours(count: int, threads: int) -> Iterator[None]:
    """Keep `count` other processes at matrix products for as long as the block runs."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    command = [sys.executable, "-c", _NEIGHBOUR, str(os.getpid())]
    started = []
    try:
        for _ in range(count):
            quiet = subprocess.DEVNULL
            started.append(subprocess.Popen(command, env=environment, stderr=quiet))
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def calibrate(counts: Counts, model: str, task: str, clock: Clock) -> Rates:
    """Time a few steps of training and scoring a model on a task of the study."""
    from healing_utils.healing.similarity import layer_similarity
    from healing_utils.healing.training import predict

    study, shape = counts.study, counts.shape(model)
    cell = study.cell("intact", model, task, study.parameters["seeds"][0])
    test = study.examples(cell).test
    study._load(cell)  # the first load imports the model's code
    load, _, network = clock(lambda: study._load(cell))
    setup, step, rate = _training_rates(counts, cell, network, clock)

    text = rate * shape.forward(test.lengths) / len(test)  # about its seconds
    sample = _spread(test, min(TEXTS, max(2, int(BUDGET / text / 2))))
    few = _spread(sample, 32)
    predict(network, _spread(sample, 2), device=study.device)
    took, *_ = clock(lambda: predict(network, sample, device=study.device))
    scoring = took / shape.forward(sample.lengths)
    layer_similarity(network, network, _spread(sample, 2))
    took, *_ = clock(lambda: layer_similarity(network, network, few))
    compared = max(0.0, took - 2 * scoring * shape.forward(few.lengths)) / few.tokens
    return Rates(load, setup, step, rate, scoring, compared)


def _training_rates(
    counts: Counts, cell: Cell, network: torch.nn.Module, clock: Clock
) -> tuple[float, float, float]:
    """Seconds around a training, of a step, and of an operation: steps of the real loop with two
    examples and with as many as the study takes, or as fit into the budget."""
    from healing_utils.healing.training import fine_tune

    train, shape = counts.study.examples(cell).train, counts.shape(cell.model)
    settings = counts.study._training(cell, lambda *_: None)

    def steps(count: int, batch_size: int) -> tuple[float, float, int]:
        """Seconds around the steps, seconds a step, operations a step."""
        epochs = count / math.ceil(len(train) / batch_size)
        given = settings | {"batch_size": batch_size, "epochs": epochs}
        took, wall, done = clock(lambda: fine_tune(network, train, **given))
        inside = done.seconds * took / wall
        lengths, done_steps = trained_lengths(train.lengths, epochs, batch_size, cell.seed)
        return took - inside, inside / done_steps, 3 * shape.forward(lengths) // done_steps

    setup, small, few = steps(1, 2)  # also what only a first step takes
    if small > BUDGET:
        return setup, 0.0, small / few
    setup, small, few = steps(STEPS, 2)
    batch_size = min(settings["batch_size"], int(2 * BUDGET / (STEPS * small)))
    if batch_size <= 2:
        return setup, 0.0, small / few
    _, large, many = steps(STEPS, batch_size)
    # Between the two: what grows with the operations, at least half of it, and what does not.
    slope = (large - small) / (many - few) if many > few else 0.0
    rate = min(max(slope, large / many / 2), large / many)
    return setup, large - rate * many, rate


def _spread(data: Encoded, count: int) -> Encoded:
    """At most `count` of the examples, evenly over their lengths."""
    from healing_utils.healing.training import Encoded

    order = np.argsort(data.lengths, kind="stable")
    rows = order[np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)]
    types = [data.types[i] for i in rows] if data.types else None
    return Encoded([data.ids[i] for i in rows], types, data.labels[rows], data.pad)


def calibrate_probes(counts: Counts, cell: Cell, rates: Rates, clock: Clock) -> ProbeRates:
    """Time a probe of the middle layer, and three fits over neurons, on a cell's words."""
    from healing_utils.healing import models
    from healing_utils.probing.activations import extract_activations
    from healing_utils.probing.codelength import online_codelength
    from healing_utils.probing.neurons import L1, L2
    from healing_utils.probing.probes import fit_probes, probe_layers
    from healing_utils.study import linguistics

    study, p = counts.study, counts.study.parameters
    shape = counts.shape(cell.model)
    drawn = linguistics.corpus(study, *cell.source[:2], cell.seed)
    lengths = counts.corpus(cell)[0]
    affordable = BUDGET / (rates.forward * shape.forward(lengths) / len(lengths))
    train = min(len(drawn.train), SENTENCES, max(20, int(affordable)))
    test = min(len(drawn.test), train // 4 + 1)
    sentences = [*drawn.train.words[:train], *drawn.test.words[:test]]
    network = models.load_classifier(cell.model, 2, cell.seed, p["model_revision"])
    tokenizer = models.load_tokenizer(cell.model, p["model_revision"])
    states = extract_activations(
        network, tokenizer, sentences, p["aggregation"], device=study.device
    )
    tagged = [*drawn.train.labels[:train], *drawn.test.labels[:test]]
    labels = [label for sentence in tagged for label in sentence]
    words = [word for sentence in sentences for word in sentence]
    size = sum(map(len, drawn.train.words[:train]))
    groups = np.repeat(np.arange(train), [len(s) for s in drawn.train.words[:train]])

    def probe(layers: np.ndarray) -> float:
        """Seconds a layer, of its probes and its code."""
        train, test = layers[:, :size], layers[:, size:]
        settings = {"seed": cell.seed, "device": study.device}

        def both() -> None:
            probe_layers(
                train, labels[:size], test, labels[size:], words[:size], words[size:], groups,
                **settings,
            )  # fmt: skip
            online_codelength(train, labels[:size], groups, **settings)

        return clock(both)[0] / len(layers)

    probed = probe(states[len(states) // 2][None])
    if 3 * probed < BUDGET:  # small: a good part of it is the same for any number of layers
        probed = probe(states)

    everything = states[:, :size].transpose(1, 0, 2).reshape(1, size, -1)
    drawn_neurons = np.random.default_rng(0).permutation(everything.shape[2])

    def fit(neurons: int, words: int = size) -> float:
        x = np.ascontiguousarray(everything[:, :words, drawn_neurons[:neurons]])
        names, ids = np.unique(labels[:words], return_inverse=True)
        return clock(lambda: fit_probes(x, ids, len(names), L1, L2, device=study.device))[0]

    many = min(MANY, everything.shape[2])
    few = min(FEW, many // 2)
    word, half, whole = fit(few) / size, fit(many, size // 2), fit(many)
    feature = max(0.0, (whole - half) / (size - size // 2) - word) / many
    square = max(0.0, whole - size * (word + feature * many)) / many**2
    return ProbeRates(probed / size, word, feature, square)


# -- the plan --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A stage's cells: planned, done, and what is left of them with the seconds of each."""

    name: str
    planned: int
    done: int
    left: list[tuple[Cell, Work, float]] = field(repr=False)
    at_once: int

    @property
    def work(self) -> Work:
        return sum((work for _, work, _ in self.left), Work())

    @property
    def seconds(self) -> float:
        return sum(seconds for *_, seconds in self.left) / self.at_once


@dataclass(frozen=True)
class Plan:
    """The stages of a study; `disk`: bytes of records, weights kept, and activations while a cell
    is probed; `notes`: lines on how the time was found."""

    stages: list[Stage]
    disk: tuple[int, int, int]
    notes: list[str]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def processes(parameters: Mapping[str, Any], left: int) -> int:
    """Processes that compute at once when a stage has `left` cells; no more than the machine's
    cores carry."""
    wanted = min(parameters["workers"], left)
    return max(1, min(wanted, cores() // parameters["threads"]))


def unfinished(study: Study) -> Iterator[tuple[str, int, list[Cell]]]:
    """Stage by stage: its name, how many cells it plans, and those without a record; of a shard,
    its own alone.

    A cell that several stages or scans plan counts where it comes first."""
    known: set[str] = set()
    mine = executors.shard().has
    for name in STAGES:
        cells = {c.key: c for c in study.plan(name) if c.key not in known and mine(c)}
        known |= set(cells)
        left = [c for c in cells.values() if study.store.read(c.stage, c.key) is None]
        yield name, len(cells), left


def make(study: Study) -> Plan:
    """Plan what is left of a study, and time it on this machine."""
    from healing_utils.base.progress import Progress

    counts, clock, rows, stages = Counts(study), Clock(study), [], []
    rates = Calibrations(counts, clock)
    with Progress(2 * len(STAGES), "planning", unit="stage") as bar:
        for name, planned, left in unfinished(study):
            bar.update(0, note=f"counting {name}")
            rows.append((name, planned, [(cell, counts.work(cell)) for cell in left]))
            bar.update(1)
        others = 0
        if study.device.type == "cpu" and any(left for *_, left in rows):
            others = processes(study.parameters, sum(len(left) for *_, left in rows)) - 1
        start = time.perf_counter()
        with neighbours(others, study.parameters["threads"]):
            for name, planned, left in rows:
                bar.update(0, note=f"timing {name}")
                timed = [(cell, work, rates.seconds(cell, work)) for cell, work in left]
                at_once = processes(study.parameters, len(left))
                stages.append(Stage(name, planned, planned - len(left), timed, at_once))
                bar.update(1)
        took = time.perf_counter() - start
    notes = rates.notes()
    if notes:
        notes.append(f"timed in {duration(took)}, with {others + 1} processes at work")
    if clock.slower > 1.3:
        longer = duration(clock.slower * sum(stage.seconds for stage in stages))
        notes.append(
            f"the machine is busy with other things, which are left out above; as busy as now it "
            f"takes {clock.slower:.1f} times as long, {longer}"
        )
    return Plan(stages, _disk(counts, stages), notes)


class Calibrations:
    """Rates, measured when they are first asked for: once a model shape, and once a shape and
    column of a corpus."""

    def __init__(self, counts: Counts, clock: Clock):
        self.counts, self.clock = counts, clock
        self.tasks: dict[Shape, tuple[str, Rates]] = {}
        self.probes: dict[tuple, ProbeRates] = {}

    def rates(self, cell: Cell) -> Rates:
        shape = self.counts.shape(cell.model)
        if shape not in self.tasks:
            task = cell.task if cell.task != "none" else self.counts.study.parameters["task"][0]
            found = calibrate(self.counts, cell.model, task, self.clock)
            self.tasks[shape] = cell.model, found
        return self.tasks[shape][1]

    def seconds(self, cell: Cell, work: Work) -> float:
        """Of computing a cell, by one process."""
        rates = self.rates(cell)
        seconds = rates.seconds(work)
        if work.probed or work.fitted:
            key = (self.counts.shape(cell.model), *cell.source)
            if key not in self.probes:
                self.probes[key] = calibrate_probes(self.counts, cell, rates, self.clock)
            seconds += self.probes[key].seconds(work)
        return seconds

    def notes(self) -> list[str]:
        return [
            f"{model}: {1e-9 / r.training:.3g} G operations/s in training, "
            f"{1e-9 / r.forward:.3g} in scoring, and {1000 * r.step:.3g} ms a step"
            for model, r in self.tasks.values()
        ]


def _disk(counts: Counts, stages: Iterable[Stage]) -> tuple[int, int, int]:
    left = [(cell, work, stage) for stage in stages for cell, work, _ in stage.left]
    held = [0]
    for cell, _, stage in left:
        if stage.name in ("probing", "neurons"):
            shape, words = counts.shape(cell.model), counts.corpus(cell)[2]
            size = 2 * words * (shape.layers + 1) * shape.hidden  # float16
            held.append(size * stage.at_once)
    return RECORD_BYTES * len(left), sum(work.kept for _, work, _ in left), max(held)


def describe(plan: Plan, title: str) -> str:
    """The plan as text, a row a stage."""
    head = ("stage", "cells", "done", "left", "trained", "scored", "operations", "time")
    rows = [head]
    for stage in plan.stages:
        if stage.planned or stage.name != "networks":
            rows.append(_row(stage.name, stage.planned, stage.done, stage.work, stage.seconds))
    total = sum((stage.work for stage in plan.stages), Work())
    planned, done = (sum(getattr(s, name) for s in plan.stages) for name in ("planned", "done"))
    rows.append(_row("all", planned, done, total, plan.seconds))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [title]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    records, weights, activations = (f"{_short(size)}B" for size in plan.disk)
    lines.append(
        f"disk: records {records}, weights kept {weights}; activations {activations} while probing"
    )
    return "\n".join([*lines, *plan.notes])


def _row(name: str, planned: int, done: int, work: Work, seconds: float) -> tuple[str, ...]:
    left = planned - done
    counts = (work.trained, work.read, work.training + work.forward)
    shown = [_short(count) if left else "-" for count in counts]
    return (
        name, str(planned), str(done), str(left), *shown, duration(seconds) if left else "-",
    )  # fmt: skip


def _short(count: float) -> str:
    """``950``, ``1.23 M``, ``45.6 T``: three digits and a power of a thousand."""
    units = ["", "k", "M", "G", "T", "P"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}" if units[0] else f"{count:.0f} "


# -- the estimate and what came of it --------------------------------------------------------------


def keep(plan: Plan, run: Path) -> Path | None:
    """Keep the estimate of what is left in the run's folder; None where nothing is left."""
    stages = {
        stage.name: {"cells": {c.key: [c.stage, round(s, 3)] for c, _, s in stage.left}}
        for stage in plan.stages
        if stage.left
    }
    if not stages:
        return None
    write_atomically(run / ESTIMATE, canonical({"stages": stages}) + "\n")
    return run / ESTIMATE


def compare(run: Path) -> list[str]:
    """Estimated against measured time of the cells computed since the estimate was kept, a line a
    stage. No lines where there is no estimate, or none of its cells is done.

    Both are sums over the cells, each as long as one process takes over it.
    """
    try:
        rows = _compared(run)
    except FileNotFoundError:
        return []
    except Exception as error:  # whatever it holds: the run itself is done
        return [f"{run / ESTIMATE} cannot be read ({error}): nothing to compare with"]
    if not rows:
        return []
    rows.append(("all", *(sum(row[i] for row in rows) for i in range(1, 5))))
    return ["Time of the cells, summed over processes, estimated and measured:"] + [
        f"  {name:10} {done} of {of} cells: {duration(estimated)} estimated, "
        f"{duration(measured)} measured, {estimated / max(measured, 1e-3):.2f} times"
        for name, done, of, estimated, measured in rows
    ]


def _compared(run: Path) -> list[tuple[str, int, int, float, float]]:
    """Stage, cells done, cells of the estimate, and the seconds of those done, twice."""
    store, rows = Store(run), []
    for name, stage in json.loads((run / ESTIMATE).read_text("utf-8"))["stages"].items():
        estimated = measured = 0.0
        done = 0
        for key, (where, seconds) in stage["cells"].items():
            record = store.read(where, key)
            if record is not None:
                done += 1
                estimated += seconds
                measured += record["times"]["seconds"]
        if done:
            rows.append((name, done, len(stage["cells"]), estimated, measured))
    return rows
