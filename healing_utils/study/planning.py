"""From parameters to cells: the main grid, the scans beside it, and what is probed.

A scan is a small grid of its own, the product of its fields' values (`parameters.Scan`). What it
trains makes the stage `scans`; what it scores broken, the untrained partners of what it heals
included, the stage `harms`. A cell that several grids name is the same cell, computed once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.records import canonical
from healing_utils.healing import models, recipes
from healing_utils.healing.corruption import parse_kind
from healing_utils.healing.encoders import OUTER_PARTS, parse_level, resolve_layers
from healing_utils.study.cells import (
    ALL_STAGES,
    MIXED_NUMERICS,
    NUMERICS,
    PROBING_NUMERICS,
    RECIPE,
    SCAN_STAGES,
    STAGE_OF,
    STAGES,
    Cell,
    by_unit,
)
from healing_utils.study.parameters import SCAN, for_task
from healing_utils.study.sources import Sources

# What a scan may set of a training; a value may be given by task.
BUDGET = ("train_size", "epochs", "learning_rate", "evaluations", "head")
Place = tuple[str, float, str, tuple[int, ...]]  # side, level, kind and resolved layers


def plan(study: Sources, stage: str) -> list[Cell]:
    """The cells of a stage, in the order in which they are computed; `everything` is all stages,
    one task and seed after the other."""
    choose(stage, (*ALL_STAGES, "everything"), "stage")
    if stage == "everything":
        return by_unit([cell for name in ALL_STAGES for cell in plan(study, name)])
    if stage in SCAN_STAGES:
        return scan_cells(study, stage)
    if stage == "networks":
        found = {c.key: c for *_, c in _networks(study, "probing") if c is not None}
        return list(found.values())
    return _grid(study, stage) if stage in STAGES else _probe_cells(study, stage)


# -- one cell --------------------------------------------------------------------------------------


def task_cell(
    study: Sources, state: str, model: str, task: str, seed: int, side: str = "none",
    level: float = 0.0, kind: str = "none", layers: tuple[int, ...] = (), *,
    part: str | None = None, start: str | None = None, recipe: str | None = None, **settings: Any,
) -> Cell:  # fmt: skip
    """The cell of a model that is scored on a task, planned or not.

    `kind` may carry a strength (``noise=0.5``). `part`, `start` and `recipe` are the study's where
    they are not given; `settings` replace its `train_size`, `head` or parameters of `RECIPE`.
    Raises HealingError for what does not go together.
    """
    corrupted, healed = state in ("broken", "healed"), state == "healed"
    p = for_task(study.parameters, task)
    part = (part or p["part"]) if corrupted else "all"
    start = (start or p["start"]) if healed else "pre-trained"
    recipe = (recipe or p["recipe"]) if healed else "full"
    kind, strength = parse_kind(kind) if corrupted else (kind, None)
    settings = {k: v for k, v in settings.items() if v != p[k] and state != "broken"}
    p |= settings
    n_layers = study.config(model).num_hidden_layers
    if "head" in settings and start != "pre-trained":
        raise HealingError(
            f"head {p['head']!r} cannot start from the fine-tuned model, which has another one"
        )
    if part == "pooler" and p["head"] == "mean":
        raise HealingError("head 'mean' has no pooler: part 'pooler' cannot be corrupted")
    if part in OUTER_PARTS and recipe != "full":
        raise HealingError(f"recipe {recipe!r} is for layers: {part} can be healed by 'full'")
    if recipe in ("transplant", "drop") and len(layers) == n_layers:
        raise HealingError(f"recipe {recipe!r} needs a healthy layer, and all are corrupted")
    data = study.task(task)
    plain = p["precision"] in ("auto", "float32")
    determinants: dict[str, Any] = {
        "numerics": NUMERICS if plain else [NUMERICS, MIXED_NUMERICS],
        "state": state,
        "model": models.identity(model, p["model_revision"]),
        "data": study.content(task, seed, p["train_size"]),
        "classes": data.num_labels,
        "recipe": {name: p[name] for name in RECIPE},
        "seed": seed,
        "threads": p["threads"],
    }
    # What is as in paper A is left out, so that a new choice leaves the keys of old records alone.
    if p["head"] != "first":
        determinants["head"] = p["head"]
    if corrupted:
        # The layers themselves: one cell, whichever side and level led to them.
        determinants["corruption"] = {"kind": kind, "layers": layers, "seed": seed}
        for name, value, usual in (
            ("part", part, "all"),
            ("strength", strength, None),
            ("scattered", level if side == "scattered" else None, None),
        ):
            if value != usual:
                determinants["corruption"][name] = value
    taught = "teacher" in recipes.RECIPES[recipe].needs
    if settings and (start != "pre-trained" or taught):
        # It starts or learns from the intact model, whose training has not these settings.
        determinants["intact"] = task_cell(study, "intact", model, task, seed).key
    if start != "pre-trained":
        determinants["start"] = start
    if recipe != "full":
        determinants["healing"] = {"recipe": recipe, "numerics": recipes.NUMERICS}
    return Cell(
        STAGE_OF.get(state, "recovery"), state, model, task, seed, side, level, kind, layers,
        n_layers, data.metric, canonical(determinants), part, strength, start, recipe,
        tuple(sorted(settings.items())),
    )  # fmt: skip


def intact_of(study: Sources, cell: Cell) -> Cell:
    """The cell of the fine-tuned model that a cell is compared with, broken from or taught by."""
    return task_cell(study, "intact", cell.model, cell.task, cell.seed)


def needs(study: Sources, cell: Cell) -> set[str]:
    """Keys of the cells whose fine-tuned models computing a cell loads."""
    network = cell if cell.corpus is None else cell.network
    if network is None:
        return set()
    found = {network.key} - {cell.key} if network.state != "broken" else set()
    taught = "teacher" in recipes.RECIPES[network.recipe].needs
    compared = network.state in ("broken", "untrained") or (network is not cell and network.layers)
    if compared or network.start == "fine-tuned" or taught:
        found.add(intact_of(study, network).key)
    return found


# -- the main grid ---------------------------------------------------------------------------------


def corruptions(study: Sources, model: str) -> list[Place]:
    """The grid for one model, no kind (with its strength) and layers twice."""
    p = study.parameters
    if p["part"] in OUTER_PARTS:  # beside the layers: side and level say nothing
        return [("none", 0.0, kind, ()) for kind in p["kind"]]
    n_layers = study.config(model).num_hidden_layers
    if p["layers"] is not None:
        layers = resolve_layers(n_layers, "bottom", 1, p["layers"])
        return [("custom", len(layers) / n_layers, kind, layers) for kind in p["kind"]]
    wanted = [(s, level, kind) for kind in p["kind"] for level in p["levels"] for s in p["sides"]]
    wanted += [(s, level, "init") for level in p["init_levels"] for s in p["sides"]]
    grid: dict[tuple[str, tuple[int, ...]], Place] = {}
    for side, level, kind in wanted:
        layers = resolve_layers(n_layers, side, level, None)
        full = len(layers) == n_layers
        place = ("all" if full else side, 1.0 if full else parse_level(level), kind, layers)
        grid.setdefault((kind, layers), place)
    return list(grid.values())


def _whole(study: Sources, model: str) -> Place:
    """Every parameter at its random initial value."""
    return "all", 1.0, "scratch", tuple(range(study.config(model).num_hidden_layers))


def _grid(study: Sources, stage: str) -> list[Cell]:
    p, cells = study.parameters, []
    for model in p["model"]:
        wanted: list[tuple[Any, ...]] = [("intact",)]
        if stage != "baseline":
            state = "broken" if stage == "corruption" else "healed"
            wanted = [(state, *place) for place in corruptions(study, model)]
        if stage == "corruption":  # the floor under every similarity
            wanted.append(("untrained", *_whole(study, model)))
        if stage == "recovery" and p["scratch"]:
            wanted.append(("scratch", *_whole(study, model)))
        for task, seed, (state, *place) in product(p["task"], p["seeds"], wanted):
            cells.append(task_cell(study, state, model, task, seed, *place))
    return cells


# -- scans -----------------------------------------------------------------------------------------


def scan_cells(study: Sources, stage: str, names: Collection[str] | None = None) -> list[Cell]:
    """The cells of `harms` or `scans`, scan by scan (those of `names` alone, where they are given),
    none twice in a scan."""
    cells: dict[tuple[str, str, str], Cell] = {}
    for name, given in study.parameters["scans"].items():
        if names is not None and name not in names:
            continue
        try:
            for cell in _scan(study, given):
                if (cell.state == "broken") == (stage == "harms"):
                    cells.setdefault((name, cell.key, cell.side), replace(cell, scan=name))
        except HealingError as error:
            raise HealingError(f"scan {name!r}: {error}") from error
    return list(cells.values())


def left_out(study: Sources) -> list[str]:
    """A line for each scan of which nothing is computed, because its tasks are not the study's."""
    there = study.parameters["task"]
    return [
        f"scan {name} is left out: its tasks ({', '.join(scan['task'])}) are not among the study's"
        for name, scan in study.parameters["scans"].items()
        if scan.get("task") and not set(scan["task"]) & set(there)
    ]


