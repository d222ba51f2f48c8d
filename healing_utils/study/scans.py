"""Scans: cells beside the main grid, each scan a small grid of its own.

The parameter `scans` names them; the fields of one are `parameters.SCAN`, its cells the product of
their values. What is trained makes the stage `scans`; what is scored broken, the untrained partners
of what is healed included, makes the stage `harms`. A cell that the main grid or another scan has
too is the same cell, computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product
from typing import TYPE_CHECKING, Any

from healing_utils.base.errors import HealingError
from healing_utils.healing import models
from healing_utils.healing.encoders import OUTER_PARTS, parse_level, resolve_layers
from healing_utils.study.parameters import SCAN, for_task
from healing_utils.study.study import Cell

if TYPE_CHECKING:
    from healing_utils.study.study import Study

# What a scan may set of a training; a value may be given by task.
BUDGET = ("train_size", "epochs", "learning_rate", "evaluations", "head")


@dataclass(frozen=True)
class ScanCell(Cell):
    """A cell as one scan names it."""

    scan: str

    def columns(self) -> dict[str, Any]:
        return {"scan": self.scan, **super().columns()}


def plan(study: Study, stage: str) -> list[ScanCell]:
    """The cells of `harms` (broken) or `scans` (trained), scan by scan, none twice in a scan."""
    cells: dict[tuple[str, str, str], ScanCell] = {}
    for name, given in study.parameters["scans"].items():
        try:
            for cell in _cells(study, given):
                if (cell.state == "broken") == (stage == "harms"):
                    found = {f.name: getattr(cell, f.name) for f in fields(Cell)}
                    named = ScanCell(**found, scan=name)
                    cells.setdefault((name, cell.key, cell.side), named)
        except HealingError as error:
            raise HealingError(f"scan {name!r}: {error}") from error
    return list(cells.values())


def left_out(study: Study) -> list[str]:
    """A line for each scan of which nothing is computed, because its tasks are not the study's."""
    there = study.parameters["task"]
    return [
        f"scan {name} is left out: its tasks ({', '.join(scan['task'])}) are not among the study's"
        for name, scan in study.parameters["scans"].items()
        if "task" in scan and not set(scan["task"]) & set(there)
    ]


def _cells(study: Study, given: dict[str, Any]) -> Iterator[Cell]:
    p = study.parameters
    scan = {field: given.get(field, parameter.default) for field, parameter in SCAN.items()}
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
        budgets = _budgets(for_task(scan, task), for_task(p, task))
        if state in ("intact", "scratch"):
            n_layers = models.load_config(model, p["model_revision"]).num_hidden_layers
            where = ("all", 1.0, "scratch", tuple(range(n_layers))) if state == "scratch" else ()
            for budget in budgets:
                yield study.cell(state, model, task, seed, *where, **budget)
            continue
        for part, kind in product(scan["part"], scan["kind"]):
            for side, level, layers in _places(study, model, scan, part, seed):
                where = (side, level, kind, layers)
                if state == "broken":
                    yield study.cell(state, model, task, seed, *where, part=part)
                    continue
                for start, recipe in product(scan["start"], scan["recipe"]):
                    how = {"part": part, "start": start, "recipe": recipe}
                    for budget in budgets:
                        yield study.cell(state, model, task, seed, *where, **how, **budget)


def _budgets(scan: dict[str, Any], usual: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings of a scan on one task, whose own parameters are `usual`."""
    values = [[usual[name]] if scan[name] is None else scan[name] for name in BUDGET]
    return [dict(zip(BUDGET, chosen, strict=True)) for chosen in product(*values)]


def probed(study: Study) -> list[ScanCell]:
    """The intact cells of scans whose models are probed."""
    wanted = {name for name, scan in study.parameters["scans"].items() if scan.get("probed")}
    if not wanted:
        return []
    cells = plan(study, "scans")
    return [cell for cell in cells if cell.state == "intact" and cell.scan in wanted]


def _places(
    study: Study, model: str, scan: dict[str, Any], part: str, seed: int
) -> list[tuple[str, float, tuple[int, ...]]]:
    """Side, level and resolved layers of what a scan corrupts; `random` differs by seed."""
    n_layers = models.load_config(model, study.parameters["model_revision"]).num_hidden_layers
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
        found.setdefault(place, place)
    return list(found)
