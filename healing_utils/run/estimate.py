"""What a profile takes, before it runs: cells, tokens, operations, disk and time.

Tokens come from the plan and a sample of each task's texts, operations from torch's own counter.
Time comes from the records that the run's folder has of a kind of cell, else from a trial: a cell
of each kind is computed, a trained one twice with a few steps, so that what a step takes is told
from what stands around the training. Within a factor of two of the run, mostly.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from healing_utils.base.progress import Progress, duration
from healing_utils.base.records import Store, canonical, write_atomically
from healing_utils.healing.corruption import spell_kind
from healing_utils.healing.training import encode
from healing_utils.run.profiles import Shard
from healing_utils.study.cells import ALL_STAGES, Cell
from healing_utils.study.planning import intact_of, keeps_weights, task_cell
from healing_utils.study.study import Study

ESTIMATE = "estimate.json"  # in the run's folder
TRIAL_STEPS = (4, 16)
TEXTS = 200  # of a task whose tokens are counted
RECORD = 6000  # bytes, about


@dataclass
class Work:
    """Counts work and times kinds of cells, for one study."""

    study: Study

    def __post_init__(self) -> None:
        self.length = lru_cache(self._length)
        self.model_size = lru_cache(self._model_size)

    def _length(self, model: str, task: str) -> float:
        """Tokens of a text, in the mean."""
        texts = self.study.task(task).pool.texts[:TEXTS]
        ids = encode(
            self.study.tokenizer(model),
            texts,
            [0] * len(texts),
            self.study.parameters["max_length"],
        )
        return float(np.mean(ids.lengths))

    def _model_size(self, model: str, length: int) -> tuple[float, int]:
        """Operations a token of a forward pass over texts of `length` tokens; parameters."""
        for device in ("meta", "cpu"):  # XLNet and DeBERTa look at values, which meta has not
            with (
                contextlib.suppress(RuntimeError),
                torch.device(device),
                torch.no_grad(),
                FlopCounterMode(display=False) as counter,
            ):
                empty = AutoModel.from_config(self.study.config(model)).eval()
                empty(input_ids=torch.zeros(1, length, dtype=torch.long))
                break
        return counter.get_total_flops() / length, sum(p.numel() for p in empty.parameters())

    def size(self, cell: Cell) -> int:
        """Training examples."""
        p, data = self.study.settings(cell), self.study.task(cell.task)
        held_out = p["validation_size"] if data.validation is None else 0
        return p["train_size"] or len(data.pool) - held_out

    def tokens(self, cell: Cell) -> tuple[float, float]:
        """Trained on, and scored."""
        if cell.corpus is not None:
            drawn = self.study.corpus(*cell.source, cell.seed)
            return 0.0, 1.5 * (drawn.train.size + drawn.test.size)  # word pieces, about
        p, data, length = self.study.settings(cell), self.study.task(cell.task), self.length
        trained = 0 if cell.state in ("broken", "untrained") else self.size(cell) * p["epochs"]
        scored = len(data.test) + (p["evaluations"] + 1) * p["validation_size"] * bool(trained)
        return trained * length(cell.model, cell.task), scored * length(cell.model, cell.task)

    def operations(self, cell: Cell) -> float:
        """Of training, three times a forward pass, and of scoring."""
        trained, scored = self.tokens(cell)
        length = (
            32 if cell.corpus is not None else max(2, round(self.length(cell.model, cell.task)))
        )
        return (3 * trained + scored) * self.model_size(cell.model, length)[0]

    def kept(self, cell: Cell) -> int:
        """Bytes of weights that the run keeps of a cell."""
        return 4 * self.model_size(cell.model, 8)[1] * keeps_weights(self.study, cell)


def kind_of(cell: Cell) -> tuple[Any, ...]:
    """What cells of which the time is alike, or goes with their operations, have in common."""
    if cell.corpus is not None:
        return cell.stage, cell.model, *cell.source
    return cell.state, cell.model, cell.task, cell.recipe, cell.start


def from_records(work: Work, cells: list[Cell]) -> tuple[float, float] | None:
    """Seconds around a cell, and those an operation, of a kind by its records; None without any."""
    seconds, operations = 0.0, 0.0
    for cell in cells:
        record = work.study.store.read(cell.stage, cell.key)
        if record is not None:
            seconds += record["times"]["seconds"]
            operations += work.operations(cell)
    return (0.0, seconds / operations) if operations else None


def by_trial(work: Work, cell: Cell, folder: str) -> tuple[float, float]:
    """The same by computing a cell like `cell`, in a folder of its own."""
    found, parameters = [], work.study.parameters
    for steps in TRIAL_STEPS:
        wanted = steps * parameters["batch_size"]
        size = min(wanted, work.size(cell)) if cell.corpus is None else wanted
        small = {"train_size": size, "epochs": wanted / size, "evaluations": 1}
        trial = Study({**parameters, **small, "scans": {}, "run": f"{folder}/{steps}"})
        like = cell
        if cell.corpus is None:
            place = (cell.side, cell.level, spell_kind(cell.kind, cell.strength), cell.layers)
            place = (
                place if cell.state in ("broken", "healed") else (*place[:2], cell.kind, place[3])
            )
            how = {"part": cell.part, "start": cell.start, "recipe": cell.recipe}
            like = task_cell(trial, cell.state, cell.model, cell.task, cell.seed, *place, **how)
            intact = intact_of(trial, cell)
            if like.key != intact.key and not trial.store.weights_path(intact.key).exists():
                trial.record(intact, lambda *_: None)
            trial.examples(like)
        start = time.perf_counter()
        trial.record(like, lambda *_: None)
        counted = Work(trial)
        found.append((time.perf_counter() - start, counted.operations(like)))
        if not work.tokens(cell)[0]:  # nothing is trained: it was the cell itself
            return 0.0, found[0][0] / found[0][1]
    (few, less), (many, more) = found
    each = max(many - few, 0.05 * many) / (more - less)
    return max(0.0, few - each * less), each


def make(study: Study, share: Shard) -> pd.DataFrame:
    """A row a cell of a study, of a shard its own: stage, cell, done, tokens, operations, seconds,
    bytes of weights. A cell that several stages plan counts where it comes first."""
    work, rows, known = Work(study), [], set()
    for stage in ALL_STAGES:
        for cell in study.plan(stage):
            if cell.key not in known and share.has(cell):
                known.add(cell.key)
                done = study.store.read(cell.stage, cell.key) is not None
                rows.append({"stage": stage, "cell": cell, "done": done, "kind": kind_of(cell)})
    counts = ["trained", "scored", "operations", "seconds", "kept"]
    table = pd.DataFrame(rows, columns=["stage", "cell", "done", "kind", *counts])
    table = table.astype({"done": bool})  # also where a shard has no cell
    kinds, warm = table.groupby("kind", sort=False), None
    with Progress(len(kinds), "planning", unit="kind") as bar, tempfile.TemporaryDirectory() as at:
        for kind, part in kinds:
            cells = list(part["cell"])
            bar.update(0, note=" ".join(map(str, kind)))
            left = part.loc[~part["done"], "cell"]
            around, each = 0.0, 0.0
            if len(left):
                known = from_records(work, cells)
                if not (known or warm):  # what the first cell of a process imports is not its own
                    warm = by_trial(work, left.iloc[0], at)
                around, each = known or by_trial(work, left.iloc[0], at)
            for index, cell in zip(part.index, cells, strict=True):
                trained, scored = work.tokens(cell)
                operations = work.operations(cell)
                table.loc[index, counts] = (
                    trained, scored, operations, around + each * operations, work.kept(cell),
                )  # fmt: skip
            bar.update(1)
    return table


def describe(table: pd.DataFrame, study: Study, title: str) -> str:
    """The plan as text, a row a stage: what is left of each."""
    p, left = study.parameters, table[~table["done"]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = max(1, min(p["workers"], cores // p["threads"]))
    lines = [title, f"{'stage':12}{'cells':>7}{'left':>7}{'trained':>10}{'scored':>10}"]
    lines[1] += f"{'operations':>12}{'time':>14}"
    for stage in (*table["stage"].unique(), "all"):
        rows, todo = (t if stage == "all" else t[t["stage"] == stage] for t in (table, left))
        sums = [_short(todo[name].sum()) for name in ("trained", "scored", "operations")]
        time_left = duration(todo["seconds"].sum() / at_once)
        lines.append(
            f"{stage:12}{len(rows):7}{len(todo):7}{sums[0]:>10}{sums[1]:>10}{sums[2]:>12}"
            f"{time_left:>14}"
        )
    disk = [_short(RECORD * len(left)), _short(left["kept"].sum())]
    lines.append(f"disk: records {disk[0]}B, weights kept {disk[1]}B; {at_once} cells at once")
    return "\n".join(lines)


def _short(count: float) -> str:
    """``950``, ``1.23 M``, ``45.6 T``: three digits and a power of a thousand."""
    units = ["", "k", "M", "G", "T", "P"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}" if units[0] else f"{count:.0f} "


def keep(table: pd.DataFrame, run: Path) -> Path | None:
    """Keep the estimate of what is left in the run's folder; None where nothing is left."""
    left = table[~table["done"]]
    cells = {
        c.key: [c.stage, round(s, 3)] for c, s in zip(left["cell"], left["seconds"], strict=True)
    }
    if cells:
        write_atomically(run / ESTIMATE, canonical(cells) + "\n")
    return run / ESTIMATE if cells else None


def compare(run: Path) -> list[str]:
    """A line on estimated against measured time of the cells computed since the estimate was kept,
    both as long as one process takes over them; none where there is nothing to compare."""
    store, estimated, measured = Store(run), 0.0, 0.0
    try:
        for key, (stage, seconds) in json.loads((run / ESTIMATE).read_text("utf-8")).items():
            record = store.read(stage, key)
            if record is not None:
                estimated += seconds
                measured += record["times"]["seconds"]
    except (OSError, ValueError, TypeError, AttributeError):
        return []
    told = f"{duration(estimated)} estimated, {duration(measured)} measured"
    return [f"Time of the cells, summed over processes: {told}"] if measured else []
