"""One set of workers computes beside all notebooks of a run, and ahead of them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import nbformat
import pytest
from helpers import contents, save_tiny_bert, tiny_study, write_planted_task

from healing_utils.run import executors, runner
from healing_utils.study.study import Study

STUDY = """\
from healing_utils import Study, notebook_parameters
from healing_utils.run import executors

study = Study(notebook_parameters(globals()))
started, helping = [], executors.helping
executors.helping = lambda *given: started.append(given[-1]) or helping(*given)"""
OVERTAKEN = """\
import time

deadline = time.monotonic() + 60
while not list(study.run_folder.glob("records/recovery/*.json")):
    assert time.monotonic() < deadline, "no worker runs ahead"
    time.sleep(0.05)"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")
    for name in ("HEALING_EXECUTOR", "HEALING_SHARD", "HEALING_HELPED"):
        monkeypatch.delenv(name, raising=False)


def write_notebook(path: Path, parameters: dict[str, object], *cells: str) -> None:
    declared = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    made = [nbformat.v4.new_code_cell(source) for source in (declared, *cells)]
    made[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(exist_ok=True)
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), path)


def run(folder: Path, **options: object) -> None:
    (folder / "profile.yaml").touch()  # the notebooks' own parameters are given with the call
    options |= {"notebooks": folder / "notebooks", "write_page": lambda target: target}
    runner.run(folder / "profile.yaml", folder / "run", **options)


def test_workers_overtake_a_notebook_and_its_kernel_starts_none(tmp_path):
    model, task = save_tiny_bert(tmp_path / "model"), write_planted_task(tmp_path / "task")
    # Six cells in each stage: enough for a kernel to start a worker of its own, were there none.
    changes = {"workers": 2, "seeds": list(range(6)), "levels": [], "init_levels": ["1/3"]}
    changes |= {"sides": ["bottom"], "scratch": False}
    given = tiny_study(tmp_path / "run", model, task, **changes)
    for name, stage, after in (("01", "baseline", OVERTAKEN), ("03", "recovery", "")):
        compute = f'assert len(study.run("{stage}")) == 6\nassert started == [0]'
        path = tmp_path / "notebooks" / f"{name}_{stage}.ipynb"
        write_notebook(path, given, STUDY, compute, after)
    run(tmp_path, overrides=given.items())
    alone = Study(given | {"run": str(tmp_path / "alone")})
    alone.run("baseline")
    alone.run("recovery")
    assert contents(tmp_path / "run") == contents(tmp_path / "alone")
    assert not list((tmp_path / "run" / "claims").iterdir())


@pytest.fixture
def sequence(tmp_path, monkeypatch):
    """A run of stand-ins for the notebooks: what happens, in order, which of them are finished and
    which fail."""
    given = {"run": "nowhere", "model": "organism", "workers": 3}
    for name in ("00_model_organism", "01_baseline", "02_corruption", "03_recovery", "05_analysis"):
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", given)
    seen, done, broken = [], set(), set()

    @contextlib.contextmanager
    def helping(jobs, count, usual):
        assert all(job["run"] == str(tmp_path / "run") for job, _ in jobs)
        assert usual == runner.HUGE_PAGES
        seen.append(("workers", count, [stage for _, stages in jobs for stage in stages]))
        try:
            yield
        finally:
            seen.append("ended")

    def watch(job, *_):
        name = Path(job["notebook"]).stem
        seen.append((name, os.environ.get("HEALING_HELPED")))
        Path(job["executed"]).write_text("executed")
        return {"event": "failed" if name in broken else "done", "cause": "planted"}

    monkeypatch.setattr(executors, "helping", helping)
    monkeypatch.setattr(runner, "_watch", watch)
    monkeypatch.setattr(runner.finished, "is_finished", lambda path, *_: path.stem in done)
    return seen, done, broken


def test_workers_start_once_with_the_first_notebook_that_is_executed(sequence, tmp_path):
    seen, done, _ = sequence
    done.add("01_baseline")
    run(tmp_path, overrides=[("workers", 3)])
    stages = ["baseline", "corruption", "harms", "recovery", "scans"]
    executed = ["00_model_organism", "02_corruption", "03_recovery", "05_analysis"]
    helped = [(name, " ".join(stages)) for name in executed]
    assert seen == [("workers", 2, stages), *helped, "ended"]
    assert "HEALING_HELPED" not in os.environ


def test_workers_are_given_the_chosen_notebooks_and_end_when_one_fails(sequence, tmp_path):
    seen, _, broken = sequence
    broken.add("02_corruption")
    with pytest.raises(runner.NotebookFailed, match="planted"):
        run(tmp_path, overrides=[("workers", 2)], stages=["corruption", "analysis"])
    stages = ["corruption", "harms"]
    assert seen == [("workers", 1, stages), ("02_corruption", " ".join(stages)), "ended"]
    assert "HEALING_HELPED" not in os.environ


@pytest.mark.parametrize(
    ("executor", "count", "finished"),
    [
        ("in-process", 2, ()),
        ("workers", 1, ()),
        ("workers", 2, ("01_baseline", "02_corruption", "03_recovery")),
    ],
)
def test_no_worker_starts_without_need(sequence, tmp_path, monkeypatch, executor, count, finished):
    seen, done, _ = sequence
    done.update(finished)
    monkeypatch.setenv("HEALING_EXECUTOR", executor)
    run(tmp_path, overrides=[("workers", count)])
    there = ["00_model_organism", "01_baseline", "02_corruption", "03_recovery", "05_analysis"]
    assert seen == [(name, None) for name in there if name not in finished]
