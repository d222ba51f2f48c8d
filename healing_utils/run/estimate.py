"""What a profile takes, before it runs: cells, tokens, operations, disk and time.

Operations are two a weight and token of a forward pass. Time comes from the records that are there
of a kind of cell, else from a trial of it with a few steps: within a factor of two, mostly.
"""

import json
import math
import os
import tempfile
import time
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from tqdm.std import tqdm
from transformers import AutoModel

from healing_utils.base.progress import Progress, duration
from healing_utils.base.records import read_json, write_atomically
from healing_utils.healing.training import encode
from healing_utils.run import profiles
from healing_utils.study.cells import ALL_STAGES, Cell
from healing_utils.study.compute import network
from healing_utils.study.planning import intact_of, keeps_weights, needs
from healing_utils.study.study import Study

ESTIMATE = "estimate.json"  # in the run's folder
TRIAL_STEPS = (4, 16)  # so that what a step takes is told from what stands around the training
FEW = 50  # examples that a trial scores
RECORD = 6000  # bytes, about
WORK = ["trained", "scored", "operations"]
ROW = "{:12}{:>7}{:>7}{:>10}{:>10}{:>12}{:>14}"


def plan(profile: str, out: str | None, parameters: dict[str, str], shard: str | None) -> str:
    """What a profile takes, or a shard of it: a line a stage, of what is left; the estimate is kept
    in the run's folder. Raises HealingError where a name or value is wrong."""
    profiles.share([], shard)
    settled = profiles.settle(profile, out, parameters)
    table = make(study := Study(settled), shard)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = max(1, min(settled["workers"], cores // settled["threads"]))
    whose = f"shard {shard} of " if shard else ""
    lines = [f"Plan of {whose}profile {profile} in {study.run_folder}", *study.vocabulary_notes()]
    lines.append(ROW.format("stage", "cells", "left", *WORK, "time"))
    for stage in (*table["stage"].unique(), "all"):
        rows = table[(table["stage"] == stage) | (stage == "all")]
        left = rows[~rows["done"]]
        counts = [tqdm.format_sizeof(left[column].sum()) for column in WORK]
        seconds = duration(left["seconds"].sum() / at_once)
        lines.append(ROW.format(stage, len(rows), len(left), *counts, seconds))
    disk = [tqdm.format_sizeof(n, "B") for n in (RECORD * len(left), left["weights"].sum())]
    lines.append("disk: records {}, weights kept {}; {} cells at once".format(*disk, at_once))
    if left.empty:
        return "\n".join([*lines, "everything is done"])
    keys = [cell.key for cell in left["cell"]]
    estimated = dict(zip(keys, left["seconds"].round(3), strict=True))
    study.store.begin()
    write_atomically(study.run_folder / ESTIMATE, json.dumps(estimated))
    return "\n".join([*lines, f"estimate kept in {study.run_folder / ESTIMATE}"])


def compare(study: Study, cells: list[Cell]) -> str:
    """A line on estimated against measured time of the cells computed since the estimate was kept,
    both as long as one process takes over them; empty where there is nothing to compare."""
    estimated = read_json(study.run_folder / ESTIMATE)
    known = {key for key, s in estimated.items() if isinstance(s, float) and 0 <= s < math.inf}
    told = [cell for cell in cells if cell.key in known]
    times = [study.store.read(cell.stage, cell.key)["times"]["seconds"] for cell in told]
    sums = duration(sum(estimated[cell.key] for cell in told)), duration(sum(times))
    said = "Time of the cells, summed over processes: {} estimated, {} measured".format(*sums)
    return said if told else ""


@lru_cache
def text_length(study: Study, model: str, task: str) -> float:
    """Tokens of a text, in the mean of a sample."""
    texts, most = study.task(task).pool.texts[:200], study.parameters["max_length"]
    return float(np.mean(encode(study.tokenizer(model), texts, [0] * len(texts), most).lengths))


@lru_cache
def empty_model(study: Study, model: str) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModel.from_config(study.config(model), trust_remote_code=False)


def training_size(study: Study, cell: Cell) -> int:
    p, data = study.settings(cell), study.task(cell.task)
    return data.sizes(p["train_size"], p["validation_size"])[0]


def work_of(study: Study, cell: Cell, **few: int) -> tuple[float, float, float]:
    """Tokens trained on and scored (in a trial `few`), and operations: of training three times."""
    if cell.corpus is not None:
        drawn = study.corpus(*cell.source, cell.seed)
        trained, scored = 0.0, 1.5 * (drawn.train.size + drawn.test.size)  # word pieces, about
    else:
        p, each = study.settings(cell) | few, text_length(study, cell.model, cell.task)
        trains = cell.state not in ("broken", "untrained")
        trained = training_size(study, cell) * p["epochs"] * each * trains
        held_out = (p["evaluations"] + 1) * p["validation_size"] * trains
        test = len(study.task(cell.task).test)
        scored = (min(test, few.get("test_size", test)) + held_out) * each
    weights = empty_model(study, cell.model).num_parameters(exclude_embeddings=True)
    return trained, scored, 2 * weights * (3 * trained + scored)


def by_trial(study: Study, cell: Cell, folder: str) -> tuple[float, float]:
    """Seconds around a cell, and those an operation, by computing cells like it in `folder`."""
    found = []
    for steps in TRIAL_STEPS:
        wanted = steps * study.parameters["batch_size"]
        learns = cell.network if cell.corpus else cell
        size = min(wanted, training_size(study, learns)) if learns else wanted
        small = {"train_size": size, "epochs": wanted / size, "evaluations": 1}
        # Scoring counts by its operations, as training does: where both are, few examples tell it.
        sizes = () if cell.state in ("broken", "untrained") else ("validation_size", "test_size")
        few = {name: min(study.parameters[name] or FEW, FEW) for name in sizes}
        run = f"{folder}/{steps}"
        trial = Study({**study.parameters, **small, **few, "scans": {}, "run": run})
        trial.store.begin()  # makes the folder
        like = replace(cell, settings=tuple({**dict(cell.settings), **small}.items()))
        if cell.corpus is None:
            if needs(trial, like):
                network(trial, intact_of(trial, cell))
            trial.examples(like)
        elif cell.network:
            network(trial, cell.network)  # a probe's time has no training in it
        trained, _, operations = work_of(study, like, **few)
        start = time.perf_counter()
        trial.record(like, lambda *_: None)
        found.append((time.perf_counter() - start, operations))
        if not trained:  # it was the cell itself
            return 0.0, found[0][0] / operations
    (few, less), (many, more) = found
    each = max(many - few, 0.05 * many) / (more - less)
    return max(0.0, few - each * less), each


def make(study: Study, shard: str | None = None) -> pd.DataFrame:
    """A row a cell of a study, or a shard of it, where a stage first plans it; `weights` are bytes
    that are kept, `seconds` are estimated where the cell is not done."""
    rows = {}
    for stage in ALL_STAGES:
        for cell in profiles.share(study.plan(stage), shard):
            if cell.key not in rows:
                record = study.store.read(cell.stage, cell.key)
                seconds = record["times"]["seconds"] if record else np.nan
                # Time is alike, or goes with the operations, in cells that have this in common; of
                # what is not trained nothing tells what loading takes: of one task alone.
                alone = cell.task if cell.state in ("broken", "untrained") else ""
                kind = (cell.state, cell.model, alone, cell.recipe, cell.start)
                if cell.corpus is not None:
                    kind = (cell.stage, cell.model, *cell.source)
                weights = 4 * empty_model(study, cell.model).num_parameters()
                numbers = (*work_of(study, cell), weights * keeps_weights(study, cell), seconds)
                rows[cell.key] = stage, cell, record is not None, kind, *numbers
    columns = ["stage", "cell", "done", "kind", *WORK, "weights", "seconds"]
    table = pd.DataFrame(list(rows.values()), columns=columns).astype({"done": bool})
    kinds, warm = table.groupby("kind", sort=False), None
    with Progress(len(kinds), "planning", unit="kind") as bar, tempfile.TemporaryDirectory() as at:
        for kind, cells in kinds:
            bar.update(0, note=" ".join(map(str, kind)))
            known, left = cells[cells["done"]], cells[~cells["done"]]
            around, each = 0.0, known["seconds"].sum() / max(1, known["operations"].sum())
            if known.empty:
                # What the first cell of a process imports is not its own: it is computed twice.
                warm = warm or by_trial(study, left["cell"].iloc[0], at)
                around, each = by_trial(study, left["cell"].iloc[0], at)
            table.loc[left.index, "seconds"] = around + each * left["operations"]
            bar.update(1)
    return table
