"""Cells: what the parameters plan, and that a key changes with what determines a cell alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import save_tiny_bert, write_planted_task

from healing_utils.base.errors import HealingError
from healing_utils.base.records import canonical
from healing_utils.study import cells, planning
from healing_utils.study.cells import ALL_STAGES, STAGES


def keys(study, stage="recovery") -> set[str]:
    return {cell.key for cell in study.plan(stage)}


def of(cells, scan):
    return [cell for cell in cells if cell.scan == scan]


# -- the main grid ---------------------------------------------------------------------------------

NOTHING, WHOLE = ("none", 0.0, "none", ()), ("all", 1.0, (0, 1, 2))


def test_the_stages_have_the_planned_cells(tiny):
    study = tiny(init_levels=["1/3"])
    healed = {
        ("bottom", 1 / 3, "reinit", (0,)), ("top", 1 / 3, "reinit", (2,)),
        ("all", 1.0, "reinit", (0, 1, 2)),  # level 1 is one cell for both sides
        ("bottom", 1 / 3, "init", (0,)), ("top", 1 / 3, "init", (2,)),
    }  # fmt: skip
    rest = {"corruption": "untrained", "recovery": "scratch"}
    for stage, state in zip(STAGES, ("intact", "broken", "healed"), strict=True):
        cells = study.plan(stage)
        expected = {(state, *place) for place in (healed if stage in rest else {NOTHING})}
        if stage in rest:
            expected.add((rest[stage], "all", 1.0, "scratch", (0, 1, 2)))
        for seed in (0, 1):
            found = [(c.state, c.side, c.level, c.kind, c.layers) for c in cells if c.seed == seed]
            assert set(found) == expected and len(found) == len(expected)
        assert len({c.key for c in cells}) == len({c.name for c in cells}) == len(cells)
    with pytest.raises(HealingError, match="unknown stage 'recovry'.*'recovery'"):
        study.plan("recovry")


def test_a_kept_plan_names_its_cells(tiny):
    study = tiny()
    everything = study.keep_plans()
    model, task = study.parameters["model"][0], study.parameters["task"][0]
    names = {cell.name for cell in everything}
    bottom, every = "healed bottom 1/3 reinit seed 0", "healed all layers reinit seed 1"
    for said in (bottom, every, "scratch seed 1"):
        assert f"{model} {task} {said}" in names
    found = set()
    for stage in (*STAGES, "harms", "scans", "probing", "neurons"):
        kept = json.loads((study.run_folder / "plans" / f"{stage}.json").read_text())
        planned = study.plan(stage)
        cells = [
            {"key": c.key, "name": c.name, "stage": c.stage, "cell": c.columns()} for c in planned
        ]
        assert kept == json.loads(canonical({"stage": stage, "cells": cells}))
        found |= {c.key for c in planned}
    assert {c.key for c in everything} == found


@pytest.mark.parametrize(
    ("changes", "grid"),
    [
        # Of three layers, 1/2 rounds half up to two, as does 2/3.
        ({"levels": ["1/2", "2/3"]}, {("bottom", (0, 1)), ("top", (1, 2))}),
        ({"levels": ["1/3"], "kind": "init", "init_levels": ["1/3"]},
         {("bottom", (0,)), ("top", (2,))}),
        ({"layers": "2,0"}, {("custom", (0, 2))}),
        ({"part": "embeddings", "kind": "noise=0.5"}, {("none", ())}),
    ],
)  # fmt: skip
def test_cells_of_the_same_layers_are_one(tiny, changes, grid):
    study = tiny(**changes)
    planned = study.corruptions(study.parameters["model"][0])
    assert len(planned) == len(grid)
    assert {(side, layers) for side, _, _, layers in planned} == grid


@pytest.mark.parametrize(
    ("changes", "stage", "message"),
    [
        ({"layers": [3]}, "recovery", "layer 3 does not exist"),
        ({"levels": ["1/12"]}, "corruption", "rounds to no layer"),
        ({"train_size": 100}, "baseline", "train_size is 100"),
        ({"model": "/no/where"}, "baseline", "cannot load model"),
        ({"epochs": {"elsewhere": 1}}, "baseline", "epochs is given for elsewhere and not for"),
        ({"part": "pooler", "head": "mean"}, "corruption", "has no pooler"),
        ({"probe_levels": "1/2"}, "probing", "'1/2', which is not in levels: 1/3, 1"),
        ({"part": "embeddings", "recipe": "drop"}, "scans", "recipe 'drop' is for layers"),
        ({"levels": 1, "recipe": "drop"}, "scans", "recipe 'drop' needs a healthy layer"),
        ({"seeds": [0, 7]}, "scans", "seed 7 is not among the study's"),
        ({"layers": [[0, 7]]}, "scans", "layer 7 does not exist"),
        ({"head": "mean", "start": "fine-tuned"}, "scans", "head 'mean' cannot start from the"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_when_planning(tiny, changes, stage, message):
    if stage == "scans":
        changes, message = {"scans": {"bad": changes}}, f"scan 'bad': {message}"
    with pytest.raises(HealingError, match=message):
        tiny(**changes).plan(stage)


# -- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 2.0}, {"batch_size": 16}, {"learning_rate": 2e-3}, {"weight_decay": 0.02},
        {"warmup": 0.2}, {"max_grad_norm": 2.0}, {"max_length": 15}, {"max_tokens": 4096},
        {"evaluations": 3}, {"precision": "bfloat16"}, {"threads": 2}, {"train_size": 31},
        {"validation_size": 7}, {"test_size": 23}, {"seeds": [2, 3]}, {"text_column": "label"},
        {"head": "mean"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_key_changes_with_every_determinant(tiny, change):
    assert not keys(tiny()) & keys(tiny(**change))
    torch.set_num_threads(1)


def test_a_key_changes_with_model_data_state_and_numerics(tiny, tmp_path, monkeypatch):
    study, task = tiny(), write_planted_task(tmp_path / "task")
    before, lower = keys(study), keys(tiny(precision="bfloat16"))
    assert keys(tiny(task=str(task))) == before
    write_planted_task(task, seed=5)  # the same file in the same process
    model = save_tiny_bert(tmp_path / "model", seed=1)
    for found in (keys(tiny(model=str(model))), keys(tiny(task=str(task))), keys(study, STAGES[1])):
        assert not before & found
    monkeypatch.setattr(cells, "MIXED_NUMERICS", cells.MIXED_NUMERICS + 1)
    assert before == keys(tiny()) and not lower & keys(tiny(precision="bfloat16"))
    monkeypatch.setattr(cells, "NUMERICS", cells.NUMERICS + 1)
    assert not before & keys(tiny())


def test_a_key_changes_with_nothing_else(tiny, folder, tmp_path):
    study = tiny()
    before, task = keys(study), study.parameters["task"][0]
    renamed = {"model": tmp_path / "other-name", "task": tmp_path / "other-task"}
    for name, path in renamed.items():
        shutil.copytree(folder / name, path)
    for change in (
        {"device": None, "workers": 3, "pretraining_steps": 3, "run": str(tmp_path / "elsewhere")},
        {"seeds": [1, 0], "sides": ["top", "bottom"], "levels": ["1", "1/3"]},
        {"levels": ["0.4", "1.0"], "probe_levels": []},  # the same layers
        {"metric": "accuracy"},  # all metrics are in the record
        {name: str(path) for name, path in renamed.items()},
        {"epochs": {task: 1.0, "elsewhere": 3}, "learning_rate": {task: 1e-3}},
    ):
        assert keys(tiny(**change)) == before, change
    # Layer 0 is layer 0, whatever led to it.
    assert keys(tiny(layers=[0], scratch=False)) < before
    # What is as in paper A is not named.
    cell = next(c for c in study.plan("recovery") if c.state == "healed")
    found = json.loads(cell.determinants)
    assert set(found) == {
        "numerics", "state", "model", "data", "classes", "recipe", "seed", "threads", "corruption",
    }  # fmt: skip
    assert set(found["corruption"]) == {"kind", "layers", "seed"}
    assert cell.determinants == canonical(found)


# -- scans -----------------------------------------------------------------------------------------


def test_a_scan_is_the_product_of_its_fields(finished):
    cells = finished.study.plan("scans")
    assert [c.layers for c in of(cells, "layers")] == [(0,), (1,), (2,)]
    assert {(c.kind, c.strength) for c in of(cells, "kinds")} == {("noise", 0.5), ("prune", 0.9)}
    assert {(c.part, c.side, c.layers) for c in of(cells, "parts")} == {
        ("attention", "bottom", (0,)), ("embeddings", "none", ()),
    }  # fmt: skip
    assert {(c.state, c.settings) for c in of(cells, "price")} == {
        (state, settings)
        for state in ("intact", "scratch")
        for settings in ((), (("train_size", 16),))
    }
    assert {c.settings for c in of(cells, "rates")} == {
        (("epochs", 2.0), ("learning_rate", 1e-4)), (("epochs", 2.0),),
    }  # fmt: skip
    layers = {c.side: len(c.layers) for c in of(cells, "controls")}
    assert layers == {"random": 1, "scattered": 3}
    # What is healed has a broken partner, unless told not to.
    harms = finished.study.plan("harms")
    assert {c.state for c in harms} == {"broken"}
    assert {c.scan for c in harms} == {
        "layers", "kinds", "parts", "controls", "deployed", "shown", "far",
    }  # fmt: skip
    (deployed,) = of(harms, "deployed")
    assert deployed.start == "pre-trained"  # broken is the fine-tuned model, whatever comes after


def test_every_choice_has_a_key_of_its_own_and_the_main_grid_s_cells_are_the_same(finished):
    scans, main, known = finished.study.plan("scans"), finished.study.plan("recovery"), {}
    for cell in scans:  # what reads alike to people is the same cell
        assert known.setdefault(cell.name, cell.key) == cell.key
    for scan, word in (
        ("kinds", "strength"), ("parts", "part"), ("controls", "scattered"), ("recipes", "drop"),
        ("deployed", "fine-tuned"),
    ):  # fmt: skip
        assert any(word in c.determinants for c in of(scans, scan))
    there = {c.layers: c.key for c in main if c.state == "healed" and c.seed == 0}
    layers = {c.layers: c.key for c in of(scans, "layers")}
    assert layers[0,] == there[0,] and layers[2,] == there[2,] and (1,) not in there
    intact = keys(finished.study, "baseline")
    assert sum(c.key in intact for c in of(scans, "price")) == 1


def test_a_scan_may_set_a_training_task_by_task(tiny, folder):
    tasks = [str(folder / "task"), str(write_planted_task(folder / "other", seed=5))]
    scan = {"state": "intact", "epochs": dict(zip(tasks, [[2, 3], 4], strict=True))}
    planned = tiny(task=tasks, seeds=0, scans={"longer": scan}).plan("scans")
    found = [(c.task, dict(c.settings)["epochs"]) for c in planned]
    assert found == [(tasks[0], 2.0), (tasks[0], 3.0), (tasks[1], 4.0)]


def test_scans_of_other_tasks_are_left_out_and_said(tiny):
    """The notebooks' own scans name the organism's task: a study of another has none of them."""
    study = tiny(scans={"layers": {"task": "sentiment", "layers": "each"}})
    assert study.plan("scans") == study.plan("harms") == []
    assert "scan layers is left out: its tasks (sentiment)" in study.describe()
    assert study.describe().startswith(f"run {study.run_folder}\n")  # absolute
    assert study.run("scans").empty


def test_a_cell_that_leans_on_the_intact_model_knows_how_that_was_trained(tiny):
    def key(size, **scan):
        scan = {"levels": "1/3", "sides": "bottom", "seeds": 0, "train_size": 16, **scan}
        (cell,) = tiny(train_size=size, scans={"one": scan}).plan("scans")
        return cell.key

    for leaning in ({"start": "fine-tuned"}, {"recipe": "distillation"}):
        assert key(32, **leaning) != key(16, **leaning)
    assert key(32, recipe="drop") == key(16, recipe="drop")


def test_layers_that_are_taken_out_are_not_probed(tiny):
    probed = {cell.state for cell in tiny(levels=["1/3"], recipe="drop").plan("probing")}
    assert probed == {"pretrained", "untrained", "intact"}


# -- order -----------------------------------------------------------------------------------------


def test_everything_is_planned_by_task_and_seed_trained_before_broken_before_probed(tiny):
    planned = tiny().keep_plans()
    units = [(cell.seed, cell.task) for cell in planned]
    assert units == sorted(units, key=units.index)  # one after the other
    turn = {"baseline": 0, "recovery": 0, "corruption": 1, "probing": 2, "neurons": 3}
    turns = [(units.index((c.seed, c.task)), turn[c.stage]) for c in planned]
    assert turns == sorted(turns)


def test_a_cell_needs_the_models_that_computing_it_loads(finished):
    plans = map(finished.study.plan, ALL_STAGES)
    cells = [c for planned in plans for c in planned if c.seed == 0]
    states = {c.key: c.state for c in cells}
    found = {}
    for cell in cells:
        what = "probed" if cell.corpus else cell.start if cell.recipe == "full" else cell.recipe
        needs = sorted(states[key] for key in planning.needs(finished.study, cell))
        assert found.setdefault((cell.state, what), needs) == needs, cell.name
    assert found == {
        ("intact", "pre-trained"): [], ("healed", "pre-trained"): [], ("healed", "drop"): [],
        ("scratch", "pre-trained"): [], ("broken", "pre-trained"): ["intact"],
        ("untrained", "pre-trained"): ["intact"], ("healed", "fine-tuned"): ["intact"],
        ("healed", "distillation"): ["intact"], ("pretrained", "probed"): [],
        ("untrained", "probed"): [], ("intact", "probed"): ["intact"],
        ("broken", "probed"): ["intact"], ("healed", "probed"): ["healed", "intact"],
    }  # fmt: skip
