"""The stages: what they plan, what determines a cell, and that nothing is computed twice."""

from __future__ import annotations

import csv
import json
import platform
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    CUES,
    planted_texts,
    processes,
    save_tiny_bert,
    study_process,
    tiny_study,
    write_planted_task,
)
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from healing_utils import load_results
from healing_utils.base.errors import HealingError
from healing_utils.base.records import Store
from healing_utils.healing import floors, models
from healing_utils.healing.corruption import corrupt
from healing_utils.healing.similarity import passing_stream
from healing_utils.healing.training import encode, evaluate
from healing_utils.study import study
from healing_utils.study.study import STAGES, Study

CONTRACT = """model task state side level kind part strength layers seed metric score score_f1
score_accuracy score_matthews score_spearman chance chance_f1 chance_accuracy test_size train_size
seconds device threads key""".split()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    save_tiny_bert(folder / "model")
    write_planted_task(folder / "task")
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """A run with all three stages done, and their tables."""
    planned = Study(tiny_study(folder / "run", folder / "model", folder / "task"))
    tables = {stage: planned.run(stage) for stage in STAGES}
    return planned, tables


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that run for a test to damage."""
    shutil.copytree(finished[0].run_folder, tmp_path / "run")
    return Study({**finished[0].parameters, "run": str(tmp_path / "run")})


def another(finished, run=None, **changes) -> Study:
    parameters = {**finished[0].parameters, **changes}
    return Study({**parameters, "run": str(run)} if run else parameters)


def forbid_computing(monkeypatch, *states):
    def computed(self, cell, on_step):
        raise AssertionError(f"computed {cell.name}")

    for state in states or study.COMPUTE:
        monkeypatch.setitem(study.COMPUTE, state, computed)


# --- Plans ----------------------------------------------------------------------------------------

GRID = {  # of three layers, for levels 1/3 and 1 of reinit and 1/3 of init
    ("bottom", "reinit", (0,)),
    ("top", "reinit", (2,)),
    ("all", "reinit", (0, 1, 2)),  # level 1 is one cell for both sides
    ("bottom", "init", (0,)),
    ("top", "init", (2,)),
}


def test_the_stages_give_the_planned_rows(finished):
    _, tables = finished
    baseline, broken, recovery = (tables[stage] for stage in STAGES)
    columns = ["state", "side", "level", "kind", "layers"]
    assert baseline[columns].values.tolist() == [["intact", "none", 0.0, "none", ()]] * 2
    assert sorted(baseline["seed"]) == [0, 1]
    for table, state in ((broken, "broken"), (recovery, "healed")):
        rows = table[table["state"] == state]
        for seed in (0, 1):
            of_seed = rows[rows["seed"] == seed]
            assert len(of_seed) == 5
            cells = zip(of_seed["side"], of_seed["kind"], of_seed["layers"], strict=True)
            assert set(cells) == GRID
        assert rows.loc[rows["side"] == "all", "level"].eq(1).all()
        assert np.allclose(rows.loc[rows["side"] != "all", "level"], 1 / 3)
    scratch = recovery[recovery["state"] != "healed"]
    assert (
        scratch[["state", "side", "kind", "layers"]].values.tolist()
        == [["scratch", "all", "scratch", (0, 1, 2)]] * 2
    )
    untrained = broken[broken["state"] != "broken"]
    assert (
        untrained[["state", "side", "layers"]].values.tolist()
        == [["untrained", "all", (0, 1, 2)]] * 2
    )
    assert len(broken) == 12 and len(recovery) == 12
    for table in tables.values():
        assert set(CONTRACT) <= set(table.columns)
        assert table["key"].is_unique and table["score"].between(0, 1).all()
        assert (table["score"] == table["score_f1"]).all() and (table["metric"] == "f1").all()
        assert (table["test_size"] == 24).all() and (table["threads"] == 1).all()
        assert table["score_spearman"].isna().all() and table["score_matthews"].notna().all()
        assert (table["chance"] == table["chance_f1"]).all()
        labels = planted_texts(24, seed=1000)[1]
        assert np.allclose(table["chance_accuracy"], max(np.bincount(labels)) / 24)
    assert (recovery["train_size"] == 32).all()


def test_plans_name_their_cells(finished):
    planned, _ = finished
    names = [cell.name for cell in planned.plan("recovery")]
    model, task = planned.parameters["model"][0], planned.parameters["task"][0]
    assert f"{model} {task} healed bottom 1/3 reinit seed 0" in names
    assert f"{model} {task} healed 1 reinit seed 1" in names
    assert f"{model} {task} scratch seed 1" in names
    assert len(set(names)) == len(names)
    for stage in STAGES:
        written = json.loads((planned.run_folder / "plans" / f"{stage}.json").read_text())
        cells = [
            {"key": cell.key, "name": cell.name, "stage": cell.stage, "cell": cell.columns()}
            for cell in planned.plan(stage)
        ]
        assert written == {"stage": stage, "cells": cells}
    with pytest.raises(HealingError, match="unknown stage 'recovry'.*'recovery'"):
        planned.plan("recovry")


@pytest.mark.parametrize(
    ("changes", "grid"),
    [
        # Of three layers, 1/2 rounds half up to two, as does 2/3; 0.4 to one, as does 1/3.
        ({"levels": ["1/2", "2/3"], "init_levels": []}, {("bottom", (0, 1)), ("top", (1, 2))}),
        ({"levels": "1/3,0.4", "init_levels": [], "sides": "top"}, {("top", (2,))}),
        ({"levels": ["1/3"], "kind": "init", "init_levels": ["1/3"]},
         {("bottom", (0,)), ("top", (2,))}),
        ({"layers": [0, 2]}, {("custom", (0, 2))}),
        ({"layers": "2,0"}, {("custom", (0, 2))}),
        ({"levels": [], "init_levels": []}, set()),
    ],
)  # fmt: skip
def test_cells_of_the_same_layers_are_one(finished, changes, grid):
    planned = another(finished, **changes).corruptions(finished[0].parameters["model"][0])
    assert len(planned) == len(grid)
    assert {(side, layers) for side, _, _, layers in planned} == grid


def test_layers_and_levels_that_do_not_exist_are_refused_before_anything_runs(finished, tmp_path):
    with pytest.raises(HealingError, match="layer 3 does not exist"):
        another(finished, layers=[3]).plan("recovery")
    with pytest.raises(HealingError, match="rounds to no layer"):
        another(finished, levels=["1/12"]).plan("corruption")
    with pytest.raises(HealingError, match="train_size is 100"):
        another(finished, train_size=100).plan("baseline")
    with pytest.raises(HealingError, match="cannot load model"):
        another(finished, model=str(tmp_path / "nothing")).plan("baseline")


# --- Keys -----------------------------------------------------------------------------------------


def keys(planned: Study, stage="recovery") -> set[str]:
    return {cell.key for cell in planned.plan(stage)}


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
def test_a_key_changes_with_every_determinant(finished, change):
    try:
        assert not keys(finished[0]) & keys(another(finished, **change))
    finally:
        torch.set_num_threads(1)


def test_a_key_changes_with_model_data_and_numerics(finished, folder, tmp_path, monkeypatch):
    before = keys(finished[0])
    other = save_tiny_bert(tmp_path / "model", seed=1)
    assert not before & keys(another(finished, model=str(other)))
    other = write_planted_task(tmp_path / "task", seed=1)
    assert not before & keys(another(finished, task=str(other)))
    mixed = keys(another(finished, precision="bfloat16"))
    with monkeypatch.context() as patch:
        patch.setattr(study, "MIXED_NUMERICS", study.MIXED_NUMERICS + 1)
        assert before == keys(another(finished))
        assert not mixed & keys(another(finished, precision="bfloat16"))
    monkeypatch.setattr(study, "NUMERICS", study.NUMERICS + 1)
    assert not before & keys(another(finished))


def test_a_key_changes_with_state_layers_and_kind(finished):
    baseline, broken, healed = (keys(finished[0], stage) for stage in STAGES)
    assert not baseline & broken and not broken & healed and not baseline & healed
    assert (len(baseline), len(broken), len(healed)) == (2, 12, 12)


def test_a_key_does_not_change_with_anything_else(finished, folder, tmp_path):
    before = keys(finished[0])
    renamed = {"model": tmp_path / "other-name", "task": tmp_path / "other-task"}
    for name, path in renamed.items():
        shutil.copytree(folder / name, path)
    same = [
        {"run": str(tmp_path / "elsewhere")},
        {"device": None},
        {"seeds": [1, 0], "sides": ["top", "bottom"], "levels": ["1", "1/3"]},
        {"levels": ["0.4", "1.0"]},  # the same layers
        {"metric": "accuracy"},  # all metrics are in the record
        {name: str(path) for name, path in renamed.items()},
        {"workers": 3},
        {"pretraining_steps": 3},
    ]
    for change in same:
        assert keys(another(finished, **change)) == before, change
    custom = keys(another(finished, layers=[0], scratch=False))
    assert custom < before  # layer 0 is layer 0, whatever led to it


def test_a_local_file_that_changes_gives_other_keys_in_the_same_process(finished, tmp_path):
    task = write_planted_task(tmp_path / "task")
    before = keys(another(finished, task=str(task)))
    assert before == keys(finished[0])
    write_planted_task(task, seed=5)
    assert not before & keys(another(finished, task=str(task)))


# --- Running --------------------------------------------------------------------------------------


def test_a_second_run_computes_nothing_and_gives_the_same_tables(finished, monkeypatch):
    planned, tables = finished
    forbid_computing(monkeypatch)
    records = {p: p.read_bytes() for p in planned.run_folder.rglob("records/**/*.json")}
    again = another(finished)
    for stage in STAGES:
        assert again.run(stage).equals(tables[stage])
    assert {p: p.read_bytes() for p in planned.run_folder.rglob("records/**/*.json")} == records
    # More seeds: only theirs are missing.
    with pytest.raises(HealingError, match="1 of 3 cells of baseline failed.*intact seed 2"):
        another(finished, seeds=[0, 1, 2]).run("baseline")


def test_a_deleted_record_alone_is_computed_again_and_is_the_same(copied, finished, monkeypatch):
    gone = copied.plan("recovery")[0]
    path = copied.store.path("recovery", gone.key)
    before = copied.store.read("recovery", gone.key)
    path.write_bytes(path.read_bytes()[:100])
    computed = []
    healed = study.COMPUTE["healed"]
    monkeypatch.setitem(study.COMPUTE, "healed", lambda *a: computed.append(a[1].key) or healed(*a))
    table = copied.run("recovery")
    assert computed == [gone.key]
    after = copied.store.read("recovery", gone.key)
    assert after["result"] == before["result"] and after["determinants"] == before["determinants"]
    columns = [c for c in table.columns if c != "seconds"]
    assert table[columns].equals(finished[1]["recovery"][columns])


def test_records_hold_what_determines_and_what_describes_them(finished):
    planned, _ = finished
    for stage in STAGES:
        for record in planned.store.records(stage):
            assert set(record) == {
                "cell", "determinants", "result", "made", "times", "stage", "key",
            }  # fmt: skip
            assert record["determinants"]["recipe"]["learning_rate"] == 1e-3
            assert record["made"]["versions"]["torch"] in torch.__version__
            assert record["times"]["seconds"] > 0
            result = record["result"]
            assert len(result["right"]) == result["test_size"]
            right = result["right"].count("1") / result["test_size"]
            assert right == pytest.approx(result["scores"]["accuracy"])
            if stage == "corruption":
                assert set(map(len, result["similarity"].values())) == {4}
                assert set(result["similarity"]) == {"cosine", "cka", "stream"}
            else:
                assert [row["step"] for row in result["curve"]] == [0, 1, 4]
                assert len(result["losses"]) == result["steps"] == 4
            text = json.dumps(record)
            assert not any(word in text for word in (*CUES, "w1 ")), "texts of a data set"


def test_the_table_says_what_was_asked_for(finished, monkeypatch):
    """Other names of the same cells find their records, under the names that were asked for."""
    forbid_computing(monkeypatch)
    table = another(finished, metric="accuracy").run("recovery")
    assert (table["metric"] == "accuracy").all()
    assert (table["score"] == table["score_accuracy"]).all()
    custom = another(finished, layers=[2], scratch=False).run("recovery")
    assert set(custom["side"]) == {"custom"} and set(custom["layers"]) == {(2,)}
    top = finished[1]["recovery"].query("side == 'top' and kind == 'reinit'")
    assert list(custom["score"]) == list(top["score"])


def test_parameters_by_task_are_the_studys_own(finished, folder, tmp_path):
    """Given by task they are the same cells as given for all, and their weights are kept."""
    task = str(folder / "task")
    by_task = {
        name: {task: finished[0].parameters[name], "elsewhere": 3}
        for name in ("train_size", "epochs")
    }
    planned = another(finished, learning_rate={task: 1e-3}, **by_task)
    assert keys(planned) == keys(finished[0])
    assert all(cell.plain for cell in planned.plan("baseline"))
    with pytest.raises(HealingError, match="epochs is given for elsewhere and not for task"):
        another(finished, epochs={"elsewhere": 1}).plan("baseline")


def test_everything_is_planned_by_task_and_seed_trained_before_broken_before_probed(finished):
    planned = another(finished, probe_levels=["1/3"])
    cells = planned.plan("everything")
    assert len({cell.key for cell in cells}) == len(cells)
    there = {c.key for stage in (*STAGES, "probing", "neurons") for c in planned.plan(stage)}
    assert {cell.key for cell in cells} == there
    units = [(cell.seed, cell.task) for cell in cells]
    assert units == sorted(units, key=units.index)  # one after the other
    turn = {"baseline": 0, "recovery": 0, "corruption": 1, "probing": 2, "neurons": 3}
    for unit in set(units):
        turns = [turn[c.stage] for c in cells if (c.seed, c.task) == unit]
        assert turns == sorted(turns)


# --- The states -----------------------------------------------------------------------------------


def by_hand(planned: Study, seed: int):
    """The saved fine-tuned model and the scored examples, read without the study's help."""
    (cell,) = [c for c in planned.plan("baseline") if c.seed == seed]
    model = AutoModelForSequenceClassification.from_pretrained(cell.model, num_labels=2)
    model.load_state_dict(load_file(planned.run_folder / "weights" / f"{cell.key}.safetensors"))
    with open(f"{cell.task}/test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = [sorted(CUES[:2]).index(row["label"]) for row in rows]
    texts = [row["text"] for row in rows]
    return model, encode(AutoTokenizer.from_pretrained(cell.model), texts, labels, 16)


def test_broken_is_the_fine_tuned_model_corrupted_and_not_trained_again(finished):
    planned, tables = finished
    for seed in (0, 1):
        model, test = by_hand(planned, seed)
        intact = tables["baseline"].query("seed == @seed").iloc[0]
        assert evaluate(model, test, device="cpu")["f1"] == intact["score"]
        for cell in planned.plan("corruption"):
            if cell.seed != seed or cell.state != "broken":
                continue
            broken, _ = by_hand(planned, seed)
            report = corrupt(broken, kind=cell.kind, seed=seed, layers=list(cell.layers))
            record = planned.store.read("corruption", cell.key)
            assert evaluate(broken, test, device="cpu") == record["result"]["scores"]
            assert record["result"]["changed"]["tensors"] == len(report.tensors)
            cosine = record["result"]["similarity"]["cosine"]
            first = cell.layers[0]  # hidden states below the first corrupted layer are untouched
            assert np.allclose(cosine[: first + 1], 1) and cosine[first + 1] < 1 - 1e-5


def test_an_untrained_network_is_scored_and_compared_as_it_begins(finished):
    planned, tables = finished
    for cell in planned.plan("corruption"):
        if cell.state != "untrained":
            continue
        data = planned.task(cell.task)
        network = models.load_classifier(cell.model, data.num_labels, cell.seed, scratch=True)
        record = planned.store.read("corruption", cell.key)
        _, test = by_hand(planned, cell.seed)
        assert evaluate(network, test, device="cpu") == record["result"]["scores"]
        sample = planned.examples(cell).sample
        assert record["result"]["similarity"]["stream"] == passing_stream(network, sample)
        assert record["result"]["similarity"]["stream"][0] == pytest.approx(1)
        assert "changed" not in record["result"]


def test_the_intact_record_has_its_floors_and_what_was_loaded(finished):
    for record in finished[0].store.records("baseline"):
        result = record["result"]
        for name in ("tfidf", "static"):  # one word of the text is its label
            assert result["floors"][name]["scores"]["f1"] > 0.9
            assert result["floors"][name]["weight"] in floors.GRID
        assert len(result["stream"]) == 4 and result["passed_over"] == result["drawn"] == []
        assert record["made"]["processor"].startswith(platform.machine())


def test_a_mean_pooled_head_is_trained_broken_healed_and_kept(folder, tmp_path):
    parameters = tiny_study(tmp_path / "run", folder / "model", folder / "task", head="mean")
    planned = Study({**parameters, "seeds": 0, "epochs": 20.0, "learning_rate": 3e-3})
    baseline, broken, recovery = (planned.run(stage) for stage in STAGES)
    assert baseline["score"].min() > 0.9 and set(recovery["head"]) == {"mean"}
    assert broken["score"].min() < baseline["score"].min()
    (cell,) = planned.plan("baseline")
    record = planned.store.read("baseline", cell.key)
    assert record["determinants"]["head"] == "mean"
    assert record["result"]["shortcut"] == "all tokens"
    kept = planned.network(cell)  # from its file
    assert evaluate(kept, planned.examples(cell).test, device="cpu") == record["result"]["scores"]
    with pytest.raises(HealingError, match="has no pooler"):
        planned.cell("broken", cell.model, cell.task, 0, "none", 0.0, "reinit", part="pooler")


@pytest.mark.parametrize("kept", [study.KEPT_STATES, 0])
def test_broken_is_the_same_whatever_was_broken_before(finished, monkeypatch, kept):
    """The intact model is shared from cell to cell: nothing of one may reach the next."""
    monkeypatch.setattr(study, "KEPT_STATES", kept)
    planned = another(finished)
    cells = planned.plan("corruption")
    mixed = [cell for pair in zip(cells, reversed(cells), strict=True) for cell in pair]
    for cell in mixed:  # both seeds in turn, then one after the other
        result = planned.result(cell, lambda *_: None)["result"]
        alone = another(finished).result(cell, lambda *_: None)["result"]
        assert result == alone == finished[0].store.read("corruption", cell.key)["result"]
        assert len(planned._intact_models) == 1


def test_healing_leaves_no_shared_model_in_its_way(finished):
    planned = another(finished)
    cell = planned.plan("corruption")[0]
    planned.result(cell, lambda *_: None)
    seen = []
    healed = planned.cell(
        "healed", cell.model, cell.task, cell.seed, cell.side, cell.level, cell.kind, cell.layers
    )
    planned.result(healed, lambda *_: seen.append(len(planned._intact_models)))
    assert seen and not any(seen)


def test_healed_is_the_pretrained_model_corrupted_then_trained(finished, folder):
    planned, _ = finished
    cell = planned.plan("recovery")[0]
    model = models.load_classifier(str(folder / "model"), 2, cell.seed)
    corrupt(model, kind=cell.kind, seed=cell.seed, layers=list(cell.layers))
    examples = planned.examples(cell)
    recipe = {n: planned.parameters[n] for n in study.RECIPE if n != "max_length"}
    done = study.fine_tune(
        model, examples.train, examples.validation, seed=cell.seed, device="cpu", progress=False,
        **recipe,
    )  # fmt: skip
    record = planned.store.read("recovery", cell.key)
    assert record["result"]["losses"] == [round(loss, 5) for loss in done.losses]
    assert evaluate(model, examples.test, device="cpu") == record["result"]["scores"]


@pytest.mark.parametrize("damage", ["deleted", "truncated", "empty", "another model's"])
def test_broken_does_not_need_the_saved_weights(copied, damage, capsys):
    cell = copied.plan("corruption")[0]
    intact = next(c for c in copied.plan("baseline") if c.seed == cell.seed)
    weights = copied.store.weights_path(intact.key)
    saved = weights.read_bytes()
    before = copied.store.read("corruption", cell.key)
    copied.store.path("corruption", cell.key).unlink()
    if damage == "deleted":
        weights.unlink()
    elif damage == "another model's":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(2)}, weights)
    else:
        weights.write_bytes(saved[: len(saved) // 2] if damage == "truncated" else b"")
    copied.run("corruption")
    assert copied.store.read("corruption", cell.key)["result"] == before["result"]
    assert weights.read_bytes() == saved
    said = capsys.readouterr().err
    assert (f"weights {weights} are unusable" in said) == (damage != "deleted")


# --- Failures and missing cells -------------------------------------------------------------------


def test_a_failing_cell_is_reported_at_the_end_and_the_others_are_kept(
    finished, tmp_path, monkeypatch, capsys
):
    planned = another(finished, tmp_path / "run", seeds=[0])
    cells = planned.plan("recovery")
    bad = cells[1]
    healed = study.COMPUTE["healed"]

    def compute(self, cell, on_step):
        if cell.key == bad.key:
            raise RuntimeError("planted failure")
        return healed(self, cell, on_step)

    with monkeypatch.context() as patch:
        patch.setitem(study.COMPUTE, "healed", compute)
        with pytest.raises(HealingError) as caught:
            planned.run("recovery")
    message = str(caught.value)
    assert "1 of 6 cells of recovery failed; the others are kept" in message
    assert f"{bad.name}: planted failure" in message and "\n" not in message
    said = capsys.readouterr().err
    assert bad.name in said and "Traceback" in said
    kept = {record["key"] for record in planned.store.records("recovery")}
    assert kept == {cell.key for cell in cells} - {bad.key}
    assert not list((planned.run_folder / "claims").iterdir())
    with pytest.raises(HealingError, match="lacks the cell .*: run that stage first") as caught:
        planned.table("recovery")
    assert bad.name in str(caught.value)
    forbid_computing(monkeypatch, "scratch")
    assert len(planned.run("recovery")) == 6  # only the failed one was left


def test_an_interruption_stops_and_gives_the_claim_back(finished, tmp_path, monkeypatch):
    def interrupted(self, cell, on_step):
        raise KeyboardInterrupt

    planned = another(finished, tmp_path / "run")
    monkeypatch.setitem(study.COMPUTE, "intact", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planned.run("baseline")
    assert not list((planned.run_folder / "claims").iterdir())


def test_a_run_folder_that_cannot_be_written_is_refused_at_once(finished, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    forbid_computing(monkeypatch)
    with pytest.raises(HealingError, match="cannot write .*plans"):
        another(finished, tmp_path / "file").run("baseline")


# --- Results --------------------------------------------------------------------------------------


def test_results_are_read_from_the_records(finished):
    planned, tables = finished
    for stage in STAGES:
        planned.run(stage)  # nothing is computed; other tests have planned in this folder since
        read = load_results(planned.run_folder, stage)
        assert read.equals(tables[stage])
        assert list(read["layers"].map(type).unique()) == [tuple]


def test_results_that_are_not_there(finished, tmp_path):
    with pytest.raises(HealingError, match="unknown stage 'baselin'.*'baseline'"):
        load_results(finished[0].run_folder, "baselin")
    with pytest.raises(HealingError, match="no such run: .*nowhere"):
        load_results(tmp_path / "nowhere", "baseline")
    with pytest.raises(HealingError, match="no records of stage 'recovery': run that stage first"):
        load_results(tmp_path, "recovery")


def test_a_corrupt_record_is_left_out_of_the_results_and_named(copied, capsys):
    path = copied.store.path("baseline", copied.plan("baseline")[0].key)
    path.write_bytes(b"\x00" * 50)
    assert len(load_results(copied.run_folder, "baseline")) == 1
    assert path.name in capsys.readouterr().err


# --- Two runs -------------------------------------------------------------------------------------


def test_two_processes_share_the_work_and_compute_each_cell_once(finished, tmp_path):
    planned = another(finished, tmp_path / "run", levels=["1/3"], init_levels=[])
    cells = [cell.key for stage in STAGES for cell in planned.plan(stage)]
    context, logs = processes(), [str(tmp_path / f"log-{i}") for i in range(2)]
    workers = [
        context.Process(target=study_process, args=(planned.parameters, None, log)) for log in logs
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    shares = [open(log).read().split() for log in logs]
    assert sorted(shares[0] + shares[1]) == sorted(cells)
    assert shares[0] and shares[1], "one did everything: the test saw nothing"
    for stage in STAGES:
        theirs = {r["key"]: r["result"] for r in Store(tmp_path / "run").records(stage)}
        ours = {r["key"]: r["result"] for r in finished[0].store.records(stage)}
        assert theirs == {key: ours[key] for key in theirs}
    assert not list((tmp_path / "run" / "claims").iterdir())


def test_workers_compute_the_same_records(finished, tmp_path):
    planned = another(finished, tmp_path / "run", workers=2)
    table = planned.run("baseline")
    assert len(table) == 2
    table = planned.run("recovery")
    columns = [c for c in table.columns if c != "seconds"]
    assert table[columns].equals(finished[1]["recovery"][columns])
    for record in planned.store.records("recovery"):
        ours = finished[0].store.read("recovery", record["key"])
        assert record["result"] == ours["result"] and record["made"] == ours["made"]
    assert not list((planned.run_folder / "claims").iterdir())
    assert not list(planned.run_folder.rglob(".*.tmp"))


def test_records_of_another_plan_are_left_out(copied):
    """A second recipe in the same folder must not come back as duplicate cells of the first."""
    again = Study({**copied.parameters, "epochs": 0.5})
    again.run("baseline")
    stored = list((copied.run_folder / "records" / "baseline").glob("*.json"))
    table = load_results(copied.run_folder, "baseline")
    assert len(stored) == 2 * len(table)
    assert set(table["key"]) == {cell.key for cell in again.plan("baseline")}
    copied.run("baseline")
    table = load_results(copied.run_folder, "baseline")
    assert set(table["key"]) == {cell.key for cell in copied.plan("baseline")}
