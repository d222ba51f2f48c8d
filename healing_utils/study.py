"""The study's stages: from parameters to cells, from cells to records.

A cell is one (model, task, corruption, recipe, seed); those of the stages `probing` and `neurons`,
which look into such a model, are in `linguistics`. Its key is a hash of what determines its
result and of nothing else, so a finished cell is found again whatever asked for it.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from healing_utils import models, tasks
from healing_utils.corruption import CorruptionReport, corrupt
from healing_utils.encoders import parse_level, resolve_layers
from healing_utils.errors import HealingError, choose
from healing_utils.parameters import read_parameters
from healing_utils.paths import run_folder
from healing_utils.progress import Progress
from healing_utils.records import Store, canonical, digest, write_atomically
from healing_utils.results import table
from healing_utils.similarity import layer_similarity
from healing_utils.training import (
    Encoded,
    encode,
    evaluate,
    fine_tune,
    majority_scores,
    pick_device,
)  # fmt: skip
from healing_utils.workers import helping

if TYPE_CHECKING:
    import pandas

# Raised whenever a change makes the same parameters give other numbers: old records stay readable
# and are no longer taken for finished cells.
NUMERICS = 3
STAGES = ("baseline", "corruption", "recovery")
PROBING_STAGES = ("probing", "neurons")
RECIPE = (
    "epochs", "batch_size", "learning_rate", "weight_decay", "warmup", "max_grad_norm",
    "max_length", "max_tokens", "evaluations", "precision",
)  # fmt: skip
SIMILARITY_EXAMPLES = 200  # test sentences over which representations are compared
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Cell:
    """One unit of work. `determinants` is all that its result depends on, and gives the key."""

    stage: str
    state: str  # intact, broken, healed or scratch
    model: str
    task: str
    seed: int
    side: str
    level: float
    kind: str
    layers: tuple[int, ...]
    n_layers: int
    metric: str
    determinants: str  # canonical JSON

    @cached_property
    def key(self) -> str:
        return digest(self.determinants)

    @property
    def name(self) -> str:
        """For people: ``organism sentiment healed bottom 1/2 reinit seed 0``."""
        where = "" if self.side in ("none", "all") else f" {self.side}"
        share = Fraction(self.level).limit_denominator(99)
        what = "" if self.state in ("intact", "scratch") else f"{where} {share} {self.kind}"
        return f"{self.model} {self.task} {self.state}{what} seed {self.seed}"

    def columns(self) -> dict[str, Any]:
        return {
            "model": self.model, "task": self.task, "state": self.state, "side": self.side,
            "level": self.level, "kind": self.kind, "part": "all" if self.layers else "none",
            "strength": None, "layers": list(self.layers), "n_layers": self.n_layers,
            "seed": self.seed, "metric": self.metric,
        }  # fmt: skip


@dataclass(frozen=True)
class Examples:
    """A task's examples for one seed, tokenised for one model."""

    train: Encoded
    validation: Encoded | None
    test: Encoded