def _scan(study: Sources, given: dict[str, Any]) -> Iterator[Cell]:
    p, scan = study.parameters, SCAN | given
    for field in ("task", "seeds", "sides"):
        if scan[field] is None:
            scan[field] = p[field]
    # A study of another task keeps the notebooks' own scans of theirs out; `left_out` says so.
    scan["task"] = [task for task in scan["task"] if task in p["task"]]
    strangers = [seed for seed in scan["seeds"] if seed not in p["seeds"]]
    if strangers:
        raise HealingError(
            f"seed {strangers[0]} is not among the study's, {p['seeds']}: it has no intact model"
        )
    states = list(scan["state"])
    if "healed" in states and scan["broken"] and "broken" not in states:
        states.append("broken")
    for model, task, seed, state in product(p["model"], scan["task"], scan["seeds"], states):
        usual, own = for_task(p, task), for_task(scan, task)
        values = [[usual[name]] if own[name] is None else own[name] for name in BUDGET]
        budgets = [dict(zip(BUDGET, chosen, strict=True)) for chosen in product(*values)]
        if state in ("intact", "scratch"):
            place = _whole(study, model) if state == "scratch" else ()
            for budget in budgets:
                yield task_cell(study, state, model, task, seed, *place, **budget)
            continue
        for part, kind in product(scan["part"], scan["kind"]):
            for side, level, layers in _places(study, model, scan, part, seed):
                how = [{}]
                if state == "healed":
                    how = [
                        {"start": start, "recipe": recipe, **budget}
                        for start, recipe, budget in product(scan["start"], scan["recipe"], budgets)
                    ]
                for one in how:
                    place = (side, level, kind, layers)
                    yield task_cell(study, state, model, task, seed, *place, part=part, **one)


