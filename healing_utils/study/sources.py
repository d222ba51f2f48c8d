"""What a study reads: models, tasks and corpora as its parameters name them, loaded once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from healing_utils.base.errors import HealingError
from healing_utils.base.paths import run_folder
from healing_utils.base.records import Store
from healing_utils.healing import models
from healing_utils.healing.training import Encoded, encode, majority_scores, pick_device
from healing_utils.study.cells import Cell
from healing_utils.study.parameters import for_task, read_parameters
from healing_utils.texts.corpora import Corpus, load_corpus
from healing_utils.texts.tasks import Split, TaskData, load_task

SIMILARITY_EXAMPLES = 200  # test sentences over which representations are compared


@dataclass(frozen=True)
class Examples:
    """A task's examples for one seed, tokenised for one model."""

    train: Encoded
    validation: Encoded | None
    test: Encoded

    @property
    def sample(self) -> Encoded:
        """The test sentences over which representations are compared."""
        test, few = self.test, slice(0, SIMILARITY_EXAMPLES)
        types = test.types[few] if test.types else None
        return Encoded(test.ids[few], types, test.labels[few], test.pad)

    @cached_property
    def chance(self) -> dict[str, float]:
        return majority_scores(self.test.labels)


class Sources:
    """A study's parameters, its run's folder, and what it reads."""

    def __init__(self, parameters: Mapping[str, Any]):
        self.parameters = read_parameters(parameters)
        self.run_folder = run_folder(self.parameters["run"])
        self.store = Store(self.run_folder)
        torch.set_num_threads(self.parameters["threads"])
        self.device = pick_device(self.parameters["device"])
        # Kept by the study and not by the process: a kernel outlives changes of a local file.
        self._tasks: dict[str, TaskData] = {}
        self._corpora: dict[tuple[str, str | None], Corpus] = {}
        self._examples: dict[tuple[Any, ...], Examples] = {}
        self._contents: dict[tuple[Any, ...], tuple[str, str]] = {}
        self._test_contents: dict[str, str] = {}
        # Of the last broken cell, with its states: those of one unit stand side by side in a plan.
        self.intact_models: dict[str, tuple[torch.nn.Module, Any]] = {}

    @property
    def healed_tasks(self) -> list[str]:
        """Tasks whose broken and healed models are probed."""
        given = self.parameters["healed_tasks"]
        return self.parameters["task"] if given is None else given

    def settings(self, cell: Cell) -> dict[str, Any]:
        """The parameters as they are for a cell."""
        return for_task(self.parameters, cell.task) | dict(cell.settings)

    def config(self, model: str) -> Any:
        return models.load_config(model, self.parameters["model_revision"])

    def tokenizer(self, model: str) -> Any:
        return models.load_tokenizer(model, self.parameters["model_revision"])

    def task(self, name: str) -> TaskData:
        if name not in self._tasks:
            p = self.parameters
            self._tasks[name] = load_task(
                name, p["text_column"], p["label_column"], p["metric"], p["data_revision"],
                p["test_size"],
            )  # fmt: skip
        return self._tasks[name]

    def draw(self, cell: Cell) -> tuple[Split, Split | None]:
        """A cell's training and held-out examples; the draw depends on the seed."""
        p = self.settings(cell)
        return self.task(cell.task).draw(cell.seed, p["train_size"], p["validation_size"])

    def examples(self, cell: Cell) -> Examples:
        """A cell's examples, tokenised."""
        p, data = self.settings(cell), self.task(cell.task)
        key = (cell.model, cell.task, p["max_length"], cell.seed, p["train_size"])
        if key not in self._examples:
            test = {k[:3]: e.test for k, e in self._examples.items()}.get(key[:3])
            self._examples.clear()  # one at a time: several full data sets would not fit
            tokenizer = self.tokenizer(cell.model)

            def encoded(split: Split) -> Encoded:
                return encode(
                    tokenizer, split.texts, split.labels, p["max_length"], data.regression
                )

            train, validation = self.draw(cell)
            self._examples[key] = Examples(
                encoded(train),
                encoded(validation) if validation else None,
                test or encoded(data.test),  # the same for every seed
            )
        return self._examples[key]

    def content(self, name: str, seed: int, train_size: int | None) -> tuple[str, str, str]:
        """Hashes of a task's training, validation and test examples for one seed."""
        key = (name, seed, train_size)
        if key not in self._contents:
            data = self.task(name)
            train, validation = data.draw(seed, train_size, self.parameters["validation_size"])
            if name not in self._test_contents:  # the same examples for every seed
                self._test_contents[name] = data.test.sha()
            self._contents[key] = train.sha(), validation.sha() if validation else ""
        return (*self._contents[key], self._test_contents[name])

    def sources(self) -> list[tuple[str, str | None]]:
        """(corpus, column) pairs: of one corpus every column, of several the one at its place."""
        corpora, columns = self.parameters["corpus"], self.parameters["column"] or [None]
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

    def corpus(self, name: str, column: str | None, seed: int) -> Corpus:
        """The sentences of one seed."""
        p = self.parameters
        if (name, column) not in self._corpora:
            found = load_corpus(name, column, p["corpus_test"], words=p["word_column"])
            self._corpora[name, column] = found
        whole = self._corpora[name, column]
        sizes = [
            None if wanted is None else min(wanted, len(part))
            for wanted, part in ((p["probe_train"], whole.train), (p["probe_test"], whole.test))
        ]
        return whole.draw(seed, *sizes)