class Study:
    """A run's folder and its parameters; plans and runs the stages.

    ``Study(parameters).run("baseline")`` computes what is missing and returns the stage's table.
    """

    def __init__(self, parameters: Mapping[str, Any]):
        self.parameters = read_parameters(parameters)
        self.run_folder = run_folder(self.parameters["run"])
        self.store = Store(self.run_folder)
        torch.set_num_threads(self.parameters["threads"])
        self.device = pick_device(self.parameters["device"])
        # Kept by the study and not by the process: a kernel outlives changes of a local file.
        self._tasks: dict[str, tasks.TaskData] = {}
        self.corpora: dict[tuple[str, str | None], Any] = {}
        self._examples: dict[tuple[str, str, int], Examples] = {}
        self._contents: dict[tuple[str, int], tuple[str, str, str]] = {}
        self._test_contents: dict[str, str] = {}

    def describe(self) -> str:
        """Models, tasks and device of this study, for the top of a notebook."""
        p, lines = self.parameters, []
        for model in p["model"]:
            config = models.load_config(model, p["model_revision"])
            lines.append(
                f"model {model}: {type(config).__name__.removesuffix('Config')}, "
                f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
                f"vocabulary {config.vocab_size:,}"
            )
        for name in p["task"]:
            data = self.task(name)
            size = len(data.pool) if p["train_size"] is None else p["train_size"]
            what = f"{data.num_labels} classes" if data.classes else "regression"
            lines.append(
                f"task {name}: {what}, {size:,} training examples, "
                f"{len(data.test):,} scored, metric {data.metric}"
            )
        made = self.provenance()
        lines.append(
            f"on {made['device']} with {made['threads']} threads, Python {made['python']}, "
            f"torch {made['versions']['torch']}, transformers {made['versions']['transformers']}"
        )
        return "\n".join(lines)

    # -- planning ----------------------------------------------------------------------------

    def task(self, name: str) -> tasks.TaskData:
        if name not in self._tasks:
            p = self.parameters
            self._tasks[name] = tasks.load_task(
                name, p["text_column"], p["label_column"], p["metric"], p["data_revision"],
                p["test_size"],
            )  # fmt: skip
        return self._tasks[name]

    def examples(self, model: str, name: str, seed: int) -> Examples:
        """Tokenised examples; the draw of training examples depends on the seed."""
        key = (model, name, seed)
        if key not in self._examples:
            self._examples.clear()  # one at a time: several full data sets would not fit
            p, data = self.parameters, self.task(name)
            train, validation = data.draw(seed, p["train_size"], p["validation_size"])
            tokenizer = models.load_tokenizer(model, p["model_revision"])

            def encoded(split: tasks.Split) -> Encoded:
                return encode(
                    tokenizer, split.texts, split.labels, p["max_length"], data.regression
                )

            self._examples[key] = Examples(
                encoded(train),
                encoded(validation) if validation else None,
                encoded(data.test),
            )
        return self._examples[key]

    def _content(self, name: str, seed: int) -> tuple[str, str, str]:
        """Hashes of a task's training, validation and test examples for one seed."""
        key = (name, seed)
        if key not in self._contents:
            p, data = self.parameters, self.task(name)
            train, validation = data.draw(seed, p["train_size"], p["validation_size"])
            if name not in self._test_contents:  # the same examples for every seed
                self._test_contents[name] = data.test.sha()
            self._contents[key] = (
                train.sha(), validation.sha() if validation else "", self._test_contents[name],
            )  # fmt: skip
        return self._contents[key]

    def cell(
        self, state: str, model: str, task: str, seed: int, side: str = "none",
        level: float = 0.0, kind: str = "none", layers: tuple[int, ...] = (),
    ) -> Cell:  # fmt: skip
        """The cell of a model that is scored on a task, planned or not."""
        p = self.parameters
        stage = {"intact": "baseline", "broken": "corruption"}.get(state, "recovery")
        config = models.load_config(model, p["model_revision"])
        data = self.task(task)
        determinants = {
            "numerics": NUMERICS,
            "state": state,
            "model": models.identity(model, p["model_revision"]),
            "data": self._content(task, seed),
            "classes": data.num_labels,
            "recipe": {name: p[name] for name in RECIPE},
            "seed": seed,
            "threads": p["threads"],
        }
        if state in ("broken", "healed"):
            # The layers themselves: one cell, whichever side and level led to them.
            determinants["corruption"] = {"kind": kind, "layers": layers, "seed": seed}
        return Cell(
            stage, state, model, task, seed, side, level, kind, layers,
            config.num_hidden_layers, data.metric, canonical(determinants),
        )  # fmt: skip

    def corruptions(self, model: str) -> list[tuple[str, float, str, tuple[int, ...]]]:
        """The grid for one model: rows of side, level, kind and resolved layers, none twice."""
        p = self.parameters
        n_layers = models.load_config(model, p["model_revision"]).num_hidden_layers
        wanted: list[tuple[str, Any, str]] = []
        for kind in p["kind"]:
            wanted += [(side, level, kind) for level in p["levels"] for side in p["sides"]]
        wanted += [(s, level, "init") for level in p["init_levels"] for s in p["sides"]]
        grid: dict[tuple[str, tuple[int, ...]], tuple[str, float, str, tuple[int, ...]]] = {}
        if p["layers"] is not None:
            layers = resolve_layers(n_layers, "bottom", 1, p["layers"])
            for kind in p["kind"]:
                grid[kind, layers] = ("custom", len(layers) / n_layers, kind, layers)
            return list(grid.values())
        for side, level, kind in wanted:
            layers = resolve_layers(n_layers, side, level, None)
            full = len(layers) == n_layers
            entry = ("all" if full else side, 1.0 if full else parse_level(level), kind, layers)
            grid.setdefault((kind, layers), entry)
        return list(grid.values())

    def plan(self, stage: str) -> list[Cell]:
        """The cells of a stage, in the order in which they are computed.

        `networks` are those of the task stages that the probing stages look into.
        """
        choose(stage, (*STAGES, *PROBING_STAGES, "networks"), "stage")
        if stage not in STAGES:
            from healing_utils import linguistics

            return list(linguistics.plan(self, stage))
        p, cells = self.parameters, []
        for model in p["model"]:
            grid = self.corruptions(model) if stage != "baseline" else []
            n_layers = models.load_config(model, p["model_revision"]).num_hidden_layers
            everything = ("all", 1.0, "scratch", tuple(range(n_layers)))
            for task in p["task"]:
                for seed in p["seeds"]:
                    if stage == "baseline":
                        cells.append(self.cell("intact", model, task, seed))
                    state = "broken" if stage == "corruption" else "healed"
                    cells += [self.cell(state, model, task, seed, *entry) for entry in grid]
                    if stage == "recovery" and p["scratch"]:
                        cells.append(self.cell("scratch", model, task, seed, *everything))
        return cells

    # -- running -----------------------------------------------------------------------------

    def run(self, stage: str, plan: bool = True) -> pandas.DataFrame:
        """Compute the stage's missing cells and return its table.

        Cells that another run on the same folder is computing are waited for. A cell that fails
        does not stop the others; all failures are raised together at the end, what is done is kept.
        With the parameter `workers` above 1, further processes share the work. `plan` makes these
        cells the stage's cells in this folder; without it they are computed beside them.
        """
        cells = self.plan(stage)
        if plan:
            planned = [{"key": c.key, "name": c.name, "cell": c.columns()} for c in cells]
            write_atomically(
                self.run_folder / "plans" / f"{stage}.json",
                canonical({"stage": stage, "cells": planned}),
            )
        self.store.sweep()
        failures: list[tuple[Cell, BaseException]] = []
        todo = [cell for cell in cells if self.store.read(cell.stage, cell.key) is None]
        # A worker takes seconds to start: it pays from a few cells on.
        workers = min(self.parameters["workers"] - 1, len(todo) // 3)
        with (
            helping(self.parameters, stage, workers),
            Progress(len(cells), stage, unit="cell") as bar,
        ):
            bar.update(len(cells) - len(todo), note=f"{len(cells) - len(todo)} found finished")
            while todo:
                waiting = []
                for cell in todo:
                    bar.update(0, note=cell.name)
                    try:

                        def on_step(step: int, steps: int, loss: float, name: str = cell.name):
                            bar.update(0, note=f"{name}: step {step}/{steps}, loss {loss:.3f}")

                        done = self._compute(cell, on_step)
                    except Exception as error:
                        failures.append((cell, error))
                        done = True
                    if done:
                        bar.update(1)
                    else:
                        waiting.append(cell)
                if waiting and len(waiting) == len(todo):
                    bar.update(0, note=f"waiting for another run: {waiting[0].name}")
                    time.sleep(1)
                todo = waiting
        if failures:
            for cell, error in failures:
                print(f"--- {cell.name} ---", file=sys.stderr)
                traceback.print_exception(error, file=sys.stderr)
            cell, error = failures[0]
            raise HealingError(
                f"{len(failures)} of {len(cells)} cells of {stage} failed; the others are kept. "
                f"First: {cell.name}: {error}"
            )
        return self.table(stage, cells)

    def help(self, stage: str, stop: Callable[[], bool]) -> None:
        """Compute cells of a stage for another process, from the last one on, until `stop()`.

        That process reports what fails: it comes to the cell itself.
        """

        def on_step(*_: Any) -> None:
            if stop():
                sys.exit()

        for cell in reversed(self.plan(stage)):
            on_step()
            with contextlib.suppress(Exception):
                if self.store.read(cell.stage, cell.key) is None:
                    self._compute(cell, on_step)

    def table(self, stage: str, cells: list[Cell] | None = None) -> pandas.DataFrame:
        """The stage's finished cells; raises HealingError naming a planned cell that is missing.

        One row a cell; of the stage `probing` one row a cell and layer."""
        found = []
        for cell in cells or self.plan(stage):
            record = self.store.read(cell.stage, cell.key)
            if record is None:
                raise HealingError(
                    f"stage {cell.stage} lacks the cell {cell.name}: run that stage first "
                    f"(in {self.run_folder})"
                )
            # The record may have been made under another name of the same cell (a side, a metric, a
            # model's folder): the table says what was asked for here.
            found.append({**record, "cell": cell.columns()})
        return table(found, stage)

    def _compute(self, cell: Cell, on_step: Callable[..., None]) -> bool:
        """Compute and record a cell; False where another run is at it."""
        with self.store.claim(cell.key) as mine:
            if not mine:
                return self.store.read(cell.stage, cell.key) is not None
            if self.store.read(cell.stage, cell.key) is not None:
                return True
            start = time.perf_counter()
            result = self._work(cell)(self, cell, on_step)
            record = {
                "cell": cell.columns(),
                "determinants": json.loads(cell.determinants),
                "result": result,
                "made": self.provenance(),
                "times": {
                    "seconds": round(time.perf_counter() - start, 3),
                    "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                },
            }
            self.store.write(cell.stage, cell.key, record)
            return True

    @staticmethod
    def _work(cell: Cell) -> Callable[[Study, Cell, Callable[..., None]], dict[str, Any]]:
        if cell.stage in PROBING_STAGES:
            from healing_utils import linguistics

            return linguistics.COMPUTE[cell.stage]
        return COMPUTE[cell.state]

    def provenance(self) -> dict[str, Any]:
        """What stands beside a result but is not part of its key."""
        gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if gpu else "cpu",
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
        }

    # -- the four states ---------------------------------------------------------------------

    def _load(self, cell: Cell, scratch: bool = False) -> torch.nn.Module:
        data = self.task(cell.task)
        return models.load_classifier(
            cell.model, data.num_labels, cell.seed, self.parameters["model_revision"], scratch,
            data.regression,
        )  # fmt: skip

    def _train_and_score(
        self, cell: Cell, model: torch.nn.Module, on_step: Callable[..., None]
    ) -> dict[str, Any]:
        p = self.parameters
        examples = self.examples(cell.model, cell.task, cell.seed)
        recipe = {name: p[name] for name in RECIPE if name != "max_length"}
        training = fine_tune(
            model, examples.train, examples.validation, seed=cell.seed, device=self.device,
            on_step=on_step, **recipe,
        )  # fmt: skip
        return {
            **self._score(cell, model),
            "train_size": len(examples.train),
            "train_tokens": training.tokens,
            "truncated": examples.train.truncated,
            "steps": training.steps,
            "skipped_steps": training.skipped_steps,
            "max_tokens": training.max_tokens,
            "precision": training.precision,
            "shortcut": training.shortcut,
            "losses": [round(loss, 5) for loss in training.losses],
            "curve": training.curve,
        }

    def _score(self, cell: Cell, model: torch.nn.Module) -> dict[str, Any]:
        examples = self.examples(cell.model, cell.task, cell.seed)
        return {
            "scores": evaluate(model, examples.test, device=self.device),
            "chance": majority_scores(examples.test.labels),
            "test_size": len(examples.test),
        }

    def _intact(self, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
        model = self._load(cell)
        result = self._train_and_score(cell, model, on_step)
        self._save_weights(cell, model)
        return result

    def _save_weights(self, cell: Cell, model: torch.nn.Module) -> None:
        """Kept for the stages that break or probe the fine-tuned model; may be deleted any time."""
        from safetensors.torch import save

        tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        write_atomically(self.store.weights_path(cell.key), save(tensors))

    def network(self, cell: Cell) -> torch.nn.Module:
        """The model that a cell scores, on this study's device, in evaluation mode.

        From the run's folder where its weights were kept, else made again.
        """
        if cell.state == "broken":
            broken = self.network(self.cell("intact", cell.model, cell.task, cell.seed))
            self._corrupt(cell, broken)
            return broken
        from safetensors.torch import load

        network = self._load(cell, scratch=cell.state == "scratch")
        path = self.store.weights_path(cell.key)
        try:
            network.load_state_dict(load(path.read_bytes()))
        except FileNotFoundError:
            if cell.state == "healed":
                self._corrupt(cell, network)
            self._train_and_score(cell, network, lambda *_: None)
            self._save_weights(cell, network)
        except Exception as error:  # truncated: safetensors and torch each have their own errors
            print(f"weights {path} are unusable ({error}); trained again", file=sys.stderr)
            path.unlink(missing_ok=True)
            return self.network(cell)
        return network.to(self.device).eval()

    def _broken(self, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
        intact = self.network(self.cell("intact", cell.model, cell.task, cell.seed))
        broken = self.network(self.cell("intact", cell.model, cell.task, cell.seed))
        report = self._corrupt(cell, broken)
        test = self.examples(cell.model, cell.task, cell.seed).test
        few = slice(0, SIMILARITY_EXAMPLES)
        sample = Encoded(
            test.ids[few], test.types[few] if test.types else None, test.labels[few], test.pad
        )
        return {
            **self._score(cell, broken),
            "similarity": layer_similarity(intact, broken, sample),
            "changed": _summary(report),
        }

    def _healed(self, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
        model = self._load(cell)
        report = self._corrupt(cell, model)
        result = {**self._train_and_score(cell, model, on_step), "changed": _summary(report)}
        if self._is_probed(cell):
            self._save_weights(cell, model)
        return result

    def _is_probed(self, cell: Cell) -> bool:
        """Whether 04_linguistics looks inside this corrupted model."""
        levels = {parse_level(level) for level in self.parameters["probe_levels"]}
        return cell.task in self.healed_tasks and cell.kind == "reinit" and cell.level in levels

    @property
    def healed_tasks(self) -> list[str]:
        """Tasks whose broken and healed models are probed."""
        given = self.parameters["healed_tasks"]
        return self.parameters["task"] if given is None else given

    def _scratch(self, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
        return self._train_and_score(cell, self._load(cell, scratch=True), on_step)

    def _corrupt(self, cell: Cell, model: torch.nn.Module) -> CorruptionReport:
        return corrupt(model, kind=cell.kind, seed=cell.seed, layers=list(cell.layers))


def _summary(report: CorruptionReport) -> dict[str, Any]:
    """What a record keeps of a report: how much changed, and the change by tensor role."""
    by_role = report.to_frame().groupby("role")["relative_change"].mean()
    return {
        "tensors": len(report.tensors),
        "values": report.elements,
        "relative_change": {role: round(float(v), 5) for role, v in sorted(by_role.items())},
    }


COMPUTE: dict[str, Callable[[Study, Cell, Callable[..., None]], dict[str, Any]]] = {
    "intact": Study._intact,
    "broken": Study._broken,
    "healed": Study._healed,
    "scratch": Study._scratch,
}
