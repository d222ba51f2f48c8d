"""A finished notebook is executed again when anything that it stands on has changed, else not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import save_tiny_bert, tiny_study, write_planted_task

from healing_utils.base.records import Store
from healing_utils.run import finished
from healing_utils.study.study import Study

STAGES = ("baseline", "corruption")


def write_notebook(path: Path, source: str = "x = 1", output: str = "") -> Path:
    cell = {
        "cell_type": "code", "source": [source], "metadata": {"tags": ["a"]},
        "outputs": [{"text": output}],
    }  # fmt: skip
    path.write_text(json.dumps({"cells": [cell]}))
    return path


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """A run with two stages computed: its folder and the parameters of its notebook."""
    folder = tmp_path_factory.mktemp("finished")
    model, task = save_tiny_bert(folder / "model"), write_planted_task(folder / "task")
    parameters = tiny_study(folder / "run", model, task, seeds=[0])
    for stage in STAGES:
        Study(parameters).run(stage)
    return folder, parameters


@pytest.fixture
def marked(computed, tmp_path):
    """The notebook of those stages, marked as executed; asks whether it still is finished."""
    folder, parameters = computed
    run = folder / "run"
    (run / "notebooks").mkdir(exist_ok=True)
    notebook = write_notebook(tmp_path / "01_both.ipynb")
    write_notebook(run / "notebooks" / notebook.name)
    finished.mark(notebook, run, parameters)

    def still(stages=STAGES, **changes):
        return finished.is_finished(notebook, run, {**parameters, **changes}, stages)

    assert still()
    return run, notebook, still


def test_outputs_count_for_nothing_and_source_and_parameters_for_all(marked):
    _, notebook, still = marked
    write_notebook(notebook, output="other")
    assert still() and not still(epochs=2.0)
    write_notebook(notebook, source="x = 2")
    assert not still()


def test_other_code_or_no_executed_notebook_or_mark_is_not_finished(marked, monkeypatch):
    run, notebook, still = marked
    with monkeypatch.context() as patch:
        patch.setattr(finished, "_code", lambda: "other")
        assert not still()
    executed = run / "notebooks" / notebook.name
    executed.rename(executed.with_suffix(".away"))
    assert not still()
    executed.with_suffix(".away").rename(executed)
    (run / "finished" / "01_both.json").write_text('{"made_from": ')  # cut off
    assert not still()
    finished.unmark(notebook, run)
    assert not still()


def test_a_record_that_is_gone_corrupt_or_of_a_new_cell_is_computed(marked, capsys):
    run, _, still = marked
    path = sorted((run / "records" / "corruption").glob("*.json"))[0]
    whole = path.read_text()
    path.unlink()
    assert not still()
    path.write_text(whole.replace("0.", "1.", 1))
    assert not still() and "corrupt" in capsys.readouterr().err and not path.exists()
    path.write_text(whole)
    assert still()
    assert not still(("recovery",))  # planned, and nothing recorded


def test_other_data_under_the_same_name_are_other_cells(computed, marked):
    folder, _ = computed
    _, _, still = marked
    files = {p: p.read_bytes() for p in (folder / "task").rglob("*") if p.is_file()}
    write_planted_task(folder / "task", seed=1)
    assert not still()
    for path, content in files.items():
        path.write_bytes(content)
    assert still()


def test_a_missing_table_is_drawn_again_and_a_new_record_changes_the_analysis_alone(
    marked, tmp_path
):
    run, _, still = marked
    parameters = {"run": str(run)}
    table = run / "tables" / "a.csv"
    table.parent.mkdir()
    table.touch()
    analysis = write_notebook(tmp_path / "05_analysis.ipynb")
    write_notebook(run / "notebooks" / analysis.name)
    finished.mark(analysis, run, parameters)
    assert finished.is_finished(analysis, run, parameters, ())
    Store(run).write("recovery", "new", {"a": 1})
    assert still() and not finished.is_finished(analysis, run, parameters, ())
    (run / "records" / "recovery" / "new.json").unlink()
    assert finished.is_finished(analysis, run, parameters, ())
    table.unlink()
    assert still() and not finished.is_finished(analysis, run, parameters, ())
    table.parent.rmdir()
