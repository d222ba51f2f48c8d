"""A notebook the way Colab opens it: alone in an empty folder, where the project is not installed.

Colab's image has torch, transformers and most of the rest; the stand-in is a fresh environment that
sees this one's packages, less the project and less what Colab lacks. Nothing in it can be replaced
without a trace: the packages lie outside of the environment that pip may write to.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest

from healing_utils.run import notebooks

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "01_baseline.ipynb"
# Not on Colab: these must come from the index, by the project's own declaration.
LACKING = ("healing", "_healing", "papermill", "nbval", "hatchling")
SMALL = {"task": ["sentiment"], "seeds": [0], "train_size": 64, "validation_size": 32, "epochs": 1}


def _clean_environment(**more):
    """This process's environment, without what would lead a kernel to the checkout."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "HEALING_RUNS")
    return {k: v for k, v in os.environ.items() if k not in hidden} | more


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Skips where pip reaches no package index: an installation cannot be tried without one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "hatchling"]
    command += ["--timeout", "10", "--retries", "1", "--dest", str(tmp_path_factory.mktemp("pip"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"no package index is reachable: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def colab(index, tmp_path_factory):
    """Colab's stand-in: a folder with an environment `env` and its kernel."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder / "env", with_pip=True, symlinks=True)
    python = folder / "env" / "bin" / "python"
    preinstalled = folder / "preinstalled"
    preinstalled.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        own = entry.name.startswith(("pip", "__editable__")) or entry.suffix == ".pth"
        if not own and not entry.name.startswith(LACKING):
            (preinstalled / entry.name).symlink_to(entry)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "preinstalled.pth").write_text(f"{preinstalled}\n")
    spec = folder / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}))
    return folder


def run_python(folder, code):
    """What `code` prints in the stand-in."""
    done = subprocess.run(
        [str(folder / "env" / "bin" / "python"), "-c", code],
        cwd=folder, env=_clean_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_a_notebook_alone_installs_the_project_and_keeps_torch(colab):
    where = "import torch; print(torch.__version__, torch.__file__)"
    torch_before = run_python(colab, where)
    assert torch_before.startswith(version("torch").split("+")[0])
    assert "No module named 'healing_utils'" in run_python(colab, "import healing_utils")

    alone = colab / "content"
    alone.mkdir()
    (alone / "mine.ipynb").write_bytes(NOTEBOOK.read_bytes())
    command = [sys.executable, "-m", "papermill", "mine.ipynb", "out.ipynb", "-k", "python3"]
    command += ["--no-progress-bar", "-y", json.dumps(SMALL)]
    environment = _clean_environment(
        HEALING_REPOSITORY=str(ROOT), HEALING_PROGRESS="quiet", JUPYTER_PATH=str(colab)
    )
    done = subprocess.run(
        command, cwd=alone, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]

    bootstrap = nbformat.read(alone / "out.ipynb", as_version=4).cells[1]
    printed = "".join(o.get("text", "") for o in bootstrap.outputs if o.get("name") == "stdout")
    assert "Installed. Device:" in printed
    assert run_python(colab, where) == torch_before
    installed = run_python(colab, "import healing_utils; print(healing_utils.__file__)")
    assert installed.startswith(str(colab / "env")), "the checkout was used, not an installation"
    assert list(alone.glob("data/runs/*/records/baseline/*.json"))


def test_torch_is_named_to_pip_where_there_is_one(monkeypatch):
    """The constraint itself, without an installation: what pip would be called with."""
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    monkeypatch.setenv("HEALING_REPOSITORY", "https://example.org/fork.git")
    cell = notebooks.bootstrap_cell().replace('find_spec("healing_utils") is None', "sys")
    exec(cell, {})
    (command,) = calls
    assert "git+https://example.org/fork.git" in command
    constraint = Path(command[command.index("--constraint") + 1])
    assert constraint.read_text() == f"torch=={version('torch')}"
    constraint.unlink()


def test_where_the_project_is_installed_the_cell_does_nothing(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    namespace = {}
    exec(notebooks.bootstrap_cell(), namespace)
    assert capsys.readouterr().out == ""
    # nothing that would be taken for a parameter is left behind
    plain = (str, int, float, bool, list, tuple, dict)
    kept = {k for k, v in namespace.items() if isinstance(v, plain) and not k.startswith("_")}
    assert kept == set()
