"""The runner, on small notebooks that work, fail in the middle, or kill their own kernel."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from healing_utils.base.errors import HealingError, choose
from healing_utils.run import notebooks, runner

HERE = Path(__file__).parents[1]
FIXTURES = HERE / "notebooks"
DEFAULTS = {"size": 3, "names": ["a"], "die": True, "sleep": 0.0}


def check(given):
    """The fixtures' own parameters, read as strictly as the study's."""
    for name in given:
        choose(name, [*DEFAULTS, "run", "device"], "parameter")
    return DEFAULTS | dict(given)


def run(profile, out, *overrides, **options):
    """`runner.run` over the fixtures; the page is a file that says that it was written."""

    def write_page(target):
        (target / "index.html").write_text("page")
        return target / "index.html"

    options = {"notebooks": FIXTURES, "check": check, "write_page": write_page} | options
    return runner.run(profile, out, overrides, **options)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")


def test_each_notebook_gets_what_it_declares_and_bars_stay_out_of_it(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "terminal")
    page = run("small", tmp_path / "run", stages=["good"])
    shown = capfd.readouterr().err
    assert page == tmp_path / "run" / "index.html"
    assert json.loads((tmp_path / "run" / "good.json").read_text()) == {"size": 5, "names": ["a"]}
    assert "a bar on the terminal" in shown and "[1/1] 01_good" in shown
    executed = nbformat.read(tmp_path / "run" / "notebooks" / "01_good.ipynb", as_version=4)
    (injected,) = [c for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert "size = 5" in injected.source and "die" not in injected.source
    outputs = [output.text for cell in executed.cells[1:] for output in cell.outputs]
    assert outputs == ["a result\n"]


def test_a_finished_notebook_is_not_executed_again_unless_asked(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "terminal")
    executed = tmp_path / "notebooks" / "01_good.ipynb"
    run("small", tmp_path, stages=["good"])
    first = executed.stat().st_mtime_ns
    capfd.readouterr()
    run("small", tmp_path, stages=["good"])
    assert executed.stat().st_mtime_ns == first
    assert "01_good: finished before" in capfd.readouterr().err
    run("small", tmp_path, stages=["good"], again=True)
    assert executed.stat().st_mtime_ns > first


def test_a_failure_is_told_keeps_what_is_done_and_can_be_mended(tmp_path):
    with pytest.raises(runner.NotebookFailed) as caught:
        run("small", tmp_path)
    first, cause, *_ = str(caught.value).splitlines()
    # the fixture's four code cells and the one that papermill adds
    assert first == '02_fails stopped at cell 4 of 5: if not Path(run, "mended").exists():'
    assert cause.strip() == "ValueError: planted: no such thing as 7"
    names = sorted(p.name for p in (tmp_path / "notebooks").iterdir())
    assert names == ["01_good.ipynb", "02_fails.failed.ipynb"]
    assert (tmp_path / "before.txt").exists() and not (tmp_path / "after.txt").exists()
    assert "notebook failed" in runner.describe(tmp_path)

    (tmp_path / "mended").touch()
    run("small", tmp_path, stages=["02_fails"])
    names = sorted(p.name for p in (tmp_path / "notebooks").iterdir())
    assert names == ["01_good.ipynb", "02_fails.ipynb"]
    assert (tmp_path / "after.txt").exists()


def test_a_killed_kernel_is_a_failure(tmp_path):
    with pytest.raises(runner.NotebookFailed, match="03_dies stopped at cell 5 of 6") as caught:
        run("small", tmp_path, ("die", True), stages=["dies"])
    assert "the kernel died" in str(caught.value)
    assert not (tmp_path / "notebooks" / "03_dies.ipynb").exists()
    assert not (tmp_path / "outlived.txt").exists()


def test_a_cell_that_takes_too_long_is_a_failure(tmp_path):
    with pytest.raises(runner.NotebookFailed, match="cell 4 of 6: time.sleep") as caught:
        run("small", tmp_path, ("sleep", 60.0), stages=["dies"], cell_timeout=1)
    assert "longer than 1 s" in str(caught.value)


def test_a_kernel_that_does_not_start_is_started_again(tmp_path, monkeypatch):
    jobs = []

    def clash_twice(job, *_):
        jobs.append(job)
        if len(jobs) < 3:
            return {"event": "not started", "cause": "Address already in use"}
        Path(job["executed"]).write_text("executed")
        return {"event": "done"}

    monkeypatch.setattr(runner.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(runner, "_watch", clash_twice)
    run("small", tmp_path, stages=["good"])
    assert len(jobs) == 3
    assert (tmp_path / "notebooks" / "01_good.ipynb").read_text() == "executed"
    monkeypatch.setattr(runner, "_watch", lambda *_: {"event": "not started", "cause": "no port"})
    with pytest.raises(runner.NotebookFailed, match="(?s)01_good stopped at its start.*no port"):
        run("small", tmp_path, stages=["good"], again=True)


def test_a_kernel_that_exits_at_once_did_not_start(tmp_path, monkeypatch):
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    exits = [sys.executable, "-c", "raise SystemExit(1)"]
    spec.write_text(json.dumps({"argv": exits, "display_name": "exits", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setattr(runner, "KERNEL_STARTS", 1)
    with pytest.raises(runner.NotebookFailed, match="01_good stopped at its start"):
        run("small", tmp_path / "run", stages=["good"])


@pytest.mark.parametrize(
    ("profile", "overrides", "message"),
    [
        ("smal", [], "unknown profile 'smal'.*Did you mean 'small'"),
        ("small", [("siz", 3)], "unknown parameter 'siz'.*Did you mean 'size'"),
        ("nowhere/none.yaml", [], "cannot read the profile"),
    ],
)
def test_wrong_names_are_refused_before_anything_runs(tmp_path, profile, overrides, message):
    with pytest.raises(HealingError, match=message):
        run(profile, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_an_unknown_stage_names_the_nearest(tmp_path):
    with pytest.raises(HealingError, match="Did you mean 'fails'"):
        run("small", tmp_path, stages=["fail"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "1: 2\n"])
def test_a_profile_that_is_no_flat_mapping_is_refused(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(HealingError, match="mine.yaml"):
        runner.read_profile(path)


def test_a_profile_loads_no_code(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(HealingError, match="not YAML"):
        runner.read_profile(path)


def test_one_folder_holds_one_study(tmp_path):
    runner.keep_parameters(tmp_path, check({"names": ("a",), "device": "cpu"}), check)
    runner.keep_parameters(tmp_path, check({"names": ["a"], "device": "cuda"}), check)
    with pytest.raises(HealingError, match=r"\(size 3 there, 4 now\); choose another --out"):
        runner.keep_parameters(tmp_path, check({"size": 4}), check)
    assert json.loads((tmp_path / "parameters.json").read_text())["size"] == 3


def test_a_parameter_that_an_older_run_did_not_have_counts_as_its_default(tmp_path):
    (tmp_path / "parameters.json").write_text('{"names": ["a"]}')
    runner.keep_parameters(tmp_path, check({}), check)
    with pytest.raises(HealingError, match="size"):
        (tmp_path / "parameters.json").write_text('{"names": ["a"]}')
        runner.keep_parameters(tmp_path, check({"size": 4}), check)


def test_the_organism_is_made_only_where_it_is_studied(tmp_path):
    for name in ("00_model_organism", "01_baseline"):
        (tmp_path / f"{name}.ipynb").touch()

    def names(parameters):
        return [path.stem for path in runner.sequence(tmp_path, None, parameters)]

    assert names({"model": ["organism"]}) == ["00_model_organism", "01_baseline"]
    assert names({"model": "organism"}) == ["00_model_organism", "01_baseline"]
    assert names({"model": ["bert-base-uncased"]}) == ["01_baseline"]


def _start(out):
    """A run, as a process, whose kernel sleeps; returns it and the kernel's process id."""
    code = (
        # In the background of a shell, where tests may run, SIGINT is ignored from the start.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/run']; import test_runner\n"
        "try: test_runner.run('small', sys.argv[2], ('sleep', 120.0), stages=['dies'])\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(HERE), str(out)])
    pid_file = out / "kernel.pid"
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return process, int(pid_file.read_text())


def _gone(pid, within):
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(pid, 0)
            # a zombie that nobody has reaped yet computes nothing
            if Path("/proc").is_dir() and " Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
            time.sleep(0.2)
            continue
        return True
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_leaves_no_kernel_behind(tmp_path, number, code):
    process, kernel = _start(tmp_path)
    process.send_signal(number)
    assert process.wait(30) == code
    assert _gone(kernel, within=15)
    assert not (tmp_path / "notebooks" / "03_dies.ipynb").exists()


def _planned(run):
    """A run with four planned cells: one done, one claimed now, one claimed long ago, one open."""
    for folder in ("plans", "records/recovery", "claims", "notebooks"):
        (run / folder).mkdir(parents=True)
    cells = [{"key": key, "name": f"cell {key}"} for key in "abcd"]
    plan = json.dumps({"stage": "recovery", "cells": cells})
    (run / "plans" / "recovery.json").write_text(plan)
    (run / "records" / "recovery" / "a.json").write_text("{}")
    for key, age in (("b", 42), ("c", 4000)):
        path = run / "claims" / f"{key}.json"
        claim = {"owner": f"host{key}:12:0", "since": time.time() - age}
        path.write_text(json.dumps(claim))
        os.utime(path, (time.time() - age, time.time() - age))
    (run / "parameters.json").write_text("{}")


def test_status_shows_what_is_done_running_and_missing(tmp_path):
    _planned(tmp_path)
    (stage,) = runner.progress(tmp_path)
    assert (stage.name, stage.planned, stage.done) == ("recovery", 4, 1)
    assert stage.missing == ["cell d"]
    text = runner.describe(tmp_path)
    assert "recovery     1 of 4 cells done" in text
    assert "running  cell b (by hostb:12 for 42 s)" in text
    assert "cell c (by hostc:12 for 1 h 06 min, silent for 1 h 06 min: that run is gone)" in text
    assert "missing  cell d" in text


def test_status_lists_the_stages_in_the_order_of_the_study(tmp_path):
    (tmp_path / "plans").mkdir()
    for stage in ("zoo", "recovery", "corruption", "baseline"):
        plan = json.dumps({"stage": stage, "cells": []})
        (tmp_path / "plans" / f"{stage}.json").write_text(plan)
    names = [stage.name for stage in runner.progress(tmp_path)]
    assert names == ["baseline", "corruption", "recovery", "zoo"]


def test_status_survives_files_that_are_being_written(tmp_path):
    _planned(tmp_path)
    (tmp_path / "plans" / "probing.json").write_text('{"stage": "pro')
    (tmp_path / "claims" / "d.json").write_text("")
    assert "cell d (claimed, by whom cannot be read)" in runner.describe(tmp_path)


def test_the_newest_run_is_the_one_written_to_last(tmp_path, monkeypatch):
    monkeypatch.setenv("HEALING_RUNS", str(tmp_path))
    with pytest.raises(HealingError, match="no runs"):
        runner.find_run()
    for name, age in (("quick", 10), ("minilm", 1000)):
        _planned(tmp_path / name)
        for path in (tmp_path / name).rglob("*"):
            os.utime(path, (time.time() - age,) * 2)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert runner.find_run().name == "quick"
    (tmp_path / "minilm" / "records" / "recovery" / "d.json").write_text("{}")
    assert runner.find_run().name == "minilm"
    assert runner.find_run("quick") == tmp_path / "quick"
    with pytest.raises(HealingError, match="Did you mean 'minilm'"):
        runner.find_run("minilmm")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds, text):
    assert runner.duration(seconds) == text


def test_every_profile_of_the_project_names_known_parameters():
    from healing_utils.study.parameters import read_parameters

    profiles = sorted((notebooks.folder() / "profiles").glob("*.yaml"))
    assert {"quick", "minilm", "paper"} <= {path.stem for path in profiles}
    for path in profiles:
        read_parameters(runner.read_profile(path)[1])
