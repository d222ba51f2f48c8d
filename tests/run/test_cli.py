"""The command line: values, exit codes, one line for what was wrong, and a light status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from healing_utils import cli
from healing_utils.base.errors import HealingError
from healing_utils.run import sequence


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("0.5", 0.5), ("[0,2]", [0, 2]), ("[1/6, 1/2]", ["1/6", "1/2"]), ("true", True),
        ("null", None),
        # YAML 1.1 sees other things than people, or nothing: it stays text, which the check of the
        # parameters reads or refuses.
        *((text, text) for text in ("2e-5", "1/6", "a-name", "012", "1:30", "2024-06-01", "[1")),
    ],
)  # fmt: skip
def test_values_mean_what_they_say(text, value):
    assert cli.parse_value(text) == value


def test_run_passes_its_arguments_on_and_ends_with_the_page(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(sequence, "run", lambda *a, **k: calls.append((a, k)) or Path("index.html"))
    monkeypatch.setattr(sequence, "run_shard", lambda *a, **k: calls.append((a, k)) or "done")
    line = "run quick --out here -p seeds [0,2] -p levels 1/6".split()
    given, where = [("seeds", [0, 2]), ("levels", "1/6")], {"executor": "ray", "address": "a:1"}
    assert cli.main([*line, "--again"]) == 0
    assert cli.main([*line, "--executor", "ray", "--address", "a:1", "--shard", "1/1"]) == 0
    usual = {"executor": "workers", "address": None, "again": True}
    assert calls == [
        (("quick", "here", given), usual),
        (("quick", sequence.Shard(1, 1), "here", given), where),  # all cells are a share too
    ]
    assert capsys.readouterr().out.splitlines() == ["index.html", "done"]


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (HealingError("unknown parameter"), 2, "healing: unknown parameter"),
        (sequence.NotebookFailed("03 stopped at cell 4"), 1, "03 stopped at cell 4"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
    ],
)
def test_exit_codes_and_no_traceback(monkeypatch, capsys, raised, code, said):
    def run(*_, **__):
        raise raised

    monkeypatch.setattr(sequence, "run", run)
    assert cli.main(["run", "quick"]) == code
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run quikc", "Did you mean 'quick'"), ("plan quikc", "Did you mean 'quick'"),
        ("run quick -p epoch 3", "unknown parameter 'epoch'; did you mean 'epochs'"),
        ("run quick --executor spark", "'spark'; allowed: workers, in-process, ray."),
        ("run quick --address 127.0.0.1:1", "add --executor ray"),
        ("run quick --shard 9/8", "shard '9/8' must be i/n"), ("status", "no runs in"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_a_folder_is_made(
    tmp_path, monkeypatch, capsys, line, said
):
    monkeypatch.setenv("HEALING_RUNS", str(tmp_path / "runs"))
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("healing: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("ray", "address", "said"),
    [
        (None, None, "pip install .[cluster]"),  # as where it is not installed
        ("not asked", "127.0.0.1:1", "cannot reach the Ray cluster at 127.0.0.1:1: "),
        ("not asked", "127.0.0.1:99999", "cannot reach the Ray cluster at 127.0.0.1:99999: "),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line_and_nothing_is_computed(
    ray, address, said, tmp_path, monkeypatch, capsys
):
    names = "is_initialized", "WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError"
    errors = dict.fromkeys((*names, "OutOfMemoryError", "ObjectLostError"), OSError)
    there = SimpleNamespace(exceptions=SimpleNamespace(**errors), is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", there if ray else None)
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")
    line = ["run", "quick", "--out", str(tmp_path), "--executor", "ray", "-p", "scans", "{}"]
    assert cli.main([*line, *(["--address", address] if address else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("healing: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "records").exists()


def test_status_works_without_torch_and_exits_with_0(tmp_path):
    (tmp_path / "plans").mkdir()
    plan = {"stage": "baseline", "cells": [{"key": "k", "name": "organism sentiment seed 0"}]}
    (tmp_path / "plans" / "baseline.json").write_text(json.dumps(plan))
    # torch and its like cannot be imported there: `status` answers while a study uses the machine
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'transformers', 'datasets', 'pandas', 'matplotlib', 'papermill'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv[1:] = ['status', sys.argv[1]]\n"
        "runpy.run_module('healing_utils', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "0 of 1 cells done" in done.stdout
    assert "missing  organism sentiment seed 0" in done.stdout
