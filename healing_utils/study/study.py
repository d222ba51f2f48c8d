"""The study: plans its stages, has what is missing computed, and gives their tables."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from healing_utils.analysis.results import table
from healing_utils.base.errors import HealingError
from healing_utils.base.progress import Progress
from healing_utils.base.records import canonical, write_atomically
from healing_utils.study import compute, linguistics, planning, pool
from healing_utils.study.cells import ALL_STAGES, PROBING_STAGES, Cell, by_unit
from healing_utils.study.cluster import Ray
from healing_utils.study.parameters import for_task
from healing_utils.study.sources import Sources

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scikit-learn")
FEW = 3  # cells: processes take seconds to start


class Study(Sources):
    """A run's folder and its parameters; plans and runs the stages.

    ``Study(parameters).run("baseline")`` computes what is missing and returns the stage's table.
    """

    _processes: pool.Processes | None = None  # they go on from stage to stage

    def describe(self) -> str:
        """Models, tasks and device of this study, for the top of a notebook."""
        p, lines = self.parameters, []
        for model in p["model"]:
            config = self.config(model)
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
        made = self.provenance()
        lines += planning.left_out(self)
        lines.append(
            f"on {made['device']} with {made['threads']} threads, Python {made['python']}, "
            f"torch {made['versions']['torch']}, transformers {made['versions']['transformers']}"
        )
        return "\n".join(lines)

    def plan(self, stage: str) -> list[Cell]:
        """The cells of a stage, in the order in which they are computed: see `planning.plan`."""
        return planning.plan(self, stage)

    def cell(self, state: str, model: str, task: str, seed: int, *place: Any, **how: Any) -> Cell:
        """The cell of a model that is scored on a task: see `planning.task_cell`."""
        return planning.task_cell(self, state, model, task, seed, *place, **how)

    def corruptions(self, model: str) -> list[planning.Place]:
        """Side, level, kind and layers of the main grid for one model."""
        return planning.corruptions(self, model)

    def run(self, stage: str, plan: bool = True) -> pd.DataFrame:
        """Compute the stage's missing cells and return its table.

        Cells that another run on the same folder is computing are waited for. A cell that fails
        does not stop the others; all failures are raised together at the end, what is done is kept.
        `plan` makes these cells the stage's cells in this folder; without it they are computed
        beside them. Raises HealingError where a cell failed.
        """
        cells = self.plan(stage)
        if plan:
            self.keep_plan(stage, cells)
        self.compute(cells, stage)
        return self.table(stage, cells)

    def compute(
        self,
        cells: list[Cell],
        what: str,
        executor: str | None = None,
        address: str | None = None,
    ) -> None:
        """Compute those of `cells` that have no record; `what` they are stands in the progress and
        in errors. `executor`: `workers`, as many processes as the parameter says, `in-process`, or
        `ray`, the cluster at `address`; by itself processes where there are to be several. Raises
        as `run` does, and where Ray is not there."""
        self.store.sweep()
        each = {cell.key: cell for cell in cells}  # scans may share a cell
        todo = [cell for cell in each.values() if self.store.read(cell.stage, cell.key) is None]
        if executor is None:  # with one worker, no further process is on its GPU
            executor = "workers" if self.parameters["workers"] > 1 else "in-process"
        if executor == "workers" and len(todo) < FEW:
            executor = "in-process"
        make = functools.partial(Study, {**self.parameters, "run": str(self.run_folder)})
        failures: list[tuple[Cell, Exception]] = []
        with Progress(len(each), what, unit="cell") as bar, contextlib.ExitStack() as open_pool:
            bar.update(len(each) - len(todo), note=f"{len(each) - len(todo)} found finished")
            if not todo:
                return
            if executor == "ray":
                backend: pool.Backend = Ray(make, self.parameters, address)
                open_pool.callback(backend.close)
            elif executor == "workers":
                self._processes = self._processes or pool.Processes(
                    make, self.parameters["workers"]
                )
                backend = self._processes
            else:
                backend = pool.InProcess(self)
            computed = pool.outcomes(
                self, todo, functools.partial(planning.needs, self), backend,
                lambda note: bar.update(0, note=note),
            )  # fmt: skip
            open_pool.enter_context(contextlib.closing(computed))  # no process goes on after a stop
            for cell, error in computed:
                if error is not None:
                    failures.append((cell, error))
                bar.update(1)
        for cell, error in failures:
            print(f"--- {cell.name} ---", file=sys.stderr)
            print("\n".join(getattr(error, "__notes__", [])) or error, file=sys.stderr)
        if failures:
            cell, error = failures[0]
            raise HealingError(
                f"{len(failures)} of {len(each)} cells of {what} failed; the others are kept. "
                f"First: {cell.name}: {error}"
            )

    def close(self) -> None:
        """End the processes that computed, which else end with this one."""
        if self._processes is not None:
            self._processes.close()

    def keep_plan(self, stage: str, cells: list[Cell]) -> None:
        """Make `cells` the stage's cells in this folder."""
        planned = [
            {"key": c.key, "name": c.name, "stage": c.stage, "cell": c.columns()} for c in cells
        ]
        write_atomically(
            self.run_folder / "plans" / f"{stage}.json",
            canonical({"stage": stage, "cells": planned}),
        )

    def keep_plans(self) -> list[Cell]:
        """Make what the parameters plan the cells of all stages in this folder; return them, one
        task and seed after the other."""
        planned = {stage: self.plan(stage) for stage in ALL_STAGES}
        for stage, cells in planned.items():
            if stage != "networks":
                self.keep_plan(stage, cells)
        return by_unit([cell for cells in planned.values() for cell in cells])

    def table(self, stage: str, cells: list[Cell] | None = None) -> pd.DataFrame:
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

    def record(self, cell: Cell, on_step: Callable[..., None]) -> None:
        """Compute a cell and write its record."""
        start = time.perf_counter()
        probing = cell.stage in PROBING_STAGES
        work = linguistics.COMPUTE[cell.stage] if probing else compute.COMPUTE[cell.state]
        result = work(self, cell, on_step)
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


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's model where the system tells it, else its kind."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return f"{platform.machine()}, {value.strip()}"
    return platform.processor() or platform.machine()
