"""A notebook the way Colab opens it: alone in an empty folder, where the project is not installed.

The stand-in for Colab's image is a fresh environment that sees this one's packages, less the
project and less what Colab lacks; they lie outside of what pip may write to.
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

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "01_baseline.ipynb"
SET_UP = nbformat.read(NOTEBOOK, as_version=4).cells[1].source
# Not on Colab: these must come from the index, by the project's own declaration.
LACKING = ("healing", "_healing", "papermill", "nbval", "hatchling")
SMALL = {"task": ["sentiment"], "seeds": [0], "train_size": 64, "validation_size": 32, "epochs": 1}
SMALL |= {"test_size": 32, "workers": 1}
HIDDEN = ("PYTHONPATH", "VIRTUAL_ENV", "HEALING_RUNS")  # would lead a kernel to the checkout
CLEAN = {name: value for name, value in os.environ.items() if name not in HIDDEN}


@pytest.fixture
def colab(tmp_path):
    """Colab's stand-in: a folder with an environment `env` and its kernel.

    Skips where pip reaches no package index: an installation cannot be tried without one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "hatchling"]
    command += ["--timeout", "10", "--retries", "1", "--dest", str(tmp_path / "pip")]
    if subprocess.run(command, capture_output=True, timeout=120).returncode:
        pytest.skip("no package index is reachable")
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    (preinstalled := tmp_path / "preinstalled").mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        own = entry.name.startswith(("pip", "__editable__")) or entry.suffix == ".pth"
        if not own and not entry.name.startswith(LACKING):
            (preinstalled / entry.name).symlink_to(entry)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "preinstalled.pth").write_text(f"{preinstalled}\n")
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    python = str(tmp_path / "env" / "bin" / "python")
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}))
    return tmp_path


def test_a_notebook_alone_installs_the_project_and_keeps_torch(colab):
    def run(*command, cwd=colab, **more):
        environment = CLEAN | more
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    def found():
        """Where torch and the project are."""
        code = "import importlib.util as u\nfor name in ('torch', 'healing_utils'):\n"
        code += "    print(getattr(u.find_spec(name), 'origin', None))"
        return run(colab / "env" / "bin" / "python", "-c", code).stdout.splitlines()

    torch, project = found()
    assert project == "None"
    alone = colab / "content"
    alone.mkdir()
    command = [sys.executable, "-m", "papermill", NOTEBOOK, "out.ipynb", "-k", "python3"]
    command += ["--no-progress-bar", "-y", json.dumps(SMALL)]
    done = run(*command, cwd=alone, HEALING_REPOSITORY=str(ROOT), JUPYTER_PATH=str(colab))
    assert done.returncode == 0, done.stderr[-2000:]
    set_up = nbformat.read(alone / "out.ipynb", as_version=4).cells[1]
    printed = "".join(o.get("text", "") for o in set_up.outputs if o.get("name") == "stdout")
    assert "Installed. Device:" in printed
    installed = found()
    assert installed[0] == torch and "preinstalled" in torch
    assert installed[1].startswith(str(colab / "env")), "the checkout was used, not an installation"
    assert list(alone.glob("data/runs/*/records/baseline/*.json"))


def test_the_set_up_cell_installs_beside_this_torch(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command[-2:]))
    monkeypatch.setenv("HEALING_REPOSITORY", "git+https://example.org/fork.git")
    exec(SET_UP.replace('find_spec("healing_utils")', "False"), {})
    assert capsys.readouterr().out.startswith("Installed. Device: ")
    assert calls == [["git+https://example.org/fork.git", f"torch=={version('torch')}"]]
