"""Workers share a stage's cells, give the same records, and never outlive their purpose."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import contents, save_tiny_bert, tiny_study, write_planted_task

from healing_utils.run import executors, workers
from healing_utils.study import study as study_module
from healing_utils.study.study import Study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    save_tiny_bert(folder / "model")
    write_planted_task(folder / "task")
    return folder


def test_workers_give_the_records_of_one_process(folder, monkeypatch):
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")
    seeds = list(range(4))
    alone = tiny_study(folder / "alone", folder / "model", folder / "task", seeds=seeds)
    shared = tiny_study(
        folder / "shared", folder / "model", folder / "task", seeds=seeds, workers=2
    )
    # The parent waits at its first cell, so that the worker has time to come up and take some.
    calls = []
    original = Study._compute

    def slow(self, cell, on_step):
        if not calls:
            deadline = time.monotonic() + 240
            while not list((folder / "shared" / "records").rglob("*.json")):
                assert time.monotonic() < deadline, "no worker came up"
                time.sleep(0.05)
        calls.append(cell.key)
        return original(self, cell, on_step)

    Study(alone).run("baseline")
    monkeypatch.setattr(Study, "_compute", slow)
    table = Study(shared).run("baseline")
    assert len(table) == len(seeds)
    assert contents(folder / "alone") == contents(folder / "shared")
    assert not list((folder / "shared" / "claims").iterdir())


def wait(until, seconds=60):
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_goes_on_to_the_next_stage_when_the_one_before_is_complete(folder):
    """Another process, here the test, is long at one cell of the first stage."""
    given = tiny_study(folder / "ahead", folder / "model", folder / "task")
    for stage in ("baseline", "recovery"):
        Study(given | {"run": str(folder / "in-turn")}).run(stage)
    study = Study(given)
    held = study.plan("baseline")[0]
    records, claims = folder / "ahead" / "records", folder / "ahead" / "claims"
    with workers.helping([(given, ["baseline"]), (given, ["recovery"])], 1):
        with study.store.claim(held.key) as mine:
            assert mine
            wait(lambda: len(list(records.glob("baseline/*.json"))) == 1)
            time.sleep(5 * executors.LOOK_AGAIN)  # it would take a cell of the next at once
            assert [path.stem for path in claims.iterdir()] == [held.key]
            assert not (records / "recovery").exists()
            study.write(held, study.result(held, lambda *_: None))
        wait(lambda: contents(folder / "ahead") == contents(folder / "in-turn"))


def test_a_cell_that_fails_is_tried_once_and_waited_for(folder, tmp_path, monkeypatch):
    study = Study(tiny_study(tmp_path / "run", folder / "model", folder / "task"))
    tried, slept = [], []

    def fails(self, cell, on_step):
        tried.append(cell.key)
        raise ValueError("planted")

    monkeypatch.setattr(Study, "_compute", fails)
    monkeypatch.setattr(study_module.time, "sleep", slept.append)
    with pytest.raises(SystemExit):
        study.help("baseline", stop=lambda: len(slept) == 50)
    assert tried == [cell.key for cell in reversed(study.plan("baseline"))]
    assert slept == [executors.LOOK_AGAIN] * 50


def test_a_worker_whose_stage_stays_incomplete_waits_until_it_is_ended(folder, tmp_path):
    """The weights of one of two models are cut off: its cells fail wherever they are computed."""
    shutil.copytree(folder / "model", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    models = [str(folder / "model"), str(tmp_path / "cut")]
    given = tiny_study(tmp_path / "run", folder / "model", folder / "task", seeds=[0])
    with workers.helping([(given | {"model": models}, ["baseline", "recovery"])], 1) as (worker,):
        wait(lambda: list((tmp_path / "run").glob("records/baseline/*.json")))
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(5 * executors.LOOK_AGAIN)
        assert worker.returncode is None
        assert [p.name for p in (tmp_path / "run" / "records").iterdir()] == ["baseline"]
    assert worker.returncode == 0  # it ended by itself, asked to
    assert not list((tmp_path / "run" / "claims").iterdir())


def test_a_worker_ends_when_its_parent_is_killed(folder, tmp_path):
    """The parent dies by SIGKILL, with no chance to tell: the worker notices by itself."""
    parameters = tiny_study(
        tmp_path / "run", folder / "model", folder / "task", seeds=[0, 1], epochs=200.0
    )
    script = (
        "import json, sys, time\n"
        "from healing_utils import workers\n"
        f"parameters = json.loads({json.dumps(json.dumps(parameters))})\n"
        "with workers.helping([(parameters, ['baseline'])], 1):\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        claims = tmp_path / "run" / "claims"
        deadline = time.monotonic() + 90
        while not (claims.is_dir() and list(claims.iterdir())):
            assert time.monotonic() < deadline, "the worker claimed no cell"
            time.sleep(0.05)
        claim = next(claims.iterdir())
        worker = int(json.loads(claim.read_text())["owner"].split(":")[1])
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 240
    while _running(worker):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.1)
    assert not list(claims.iterdir())  # it released what it held


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
    except OSError:  # no /proc on this system
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True


def test_helping_ends_its_workers_and_their_claims(folder, tmp_path):
    parameters = tiny_study(
        tmp_path / "run", folder / "model", folder / "task", seeds=[0, 1], epochs=500.0
    )
    claims = tmp_path / "run" / "claims"
    with workers.helping([(parameters, ["baseline"])], 2) as started:
        wait(lambda: claims.is_dir() and len(list(claims.glob("*.json"))) == 2)
        asked = time.monotonic()
    assert time.monotonic() - asked < workers.PATIENCE  # nobody had to be killed
    assert [worker.returncode for worker in started] == [0, 0]
    assert not list(claims.iterdir())


@pytest.mark.parametrize(("gpus", "taken"), [(3, [1, 2, 0, 1]), (1, [0, 0, 0, 0]), (0, [])])
def test_workers_take_the_gpus_in_turn(gpus, taken, monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    for place in range(4):
        workers.take_gpu(place)
    assert found == taken


def test_a_worker_that_is_killed_is_replaced_and_said(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(workers, "LOOK_AGAIN", 0.05)
    given = tiny_study(
        tmp_path / "run", folder / "model", folder / "task", seeds=[0, 1], epochs=60.0
    )  # a cell takes seconds
    Study(given | {"run": str(tmp_path / "alone")}).run("baseline")
    claims = tmp_path / "run" / "claims"
    with workers.helping([(given, ["baseline"])], 1) as started:
        first = started[0]
        wait(lambda: claims.is_dir() and list(claims.iterdir()))
        first.kill()
        assert not list((tmp_path / "run").glob("records/*/*.json"))
        wait(lambda: started[0] is not first)
        wait(lambda: contents(tmp_path / "run") == contents(tmp_path / "alone"))
    assert first.returncode == -signal.SIGKILL
    assert "ended by SIGKILL; a new one takes its place" in capfd.readouterr().err


def test_a_worker_is_replaced_so_often_and_no_more(monkeypatch, capsys):
    monkeypatch.setattr(workers, "LOOK_AGAIN", 0.0)
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"]

    def start(place=0, command=killed):
        process = subprocess.Popen(command)
        process.wait()
        return process

    over = threading.Event()
    workers._replace([start()], start, over)  # ends by itself
    assert capsys.readouterr().err.count("SIGSEGV") == workers.REPLACED
    threading.Timer(0.5, over.set).start()
    for ended_well_or_by_an_error in ("", "raise SystemExit(1)"):
        one = start(command=[sys.executable, "-c", ended_well_or_by_an_error])
        workers._replace([one], start, over)
    assert capsys.readouterr().err == ""
