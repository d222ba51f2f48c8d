"""A run: cells, then notebooks (small ones that work, fail or kill their kernel), then the page."""

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
from healing_utils.study.study import Study

HERE = Path(__file__).parents[1]
BOTH = ["01_good", "02_fails"]


class NoCells:
    """A study that has nothing to compute."""

    asked: list[tuple] = []
    close = compute = lambda self, *asked: self.asked.append(asked)
    keep_plans = lambda self: Study.keep_parameters(self) or []  # noqa: E731

    vocabulary_notes = lambda _: ["model a reads task b in pieces"]  # noqa: E731

    def __init__(self, parameters):
        self.given, self.run_folder = parameters, Path(parameters["run"])
        self.store = Store(self.run_folder)


def stand_ins(folder: Path, patch: pytest.MonkeyPatch, *notebooks: str) -> None:
    """Have runs take those notebooks alone, compute no cells, and write no page."""
    shutil.copytree(HERE / "notebooks" / "profiles", folder / "profiles")
    for name in notebooks:
        shutil.copy(HERE / "notebooks" / f"{name}.ipynb", folder)
    patch.setattr(profiles, "notebook_folder", lambda: folder)
    patch.setattr(sequence, "write_page", lambda target: target / "index.html")
    patch.setattr(sequence, "Study", NoCells)


@pytest.fixture
def take(tmp_path, monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")
    return lambda *names: stand_ins(tmp_path / "taken", monkeypatch, *names)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("notebooks/*"))


def test_notebooks_run_in_order_a_failure_is_told_and_the_same_call_goes_on(
    take, tmp_path, monkeypatch, capfd
):
    take(*BOTH)
    monkeypatch.setenv("HEALING_PROGRESS", "terminal")
    out = tmp_path / "run"
    with pytest.raises(HealingError) as caught:
        sequence.run("small", out, executor="in-process")
    assert NoCells.asked[:2] == [([], "all stages", "in-process", None), ()]
    said = str(caught.value)
    # the fixture's five cells and the one that papermill adds
    assert said.startswith('02_fails stopped at cell 5: if not Path(run, "mended").exists():')
    assert ": ValueError: planted: no such thing as 7 (as far as it came: " in said
    assert "finished cells are kept" in said and "\n" not in said
    assert names(out) == ["01_good.ipynb", "02_fails.failed.ipynb"]
    assert (out / "before.txt").exists() and not (out / "after.txt").exists()
    assert "notebook failed" in status.describe(out)
    # Each gets what it declares, and bars stay out of it.
    given = json.loads((out / "good.json").read_text())
    assert given == {"seeds": [5], "levels": ["1/3"], "found": 0}
    executed = nbformat.read(out / "notebooks" / "01_good.ipynb", as_version=4)
    nbformat.validate(executed)
    outputs = [output.text for cell in executed.cells[1:] for output in cell.outputs]
    shown = capfd.readouterr().err
    assert outputs == ["a result\n"] and "a bar on the terminal" in shown and "[1/2]" in shown
    assert shown.count("model a reads task b in pieces\n") == 1  # before any cell
    (out / "mended").touch()
    assert sequence.run("small", out) == str(out / "index.html")
    assert names(out) == ["01_good.ipynb", "02_fails.ipynb"] and (out / "after.txt").exists()
    assert "[1/2] 01_good: finished before" in capfd.readouterr().err


