"""The command line: exit codes, one line for what was wrong, and a light status."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from healing_utils import __version__, cli
from healing_utils.base.errors import HealingError
from healing_utils.run import sequence
from healing_utils.study.parameters import Parameters


def test_run_passes_its_arguments_on_and_ends_with_the_page(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(sequence, "run", lambda **given: calls.append(given) or "index.html")
    line = "run quick --out here -p seeds [0,2] -p levels 1/6".split()
    assert cli.main([*line, "--again"]) == 0
    assert cli.main([*line, "--executor", "ray", "--address", "a:1", "--shard", "1/1"]) == 0
    usual = {"profile": "quick", "out": "here", "parameters": {"seeds": "[0,2]", "levels": "1/6"}}
    assert calls == [
        {**usual, "executor": "workers", "address": None, "shard": None, "again": True},
        {**usual, "executor": "ray", "address": "a:1", "shard": "1/1", "again": False},
    ]
    assert capsys.readouterr().out.splitlines() == ["index.html", "index.html"]


def test_help_names_every_parameter_and_the_version_is_told(capsys):
    for command in ("run", "plan"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        shown = capsys.readouterr().out
        listed = re.findall(r"^  (\w+) ", shown.partition("parameters, with")[2], re.MULTILINE)
        assert listed == list(Parameters.model_fields) and "the peak\n" in shown
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"healing {__version__}\n"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("healing run qu", ["quick "]),
        ("healing plan quick -p lev", ["levels "]),
        ("healing run quick -p task lev", []),  # a value
        ("healing run quick -p seeds 0 -p probe_l", ["probe_levels "]),
    ],
)
def test_a_shell_completes_profiles_and_names_of_parameters_without_torch(line, found, tmp_path):
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words"),
             "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}  # fmt: skip
    code = (
        "import os, sys\n"
        "leave, os._exit = os._exit, lambda code: leave(9 if 'torch' in sys.modules else code)\n"
        "from healing_utils.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "words").read_text().split("\n") == (found or [""])


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (HealingError("3 of 4 cells failed"), 2, "healing: 3 of 4 cells failed\n"),
        (OSError(28, "No space left", "a"), 2, "healing: [Errno 28] No space left: 'a'\n"),
        (RecursionError("two\nlines"), 2, "healing: two lines\n"),
        (KeyboardInterrupt(), 130, "\nStopped. Everything finished is kept; the same command "
         "goes on.\n"),
    ],
)  # fmt: skip
def test_exit_codes_and_no_traceback(monkeypatch, capsys, raised, code, said):
    monkeypatch.setattr(sequence, "run", lambda **_: (_ for _ in ()).throw(raised))
    assert cli.main(["run", "quick"]) == code
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run quikc", "Did you mean 'quick'"), ("plan quikc", "Did you mean 'quick'"),
        ("run quick -p epoch 3", "unknown parameter 'epoch'; did you mean 'epochs'"),
        ("run quick --executor spark", "'spark'; allowed: workers, in-process, ray."),
        ("run quick --address 127.0.0.1:1", "add --executor ray"),
        ("run quick --shard 9/8", "shard '9/8' must be i/n"), ("status", "no runs in"),
        ("report", "no runs in"), ("run", "arguments are required: PROFILE"), ("", "COMMAND"),
        ("run quick -p seeds", "expected 2 arguments"), ("walk", "invalid choice: 'walk'"),
        ("run quick --executor ray", "pip install .[cluster]"),
        ("run quick --executor ray --address 127.0.0.1:1", "Ray cluster at 127.0.0.1:1: "),
        ("run quick --executor ray --address 127.0.0.1:99999", "cluster at 127.0.0.1:99999: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_a_folder_is_made(
    tmp_path, monkeypatch, capsys, line, said
):
    names = "is_initialized", "WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError"
    errors = dict.fromkeys((*names, "OutOfMemoryError", "ObjectLostError"), OSError)
    ray = SimpleNamespace(exceptions=SimpleNamespace(**errors), is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", ray if "--address" in line else None)
    monkeypatch.setenv("HEALING_RUNS", str(tmp_path / "runs"))
    try:
        assert cli.main(line.split()) == 2
    except SystemExit as stop:  # argparse's own way
        assert stop.code == 2
    error = capsys.readouterr().err
    assert error.startswith("healing: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


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
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 of 1 cells done" in done.stdout
    assert "missing  organism sentiment seed 0" in done.stdout