def _places(
    study: Sources, model: str, scan: dict[str, Any], part: str, seed: int
) -> list[tuple[str, float, tuple[int, ...]]]:
    """Side, level and resolved layers of what a scan corrupts; `random` differs by seed."""
    n_layers = study.config(model).num_hidden_layers
    if part in OUTER_PARTS:
        return [("none", 0.0, ())]
    if scan["layers"] is not None:
        sets = [[i] for i in range(n_layers)] if scan["layers"] == "each" else scan["layers"]
        chosen = [resolve_layers(n_layers, layers=layers) for layers in sets]
        return [("custom", len(layers) / n_layers, layers) for layers in chosen]
    found = {}
    for level, side in product(scan["levels"], scan["sides"]):
        layers = resolve_layers(n_layers, side, level, None, seed)
        full = len(layers) == n_layers and side != "scattered"
        place = ("all", 1.0, layers) if full else (side, parse_level(level), layers)
        found.setdefault(place)
    return list(found)


# -- what is probed --------------------------------------------------------------------------------


def probed_beside(study: Sources) -> list[Cell]:
    """The intact cells of scans whose models are probed."""
    scans = study.parameters["scans"]
    wanted = {name for name, scan in scans.items() if scan.get("probed")}
    return [cell for cell in scan_cells(study, "scans", wanted) if cell.state == "intact"]


