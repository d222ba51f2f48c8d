"""Stages run: tables as planned, nothing computed twice, and what happens to cells that fail."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from helpers import planted_texts, write_planted_task
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from healing_utils import load_results
from healing_utils.analysis.results import describe_origin, has_stage, missing_cells
from healing_utils.base.errors import HealingError
from healing_utils.study import compute
from healing_utils.study.study import Study

CONTRACT = """model task state side level kind part strength layers seed metric score score_f1
score_accuracy score_matthews score_spearman chance chance_f1 chance_accuracy test_size train_size
seconds device threads key""".split()


def forbid_computing(monkeypatch):
    for state in compute.COMPUTE:
        monkeypatch.setitem(compute.COMPUTE, state, lambda study, cell: pytest.fail(cell.name))


def test_a_stage_s_table_has_a_row_a_cell_and_the_columns_of_the_contract(finished):
    majority = max(np.bincount(planted_texts(24, seed=1000)[1])) / 24
    for stage, table in finished.tables.items():
        rows = sorted(zip(table["key"], table["side"], table["layers"], strict=True))
        cells = finished.study.plan(stage)
        assert rows == sorted((cell.key, cell.side, cell.layers) for cell in cells)
        assert set(CONTRACT) <= set(table) and table["score"].between(0, 1).all()
        assert (table["score"] == table["score_f1"]).all() and (table["metric"] == "f1").all()
        assert (table["test_size"] == 24).all() and (table["threads"] == 1).all()
        assert table["score_spearman"].isna().all() and table["score_matthews"].notna().all()
        assert (table["chance"] == table["chance_f1"]).all()
        assert np.allclose(table["chance_accuracy"], majority)
        read = load_results(finished.study.run_folder, stage)
        assert read.equals(table) and has_stage(finished.study.run_folder, stage)
        assert list(read["layers"].map(type).unique()) == [tuple]
    assert (finished.tables["recovery"]["train_size"] == 32).all()
    every = pd.concat(finished.tables.values(), ignore_index=True)
    trained = ~every.state.isin(["broken", "untrained"])
    halved = every.assign(precision=every.precision.mask(trained, "float16"))
    assert "MIXED" not in describe_origin(halved)  # what is only scored is scored in float32
    assert "MIXED: computed on" in describe_origin(halved.assign(threads=halved.index))


def test_a_stage_that_is_not_there_is_named(tmp_path):
    for run, stage, message in (
        (tmp_path, "baselin", "unknown stage 'baselin'.*'baseline'"),
        (tmp_path / "nowhere", "baseline", "no such run: .*nowhere"),
        (tmp_path, "recovery", "no records of stage 'recovery': run that stage first"),
    ):
        with pytest.raises(HealingError, match=message):
            load_results(run, stage)


def test_a_second_run_computes_nothing_and_gives_the_same_tables(copied, finished, monkeypatch):
    forbid_computing(monkeypatch)
    records = {p: p.read_bytes() for p in copied.run_folder.rglob("records/**/*.json")}
    for stage, table in finished.tables.items():
        assert copied.run(stage).equals(table)
    assert {p: p.read_bytes() for p in copied.run_folder.rglob("records/**/*.json")} == records
    # Other names of the same cells find their records, under the names that were asked for.
    table = Study({**copied.parameters, "metric": "accuracy"}).run("recovery", plan=False)
    assert (table["metric"] == "accuracy").all()
    assert (table["score"] == table["score_accuracy"]).all()
    custom = Study({**copied.parameters, "layers": [2], "scratch": False})
    custom = custom.run("recovery", plan=False)
    assert set(custom["side"]) == {"custom"} and set(custom["layers"]) == {(2,)}
    top = finished.tables["recovery"].query("side == 'top'")
    assert list(custom["score"]) == list(top["score"])
    # More seeds: only theirs are missing.
    monkeypatch.setitem(compute.COMPUTE, "intact", lambda *_: 1 / 0)
    with pytest.raises(HealingError, match="1 of 3 cells of baseline failed.*intact seed 2"):
        Study({**copied.parameters, "seeds": [0, 1, 2]}).run("baseline", plan=False)


def test_a_damaged_record_alone_is_computed_again_and_is_the_same(
    copied, finished, monkeypatch, capsys
):
    gone = copied.plan("recovery")[0]
    path = copied.store.path("recovery", gone.key)
    before = copied.store.read("recovery", gone.key)
    path.write_bytes(path.read_bytes()[:100])
    whole = finished.tables["recovery"]
    assert len(load_results(copied.run_folder, "recovery")) == len(whole) - 1
    (lost,) = missing_cells(copied.run_folder, "scans")  # which name it too
    assert "healed layers 0" in lost
    assert path.name in capsys.readouterr().err
    computed, healed = [], compute.COMPUTE["healed"]
    forbid_computing(monkeypatch)
    monkeypatch.setitem(
        compute.COMPUTE, "healed", lambda *given: computed.append(given[1].key) or healed(*given)
    )
    table = copied.run("recovery")
    assert computed == [gone.key]
    after = copied.store.read("recovery", gone.key)
    assert after["result"] == before["result"] and after["determinants"] == before["determinants"]
    assert table.drop(columns="seconds").equals(whole.drop(columns="seconds"))


def test_another_study_leaves_a_folder_s_plan_alone(copied):
    """A second recipe in the same folder must not come back as duplicate cells of the first."""
    again = Study({**copied.parameters, "epochs": 0.5, "seeds": 0})
    plans = {path: path.read_bytes() for path in copied.run_folder.glob("p*/*.json")}
    for keep in (lambda: again.run("baseline"), again.keep_plans):
        with pytest.raises(HealingError, match=r"other parameters \(seeds \[0, 1\] there, \[0\]"):
            keep()
    assert plans == {path: path.read_bytes() for path in copied.run_folder.glob("p*/*.json")}
    again.run("baseline", plan=False)
    assert len(list(copied.store.records("baseline"))) > 3
    table = load_results(copied.run_folder, "baseline")
    assert set(table["key"]) == {cell.key for cell in copied.plan("baseline")}


def test_a_folder_without_records_takes_new_parameters(tiny, tmp_path, monkeypatch, capsys):
    """And those that a stage did not declare are added by the next."""
    forbid_computing(monkeypatch)
    kept = tmp_path / "parameters.json"
    for bad, said in (
        ({"task": "sentimnet"}, "sentimnet"), ({"layers": [0, 99]}, "layer 99 does not exist"),
        ({"scans": {"a": {"layers": [[0, 99]]}}}, "layer 99"),
    ):  # fmt: skip
        with pytest.raises(HealingError, match=said):
            tiny(run=tmp_path, **bad).run("baseline")
        with pytest.raises(HealingError, match=said):
            tiny(run=tmp_path, **bad).keep_plans()
        assert not list(tmp_path.iterdir())
    tiny(run=tmp_path, corpus="of/no/other").keep_parameters()
    for seeds in ([5], [0]):
        study = tiny(run=tmp_path, seeds=seeds)
        study.keep_plans()
        found = json.loads(kept.read_text())
        assert found["seeds"] == seeds and "corpus" not in found
    for garbage in ("[]", "null", "{", "[" * 100_000, '"', "{}"):
        kept.write_text(garbage)
        (tmp_path / "plans" / "baseline.json").write_text(garbage)
        study.keep_plans()
        assert {"run": str(tmp_path), **json.loads(kept.read_text())} == study.given
        said = capsys.readouterr().err
        assert f"{kept} is corrupt (it holds no parameters); set aside" in said
    study.store.write("baseline", "k", {})
    write_planted_task(tmp_path / "task", seed=7)
    same = tiny(run=tmp_path, seeds=[0], task=str(tmp_path / "task"))
    same.given = study.given  # a path that another folder's means other data
    same.keep_plans()
    assert "code are others than when baseline was planned" in capsys.readouterr().err
    declared = Study({name: study.parameters[name] for name in ("run", "model", "task")})
    declared.keep_parameters()
    with pytest.raises(HealingError, match="other parameters"):
        Study({"run": str(tmp_path), "seeds": 1}).keep_parameters()
    Study({"run": str(tmp_path), "workers": 3, "corpus": "x", "scans": {}}).keep_parameters()
    assert json.loads(kept.read_text())["corpus"] == ["x"]


def test_a_failing_cell_is_reported_once_at_the_end_and_the_others_are_kept(
    tiny, monkeypatch, capsys
):
    """Two scans name it: it is one cell."""
    same = {"epochs": 2, "levels": "1/3", "broken": False}
    study = tiny(seeds=[0], scans={"one": same, "two": {**same, "sides": "top"}})
    cells = study.plan("scans")
    bad, healed = cells[1], compute.COMPUTE["healed"]
    assert [c.key for c in cells].count(bad.key) == 2 and len(cells) == 3

    def fails(study, cell):
        if cell.key == bad.key:
            raise RuntimeError("planted failure")
        return healed(study, cell)

    with monkeypatch.context() as patch:
        patch.setitem(compute.COMPUTE, "healed", fails)
        with pytest.raises(HealingError) as caught:
            study.run("scans")
    message = str(caught.value)
    assert "1 of 2 cells of scans failed; the others are kept" in message
    assert f"{bad.name}: planted failure" in message and "\n" not in message
    said = capsys.readouterr().err
    assert said.count(bad.name) == 1 and said.count("Traceback") == 1
    assert {r["key"] for r in study.store.records("recovery")} == {cells[0].key}
    assert not list((study.run_folder / "claims").iterdir())
    with pytest.raises(HealingError, match="lacks the cell .*: run that stage first") as caught:
        study.table("scans")
    assert bad.name in str(caught.value)
    assert len(study.run("scans")) == 3  # only the failed one was left


def test_a_folder_moved_away_while_it_is_computed_stops_the_run(tiny, tmp_path, monkeypatch):
    study, healed = tiny(run=tmp_path / "run"), compute.COMPUTE["healed"]

    def moves(study, cell):
        result = healed(study, cell)
        if study.run_folder.exists():
            study.run_folder.rename(tmp_path / "moved")
        return result

    monkeypatch.setitem(compute.COMPUTE, "healed", moves)
    with pytest.raises(HealingError, match="the run's folder is gone; was it moved?"):
        study.run("recovery")
    assert not study.run_folder.exists() and (tmp_path / "moved").exists()


def test_what_stops_a_run_gives_its_claims_back(tiny, monkeypatch):
    def interrupted(study, cell):
        raise KeyboardInterrupt

    def full(*_):
        raise OSError(28, "No space left on device")

    study = tiny(seeds=[0, 1, 2], workers=1)
    plans = study.plan("baseline")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stop:
        patch.setitem(compute.COMPUTE, "intact", interrupted)
        study.compute(plans, "baseline")
    shell = InteractiveShell.instance()
    with capture_output() as shown:  # what a notebook shows: one line
        shell.showtraceback((stop.type, stop.value, stop.tb))
    (line,) = shown.stdout.splitlines()
    assert line.startswith("Stopped: finished cells are kept")
    assert not list((study.run_folder / "claims").iterdir())
    tries = []
    monkeypatch.setattr("os.fsync", lambda *_: tries.append(1) or full())
    with pytest.raises(HealingError, match="seed 0: cannot write .*No space left.* are kept$"):
        study.compute(plans, "baseline")
    assert len(tries) == 1  # the other seeds would be lost as well
    assert not list((study.run_folder / "claims").iterdir())
    assert not list(study.run_folder.rglob("*.tmp"))


def test_a_tokenizer_that_cannot_read_is_named_before_anything_runs(finished, monkeypatch):
    def tokenizer(texts, **_):
        raise Exception("Missing [UNK] token from the vocabulary")  # tokenizers' own are no others

    monkeypatch.setattr(finished.study, "tokenizer", lambda model: tokenizer)
    with pytest.raises(HealingError, match=r"model .* cannot read task .*: Missing \[UNK\]"):
        finished.study.vocabulary_notes()
