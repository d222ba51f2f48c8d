"""The study's stages: from parameters to cells, from cells to records.

A cell is one (model, task, corruption, recipe, seed); those of the stages `probing` and `neurons`,
which look into such a model, are in `linguistics`. Its key is a hash of what determines its
result and of nothing else, so a finished cell is found again whatever asked for it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from threadpoolctl import threadpool_limits

from healing_utils.analysis.results import SCAN_STAGES, table
from healing_utils.base.errors import HealingError, choose
from healing_utils.base.paths import run_folder
from healing_utils.base.progress import Progress
from healing_utils.base.records import Store, canonical, digest, write_atomically
from healing_utils.healing import floors, models, recipes
from healing_utils.healing.corruption import CorruptionReport, corrupt, parse_kind, spell_kind
from healing_utils.healing.encoders import OUTER_PARTS, parse_level, resolve_layers
from healing_utils.healing.similarity import layer_similarity, layer_states, passing_stream
from healing_utils.healing.training import (
    Diverged,
    Encoded,
    Training,
    answers,
    encode,
    fine_tune,
    grade,
    majority_scores,
    pick_device,
    predict,
)  # fmt: skip
from healing_utils.run import executors
from healing_utils.study.parameters import for_task, read_parameters
from healing_utils.texts import tasks

if TYPE_CHECKING:
    import pandas

# Raised whenever a change makes the same parameters give other numbers: old records stay readable
# and are no longer taken for finished cells.
NUMERICS = 4
MIXED_NUMERICS = 1  # beside it, where bfloat16 or float16 is asked for
STAGES = ("baseline", "corruption", "recovery")
PROBING_STAGES = ("probing", "neurons")
RECIPE = (
    "epochs", "batch_size", "learning_rate", "weight_decay", "warmup", "max_grad_norm",
    "max_length", "max_tokens", "evaluations", "precision",
)  # fmt: skip
SIMILARITY_EXAMPLES = 200  # test sentences over which representations are compared
KEPT_STATES = 256 << 20  # bytes of an intact model's states on them, the most that are kept
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scikit-learn")


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's model where the system tells it, else its kind."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return f"{platform.machine()}, {value.strip()}"
    return platform.processor() or platform.machine()


def keeps_states(config: Any, tokens: int) -> bool:
    """Whether an intact model's states on so many tokens are kept from cell to cell."""
    return 4 * tokens * (config.num_hidden_layers + 1) * config.hidden_size <= KEPT_STATES


