"""From parameters to cells: the main grid, the scans beside it, and what is probed.

A grid has the fields of `parameters.Scan`, and its cells are the product of their values. What a
scan trains makes the stage `scans`; what it scores broken, the untrained partners of what it heals
included, the stage `harms`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.records import canonical
from healing_utils.healing import models, recipes
from healing_utils.healing.corruption import parse_kind
from healing_utils.healing.encoders import CONTROLS, OUTER_PARTS, parse_level, resolve_layers
from healing_utils.study import cells
from healing_utils.study.cells import CORRUPTED, Cell
from healing_utils.study.parameters import SCAN, for_task

STAGE_OF = {  # the floor under every similarity is untrained
    "intact": "baseline", "broken": "corruption", "untrained": "corruption", "healed": "recovery",
    "scratch": "recovery",
}  # fmt: skip
# What a grid may set of a training; a value may be given by task.
BUDGET = ("train_size", "epochs", "learning_rate", "evaluations", "head")
# As in paper A. Determinants leave it out, so that a new choice leaves the keys of old records.
USUAL = {
    "corruption": None, "part": "all", "strength": None, "scattered": None, "head": "first",
    "intact": None, "start": "pre-trained", "healing": None,
}  # fmt: skip
Place = tuple[str, float, str, tuple[int, ...]]  # side, level, kind and resolved layers


def plan(study: Any, stage: str) -> list[Cell]:
    """The cells of a stage, in the order in which they are computed."""
    choose(stage, cells.ALL_STAGES, "stage")
    if stage in cells.STAGES:
        states = [state for state in STAGE_OF if STAGE_OF[state] == stage]
        if not study.parameters["scratch"]:
            states = [state for state in states if state != "scratch"]
        return list(_expand(study, {**_main_grid(study), "state": states}))
    if stage in cells.SCAN_STAGES:
        return [c for c in _scanned(study) if (c.state == "broken") == (stage == "harms")]
    networks = _networks(study, stage)
    if stage == "networks":
        return once(cell for cell in networks if cell.stage)
    return [cell for network in networks for cell in _probes(study, stage, network)]


def once(planned: Iterable[Cell]) -> list[Cell]:
    """Each cell where it is first named."""
    found: dict[str, Cell] = {}
    for cell in planned:
        found.setdefault(cell.key, cell)
    return list(found.values())


def by_unit(planned: list[Cell]) -> list[Cell]:
    """Each cell once, by seed and task, and of these what is trained before what is broken, and
    that before what is probed: so that models are looked into where and when they were made."""
    tasks = list(dict.fromkeys(cell.task for cell in planned))
    turn = {"corruption": 1, "probing": 2, "neurons": 3}
    return sorted(once(planned), key=lambda c: (c.seed, tasks.index(c.task), turn.get(c.stage, 0)))


# -- one cell --------------------------------------------------------------------------------------


def task_cell(
    study: Any, state: str, model: str, task: str, seed: int, side: str = "none",
    level: float = 0.0, kind: str = "none", layers: tuple[int, ...] = (), **how: Any,
) -> Cell:  # fmt: skip
    """The cell of a model that is scored on a task, planned or not. `how` may replace the study's
    `part`, `start`, `recipe`, `train_size`, `head` and parameters of `cells.RECIPE`. Raises
    HealingError for what does not go together."""
    usual, data = for_task(study.parameters, task), study.task(task)
    p, n_layers = usual | how, study.config(model).num_hidden_layers
    if state not in CORRUPTED:
        p["part"] = "all"
    if state != "healed":
        # What is broken is not trained, but its layers may be taken out where a scan asks for it.
        given = how.get("recipe", "full") if state == "broken" else "full"
        if given not in ("full", "drop"):
            raise HealingError(f"recipe {given!r} trains: what is broken takes 'full' or 'drop'")
        p |= {"start": "pre-trained", "recipe": given}
    part, start, recipe, head = (p[name] for name in ("part", "start", "recipe", "head"))
    settings = sorted(how.keys() - {"part", "start", "recipe"})
    settings = {name: how[name] for name in settings if how[name] != usual[name]}
    if "head" in settings and start != "pre-trained":
        raise HealingError(
            f"head {head!r} cannot start from the fine-tuned model, which has another one"
        )
    if part == "pooler" and head == "mean":
        raise HealingError("head 'mean' has no pooler: part 'pooler' cannot be corrupted")
    if part in OUTER_PARTS and recipe != "full":
        raise HealingError(f"recipe {recipe!r} is for layers: {part} can be healed by 'full'")
    if recipe in ("transplant", "drop") and len(layers) == n_layers:
        raise HealingError(f"recipe {recipe!r} needs a healthy layer, and all are corrupted")
    corruption = strength = intact = healing = None
    if state in CORRUPTED:
        kind, strength = parse_kind(kind)
        # The layers themselves: one cell, whichever side and level led to them.
        scattered = level if side == "scattered" else None
        corruption = {"kind": kind, "layers": layers, "seed": seed}
        corruption |= _unusual(part=part, strength=strength, scattered=scattered)
    if settings and (start != "pre-trained" or taught(recipe)):
        # It starts or learns from the intact model, whose training has not these settings.
        intact = task_cell(study, "intact", model, task, seed).key
    if recipe != "full":
        healing = {"recipe": recipe, "numerics": recipes.NUMERICS}
    plain = p["precision"] in ("auto", "float32")
    determinants = {
        "numerics": cells.NUMERICS if plain else [cells.NUMERICS, cells.MIXED_NUMERICS],
        "state": state,
        "model": models.identity(model, p["model_revision"]),
        "data": study.content(task, seed, p["train_size"]),
        "classes": data.num_labels,
        "recipe": {name: p[name] for name in cells.RECIPE},
        "seed": seed,
        "threads": p["threads"],
        **_unusual(corruption=corruption, head=head, intact=intact, start=start, healing=healing),
    }
    return Cell(
        stage=STAGE_OF[state], determinants=canonical(determinants), model=model, task=task,
        state=state, side=side, level=level, kind=kind, part=part, strength=strength,
        layers=layers, n_layers=n_layers, seed=seed, metric=data.metric, start=start,
        recipe=recipe, settings=tuple(settings.items()),
    )  # fmt: skip


def _unusual(**found: Any) -> dict[str, Any]:
    return {name: value for name, value in found.items() if value != USUAL[name]}


def taught(recipe: str) -> bool:
    """Whether a recipe learns from the intact model."""
    return "teacher" in recipes.RECIPES[recipe].needs


def intact_of(study: Any, cell: Cell) -> Cell:
    """The cell of the fine-tuned model that a cell is compared with, broken from or taught by."""
    return task_cell(study, "intact", cell.model, cell.task, cell.seed)


def needs(study: Any, cell: Cell) -> set[str]:
    """Keys of the cells whose fine-tuned models computing a cell loads."""
    network = cell if cell.corpus is None else cell.network
    if network is None:
        return set()
    found = {network.key} - {cell.key} if network.state != "broken" else set()
    compared = network.state in ("broken", "untrained") or (network is not cell and network.layers)
    if compared or network.start == "fine-tuned" or taught(network.recipe):
        found.add(intact_of(study, network).key)
    return found


def keeps_weights(study: Any, cell: Cell) -> bool:
    """Whether a cell's model stays in the run's folder, to be broken or looked into."""
    if cell.corpus is not None:
        return False
    if cell.state == "intact":
        return cell.plain or cell.key in {c.key for c in _scanned(study, probed=True)}
    wanted = cell.state == "healed" and cell.task in study.healed_tasks and cell.plain
    there = cell.kind == "reinit" and cell.side not in CONTROLS
    return wanted and there and cell.level in map(parse_level, study.parameters["probe_levels"])


# -- grids -----------------------------------------------------------------------------------------


def _main_grid(study: Any) -> dict[str, Any]:
    p = study.parameters
    same = ("task", "seeds", "sides", "levels", "kind", "init_levels")
    single = {name: [p[name]] for name in ("part", "start", "recipe")}
    layers = None if p["layers"] is None else [p["layers"]]
    return SCAN | {name: p[name] for name in same} | single | {"layers": layers}


def corruptions(study: Any, model: str) -> list[Place]:
    """Side, level, kind and layers of the main grid for one model."""
    return _places(study, model, _main_grid(study), study.parameters["part"])


def _places(study: Any, model: str, grid: dict[str, Any], part: str, seed: int = 0) -> list[Place]:
    """What a grid corrupts, no kind and layers twice; `random` differs by seed."""
    if part in OUTER_PARTS:  # beside the layers: side and level say nothing
        return [("none", 0.0, kind, ()) for kind in grid["kind"]]
    n_layers = study.config(model).num_hidden_layers
    if grid["layers"] is not None:
        sets = [[i] for i in range(n_layers)] if grid["layers"] == "each" else grid["layers"]
        sets = dict.fromkeys(resolve_layers(n_layers, layers=named) for named in sets)
        return [("custom", len(s) / n_layers, kind, s) for kind in grid["kind"] for s in sets]
    found: dict[tuple[Any, ...], Place] = {}
    wanted = [*product(grid["kind"], grid["levels"], grid["sides"])]
    wanted += product(["init"], grid.get("init_levels", ()), grid["sides"])
    for kind, level, side in wanted:
        layers, share = resolve_layers(n_layers, side, level, None, seed), parse_level(level)
        if len(layers) == n_layers and side != "scattered":
            side, share = "all", 1.0
        found.setdefault((kind, layers, side == "scattered" and share), (side, share, kind, layers))
    return list(found.values())


def _expand(study: Any, grid: dict[str, Any]) -> Iterator[Cell]:
    each = product(study.parameters["model"], grid["task"], grid["seeds"], grid["state"])
    for model, task, seed, state in each:
        given = for_task(grid, task)
        alone = ("recipe",) if grid["state"] == ["broken"] else ()
        fields = {"broken": alone, "healed": ("start", "recipe", *BUDGET)}.get(state, BUDGET)
        fields = [name for name in fields if given[name] is not None]
        ways = product(*(given[name] for name in fields))
        ways = [dict(zip(fields, values, strict=True)) for values in ways]
        whole = "all", 1.0, "scratch", tuple(range(study.config(model).num_hidden_layers))
        for part in grid["part"] if state in CORRUPTED else ["all"]:
            places: list[Any] = [() if state == "intact" else whole]
            if state in CORRUPTED:
                places = _places(study, model, grid, part, seed)
            for place, how in product(places, ways):
                yield task_cell(study, state, model, task, seed, *place, part=part, **how)


def _scanned(study: Any, probed: bool = False) -> Iterator[Cell]:
    """The cells of the scans; with `probed`, the intact ones of those whose models are probed."""
    p = study.parameters
    for name, given in p["scans"].items():
        if probed and not given.get("probed"):
            continue
        scan = SCAN | given
        scan |= {field: p[field] for field in ("task", "seeds", "sides") if scan[field] is None}
        # A study of another task keeps the notebooks' own scans of theirs out; `describe` says so.
        scan["task"] = [task for task in scan["task"] if task in p["task"]]
        if not scan["task"]:
            continue
        if scan["broken"] and "healed" in scan["state"]:
            scan["state"] = list(dict.fromkeys([*scan["state"], "broken"]))
        try:
            for seed in set(scan["seeds"]) - set(p["seeds"]):
                raise HealingError(
                    f"seed {seed} is not among the study's, {p['seeds']}: it has no intact model"
                )
            for cell in _expand(study, scan):
                if not probed or cell.state == "intact":
                    yield replace(cell, scan=name)
        except HealingError as error:
            raise HealingError(f"scan {name!r}: {error}") from error


# -- what is probed --------------------------------------------------------------------------------


def _networks(study: Any, stage: str) -> list[Cell]:
    """The models that a stage looks into; those before any fine-tuning are of no stage."""
    p, tasks = study.parameters, study.parameters["probe_tasks"] or study.parameters["task"]
    there = {parse_level(level) for level in p["levels"]}
    for level in p["probe_levels"]:
        if p["layers"] is None and parse_level(level) not in there:
            known = ", ".join(p["levels"])
            raise HealingError(f"probe_levels has {level!r}, which is not in levels: {known}")
    found: list[Cell] = []
    for model, seed in product(p["probe_models"] or p["model"], p["seeds"]):
        known = {"state": "pretrained", "model": models.identity(model, p["model_revision"])}
        n_layers, determinants = study.config(model).num_hidden_layers, canonical(known)
        before = Cell(
            stage="", determinants=determinants, model=model, state="pretrained",
            n_layers=n_layers, seed=seed, metric="",
        )  # fmt: skip
        found.append(before)
        if stage != "neurons":
            determinants = canonical(known | {"state": "untrained", "seed": seed})
            found.append(replace(before, state="untrained", determinants=determinants))
        found += [task_cell(study, "intact", model, task, seed) for task in tasks]
        broken = stage != "neurons" and p["recipe"] != "drop"  # what is taken out has no probe
        for task in study.healed_tasks if broken else ():
            if task not in tasks:
                found.append(task_cell(study, "intact", model, task, seed))
            for place, state in product(corruptions(study, model), CORRUPTED):
                if place[1] in map(parse_level, p["probe_levels"]) and place[2] == "reinit":
                    found.append(task_cell(study, state, model, task, seed, *place))
    if stage != "neurons":
        known = {cell.key for cell in found}
        scanned = once(_scanned(study, probed=True))
        found += [cell for cell in scanned if cell.key not in known]
    return found


def _probes(study: Any, stage: str, network: Cell) -> Iterator[Cell]:
    """A cell for every column of every corpus."""
    p, scored = study.parameters, network if network.stage else None
    for name, column in study.sources():
        drawn = study.corpus(name, column, network.seed)
        determinants: dict[str, Any] = {
            "stage": stage,
            "numerics": cells.PROBING_NUMERICS,
            "network": json.loads(network.determinants),
            "corpus": [drawn.train.sha(), drawn.test.sha()],
            "aggregation": p["aggregation"],
            "seed": network.seed,
            "threads": p["threads"],
        }
        if stage == "neurons":
            ablated = bool(scored and network.task in study.healed_tasks)
            determinants |= {"delta": p["neuron_delta"], "ablated": ablated}
        yield replace(
            network, stage=stage, determinants=canonical(determinants), metric="accuracy",
            corpus=drawn.name, column=drawn.column, source=(name, column), network=scored,
            architecture=study.config(network.model).model_type,
        )  # fmt: skip