def test_a_killed_kernel_or_one_that_does_not_start_is_a_failure(take, tmp_path, monkeypatch):
    take("03_dies")
    out = tmp_path / "run"
    with pytest.raises(HealingError, match="03_dies stopped at cell 6: os.kill") as it:
        sequence.run("small", out)
    assert "the kernel died" in str(it.value)
    assert names(out) == ["03_dies.failed.ipynb"] and not (out / "outlived.txt").exists()
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    exits = [sys.executable, "-c", "raise SystemExit(1)"]
    spec.write_text(json.dumps({"argv": exits, "display_name": "exits", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(HealingError, match="03_dies stopped at its start"):
        sequence.run("small", out, again=True)


def test_a_kernel_that_fails_to_start_once_is_started_again(take, tmp_path, monkeypatch):
    """Two that start at once can pick the same port."""
    take("01_good")
    real, failures = sequence.papermill.execute_notebook, [RuntimeError("address in use")]

    def execute_notebook(*args, **more):
        if failures:
            raise failures.pop()
        return real(*args, **more)

    monkeypatch.setattr(sequence.papermill, "execute_notebook", execute_notebook)
    sequence.run("small", tmp_path / "run")
    assert names(tmp_path / "run") == ["01_good.ipynb"] and not failures


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
    command = [sys.executable, "-c", script, str(HERE), str(out)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"HEALING_PROGRESS": "terminal"},
    )
    pid_file, deadline = out / "kernel.pid", time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    if number == signal.SIGINT:  # Ctrl-C reaches the kernel too, which is not to answer
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(30) == code
    stopped = "\nStopped. Everything finished is kept; the same command goes on.\n"
    lines = process.stderr.read().partition("[1/1] 03_dies\n")[2]
    assert lines == (stopped if number == signal.SIGINT else "")
    deadline = time.monotonic() + 30
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        while " Z " not in Path(f"/proc/{pid_file.read_text()}/stat").read_text():
            os.kill(int(pid_file.read_text()), 0)
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not (out / "notebooks" / "03_dies.ipynb").exists()


def test_a_notebook_is_executed_again_when_what_it_stands_on_has_changed(
    take, tmp_path, monkeypatch
):
    take(*BOTH)
    out, source, seen = tmp_path / "run", tmp_path / "taken" / "01_good.ipynb", []

    def execute_notebook(path, executed, *_, **__):
        seen.append(path.stem)
        shutil.copy(path, executed)
        (out / "tables" / ".ipynb_checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "tables" / "claims.csv").write_text("as it was drawn")

    def executed(**options):
        seen.clear()
        sequence.run("small", out, **options)
        return list(seen)

    monkeypatch.setattr(sequence.papermill, "execute_notebook", execute_notebook)
    monkeypatch.setattr(sequence, "ANALYSIS", ("02_fails",))  # which draws
    assert executed() == BOTH and executed() == [] and executed(again=True) == BOTH
    book = json.loads(source.read_text())
    book["cells"][-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "new"}]
    source.write_text(json.dumps(book))
    assert executed() == []  # what it once showed counts for nothing
    book["cells"][-1]["source"] += "\n"
    record = Store(out).path("recovery", "new")
    for change, again in (
        (lambda: source.write_text(json.dumps(book)), ["01_good"]),
        (lambda: (out / "notebooks" / "02_fails.ipynb").write_text('{"cells": '), ["02_fails"]),
        (lambda: (out / "notebooks" / "01_good.ipynb").unlink(), ["01_good"]),
        (lambda: (out / "notebooks" / "01_good.ipynb").write_text('{"metadata": 5}'), ["01_good"]),
        (lambda: (out / "tables" / "claims.csv").unlink(), ["02_fails"]),
        (lambda: (out / "tables" / "claims.csv").write_text("edited"), ["02_fails"]),
        (lambda: Store(out).write("recovery", "new", {}), BOTH),
        (record.unlink, BOTH),
        (lambda: monkeypatch.setattr(sequence, "digest", lambda parts: parts[2][0]), BOTH),  # code
    ):
        change()
        assert executed() == again and executed() == []
    Store(out).write("recovery", "new", {})
    (out / "tables" / "claims.csv").write_text("edited")  # and by itself
    assert sequence.report(out) == str(out / "index.html") and seen.pop() == "02_fails"
    assert sequence.report(out) and seen == []
    with pytest.raises(HealingError, match=r"\(seeds \[5\] there, \[6\] now\); choose another"):
        executed(parameters={"seeds": 6})
    monkeypatch.setattr(NoCells, "compute", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # cells that fail, before any notebook
        executed(again=True)
    assert seen == []


def test_shards_merge_into_one_run_whose_notebook_finds_all_cells(take, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "cues-train.tsv", 16)
    write_corpus(tmp_path / "cues-test.tsv", 6, seed=1)
    given = tiny_study(
        tmp_path, save_tiny_bert(tmp_path / "model"), write_planted_task(tmp_path / "task"),
        seeds=[0], levels=["1/3"], init_levels=[], sides="bottom", scratch=False,
        scans={"layers": {"layers": [[1]]}}, corpus=str(corpus), column=["1"], probe_train=12,
        probe_test=6, probe_levels=["1/3"],
    )  # fmt: skip
    take("01_good")
    monkeypatch.setattr(sequence, "Study", Study)
    for shard in ("1/2", "2/2"):
        out = tmp_path / f"shard{shard[0]}"
        said = sequence.run("small", out, given, executor="in-process", shard=shard)
        assert said.startswith(f"Shard {shard}: its ") and "without a shard" in said
        assert names(out) == []  # no notebook is run
        shutil.copytree(out / "records", tmp_path / "run" / "records", dirs_exist_ok=True)
    shards = [contents(tmp_path / f"shard{number}") for number in (1, 2)]
    assert all(shards) and not set(shards[0]) & set(shards[1])

    monkeypatch.setattr(Study, "record", lambda *_: pytest.fail("a cell is computed again"))
    assert sequence.run("small", tmp_path / "run", given, executor="in-process")
    found = json.loads((tmp_path / "run" / "good.json").read_text())["found"]
    assert found == len(shards[0]) + len(shards[1]) == 13
    assert all(not missing for _, _, missing in status.progress(tmp_path / "run"))