def keeps_weights(study: Sources, cell: Cell) -> bool:
    """Whether a cell's model stays in the run's folder, to be broken or looked into."""
    if cell.state == "intact" and cell.corpus is None:
        return cell.plain or cell.key in {c.key for c in probed_beside(study)}
    levels = {parse_level(level) for level in study.parameters["probe_levels"]}
    probed = cell.state == "healed" and cell.task in study.healed_tasks and cell.kind == "reinit"
    grid = cell.plain and cell.level in levels and cell.side in ("bottom", "top", "all", "custom")
    return probed and grid and cell.corpus is None


def _networks(study: Sources, stage: str) -> list[tuple[str, str, int, Cell | None]]:
    """(model, state, seed, task cell or None) of every model that a stage looks into."""
    p = study.parameters
    tasks = p["probe_tasks"] or p["task"]
    levels = {parse_level(level) for level in p["probe_levels"]}
    there = {parse_level(level) for level in p["levels"]}
    for level in p["probe_levels"]:
        if p["layers"] is None and parse_level(level) not in there:
            known = ", ".join(p["levels"])
            raise HealingError(f"probe_levels has {level!r}, which is not in levels: {known}")
    found: list[tuple[str, str, int, Cell | None]] = []
    for model, seed in product(p["probe_models"] or p["model"], p["seeds"]):
        found.append((model, "pretrained", seed, None))
        if stage == "probing":
            found.append((model, "untrained", seed, None))
        for task in tasks:
            found.append((model, "intact", seed, task_cell(study, "intact", model, task, seed)))
        if stage == "neurons":
            continue
        for task in study.healed_tasks:
            if task not in tasks:
                cell = task_cell(study, "intact", model, task, seed)
                found.append((model, "intact", seed, cell))
            for side, level, kind, layers in corruptions(study, model):
                if kind == "reinit" and level in levels:
                    for state in ("broken", "healed"):
                        place = (side, level, kind, layers)
                        cell = task_cell(study, state, model, task, seed, *place)
                        found.append((model, state, seed, cell))
    if stage == "probing":
        known = {cell.key for *_, cell in found if cell is not None}
        for cell in probed_beside(study):
            if cell.key not in known:
                found.append((cell.model, "intact", cell.seed, cell))
                known.add(cell.key)
    return found


def _probe_cells(study: Sources, stage: str) -> list[Cell]:
    p, cells = study.parameters, []
    for model, state, seed, network in _networks(study, stage):
        config = study.config(model)
        for name, column in study.sources():
            drawn = study.corpus(name, column, seed)
            before = {"state": state, "model": models.identity(model, p["model_revision"])}
            before |= {"seed": seed} if state == "untrained" else {}
            determinants: dict[str, Any] = {
                "stage": stage,
                "numerics": PROBING_NUMERICS,
                "network": json.loads(network.determinants) if network else before,
                "corpus": [drawn.train.sha(), drawn.test.sha()],
                "aggregation": p["aggregation"],
                "seed": seed,
                "threads": p["threads"],
            }
            if stage == "neurons":
                ablated = bool(network and network.task in study.healed_tasks)
                determinants |= {"delta": p["neuron_delta"], "ablated": ablated}
            of = network or Cell("", "", "", "none", 0, "none", 0.0, "none", (), 0, "", "")
            cells.append(
                Cell(
                    stage, state, model, of.task, seed, of.side, of.level, of.kind, of.layers,
                    config.num_hidden_layers, "accuracy", canonical(determinants),
                    scan=of.scan, corpus=drawn.name, column=drawn.column, source=(name, column),
                    network=network, architecture=config.model_type,
                )
            )  # fmt: skip
    return cells
