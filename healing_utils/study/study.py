"""The study: plans its stages, has what is missing computed, and gives their tables."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from healing_utils.analysis.results import table
from healing_utils.base.errors import HealingError, Unwritable
from healing_utils.base.paths import run_folder, shown_folder
from healing_utils.base.progress import Progress
from healing_utils.base.records import Store, canonical, read_json, set_aside, write_atomically
from healing_utils.healing import models
from healing_utils.healing.examples import reading_note
from healing_utils.healing.training import Encoded, encode, pick_device
from healing_utils.study import compute, linguistics, planning, pool
from healing_utils.study.cells import ALL_STAGES, Cell
from healing_utils.study.parameters import for_task, has_records, read_parameters, refuse_another
from healing_utils.texts.corpora import Corpus, load_corpus
from healing_utils.texts.tasks import Split, TaskData, load_task

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scikit-learn")
FEW = 3  # cells: processes take seconds to start
SIMILARITY_EXAMPLES = 200  # test sentences over which representations are compared
Examples = tuple[Encoded, Encoded | None, Encoded]  # training, validation, test


class Study:
    """A run's folder and its parameters; plans and runs the stages.

    ``Study(parameters).run("baseline")`` computes what is missing and returns the stage's table.
    """

    plan, corruptions = planning.plan, planning.corruptions

    def __init__(self, parameters: Mapping[str, Any]):
        self.parameters = read_parameters(parameters)
        self.given = {name: self.parameters[name] for name in parameters}
        if not self.parameters["scans"]:  # 04_linguistics has none of its own
            self.given.pop("scans", None)
        self.run_folder = run_folder(self.parameters["run"])
        self.store = Store(self.run_folder)
        torch.set_num_threads(self.parameters["threads"])
        self.device = pick_device(self.parameters["device"])
        # Kept by the study and not by the process: a kernel outlives changes of a local file.
        for name in ("task", "content", "test_content", "whole_corpus"):
            setattr(self, name, functools.cache(getattr(self, name)))
        self.on_step: Callable[..., None] = lambda *_: None  # of the training that goes on
        self._examples: dict[tuple[Any, ...], Examples] = {}
        # Of the last broken cell, with its states: those of one unit stand side by side in a plan.
        self.intact_models: dict[str, tuple[torch.nn.Module, Any]] = {}
        self._processes: pool.Processes | None = None  # they go on from stage to stage

    def describe(self) -> str:
        """Folder, models, tasks and device of this study, for the top of a notebook."""
        p, made = self.parameters, self.provenance()
        lines = [f"run {shown_folder(self.run_folder)}"]
        for model in p["model"]:
            config = self.config(model)
            lines.append(
                f"model {model}: {type(config).__name__.removesuffix('Config')}, "
                f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
                f"vocabulary {config.vocab_size:,}"
            )
        for name in p["task"]:
            data, size = self.task(name), for_task(p, name)["train_size"]
            what = f"{data.num_labels} classes" if data.classes else "regression"
            unread = f"; nothing is read from {', '.join(data.unused)}" if data.unused else ""
            lines.append(
                f"task {name}: {what}, {len(data.pool) if size is None else size:,} training "
                f"examples, {len(data.test):,} scored, metric {data.metric}{unread}"
            )
        lines += self.vocabulary_notes()
        if p["head"] != "first":
            lines.append(f"head: reads the {p['head']} over all tokens")
        for name, scan in p["scans"].items():
            if scan.get("task") and not set(scan["task"]) & set(p["task"]):
                tasks = ", ".join(scan["task"])
                lines.append(
                    f"scan {name} is left out: its tasks ({tasks}) are not among the study's"
                )
        lines.append(
            f"on {made['device']} with {made['threads']} threads, Python {made['python']}, "
            f"torch {made['versions']['torch']}, transformers {made['versions']['transformers']}"
        )
        return "\n".join(lines)

    def vocabulary_notes(self) -> list[str]:
        """A line for every model whose vocabulary is not made for a task's texts. Raises
        HealingError where its tokenizer cannot read them."""
        lines = []
        for task, model in product(self.parameters["task"], self.parameters["model"]):
            tokenizer, texts = self.tokenizer(model), self.task(task).test.texts
            try:
                note = reading_note(tokenizer, texts)
            except Exception as error:  # the tokenizers' own are plain ones
                raise HealingError(f"model {model} cannot read task {task}: {error}") from error
            lines += [f"model {model} reads task {task} in {note}"] if note else []
        return lines

    def run(self, stage: str, plan: bool = True) -> pd.DataFrame:
        """Compute the stage's missing cells and return its table.

        Cells that another run on the same folder is computing are waited for. `plan` makes these
        cells the stage's cells in this folder; without it they are computed beside them. Raises
        HealingError where cells failed, after all others are done, or at once where one cannot be
        kept, and before any is computed where the folder has records of other parameters.
        """
        if {"levels", "layers", "scans"} & self.given.keys() and not has_records(self.run_folder):
            for other in ("recovery", "scans"):  # what no model has is refused at once
                self.plan(other)
        cells = self.plan(stage)
        if plan:
            self.keep_plan(stage, cells)
        self.compute(cells, stage)
        return self.table(stage, cells)

    def compute(
        self, cells: list[Cell], what: str, executor: str | None = None, address: str | None = None
    ) -> None:
        """Compute those of `cells` that have no record; `what` they are stands in the progress and
        in errors. `executor`: `workers`, as many processes as the parameter says, `in-process`, or
        `ray`, the cluster at `address`; by itself processes where there are to be several. Raises
        as `run` does, and where Ray is not there."""
        self.store.begin()
        self.store.sweep()
        cells = planning.once(cells)  # scans may share one
        todo = [cell for cell in cells if self.store.read(cell.stage, cell.key) is None]
        workers, failures = self.parameters["workers"], []
        if executor is None and workers == 1:  # so that no further process is on its GPU
            executor = "in-process"
        found = len(cells) - len(todo)
        with Progress(len(cells), what, "cell", found) as bar, contextlib.ExitStack() as opened:
            bar.update(0, note=f"{found} found finished")
            if not todo:
                return
            note = functools.partial(bar.update, 0)
            make = functools.partial(Study, {**self.parameters, "run": str(self.run_folder)})
            if executor == "ray":
                backend: Any = pool.Ray(self, make, address)
                opened.callback(backend.close)
            elif executor == "in-process" or len(todo) < FEW:
                backend = pool.InProcess(self, note)
            else:
                backend = self._processes = self._processes or pool.Processes(make, workers)
            needs = functools.partial(planning.needs, self)
            computed = pool.outcomes(self, todo, needs, backend, note)
            opened.enter_context(contextlib.closing(computed))  # no process goes on after a stop
            for cell, error in computed:
                if isinstance(error, Unwritable):
                    raise Unwritable(f"{cell.name}: {error}; finished cells are kept")
                failures += [(cell, error)] if error else []
                bar.update(1)
        for cell, error in failures:
            notes = getattr(error, "__notes__", [error])
            print(f"--- {cell.name} ---", *notes, sep="\n", file=sys.stderr)
        if failures:
            cell, error = failures[0]
            raise HealingError(
                f"{len(failures)} of {len(cells)} cells of {what} failed; the others are kept. "
                f"First: {cell.name}: {error}"
            )

    def close(self) -> None:
        """End the processes that computed, which else end with this one."""
        if self._processes:
            self._processes.close()

    def keep_plan(self, stage: str, cells: list[Cell]) -> None:
        """Make `cells` the stage's cells in this folder, and this study the folder's."""
        self.keep_parameters()
        planned = [
            {"key": c.key, "name": c.name, "stage": c.stage, "cell": c.columns()} for c in cells
        ]
        path = self.run_folder / "plans" / f"{stage}.json"
        former = path.read_bytes() if path.exists() and has_records(self.run_folder) else b""
        if former and cells and not any(cell.key.encode() in former for cell in cells):
            said = (
                f"{self.run_folder}: data, models or code are others than when {stage} was planned"
            )
            print(f"{said}: finished cells are kept, but no table has them", file=sys.stderr)
        write_atomically(path, canonical({"stage": stage, "cells": planned}))

    def keep_parameters(self) -> None:
        """Note what this study was given in the folder, for who reports on it. Raises HealingError
        where it has records of another study."""
        self.store.begin()
        refuse_another(self.run_folder, self.given)
        path = self.run_folder / "parameters.json"
        there = read_json(path)
        if path.exists() and not there:
            set_aside(path, "it holds no parameters")
        there = there if has_records(self.run_folder) else {}  # else of a study that never began
        now = there | {name: x for name, x in self.given.items() if name != "run"}  # it may move
        if isinstance(there.get("scans"), dict) and "scans" in now:
            now["scans"] = there["scans"] | now["scans"]
        if there != now:
            write_atomically(path, json.dumps(now, indent=2) + "\n")

    def keep_plans(self) -> list[Cell]:
        """Make what the parameters plan the cells of all stages in this folder; return them, one
        task and seed after the other."""
        planned = {stage: self.plan(stage) for stage in ALL_STAGES}
        for stage, cells in planned.items():
            self.keep_plan(stage, cells)
        return planning.by_unit([cell for cells in planned.values() for cell in cells])

    def table(self, stage: str, cells: list[Cell] | None = None) -> pd.DataFrame:
        """The stage's finished cells; raises HealingError naming a planned cell that is missing.

        One row a cell; of the stage `probing` one row a cell and layer."""
        found = []
        for cell in cells or self.plan(stage):
            record = self.store.read(cell.stage, cell.key)
            if record is None:
                lack = f"stage {cell.stage} lacks the cell {cell.name}"
                raise HealingError(f"{lack}: run that stage first (in {self.run_folder})")
            # The record may have been made under another name of the same cell (a side, a metric, a
            # model's folder): the table says what was asked for here.
            found.append({**record, "cell": cell.columns()})
        return table(found, stage)

    def record(self, cell: Cell, on_step: Callable[..., None] = lambda *_: None) -> None:
        """Compute a cell and write its record; `on_step` is that of `fine_tune`."""
        start, self.on_step = time.perf_counter(), on_step
        work = compute.COMPUTE | linguistics.COMPUTE
        try:
            result = work[cell.stage if cell.corpus else cell.state](self, cell)
        finally:
            self.on_step = lambda *_: None
        seconds = round(time.perf_counter() - start, 3)
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {
            "cell": cell.columns(),
            "determinants": json.loads(cell.determinants),
            "result": result,
            "made": self.provenance(),
            "times": {"seconds": seconds, "finished": finished},
        }
        self.store.write(cell.stage, cell.key, record)

    def provenance(self) -> dict[str, Any]:
        """What stands beside a result but is not part of its key."""
        gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if gpu else "cpu",
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
        }

    # -- what it reads -----------------------------------------------------------------------------

    @property
    def healed_tasks(self) -> list[str]:
        """Whose broken and healed models are probed."""
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
        names = ("text_column", "label_column", "metric", "data_revision", "test_size")
        return load_task(name, *(self.parameters[one] for one in names))

    def draw(self, cell: Cell) -> tuple[Split, Split | None]:
        """A cell's training and held-out examples; the draw depends on the seed."""
        p = self.settings(cell)
        return self.task(cell.task).draw(cell.seed, p["train_size"], p["validation_size"])

    def examples(self, cell: Cell) -> Examples:
        """A cell's examples, tokenised."""
        p, data, tokenizer = self.settings(cell), self.task(cell.task), self.tokenizer(cell.model)
        key = (cell.model, cell.task, p["max_length"], cell.seed, p["train_size"])
        if key not in self._examples:
            # The test examples are the same for every seed.
            test = {k[:3]: e[2] for k, e in self._examples.items()}.get(key[:3])
            self._examples.clear()  # one at a time: several full data sets would not fit
            how = {"max_length": p["max_length"], "regression": data.regression}
            *drawn, scored = (
                encode(tokenizer, split.texts, split.labels, **how) if split else None
                for split in (*self.draw(cell), None if test else data.test)
            )
            self._examples[key] = *drawn, test or scored
        return self._examples[key]

    def sample(self, cell: Cell) -> Encoded:
        """The test sentences over which representations are compared."""
        test, few = self.examples(cell)[2], slice(0, SIMILARITY_EXAMPLES)
        types = test.types[few] if test.types else None
        return Encoded(test.ids[few], types, test.labels[few], test.pad)

    def content(self, name: str, seed: int, train_size: int | None) -> tuple[str, str, str]:
        """Hashes of a task's training, validation and test examples for one seed."""
        held_out = self.parameters["validation_size"]
        train, validation = self.task(name).draw(seed, train_size, held_out)
        return train.sha(), validation.sha() if validation else "", self.test_content(name)

    def test_content(self, name: str) -> str:
        return self.task(name).test.sha()

    def sources(self) -> list[tuple[str, str | None]]:
        """(corpus, column) pairs: of one corpus every column, of several the one at its place."""
        corpora, columns = self.parameters["corpus"], self.parameters["column"] or [None]
        if 1 in (len(corpora), len(columns)):
            return list(product(corpora, columns))
        if len(corpora) != len(columns):
            raise HealingError(
                f"corpus names {len(corpora)} corpora and column {len(columns)} columns: need one "
                "column for each, one for all, or a single corpus"
            )
        return list(zip(corpora, columns, strict=True))

    def whole_corpus(self, name: str, column: str | None) -> Corpus:
        return load_corpus(
            name, column, self.parameters["corpus_test"], words=self.parameters["word_column"]
        )

    def corpus(self, name: str, column: str | None, seed: int) -> Corpus:
        """The sentences of one seed."""
        p, whole = self.parameters, self.whole_corpus(name, column)
        train, test = p["probe_train"] or len(whole.train), p["probe_test"] or len(whole.test)
        return whole.draw(seed, min(train, len(whole.train)), min(test, len(whole.test)))


@functools.cache
def processor() -> str:
    """The processor's model where the system tells it, else its kind."""
    with contextlib.suppress(OSError):
        said = Path("/proc/cpuinfo").read_text("utf-8")
        if named := re.search(r"^model name\s*: (.*)", said, re.MULTILINE):
            return f"{platform.machine()}, {named[1].strip()}"
    return platform.processor() or platform.machine()
