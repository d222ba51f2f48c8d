"""The command line: values, exit codes, one line for what was wrong, and a light status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from healing_utils import cli
from healing_utils.base.errors import HealingError
from healing_utils.run import runner


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("2.0e-5", 2e-5),
        ("2e-5", "2e-5"),  # YAML 1.1 sees text; the check of the parameters reads the number
        ("1/6", "1/6"),
        ("[0,2]", [0, 2]),
        ("[1/6, 1/2]", ["1/6", "1/2"]),
        ("true", True),
        ("null", None),
        ("bert-base-uncased", "bert-base-uncased"),
        ("012", "012"),
        ("1:30", "1:30"),
        ("2024-06-01", "2024-06-01"),
        ("a: b", "a: b"),
        ("[1", "[1"),
    ],
)
def test_values_mean_what_they_say(text, value):
    assert cli.parse_value(text) == value


@pytest.fixture
def received(monkeypatch):
    """What `healing run` asks of the runner, which does nothing."""
    calls = []

    def run(profile, out, overrides, again):
        calls.append((profile, out, overrides, again))
        return Path("somewhere/index.html")

    monkeypatch.setattr(runner, "run", run)
    return calls


def test_run_passes_its_arguments_on_and_ends_with_the_page(received, capsys):
    line = "run quick --out here -p seeds [0,2] -p levels 1/6"
    assert cli.main(line.split()) == 0
    assert received == [("quick", "here", [("seeds", [0, 2]), ("levels", "1/6")], False)]
    assert capsys.readouterr().out.splitlines()[-1] == "somewhere/index.html"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (HealingError("unknown parameter"), 2, "healing: unknown parameter"),
        (runner.NotebookFailed("03 stopped at cell 4"), 1, "03 stopped at cell 4"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
    ],
)
def test_exit_codes_and_no_traceback(monkeypatch, capsys, raised, code, said):
    def run(*_, **__):
        raise raised

    monkeypatch.setattr(runner, "run", run)
    assert cli.main(["run", "quick"]) == code
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_a_mistyped_parameter_is_refused_with_the_nearest_before_a_folder_is_made(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["run", "quick", "--out", str(out), "-p", "epoch", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("healing: unknown parameter 'epoch'") and "'epochs'" in error
    assert len(error.splitlines()) == 1 and not out.exists()


def test_an_unknown_profile_names_the_nearest(capsys):
    assert cli.main(["run", "quikc"]) == 2
    assert "'quick'" in capsys.readouterr().err


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2


def test_status_works_without_torch_and_exits_with_0(tmp_path):
    (tmp_path / "plans").mkdir()
    plan = {"stage": "baseline", "cells": [{"key": "k", "name": "organism sentiment seed 0"}]}
    (tmp_path / "plans" / "baseline.json").write_text(json.dumps(plan))
    # torch and its like cannot be imported there: `status` answers while a study uses the machine
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'datasets', 'pandas', 'matplotlib', 'papermill'):\n"
        "    sys.modules[name] = None\n"
        "from healing_utils.cli import main\n"
        "sys.exit(main(['status', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "0 of 1 cells done" in done.stdout
    assert "missing  organism sentiment seed 0" in done.stdout


def test_status_of_nothing_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HEALING_RUNS", str(tmp_path))
    assert cli.main(["status"]) == 2
    assert "no runs in" in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "healing_utils", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "status" in done.stdout
