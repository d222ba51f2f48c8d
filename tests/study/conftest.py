"""One model, one task and one finished run for all tests of the study, which leave them alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import save_tiny_bert, tiny_study, write_planted_task

from healing_utils.study.cells import SCAN_STAGES, STAGES
from healing_utils.study.study import Study

# Of three layers, at one third and, all of them, at 1.
GRID = {"levels": ["1/3", "1"], "init_levels": [], "probe_levels": ["1/3"]}
ONE = {"sides": "bottom", "levels": "1/3", "seeds": 0}
SCANS = {
    "layers": {"layers": "each", "seeds": 0},
    "kinds": {"kind": ["noise=0.5", "prune=0.9"], **ONE, "sides": "top"},
    "parts": {"part": ["attention", "embeddings"], **ONE},
    "controls": {**ONE, "sides": ["random", "scattered"]},
    "recipes": {"recipe": ["drop", "distillation"], **ONE, "broken": False},
    "deployed": {"start": "fine-tuned", **ONE},
    "price": {"state": ["intact", "scratch"], "train_size": [16, 32], "seeds": 0},
    "rates": {"state": "intact", "learning_rate": [1e-4, 1e-3], "epochs": 2, "seeds": 0},
    "shown": {"state": "broken", "kind": "zero", **ONE},
    "far": {"kind": "noise=1e30", **ONE},  # overflows in the first forward pass
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    save_tiny_bert(folder / "model")
    write_planted_task(folder / "task")
    return folder


@pytest.fixture(scope="session")
def given(folder) -> dict[str, object]:
    """Parameters of the finished run."""
    return tiny_study(folder / "run", folder / "model", folder / "task", **GRID, scans=SCANS)


@pytest.fixture(scope="session")
def tiny(given, tmp_path_factory):
    """Make a study like the finished one, in a folder of its own, without scans."""

    def make(**changes: object) -> Study:
        run = changes.pop("run", None) or tmp_path_factory.mktemp("run")
        return Study({**given, "scans": {}, "run": str(run), **changes})

    return make


@pytest.fixture(scope="session")
def finished(given) -> SimpleNamespace:
    """Its `study`, and the `tables` of its task stages and scans."""
    study = Study(given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEALING_PROGRESS", "quiet")
        tables = {stage: study.run(stage) for stage in (*STAGES, *SCAN_STAGES)}
    return SimpleNamespace(study=study, tables=tables)


@pytest.fixture
def copied(finished, given, tmp_path) -> Study:
    """A copy of that run for a test to damage."""
    shutil.copytree(finished.study.run_folder, tmp_path / "run")
    return Study({**given, "run": str(tmp_path / "run")})