@dataclass(frozen=True)
class Cell:
    """One unit of work. `determinants` is all that its result depends on, and gives the key."""

    stage: str
    state: str  # intact, broken, untrained, healed or scratch
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
    part: str = field(default="all", kw_only=True)
    strength: float | None = field(default=None, kw_only=True)
    start: str = field(default="pre-trained", kw_only=True)
    recipe: str = field(default="full", kw_only=True)
    # Parameters of the training that are other than the study's.
    settings: tuple[tuple[str, Any], ...] = field(default=(), kw_only=True)

    @cached_property
    def key(self) -> str:
        return digest(self.determinants)

    @property
    def name(self) -> str:
        """For people: ``organism sentiment healed bottom 1/2 reinit seed 0``."""
        where = "" if self.side in ("none", "all") else f" {self.side}"
        if self.side == "custom":
            where = f" layers {','.join(map(str, self.layers))}"
        share = (
            ""
            if self.side in ("none", "custom")
            else f" {Fraction(self.level).limit_denominator(99)}"
        )
        what = f"{where}{share} {spell_kind(self.kind, self.strength)}"
        what += "" if self.part == "all" else f" {self.part}"
        what += "" if self.start == "pre-trained" else f" {self.start}"
        what += "" if self.recipe == "full" else f" by {self.recipe}"
        what = "" if self.state in ("intact", "scratch", "untrained") else what
        others = "".join(
            f" {name} {value}" if isinstance(value, str) else f" {name} {value:g}"
            for name, value in self.settings
        )
        return f"{self.model} {self.task} {self.state}{what}{others} seed {self.seed}"

    @property
    def plain(self) -> bool:
        """Whether whole layers of the pre-trained model are corrupted, and all of it is then
        trained as the study's parameters say."""
        found = (self.part, self.strength, self.start, self.recipe, self.settings)
        return found == ("all", None, "pre-trained", "full", ())

    def columns(self) -> dict[str, Any]:
        corrupted = self.state in ("broken", "healed")
        return {
            "model": self.model, "task": self.task, "state": self.state, "side": self.side,
            "level": self.level, "kind": self.kind,
            "part": self.part if corrupted or self.layers else "none",
            "strength": self.strength, "layers": list(self.layers), "n_layers": self.n_layers,
            "seed": self.seed, "metric": self.metric,
            "start": self.start, "recipe": self.recipe,
        }  # fmt: skip


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
        self._examples: dict[tuple[str, str, int, int, int | None], Examples] = {}
        self._contents: dict[tuple[str, int, int | None], tuple[str, str, str]] = {}
        self._test_contents: dict[str, str] = {}
        # Of the last broken cell: those of one (model, task, seed) stand side by side in a plan.
        self._intact_models: dict[str, tuple[torch.nn.Module, Any]] = {}

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
            size = for_task(p, name)["train_size"]
            size = len(data.pool) if size is None else size
            what = f"{data.num_labels} classes" if data.classes else "regression"
            lines.append(
                f"task {name}: {what}, {size:,} training examples, "
                f"{len(data.test):,} scored, metric {data.metric}"
            )
        if p["head"] != "first":
            lines.append(f"head: reads the {p['head']} over all tokens")
        if p["scans"]:
            from healing_utils.study import scans

            lines += scans.left_out(self)
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

    def settings(self, cell: Cell) -> dict[str, Any]:
        """The parameters as they are for a cell."""
        return for_task(self.parameters, cell.task) | dict(cell.settings)

    def examples(self, cell: Cell) -> Examples:
        """A cell's tokenised examples; the draw of training examples depends on the seed."""
        p = self.settings(cell)
        model, name, seed = cell.model, cell.task, cell.seed
        key = (model, name, p["max_length"], seed, p["train_size"])
        if key not in self._examples:
            test = {k[:3]: e.test for k, e in self._examples.items()}.get(key[:3])
            self._examples.clear()  # one at a time: several full data sets would not fit
            data = self.task(name)
            train, validation = data.draw(seed, p["train_size"], p["validation_size"])
            tokenizer = models.load_tokenizer(model, p["model_revision"])

            def encoded(split: tasks.Split) -> Encoded:
                return encode(
                    tokenizer, split.texts, split.labels, p["max_length"], data.regression
                )

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
            self._contents[key] = (
                train.sha(), validation.sha() if validation else "", self._test_contents[name],
            )  # fmt: skip
        return self._contents[key]

    def cell(
        self, state: str, model: str, task: str, seed: int, side: str = "none",
        level: float = 0.0, kind: str = "none", layers: tuple[int, ...] = (), *,
        part: str | None = None, start: str | None = None, recipe: str | None = None,
        **settings: Any,
    ) -> Cell:  # fmt: skip
        """The cell of a model that is scored on a task, planned or not.

        `kind` may carry a strength (``noise=0.5``). `part`, `start` and `recipe` are the study's
        where they are not given; `settings` replace its `train_size`, `head` or parameters of
        `RECIPE`.
        """
        stages = {"intact": "baseline", "broken": "corruption", "untrained": "corruption"}
        stage = stages.get(state, "recovery")
        corrupted, healed = state in ("broken", "healed"), state == "healed"
        p = for_task(self.parameters, task)
        part = (part or p["part"]) if corrupted else "all"
        start = (start or p["start"]) if healed else "pre-trained"
        recipe = (recipe or p["recipe"]) if healed else "full"
        name, strength = parse_kind(kind) if corrupted else (kind, None)
        settings = {k: v for k, v in settings.items() if v != p[k] and state != "broken"}
        p = p | settings
        config = models.load_config(model, p["model_revision"])
        if "head" in settings and start != "pre-trained":
            raise HealingError(
                f"head {p['head']!r} cannot start from the fine-tuned model, which has another one"
            )
        if part == "pooler" and p["head"] == "mean":
            raise HealingError("head 'mean' has no pooler: part 'pooler' cannot be corrupted")
        if part in OUTER_PARTS and recipe != "full":
            raise HealingError(f"recipe {recipe!r} is for layers: {part} can be healed by 'full'")
        if recipe in ("transplant", "drop") and len(layers) == config.num_hidden_layers:
            raise HealingError(f"recipe {recipe!r} needs a healthy layer, and all are corrupted")
        data = self.task(task)
        determinants = {
            "numerics": NUMERICS
            if p["precision"] in ("auto", "float32")
            else [NUMERICS, MIXED_NUMERICS],
            "state": state,
            "model": models.identity(model, p["model_revision"]),
            "data": self.content(task, seed, p["train_size"]),
            "classes": data.num_labels,
            "recipe": {name: p[name] for name in RECIPE},
            "seed": seed,
            "threads": p["threads"],
        }
        if p["head"] != "first":
            determinants["head"] = p["head"]
        if corrupted:
            # The layers themselves: one cell, whichever side and level led to them. What is as in
            # paper A is left out, so that a new choice leaves the keys of old records alone.
            determinants["corruption"] = {"kind": name, "layers": layers, "seed": seed} | {
                key: value
                for key, value, usual in (
                    ("part", part, "all"),
                    ("strength", strength, None),
                    ("scattered", level if side == "scattered" else None, None),
                )
                if value != usual
            }
        taught = "teacher" in recipes.RECIPES[recipe].needs
        if settings and (start != "pre-trained" or taught):
            # It starts or learns from the intact model, whose training has not these settings.
            determinants["intact"] = self.cell("intact", model, task, seed).key
        if start != "pre-trained":
            determinants["start"] = start
        if recipe != "full":
            determinants["healing"] = {"recipe": recipe, "numerics": recipes.NUMERICS}
        return Cell(
            stage, state, model, task, seed, side, level, name, layers,
            config.num_hidden_layers, data.metric, canonical(determinants),
            part=part, strength=strength, start=start, recipe=recipe,
            settings=tuple(sorted(settings.items())),
        )  # fmt: skip

    def corruptions(self, model: str) -> list[tuple[str, float, str, tuple[int, ...]]]:
        """The grid for one model: rows of side, level, kind (with its strength) and resolved
        layers, none twice."""
        p = self.parameters
        if p["part"] in OUTER_PARTS:  # beside the layers: side and level say nothing
            return [("none", 0.0, kind, ()) for kind in p["kind"]]
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

        `networks` are those of the task stages that the probing stages look into; `everything` is
        all stages, one task and seed after the other: what breaks or probes a model finds its
        weights on the machine that has just trained it.
        """
        stages = (*STAGES, *SCAN_STAGES, "networks", *PROBING_STAGES)
        choose(stage, (*stages, "everything"), "stage")
        if stage == "everything":
            return _by_unit([cell for name in stages for cell in self.plan(name)])
        if stage in SCAN_STAGES:
            from healing_utils.study import scans

            return list(scans.plan(self, stage))
        if stage not in STAGES:
            from healing_utils.study import linguistics

            return list(linguistics.plan(self, stage))
        p, cells = self.parameters, []
        for model in p["model"]:
            grid = self.corruptions(model) if stage != "baseline" else []
            n_layers = models.load_config(model, p["model_revision"]).num_hidden_layers
            everything = ("all", 1.0, "scratch", tuple(range(n_layers)))  # of its parameters
            for task in p["task"]:
                for seed in p["seeds"]:
                    if stage == "baseline":
                        cells.append(self.cell("intact", model, task, seed))
                    state = "broken" if stage == "corruption" else "healed"
                    cells += [self.cell(state, model, task, seed, *entry) for entry in grid]
                    if stage == "corruption":  # the floor under every similarity
                        cells.append(self.cell("untrained", model, task, seed, *everything))
                    if stage == "recovery" and p["scratch"]:
                        cells.append(self.cell("scratch", model, task, seed, *everything))
        return cells

    # -- running -----------------------------------------------------------------------------

    def run(self, stage: str, plan: bool = True) -> pandas.DataFrame:
        """Compute the stage's missing cells and return its table.

        Cells that another run on the same folder is computing are waited for. A cell that fails
        does not stop the others; all failures are raised together at the end, what is done is kept.
        Where they are computed, and which share of them, is told by `executors`. `plan` makes these
        cells the stage's cells in this folder; without it they are computed beside them. Raises
        HealingError where a cell failed, or is left to another shard.
        """
        cells = self.compute(stage, plan)
        return self.table(stage, cells)

    def compute(self, stage: str, plan: bool = True) -> list[Cell]:
        """Compute the stage's missing cells, of a shard its share, as `run` does, without a table.

        Returns all cells of the stage.
        """
        executor, shard = executors.chosen(), executors.shard()
        cells = self.plan(stage)
        if plan:
            self.keep_plan(stage, cells)
        self.store.sweep()
        failures: list[tuple[Cell, BaseException]] = []
        todo = [cell for cell in cells if self.store.read(cell.stage, cell.key) is None]
        mine = [cell for cell in todo if shard.has(cell)]
        with (
            Progress(len(cells), stage, unit="cell") as bar,
            # Closed at once where this is interrupted, so that no worker goes on.
            contextlib.closing(
                executor.outcomes(self, stage, mine, lambda note: bar.update(0, note=note))
            ) as outcomes,
        ):
            bar.update(len(cells) - len(todo), note=f"{len(cells) - len(todo)} found finished")
            for cell, error in outcomes:
                if error is not None:
                    failures.append((cell, error))
                bar.update(1)
        if failures:
            for cell, error in failures:
                print(f"--- {cell.name} ---", file=sys.stderr)
                traceback.print_exception(error, file=sys.stderr)
            cell, error = failures[0]
            raise HealingError(
                f"{len(failures)} of {len(cells)} cells of {stage} failed; the others are kept. "
                f"First: {cell.name}: {error}"
            )
        return cells

    def keep_plan(self, stage: str, cells: list[Cell] | None = None) -> None:
        """Make `cells`, or what the parameters plan, the stage's cells in this folder."""
        planned = [
            {"key": c.key, "name": c.name, "stage": c.stage, "cell": c.columns()}
            for c in cells or self.plan(stage)
        ]
        write_atomically(
            self.run_folder / "plans" / f"{stage}.json",
            canonical({"stage": stage, "cells": planned}),
        )

    def help(self, stage: str, stop: Callable[[], bool]) -> None:
        """Compute cells of a stage for another process, from the last one on, until `stop()` or
        until all are recorded, whoever computes them.

        That process reports what fails: it comes to the cell itself.
        """

        def on_step(*_: Any) -> None:
            if stop():
                sys.exit()

        cells = list(filter(executors.shard().has, self.plan(stage)))
        for cell in cells if stage == "everything" else reversed(cells):
            on_step()
            with contextlib.suppress(Exception):
                if self.store.read(cell.stage, cell.key) is None:
                    self._compute(cell, on_step)
        # Later stages stand on this one: without its weights they would train its models again.
        for cell in cells:
            while self.store.read(cell.stage, cell.key) is None:
                on_step()
                time.sleep(executors.LOOK_AGAIN)

    def table(self, stage: str, cells: list[Cell] | None = None) -> pandas.DataFrame:
        """The stage's finished cells; raises HealingError naming a planned cell that is missing.

        One row a cell; of the stage `probing` one row a cell and layer."""
        found = []
        for cell in cells or self.plan(stage):
            record = self.store.read(cell.stage, cell.key)
            if record is None and not executors.shard().has(cell):
                raise HealingError(
                    f"shard {executors.shard()} of stage {stage} is computed; its table needs all "
                    f"shards: copy their records into {self.store.run / 'records'} and run without "
                    "a shard"
                )
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
            self.write(cell, self.result(cell, on_step))
            return True

    def result(self, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
        """Compute a cell: the part of its record that says what came out, where and when."""
        start = time.perf_counter()
        return {
            "result": self._work(cell)(self, cell, on_step),
            "made": self.provenance(),
            "times": {
                "seconds": round(time.perf_counter() - start, 3),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        }

    def write(self, cell: Cell, result: dict[str, Any]) -> None:
        """Record what `result` gave, here or on another machine."""
        heading = {"cell": cell.columns(), "determinants": json.loads(cell.determinants)}
        self.store.write(cell.stage, cell.key, heading | result)

    @staticmethod
    def _work(cell: Cell) -> Callable[[Study, Cell, Callable[..., None]], dict[str, Any]]:
        if cell.stage in PROBING_STAGES:
            from healing_utils.study import linguistics

            return linguistics.COMPUTE[cell.stage]
        return COMPUTE[cell.state]

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

    # -- the four states ---------------------------------------------------------------------

    def _load(self, cell: Cell, scratch: bool = False) -> torch.nn.Module:
        data = self.task(cell.task)
        return models.load_classifier(
            cell.model, data.num_labels, cell.seed, self.parameters["model_revision"], scratch,
            data.regression, self.settings(cell)["head"],
        )  # fmt: skip

    def _training(self, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
        """What `fine_tune` is given for a cell, beside the model and the examples."""
        p = self.settings(cell)
        recipe = {name: p[name] for name in RECIPE if name != "max_length"}
        return {**recipe, "seed": cell.seed, "device": self.device, "on_step": on_step}

    def _train_and_score(
        self, cell: Cell, model: torch.nn.Module, on_step: Callable[..., None]
    ) -> dict[str, Any]:
        examples, diverged = self.examples(cell), {}
        self._intact_models.clear()  # its place is for the training
        try:
            training = fine_tune(
                model, examples.train, examples.validation, **self._training(cell, on_step)
            )
        except Diverged as error:
            if cell.plain and cell.state == "intact":  # all else is compared with it
                raise
            training, diverged = error.training, {"diverged": str(error)}
        return {**self._score(cell, model), **self._trained(cell, training), **diverged}

    def _trained(self, cell: Cell, training: Training) -> dict[str, Any]:
        examples = self.examples(cell)
        return {
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
        test = self.examples(cell).test
        logits = predict(model, test, device=self.device)
        scored = {
            "scores": grade(logits, test.labels),
            "chance": {**self.examples(cell).chance},
            "test_size": len(test),
        }
        if test.labels.dtype.kind != "f":  # so that the error of the test items can be paired
            right = answers(logits) == test.labels
            scored["right"] = "".join(map(str, right.astype(int)))
        return scored

    def _intact(self, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
        model = self._load(cell)
        floor = self._floors(cell, model)  # of the embeddings before they are trained
        result = self._train_and_score(cell, model, on_step)
        if cell.plain or cell.key in self.probed_beside:
            self._save_weights(cell, model)
        found = models.loaded(cell.model, self.parameters["model_revision"])
        sample = self.examples(cell).sample
        return {**result, "floors": floor, "stream": passing_stream(model, sample), **found}

    def _floors(self, cell: Cell, model: torch.nn.Module) -> dict[str, Any]:
        p, data = self.settings(cell), self.task(cell.task)
        train, validation = data.draw(cell.seed, p["train_size"], p["validation_size"])
        given = (train, validation, data.test, data.num_labels)
        tokenizer = models.load_tokenizer(cell.model, p["model_revision"])
        table = model.get_input_embeddings().weight.detach().cpu().numpy()
        means = floors.static_means(tokenizer, table, p["max_length"])
        with threadpool_limits(p["threads"]):  # with other threads, sums round otherwise
            return {"tfidf": floors.tfidf(*given), "static": floors.static(*given, means)}

    @cached_property
    def probed_beside(self) -> frozenset[str]:
        """Keys of the intact models of scans that 04_linguistics looks into."""
        from healing_utils.study import scans

        return frozenset(cell.key for cell in scans.probed(self))

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
            broken = self._intact_network(cell)
            self._corrupt(cell, broken)
            return broken
        from safetensors.torch import load

        network = self._load(cell, scratch=cell.state == "scratch")
        path = self.store.weights_path(cell.key)
        try:
            network.load_state_dict(load(path.read_bytes()))
        except FileNotFoundError:
            if cell.state == "healed":
                network, _ = self._heal(cell, lambda *_: None)
            else:
                self._train_and_score(cell, network, lambda *_: None)
            self._save_weights(cell, network)
        except Exception as error:  # truncated: safetensors and torch each have their own errors
            print(f"weights {path} are unusable ({error}); trained again", file=sys.stderr)
            path.unlink(missing_ok=True)
            return self.network(cell)
        return network.to(self.device).eval()

    def _intact_network(self, cell: Cell) -> torch.nn.Module:
        """A copy of the fine-tuned model of the cell's model, task and seed."""
        return self.network(self.cell("intact", cell.model, cell.task, cell.seed))

    def _shared_intact(self, cell: Cell) -> tuple[torch.nn.Module, Any]:
        """The fine-tuned model of the cell's model, task and seed, and what `layer_similarity`
        takes for it. The next cell mostly gets the same ones: they are not to be changed."""
        intact = self.cell("intact", cell.model, cell.task, cell.seed)
        if intact.key not in self._intact_models:
            self._intact_models.clear()  # one at a time
            states = network = self.network(intact)
            sample = self.examples(cell).sample
            if keeps_states(network.config, sample.tokens):
                # Of a copy: what a forward pass leaves in a model does not get into broken ones.
                states = list(layer_states(copy.deepcopy(network), sample))
            self._intact_models[intact.key] = network, states
        return self._intact_models[intact.key]

    def similarity(self, cell: Cell, model: torch.nn.Module) -> dict[str, list[float]]:
        """How like the fine-tuned model's the layers of `model`, corrupted or healed, are."""
        return layer_similarity(self._shared_intact(cell)[1], model, self.examples(cell).sample)

    def _broken(self, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
        broken = copy.deepcopy(self._shared_intact(cell)[0])
        report = self._corrupt(cell, broken)
        return {
            **self._score(cell, broken),
            "similarity": self.similarity(cell, broken),
            "changed": _summary(report),
        }

    def _untrained(self, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
        model = self._load(cell, scratch=True).to(self.device).eval()
        return {**self._score(cell, model), "similarity": self.similarity(cell, model)}

    def _healed(self, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
        model, result = self._heal(cell, on_step)
        if self.is_probed(cell):
            self._save_weights(cell, model)
        return result

    def _heal(
        self, cell: Cell, on_step: Callable[..., None]
    ) -> tuple[torch.nn.Module, dict[str, Any]]:
        """Corrupt and heal; the model and its record. A loss that is no longer finite is a result:
        the model is then scored as training left it."""
        model = self._intact_network(cell) if cell.start == "fine-tuned" else self._load(cell)
        report = self._corrupt(cell, model)
        examples, training = self.examples(cell), self._training(cell, on_step)
        self._intact_models.clear()
        try:
            if cell.recipe == "full":
                done = fine_tune(model, examples.train, examples.validation, **training)
                healing: dict[str, Any] = {}
            else:
                healed = recipes.heal(
                    model, cell.recipe, layers=cell.layers, train=examples.train,
                    validation=examples.validation, pristine=lambda: self._load(cell),
                    teacher=self._teacher(cell),
                    tokenizer=models.load_tokenizer(cell.model, self.parameters["model_revision"]),
                    **training,
                )  # fmt: skip
                done = healed.training
                healing = {"trained": healed.trained, "parameters": healed.parameters}
                if healed.warm_up:
                    healing["warm_up_tokens"] = healed.warm_up.tokens
        except Diverged as error:
            done, healing = error.training, {"diverged": str(error)}
        trained = self._trained(cell, done)
        record = {**self._score(cell, model), **trained, **healing, "changed": _summary(report)}
        return model, record

    def _teacher(self, cell: Cell) -> torch.nn.Module | None:
        wanted = "teacher" in recipes.RECIPES[cell.recipe].needs
        return self._intact_network(cell) if wanted else None

    def is_probed(self, cell: Cell) -> bool:
        """Whether 04_linguistics looks inside this corrupted model."""
        levels = {parse_level(level) for level in self.parameters["probe_levels"]}
        probed = cell.task in self.healed_tasks and cell.kind == "reinit" and cell.plain
        return probed and cell.level in levels and cell.side in ("bottom", "top", "all", "custom")

    @property
    def healed_tasks(self) -> list[str]:
        """Tasks whose broken and healed models are probed."""
        given = self.parameters["healed_tasks"]
        return self.parameters["task"] if given is None else given

    def _scratch(self, cell: Cell, on_step: Callable[..., None]) -> dict[str, Any]:
        return self._train_and_score(cell, self._load(cell, scratch=True), on_step)

    def _corrupt(self, cell: Cell, model: torch.nn.Module) -> CorruptionReport:
        scattered = {"side": cell.side, "level": cell.level} if cell.side == "scattered" else None
        where = scattered or {"layers": list(cell.layers) or None}
        return corrupt(
            model, kind=cell.kind, seed=cell.seed, part=cell.part, strength=cell.strength, **where
        )


def _by_unit(cells: list[Cell]) -> list[Cell]:
    """Each cell once, by seed and task, and of these what is trained before what is broken, and
    that before what is probed."""
    each: dict[str, Cell] = {}
    for cell in cells:
        each.setdefault(cell.key, cell)
    tasks = {task: i for i, task in enumerate(dict.fromkeys(c.task for c in cells))}

    def turn(cell: Cell) -> tuple[int, int, int]:
        probed = PROBING_STAGES.index(cell.stage) + 2 if cell.stage in PROBING_STAGES else 0
        return cell.seed, tasks[cell.task], probed or int(cell.stage == "corruption")

    return sorted(each.values(), key=turn)


def _summary(report: CorruptionReport) -> dict[str, Any]:
    """What a record keeps of a report: how much changed, and the change by tensor role."""
    by_role = report.to_frame().groupby("role")["relative_change"].mean()
    summary = {
        "tensors": len(report.tensors),
        "values": report.elements,
        "relative_change": {
            role: round(float(v), 5) for role, v in sorted(by_role.items()) if math.isfinite(v)
        },
    }
    if report.not_finite:
        summary["not_finite"] = report.not_finite
    if report.cannot_heal:
        summary["cannot_heal"] = True
    return summary


COMPUTE: dict[str, Callable[[Study, Cell, Callable[..., None]], dict[str, Any]]] = {
    "intact": Study._intact,
    "broken": Study._broken,
    "untrained": Study._untrained,
    "healed": Study._healed,
    "scratch": Study._scratch,
}
