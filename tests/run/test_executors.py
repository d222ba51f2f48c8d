"""Executors and shards: the choice, the shares, and records that merge by being copied."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import save_tiny_bert, tiny_study, write_planted_task

from healing_utils import cli
from healing_utils.base.errors import HealingError
from healing_utils.run import executors, runner
from healing_utils.run.executors import InProcess, Shard, Workers
from healing_utils.study.study import STAGES, Study

CHOICES = ("HEALING_EXECUTOR", "HEALING_RAY_ADDRESS", "HEALING_SHARD")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing chosen, and what a test chooses is forgotten after it."""
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")
    for name in CHOICES:
        monkeypatch.setenv(name, "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("executors")
    save_tiny_bert(folder / "model")
    write_planted_task(folder / "task")
    return folder


def parameters(folder, run, **changes):
    return tiny_study(folder / run, folder / "model", folder / "task", **changes)


def test_the_environment_chooses_the_executor(monkeypatch):
    assert type(executors.chosen()) is Workers
    monkeypatch.setenv("HEALING_EXECUTOR", "in-process")
    assert type(executors.chosen()) is InProcess
    monkeypatch.setenv("HEALING_EXECUTOR", "rya")
    with pytest.raises(HealingError, match="unknown executor 'rya'.*Did you mean 'ray'"):
        executors.chosen()


@pytest.mark.parametrize("text", ["0/3", "4/3", "2", "a/b", "1/0", "-1/3", "1/3/5"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(HealingError, match="from 1 to n, such as 2/8"):
        executors.shard(text)


def test_shares_are_disjoint_cover_everything_and_depend_on_the_key_alone(folder):
    cells = Study(parameters(folder, "planned", seeds=list(range(6)))).plan("recovery")
    shares = [{c.key for c in cells if executors.shard(f"{i}/3").has(c)} for i in (1, 2, 3)]
    assert set.union(*shares) == {c.key for c in cells}
    assert sum(map(len, shares)) == len(cells) and all(shares)
    assert all(Shard().has(c) for c in cells)


def test_shards_merge_into_the_records_of_one_run(folder, monkeypatch):
    whole = Study(parameters(folder, "whole"))
    tables = {stage: whole.run(stage) for stage in STAGES}
    for share in ("1/2", "2/2"):
        monkeypatch.setenv("HEALING_SHARD", share)
        study = Study(parameters(folder, f"shard{share[0]}"))
        for stage in STAGES:
            study.compute(stage)
        with pytest.raises(HealingError, match=f"shard {share} of stage .* needs all shards"):
            for stage in STAGES:
                study.run(stage)
    monkeypatch.setenv("HEALING_SHARD", "")
    for number in (1, 2):
        there = folder / f"shard{number}" / "records"
        shutil.copytree(there, folder / "merged" / "records", dirs_exist_ok=True)
    # Each computed its share and nothing else: together they are exactly the run's records.
    merged, made = ({p.name for p in (folder / run).rglob("records/*/*.json")}
                    for run in ("merged", "whole"))  # fmt: skip
    assert merged == made
    counts = [len(list((folder / f"shard{n}").rglob("records/*/*.json"))) for n in (1, 2)]
    assert sum(counts) == len(made) and all(counts)

    def none(*_):
        raise AssertionError("a finished cell is computed again")

    monkeypatch.setattr(Study, "_compute", none)
    study = Study(parameters(folder, "merged"))
    times = ["seconds", "finished"]
    for stage, table in tables.items():
        same = study.run(stage)
        left = [name for name in times if name in table]
        assert same.drop(columns=left).equals(table.drop(columns=left))


def test_a_worker_computes_and_waits_for_its_own_shard_alone(folder, monkeypatch):
    monkeypatch.setenv("HEALING_SHARD", "2/2")
    study = Study(parameters(folder, "helped"))
    study.help("corruption", stop=lambda: False)  # which ends although cells are missing
    mine = {cell.key for cell in study.plan("corruption") if executors.shard().has(cell)}
    assert {record["key"] for record in study.store.records("corruption")} == mine
    assert 0 < len(mine) < len(study.plan("corruption"))


def test_a_shard_of_the_sequence_needs_no_notebook_and_says_what_is_left(folder, capsys):
    """With the project's own notebooks: each stage's parameters are those that it declares."""
    given = parameters(folder, "unused", seeds=[0], scratch=False) | {
        "probe_levels": ["1/3"], "probe_train": 12, "probe_test": 6, "column": ["pos"],
        "scans": {"layers": {"layers": [[1]]}},
    }  # fmt: skip
    pairs = [(name, value) for name, value in given.items() if name not in ("run",)]
    line = ["run", "quick", "--out", str(folder / "sequence"), "--shard"]
    arguments = [a for name, value in pairs for a in ("-p", name, str(value))]
    assert cli.main([*line, "1/2", *arguments]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Shard 1/2: its ") and "without a shard" in said
    assert cli.main([*line, "2/2", *arguments]) == 0  # beside it, in one folder
    assert not list((folder / "sequence" / "notebooks").iterdir())
    assert all(s.done == s.planned > 0 for s in runner.progress(folder / "sequence"))
    assert {s.name for s in runner.progress(folder / "sequence")} == set(runner.STAGES)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--executor spark", "unknown executor 'spark'; allowed: in-process, workers, ray."),
        ("--address 127.0.0.1:1", "add --executor ray"),
        ("--shard 9/8", "shard '9/8' must be i/n"),
        ("--executor ray", "pip install .[cluster]"),
    ],
)
def test_a_wrong_choice_is_one_line_before_anything_runs(
    given, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    out = tmp_path / "run"
    assert cli.main(["run", "quick", "--out", str(out), *given.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("healing: ") and said in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_one_line_before_anything_runs(
    address, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())  # nothing of it is asked
    line = ["run", "quick", "--out", str(tmp_path / "run"), "--executor", "ray", "--address"]
    assert cli.main([*line, address]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"healing: cannot reach the Ray cluster at {address}: ")
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_choice_reaches_what_the_run_starts(monkeypatch, tmp_path):
    seen = {}

    def run(*_, **__):
        import os

        seen.update({name: os.environ[name] for name in CHOICES})
        return Path("index.html")

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "run_shard", run)
    for share in ([], ["--shard", "1/1"]):  # without notebooks, all cells are a share too
        assert cli.main(["run", "quick", "--executor", "in-process", *share]) == 0
        assert seen == {
            "HEALING_EXECUTOR": "in-process", "HEALING_RAY_ADDRESS": "",
            "HEALING_SHARD": "".join(share[1:]),
        }  # fmt: skip
