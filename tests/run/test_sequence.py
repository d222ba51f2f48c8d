"""A run: cells, then notebooks (small ones that work, fail or kill their kernel), then the page."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from helpers import contents, save_tiny_bert, tiny_study, write_corpus, write_planted_task

from healing_utils.base.errors import HealingError
from healing_utils.base.records import Store
from healing_utils.run import profiles, sequence, status
from healing_utils.run.profiles import Shard
from healing_utils.study.study import Study

HERE = Path(__file__).parents[1]


class NoCells:
    """A study that has nothing to compute."""

    asked: list[tuple] = []

    def __init__(self, parameters):
        pass

    def keep_plans(self):
        return []

    def compute(self, *asked):
        self.asked.append(asked)

    def close(self):
        pass


def stand_ins(folder: Path, patch: pytest.MonkeyPatch, *notebooks: str) -> None:
    """Have runs take those notebooks alone, compute no cells, and write a page of one word."""
    shutil.copytree(HERE / "notebooks" / "profiles", folder / "profiles")
    for name in notebooks:
        shutil.copy(HERE / "notebooks" / f"{name}.ipynb", folder)

    def write_page(target):
        (target / "index.html").write_text("page")
        return target / "index.html"

    for module in (profiles, sequence):
        patch.setattr(module, "notebook_folder", lambda: folder)
    patch.setattr(sequence, "write_page", write_page)
    patch.setattr(sequence, "Study", NoCells)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")


@pytest.fixture
def take(tmp_path, monkeypatch):
    return lambda *names: stand_ins(tmp_path / "taken", monkeypatch, *names)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "notebooks").iterdir())


# -- kernels ---------------------------------------------------------------------------------------


def test_notebooks_run_in_order_a_failure_is_told_and_the_same_call_goes_on(
    take, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("HEALING_PROGRESS", "terminal")
    take("01_good", "02_fails")
    out = tmp_path / "run"
    with pytest.raises(sequence.NotebookFailed) as caught:
        sequence.run("small", out, executor="in-process")
    assert NoCells.asked.pop() == ([], "all stages", "in-process", None)
    first, cause, *_ = str(caught.value).splitlines()
    # the fixture's five cells and the one that papermill adds
    assert first == '02_fails stopped at cell 5: if not Path(run, "mended").exists():'
    assert cause.strip() == "ValueError: planted: no such thing as 7"
    assert names(out) == ["01_good.ipynb", "02_fails.failed.ipynb"]
    assert (out / "before.txt").exists() and not (out / "after.txt").exists()
    assert "notebook failed" in status.describe(out)
    # Each gets what it declares, and bars stay out of it.
    given = json.loads((out / "good.json").read_text())
    assert given == {"seeds": [5], "levels": ["1/3"], "found": 0}
    executed = nbformat.read(out / "notebooks" / "01_good.ipynb", as_version=4)
    (injected,) = [c for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert "seeds = [5]" in injected.source and "probe_levels" not in injected.source
    outputs = [output.text for cell in executed.cells[1:] for output in cell.outputs]
    shown = capfd.readouterr().err
    assert outputs == ["a result\n"] and "a bar on the terminal" in shown and "[1/2]" in shown

    (out / "mended").touch()
    assert sequence.run("small", out) == out / "index.html"
    assert names(out) == ["01_good.ipynb", "02_fails.ipynb"] and (out / "after.txt").exists()
    assert "[1/2] 01_good: finished before" in capfd.readouterr().err


def test_a_killed_kernel_or_a_cell_that_takes_too_long_is_a_failure(take, tmp_path):
    take("03_dies")
    out = tmp_path / "run"
    with pytest.raises(sequence.NotebookFailed, match="03_dies stopped at cell 6: os.kill") as it:
        sequence.run("small", out)
    assert "the kernel died" in str(it.value)
    assert names(out) == ["03_dies.failed.ipynb"] and not (out / "outlived.txt").exists()
    (out / "sleep").write_text("60")
    notebook, given = tmp_path / "taken" / "03_dies.ipynb", {"run": str(out)}
    with pytest.raises(sequence.NotebookFailed, match="cell 5: asked = .*\n.*longer than 1 s"):
        sequence.execute(notebook, out, given, timeout=1)


def test_a_kernel_that_does_not_start_is_started_again(take, tmp_path, monkeypatch):
    take("01_good")
    tries = []

    def clash_twice(path, executed, *_):
        tries.append(path)
        Path(executed).write_text("executed")
        return "", "Address already in use" if len(tries) < 3 else None

    monkeypatch.setattr(sequence.time, "sleep", lambda seconds: None)
    with monkeypatch.context() as patch:
        patch.setattr(sequence, "_execute", clash_twice)
        sequence.run("small", tmp_path / "run")
    assert len(tries) == 3
    assert (tmp_path / "run" / "notebooks" / "01_good.ipynb").read_text() == "executed"
    # For real: one that exits at once.
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    exits = [sys.executable, "-c", "raise SystemExit(1)"]
    spec.write_text(json.dumps({"argv": exits, "display_name": "exits", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setattr(sequence, "KERNEL_STARTS", 1)
    with pytest.raises(sequence.NotebookFailed, match="01_good stopped at its start"):
        sequence.run("small", tmp_path / "run", again=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_leaves_no_kernel_behind(tmp_path, number, code):
    out = tmp_path / "run"
    out.mkdir()
    (out / "sleep").write_text("120")
    script = (
        # In the background of a shell, where tests may run, SIGINT is ignored from the start.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/run']\n"
        "import pathlib, pytest, test_sequence as t\n"
        "t.stand_ins(pathlib.Path(sys.argv[2], 'taken'), pytest.MonkeyPatch(), '03_dies')\n"
        "from healing_utils.cli import main\n"
        "sys.exit(main(['run', 'small', '--out', sys.argv[2]]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(HERE), str(out)])
    pid_file, deadline = out / "kernel.pid", time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(30) == code
    deadline = time.monotonic() + 30
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        while " Z " not in Path(f"/proc/{pid_file.read_text()}/stat").read_text():
            os.kill(int(pid_file.read_text()), 0)
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not (out / "notebooks" / "03_dies.ipynb").exists()


# -- what is finished ------------------------------------------------------------------------------


@pytest.fixture
def executed(take, tmp_path, monkeypatch):
    """Run two notebooks, which write a table; the names of those that were executed."""
    take("01_good", "02_fails")
    seen = []

    def execute(path, target, parameters):
        seen.append(path.stem)
        shutil.copy(path, target / "notebooks")
        (target / "tables").mkdir(exist_ok=True)
        (target / "tables" / f"{path.stem}.csv").touch()

    monkeypatch.setattr(sequence, "execute", execute)

    def run(**options):
        seen.clear()
        sequence.run("small", tmp_path / "run", **options)
        return list(seen)

    assert run() == ["01_good", "02_fails"] and run() == []
    return run


BOTH = ["01_good", "02_fails"]


def test_a_notebook_is_executed_again_when_what_it_stands_on_has_changed(
    executed, tmp_path, monkeypatch
):
    out, source = tmp_path / "run", tmp_path / "taken" / "01_good.ipynb"
    assert executed(again=True) == BOTH
    book = json.loads(source.read_text())
    book["cells"][-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "new"}]
    source.write_text(json.dumps(book))
    assert executed() == []  # what it once showed counts for nothing
    book["cells"][-1]["source"] += "\n"
    source.write_text(json.dumps(book))
    assert executed() == ["01_good"]
    (out / "finished" / "02_fails.json").write_text('{"made_from": ')  # cut off
    assert executed() == ["02_fails"]
    (out / "notebooks" / "01_good.ipynb").unlink()
    assert executed() == ["01_good"]
    (out / "tables" / "02_fails.csv").unlink()
    assert executed() == BOTH
    Store(out).write("recovery", "new", {})
    assert executed() == BOTH and executed() == []
    (out / "records" / "recovery" / "new.json").unlink()
    assert executed() == BOTH
    monkeypatch.setattr(sequence, "digest", lambda made_from: made_from["code"][::-1])
    assert executed() == BOTH  # other code


def test_other_parameters_in_the_folder_are_refused(executed, tmp_path):
    with pytest.raises(HealingError, match=r"\(seeds \[5\] there, \[6\] now\); choose another"):
        executed(overrides=[("seeds", 6)])
    assert executed(overrides=[("device", "cpu")]) == []


def test_cells_that_fail_stop_the_run_before_its_notebooks(executed, monkeypatch):
    def fails(*_):
        raise HealingError("1 of 3 cells of all stages failed")

    monkeypatch.setattr(NoCells, "compute", fails)
    with pytest.raises(HealingError, match="1 of 3 cells"):
        executed(again=True)


def test_the_organism_is_made_only_where_it_is_studied(tmp_path, monkeypatch):
    for name in ("00_model_organism", "01_baseline"):
        (tmp_path / f"{name}.ipynb").touch()
    monkeypatch.setattr(sequence, "notebook_folder", lambda: tmp_path)
    assert [p.stem[:2] for p in sequence.sequence(["organism", "bert-base-uncased"])] == [
        "00", "01",
    ]  # fmt: skip
    assert [p.stem[:2] for p in sequence.sequence(["bert-base-uncased"])] == ["01"]


# -- with cells ------------------------------------------------------------------------------------


def test_shards_merge_into_one_run_whose_notebook_finds_all_cells(take, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "cues-train.tsv", 16)
    write_corpus(tmp_path / "cues-test.tsv", 6, seed=1)
    given = tiny_study(
        tmp_path, save_tiny_bert(tmp_path / "model"), write_planted_task(tmp_path / "task"),
        seeds=[0], levels=["1/3"], init_levels=[], sides="bottom", scratch=False,
        scans={"layers": {"layers": [[1]]}}, corpus=str(corpus), column=["1"], probe_train=12,
        probe_test=6, probe_levels=["1/3"],
    )  # fmt: skip
    overrides = [(name, value) for name, value in given.items() if name != "run"]
    take("01_good")
    monkeypatch.setattr(sequence, "Study", Study)
    for share in (Shard(1, 2), Shard(2, 2)):
        out = tmp_path / f"shard{share.index}"
        said = sequence.run_shard("small", share, out, overrides, executor="in-process")
        assert said.startswith(f"Shard {share}: its ") and "without a shard" in said
        assert names(out) == []  # no notebook is run
        shutil.copytree(out / "records", tmp_path / "run" / "records", dirs_exist_ok=True)
    shards = [contents(tmp_path / f"shard{number}") for number in (1, 2)]
    assert all(shards) and not set(shards[0]) & set(shards[1])

    def none(*_):
        raise AssertionError("a finished cell is computed again")

    monkeypatch.setattr(Study, "record", none)
    page = sequence.run("small", tmp_path / "run", overrides, executor="in-process")
    assert page.read_text() == "page"
    found = json.loads((tmp_path / "run" / "good.json").read_text())["found"]
    assert found == len(shards[0]) + len(shards[1]) == 13
    assert all(not missing for _, _, missing in status.progress(tmp_path / "run"))
