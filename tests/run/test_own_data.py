"""What a user does who has the README alone: from a file of their own to a page, word for word.

Only less of everything, so that it takes a minute, and a file whose path is no plain name.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from helpers import planted_texts

from healing_utils import cli, load_results

ROOT = Path(__file__).resolve().parents[2]
README, GUIDE, MAKEFILE = (
    (ROOT / name).read_text("utf-8") for name in ("README.md", "docs/guide.md", "Makefile")
)
LESS = """-p seeds [0,1] -p sides top -p levels 1/2 -p epochs 0.5 -p train_size 48
    -p validation_size 16 -p evaluations 2 -p workers 1""".split()
PROBES = "-p probe_train 12 -p probe_test 12".split()
NOISE = "ERROR|WARNING|Unable to|Traceback"


def run_python(*command):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_a_file_of_ones_own_to_its_page(tmp_path, monkeypatch, capsys):
    def healing(*command):
        assert cli.main(command) == 0
        said = capsys.readouterr()
        assert not re.search(NOISE, said.err), said.err
        return said.out

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEALING_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HEALING_PROGRESS", "terminal")
    texts, labels = planted_texts(120)
    rows = [f"{text},{('bad', 'good')[label]}" for text, label in zip(texts, labels, strict=True)]
    task = tmp_path / "<b>my #1.csv"
    task.write_text("\n".join(["text,label", *rows]))
    (asked,) = re.findall(r'^make study ARGS="(.+ reviews\.csv .+)"$', README, re.MULTILINE)
    (line,) = re.findall(r"^study:.*\n\t@\$\(BIN\)/healing (.+)$", MAKEFILE, re.MULTILINE)
    words = line.replace("$(ARGS)", asked).split()
    command = [{"reviews.csv": str(task), "reviews": "mine"}.get(word, word) for word in words]
    done = run_python("healing_utils", *command, *LESS, *PROBES)
    page = tmp_path / "mine" / "index.html"
    assert done.stdout == f"{page}\n" and not re.search(NOISE, done.stderr), done.stderr
    found = BeautifulSoup(page.read_text("utf-8"), "html.parser")
    assert "my #1.csv" in found.dl.get_text() and found.find(id="found")
    assert not found.find(id="missing"), found.find(id="missing")
    names = [re.sub("-[0-9a-f]{6}$", "", p.stem) for p in (tmp_path / "mine/figures").glob("*.png")]
    assert "healed_-b-my-1.csv" in names and "recovery" in names
    # The same name is the same folder to the commands and in Python.
    status = healing("status", "mine")
    (total,) = re.findall(r"all +(\d+) of \1 cells done", status)
    assert f"Cells {total}" in " ".join(found.dl.get_text(" ").split())
    assert healing("report", "mine") == done.stdout
    assert set(load_results("mine", "recovery")["task"]) == {str(task)}

    # A notebook by itself: its run is known to the commands too.
    run = tmp_path / "runs" / "reviews"
    for stage in ("baseline", "recovery"):  # finished, so as not to compute them here again
        shutil.copytree(tmp_path / "mine/records" / stage, run / "records" / stage)
    assert "papermill notebooks/03_recovery.ipynb out.ipynb -p run data/runs/reviews" in GUIDE
    notebook = str(ROOT / "notebooks" / "03_recovery.ipynb")
    given = ["-p", "run", "data/runs/reviews", "-p", "task", str(task), *LESS]
    run_python("papermill", notebook, "out.ipynb", *given)
    assert json.loads((run / "parameters.json").read_text())["task"] == [str(task)]
    assert healing("status").startswith(f"Run {run}\n")
