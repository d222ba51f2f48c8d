"""Cells beside the main grid: what they are, that old keys stay, that each does what it says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import save_tiny_bert, tiny_study, write_planted_task

from healing_utils import load_results
from healing_utils.analysis.results import has_stage
from healing_utils.base.errors import HealingError
from healing_utils.base.records import Store, canonical
from healing_utils.healing import recipes
from healing_utils.healing.encoders import encoder_layers
from healing_utils.healing.training import Diverged, Training
from healing_utils.study import study
from healing_utils.study.parameters import read_parameters
from healing_utils.study.study import Study

SCANS = {
    "layers": {"layers": "each"},
    "kinds": {"kind": ["noise=0.5", "prune=0.9"], "sides": "top", "levels": "1/3"},
    "parts": {"part": ["attention", "embeddings"], "sides": "bottom", "levels": "1/3", "seeds": 0},
    "controls": {"sides": ["random", "scattered"], "levels": "1/3"},
    "recipes": {"recipe": ["drop", "distillation"], "levels": "1/3", "seeds": 0, "broken": False},
    "deployed": {"start": "fine-tuned", "levels": "1/3", "seeds": 0, "sides": "bottom"},
    "price": {"state": ["intact", "scratch"], "train_size": [16, 32], "seeds": 0},
    "rates": {"state": "intact", "learning_rate": [1e-4, 1e-3], "epochs": 2, "seeds": 0},
    "shown": {"state": "broken", "kind": "zero", "sides": "bottom", "levels": "1/3", "seeds": 0},
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    save_tiny_bert(folder / "model")
    write_planted_task(folder / "task")
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    planned = Study(tiny_study(folder / "run", folder / "model", folder / "task", scans=SCANS))
    return planned, {stage: planned.run(stage) for stage in ("baseline", "harms", "scans")}


def tiny(folder, run, **changes) -> Study:
    return Study(tiny_study(folder / run, folder / "model", folder / "task", **changes))


def of(cells, scan):
    return [cell for cell in cells if cell.scan == scan]


# --- Plans ----------------------------------------------------------------------------------------


def test_a_scan_may_set_a_training_task_by_task(folder):
    other = write_planted_task(folder / "other", seed=5)
    tasks = [str(folder / "task"), str(other)]
    scans = {"longer": {"state": "intact", "epochs": dict(zip(tasks, [[2, 3], 4], strict=True))}}
    parameters = tiny_study(folder / "by-task", folder / "model", folder / "task", seeds=0)
    study = Study({**parameters, "task": tasks, "scans": scans})
    found = [(c.task, c.settings) for c in study.plan("scans")]
    assert found == [
        (tasks[0], (("epochs", 2.0),)), (tasks[0], (("epochs", 3.0),)),
        (tasks[1], (("epochs", 4.0),)),
    ]  # fmt: skip
    scans["longer"]["epochs"] = {tasks[0]: 2}
    with pytest.raises(HealingError, match="scan 'longer': epochs is given for .* and not for"):
        Study({**parameters, "task": tasks, "scans": scans}).plan("scans")


def test_a_scan_may_have_the_other_head(folder):
    scans = {"pooled": {"state": ["intact", "healed"], "head": ["first", "mean"], "seeds": 0}}
    study = tiny(folder, "heads", scans={**scans, "pooled": scans["pooled"] | {"levels": "1/3"}})
    cells = study.plan("scans")
    main = {c.key for stage in ("baseline", "recovery") for c in study.plan(stage)}
    assert {c.settings for c in cells} == {(), (("head", "mean"),)}
    assert {c.key in main for c in cells if not c.settings} == {True}
    assert {c.key in main for c in cells if c.settings} == {False}
    assert all(c.name.endswith("head mean seed 0") for c in cells if c.settings)
    scans["pooled"] |= {"start": "fine-tuned", "levels": "1/3"}
    with pytest.raises(HealingError, match="head 'mean' cannot start from the fine-tuned model"):
        tiny(folder, "heads", scans=scans).plan("scans")


def test_the_intact_models_of_a_probed_scan_are_kept_and_probed(folder, monkeypatch):
    scans = {
        "longer": {"state": ["intact", "scratch"], "epochs": 2, "seeds": 0, "probed": True},
        "shorter": {"state": "intact", "epochs": 0.5, "seeds": 0},
    }
    study = tiny(folder, "probed", scans=scans, seeds=0, probe_levels=[], corpus="organism")
    study.run("scans")
    cells = {c.scan: c for c in study.plan("scans") if c.state == "intact"}
    kept = {name: study.store.weights_path(c.key).exists() for name, c in cells.items()}
    assert kept == {"longer": True, "shorter": False}
    probing = study.plan("probing")
    assert [c.network.key for c in probing if c.scan == "longer"] == [cells["longer"].key]
    assert {c.scan for c in probing} == {"main", "longer"}
    assert "longer" not in {c.scan for c in study.plan("neurons")}


def test_a_scan_is_the_product_of_its_fields(finished):
    cells = finished[0].plan("scans")
    assert [c.layers for c in of(cells, "layers")] == [(0,), (1,), (2,)] * 2
    assert {(c.kind, c.strength) for c in of(cells, "kinds")} == {("noise", 0.5), ("prune", 0.9)}
    assert {(c.part, c.side, c.layers) for c in of(cells, "parts")} == {
        ("attention", "bottom", (0,)), ("embeddings", "none", ()),
    }  # fmt: skip
    assert {c.recipe for c in of(cells, "recipes")} == {"drop", "distillation"}
    assert {c.start for c in of(cells, "deployed")} == {"fine-tuned"}
    assert {(c.state, c.settings) for c in of(cells, "price")} == {
        (state, settings)
        for state in ("intact", "scratch")
        for settings in ((), (("train_size", 16),))
    }
    assert {c.settings for c in of(cells, "rates")} == {
        (("epochs", 2.0), ("learning_rate", 1e-4)), (("epochs", 2.0),),
    }  # fmt: skip
    scattered = [c for c in of(cells, "controls") if c.side == "scattered"]
    assert {c.layers for c in scattered} == {(0, 1, 2)}
    assert all(len(c.layers) == 1 for c in of(cells, "controls") if c.side == "random")


def test_what_is_healed_has_a_broken_partner_unless_told_otherwise(finished):
    harms = finished[0].plan("harms")
    assert {c.scan for c in harms} == {"layers", "kinds", "parts", "controls", "deployed", "shown"}
    assert {c.state for c in harms} == {"broken"}
    (deployed,) = of(harms, "deployed")
    assert deployed.start == "pre-trained"  # broken is the fine-tuned model, whatever comes after


def test_the_main_grid_s_cells_are_the_same_cells(finished):
    planned = finished[0]
    main = {c.layers: c.key for c in planned.plan("recovery") if c.kind == "reinit" and c.seed == 0}
    layers = {c.layers: c.key for c in of(planned.plan("scans"), "layers") if c.seed == 0}
    assert layers[0,] == main[0,] and layers[2,] == main[2,] and (1,) not in main
    intact = {c.key for c in planned.plan("baseline")}
    assert sum(c.key in intact for c in of(planned.plan("scans"), "price")) == 1


def test_every_choice_has_a_key_of_its_own(finished):
    cells = {(c.scan, c.key): c for c in finished[0].plan("scans")}
    keys = {}
    for cell in cells.values():  # what reads alike to people is the same cell
        assert keys.setdefault(cell.name, cell.key) == cell.key
    reasons = {
        "kinds": "strength", "parts": "part", "controls": "scattered", "recipes": "drop",
        "deployed": "fine-tuned",
    }  # fmt: skip
    for scan, word in reasons.items():
        assert any(word in c.determinants for c in cells.values() if c.scan == scan)


def test_determinants_of_paper_a_s_cells_name_nothing_new(finished):
    cell = next(c for c in finished[0].plan("recovery") if c.state == "healed")
    found = json.loads(cell.determinants)
    assert set(found) == {
        "numerics", "state", "model", "data", "classes", "recipe", "seed", "threads", "corruption",
    }  # fmt: skip
    assert set(found["corruption"]) == {"kind", "layers", "seed"}
    assert cell.determinants == canonical(found)


@pytest.mark.parametrize(
    "scans, message",
    [
        ([1], "must be scans by name"),
        ({"a": 3}, "scan 'a' must be a mapping"),
        ({"a": {"prat": "all"}}, "field of scan 'a' 'prat'.*Did you mean 'part'"),
        ({"a": {"recipe": "transplants"}}, "Did you mean 'transplant'"),
        ({"a": {"kind": "noise"}}, "kind of scan 'a'.*needs a strength"),
        ({"a": {"kind": "reinit=2"}}, "no strength"),
        ({"a": {"layers": "all"}}, "layers of scan 'a'"),
        ({"a": {"epochs": 0}}, "epochs of scan 'a'"),
    ],
)
def test_a_mistake_in_a_scan_is_named(scans, message):
    with pytest.raises(HealingError, match=message):
        read_parameters({"scans": scans})


def test_a_scan_may_arrive_as_text():
    given = read_parameters({"scans": "{layers: {layers: each, seeds: 0}}"})
    assert given["scans"] == {"layers": {"layers": "each", "seeds": [0]}}


def test_what_no_recipe_can_do_is_refused_when_planning(folder):
    planned = tiny(folder, "a", scans={"bad": {"part": "embeddings", "recipe": "drop"}})
    with pytest.raises(HealingError, match="scan 'bad': recipe 'drop' is for layers"):
        planned.plan("scans")
    planned = tiny(folder, "a", scans={"bad": {"levels": 1, "recipe": "drop"}})
    with pytest.raises(HealingError, match="scan 'bad': recipe 'drop' needs a healthy layer"):
        planned.plan("scans")
    planned = tiny(folder, "a", scans={"bad": {"seeds": [0, 7]}})
    with pytest.raises(HealingError, match="scan 'bad': seed 7 is not among the study's"):
        planned.plan("scans")
    planned = tiny(folder, "a", scans={"bad": {"layers": [[0, 7]]}})
    with pytest.raises(HealingError, match="scan 'bad': layer 7 does not exist"):
        planned.plan("scans")


def test_scans_of_other_tasks_are_left_out_and_said(folder):
    """The notebooks' own scans name the organism's task: a study of another has none of them."""
    planned = tiny(folder, "a", scans={"layers": {"task": "sentiment", "layers": "each"}})
    assert planned.plan("scans") == planned.plan("harms") == []
    assert "scan layers is left out: its tasks (sentiment)" in planned.describe()


def test_a_cell_that_leans_on_the_intact_model_knows_how_that_was_trained(folder):
    def key(size, **scan):
        scan = {"levels": "1/3", "sides": "bottom", "seeds": 0, "train_size": 16, **scan}
        (cell,) = tiny(folder, "a", train_size=size, scans={"one": scan}).plan("scans")
        return cell.key

    for leaning in ({"start": "fine-tuned"}, {"recipe": "distillation"}):
        assert key(32, **leaning) != key(16, **leaning)
    assert key(32, recipe="drop") == key(16, recipe="drop")


# --- Records --------------------------------------------------------------------------------------


def test_tables_say_what_each_cell_was(finished):
    planned, tables = finished
    scans, harms = tables["scans"], tables["harms"]
    assert set(scans["scan"]) == set(SCANS) - {"shown"}
    assert len(scans) == len(planned.plan("scans")) and len(harms) == len(planned.plan("harms"))
    kinds = scans[scans["scan"] == "kinds"]
    assert set(zip(kinds["kind"], kinds["strength"], strict=True)) == {
        ("noise", 0.5), ("prune", 0.9),
    }  # fmt: skip
    price = scans[scans["scan"] == "price"]
    assert sorted(price["train_size"]) == [16, 16, 32, 32]
    rates = scans[scans["scan"] == "rates"]
    assert set(rates["epochs"]) == {2.0} and set(rates["learning_rate"]) == {1e-4, 1e-3}
    assert set(scans[scans["scan"] == "recipes"]["recipe"]) == {"drop", "distillation"}
    assert (scans["diverged"] == "").all()
    for stage, table in (("scans", scans), ("harms", harms)):
        read = load_results(planned.run_folder, stage)
        assert read.drop(columns="layers").equals(table.drop(columns="layers"))
        assert has_stage(planned.run_folder, stage)


def test_the_tables_of_the_task_stages_leave_scans_out(finished):
    planned, _ = finished
    planned.run("recovery")
    table = load_results(planned.run_folder, "recovery")
    assert len(table) == len(planned.plan("recovery"))
    assert (table["recipe"] == "full").all() and (table["start"] == "pre-trained").all()


def test_a_gap_in_the_scans_is_named_not_passed_over(finished, tmp_path):
    planned, _ = finished
    shutil.copytree(planned.run_folder, tmp_path / "run")
    cell = of(planned.plan("scans"), "deployed")[0]
    Store(tmp_path / "run").path(cell.stage, cell.key).unlink()
    with pytest.raises(HealingError, match="lacks 1 planned cells of 'scans'.*fine-tuned"):
        load_results(tmp_path / "run", "scans")


def test_without_scans_there_is_nothing_to_do(folder):
    planned = tiny(folder, "none")
    assert planned.plan("scans") == [] and planned.plan("harms") == []
    assert planned.run("scans").empty
    assert not has_stage(planned.run_folder, "scans")


def test_a_healed_cell_does_what_its_recipe_says(finished):
    planned, _ = finished
    cells = {(c.scan, c.recipe, c.part, c.side): c for c in planned.plan("scans")}
    dropped, _ = planned._heal(cells["recipes", "drop", "all", "bottom"], lambda *_: None)
    assert len(encoder_layers(dropped)) == 2
    cell = cells["recipes", "distillation", "all", "bottom"]
    record = planned.store.read(cell.stage, cell.key)["result"]
    assert record["warm_up_tokens"] > 0
    plain = next(c for c in planned.plan("baseline") if c.seed == 0)
    spent = planned.store.read(plain.stage, plain.key)["result"]["train_tokens"]
    # Batches are whole: the two parts may differ from the whole by one batch of 8 short sentences.
    assert abs(record["train_tokens"] + record["warm_up_tokens"] - spent) <= 8 * 16


def test_a_deployed_model_is_broken_from_its_fine_tuned_weights(finished, monkeypatch):
    planned, _ = finished
    (cell,) = of(planned.plan("scans"), "deployed")
    seen = {}

    def spy(model, *args, **kwargs):
        seen.update({k: v.clone() for k, v in model.state_dict().items()})
        raise Diverged("stop", Training(0, [], [], 0, 0.0, "float32", "cpu", 1, 1))

    monkeypatch.setattr(study, "fine_tune", spy)
    planned._heal(cell, lambda *_: None)
    (broken,) = of(planned.plan("harms"), "deployed")
    expected = planned.network(broken).state_dict()
    assert all(torch.equal(seen[name], value) for name, value in expected.items())


def test_a_diverged_cell_is_a_result(folder, monkeypatch):
    planned = tiny(folder, "run", scans={"far": {"kind": "noise=0.5", "learning_rate": 1.0}})
    cell = planned.plan("scans")[0]

    def diverge(model, *args, **kwargs):
        raise Diverged("the loss is nan", Training(1, [], [], 9, 0.0, "float32", "cpu", 1, 8192))

    monkeypatch.setattr(study, "fine_tune", diverge)
    _, record = planned._heal(cell, lambda *_: None)
    assert record["diverged"] == "the loss is nan" and "f1" in record["scores"]
    assert record["steps"] == 1 and record["curve"] == []


def test_a_model_that_cannot_be_trained_is_recorded_whole(folder):
    """For real: noise of 1e30 overflows in the first forward pass."""
    scans = {"far": {"kind": "noise=1e30", "sides": "bottom", "seeds": 0}}
    planned = tiny(folder, "overflow", scans=scans)
    planned.run("harms")
    table = planned.run("scans")
    assert table["diverged"].str.contains("loss is").all() and table["score"].notna().all()


def test_main_grid_takes_part_start_and_recipe(folder):
    planned = tiny(
        folder, "main", part="feed_forward", recipe="norms_and_biases", start="fine-tuned",
        kind="noise=0.5",
    )  # fmt: skip
    healed = [c for c in planned.plan("recovery") if c.state == "healed" and c.kind == "noise"]
    assert healed and all(
        (c.part, c.recipe, c.start, c.strength)
        == ("feed_forward", "norms_and_biases", "fine-tuned", 0.5)
        for c in healed
    )
    assert all(c.plain for c in planned.plan("baseline"))
    assert set(recipes.RECIPES) >= {c.recipe for c in healed}
