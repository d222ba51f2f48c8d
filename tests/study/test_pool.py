"""The pool: what it hands out and when, and what becomes of a process, or a driver, that dies."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers import contents

from healing_utils.base.errors import HealingError
from healing_utils.base.records import Store
from healing_utils.study import pool
from healing_utils.study.study import Study

# A study whose cells do as they are named, of which a process is there in no time.
STAND_IN = """
import os, signal, sys, time
from types import SimpleNamespace
from healing_utils.base.records import Store

place = []
cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, set_device=place.append)
if sys.argv[0].endswith("pool.py"):
    sys.modules["torch"] = SimpleNamespace(cuda=cuda)


class Study:
    def __init__(self, run):
        self.store, self.run = Store(run), run

    def record(self, cell, on_step=None):
        with open(f"{self.run}/begun", "a") as file:
            file.write(f"{cell.key} {os.getpid()}\\n")
        if cell.name == "fails":
            raise Untravelled(1, 2)
        if cell.name == "sleeps":
            time.sleep(600)
        if cell.name == "kills" or cell.name == "kills once" and begun(self.run, cell.key) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        print("noise among the answers")
        self.store.write(cell.stage, cell.key, {"gpu": place})


class Untravelled(Exception):
    def __init__(self, one, two):
        super().__init__("no way")


def begun(run, key):
    return open(f"{run}/begun").read().split().count(key)


def unable(run):
    raise OSError("no such device")
"""


def cells(*names: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(stage="s", key=f"k{i}", name=name) for i, name in enumerate(names)]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """That module, importable here and in processes started from here."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "stand_in.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)
    yield importlib.import_module("stand_in")
    del sys.modules["stand_in"]


@pytest.fixture
def run(stand_in, tmp_path):
    """Compute cells in `count` processes: how each ended, by key, and the notes on the way."""

    def run(work, count=1, make=stand_in.Study, say=lambda note: None):
        notes = []
        backend = pool.Processes(functools.partial(make, str(tmp_path)), count)
        study = stand_in.Study(str(tmp_path))
        note = lambda text: (notes.append(text), say(text))  # noqa: E731
        try:
            done = pool.outcomes(study, work, lambda cell: set(), backend, note)
            return {cell.key: error for cell, error in done}, notes
        finally:
            assert not list((tmp_path / "claims").iterdir())
            backend.close()
            assert all(worker.returncode is not None for worker in backend.workers.values())

    return run


def begun(folder: Path) -> list[list[str]]:
    path = folder / "begun"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def wait(until, seconds=60.0):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


# -- processes -------------------------------------------------------------------------------------


def test_processes_take_turns_at_the_gpus_and_say_how_many_are_at_work(run, tmp_path):
    work = cells("a", "b", "c", "d", "e")
    errors, notes = run(work, 3)
    assert errors == {cell.key: None for cell in work} and "3 at work, first a" in notes
    gpus = {json.dumps(record["gpu"]) for record in Store(tmp_path).records("s")}
    assert "[0]" in gpus and gpus <= {"[0]", "[1]"}  # of two, for three processes


def test_a_killed_process_costs_its_cell_one_more_try_and_a_deadly_cell_is_reported(
    run, tmp_path, capfd
):
    errors, _ = run(cells("a", "kills once", "kills", "b", "fails", "c"), 2)
    assert {k for k, error in errors.items() if error} == {"k2", "k4"} and len(errors) == 6
    assert "3 processes were lost over it, out of memory?" in str(errors["k2"])
    assert "ended with code -9" in str(errors["k2"])
    tries = [key for key, _ in begun(tmp_path)]
    assert {k: tries.count(k) for k in set(tries)} == {
        "k0": 1, "k1": 2, "k2": pool.LOSSES, "k3": 1, "k4": 1, "k5": 1,
    }  # fmt: skip
    # An error that cannot be pickled is told all the same, and where it came from.
    assert str(errors["k4"]) == "Untravelled: no way"
    assert "Traceback" in errors["k4"].__notes__[0] and "in record" in errors["k4"].__notes__[0]
    assert capfd.readouterr().err.count("lost over") == 1 + pool.LOSSES


def test_a_study_that_no_process_can_make_is_each_cell_s_error(run, stand_in):
    errors, _ = run(cells("a", "b", "c"), 2, make=stand_in.unable)
    assert [str(error) for error in errors.values()] == ["no such device"] * 3


def test_a_process_that_dies_idle_costs_nothing(stand_in, tmp_path):
    backend = pool.Processes(functools.partial(stand_in.Study, str(tmp_path)), 1)
    study, (first, second) = stand_in.Study(str(tmp_path)), cells("a", "b")
    assert backend.submit(first).result(60) is None
    old = backend.workers[0]
    old.kill()
    old.wait()
    assert backend.submit(second).result(60) is None and study.store.read("s", second.key)
    assert backend.workers[0] is not old
    backend.close()


def test_a_stopped_run_ends_its_processes_and_gives_its_claims_back(run, tmp_path):
    def interrupt(note):
        if len(begun(tmp_path)) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cells(*["sleeps"] * 3), 2, say=interrupt)


def test_a_killed_driver_leaves_no_process_and_its_claims_are_taken_over(run, stand_in, tmp_path):
    code = f"""if True:
        import functools, stand_in
        from healing_utils.study import pool
        from types import SimpleNamespace
        work = [SimpleNamespace(stage="s", key=f"k{{i}}", name="sleeps") for i in range(3)]
        make = functools.partial(stand_in.Study, {str(tmp_path)!r})
        list(pool.outcomes(make(), work, lambda c: set(), pool.Processes(make, 2), print))
    """
    path = os.pathsep.join([str(Path(pool.__file__).parents[2]), os.environ["PYTHONPATH"]])
    driver = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    wait(lambda: len(begun(tmp_path)) == 2)
    driver.kill()
    driver.wait()
    for _, pid in begun(tmp_path):
        wait(lambda pid=pid: gone(int(pid)), 10)
    claims = [json.loads(path.read_text()) for path in (tmp_path / "claims").iterdir()]
    assert {claim["owner"].split(":")[1] for claim in claims} == {str(driver.pid)}
    errors, _ = run(cells("a", "b", "c"))
    assert errors == {"k0": None, "k1": None, "k2": None}


def test_a_study_s_processes_give_the_records_of_one(tiny, finished, tmp_path):
    """Trained before broken: by weights that another process kept."""
    study = tiny(run=tmp_path / "run", workers=2, levels=["1/3"], sides="top", scratch=False)
    cells = [cell for stage in ("baseline", "corruption") for cell in study.plan(stage)]
    study.compute(list(reversed(cells)), "both stages")
    study.close()
    ours, made = contents(finished.study.run_folder), contents(study.run_folder)
    assert len(made) == 6 and made == {name: ours[name] for name in made}
    assert not list((study.run_folder / "claims").iterdir())


# -- what is handed out ----------------------------------------------------------------------------


class Scripted:
    """A backend of one thread, which ends cells in the order in which they were begun."""

    lost = ()

    def __init__(self, study, room=2):
        self.study, self.places, self.log, self.closed = study, room, [], False
        self.thread = ThreadPoolExecutor(1)

    def room(self):
        return self.places

    def submit(self, cell):
        if cell.name == "interrupts":
            raise KeyboardInterrupt
        self.log.append(cell.name)
        return self.thread.submit(self.end, cell)

    def end(self, cell):
        self.study.store.write(cell.stage, cell.key, {})
        self.log.append(f"end {cell.name}")

    def close(self):
        self.closed = True


@pytest.fixture
def study(tmp_path):
    return SimpleNamespace(store=Store(tmp_path))


def test_a_cell_waits_for_the_models_that_it_needs(study):
    probed, broken, other, intact = work = cells("probed", "broken", "other", "intact")
    needs = {"k0": {broken.key, intact.key}, "k1": {intact.key}, "k2": {"of no cell"}}
    backend = Scripted(study)
    done = list(pool.outcomes(study, work, lambda c: needs.get(c.key, set()), backend, print))
    assert sorted(cell.name for cell, _ in done) == ["broken", "intact", "other", "probed"]
    log = backend.log
    assert log.index("other") < log.index("intact") < log.index("end intact")
    assert log[-4:] == ["broken", "end broken", "probed", "end probed"]


def test_what_another_run_computes_is_waited_for_and_not_computed(study, tmp_path, monkeypatch):
    first, second = work = cells("theirs", "ours")
    other, backend, notes = Store(tmp_path), Scripted(study), []
    claim = other.claim(first.key)
    assert claim.__enter__()

    def sleep(seconds):  # they end while this run waits
        other.write("s", first.key, {})
        claim.__exit__(None, None, None)

    monkeypatch.setattr(pool.time, "sleep", sleep)
    done = list(pool.outcomes(study, work, lambda c: set(), backend, notes.append))
    assert done == [(second, None), (first, None)] and backend.log == ["ours", "end ours"]
    assert notes[-1] == "waiting for another run: theirs"


def test_what_stops_the_handing_out_gives_every_claim_back(study, tmp_path):
    backend = Scripted(study, room=3)
    with pytest.raises(KeyboardInterrupt):
        list(pool.outcomes(study, cells("a", "b", "interrupts"), lambda c: set(), backend, print))
    assert backend.closed and not list((tmp_path / "claims").iterdir())
    (tmp_path / "claims").rmdir()
    (tmp_path / "claims").write_text("")  # no claim can be written
    backend = Scripted(study)
    with pytest.raises(HealingError, match="cannot claim"):
        list(pool.outcomes(study, cells("c", "d", "e", "f"), lambda c: set(), backend, print))
    assert backend.closed and not backend.log


def test_few_cells_and_one_worker_stay_in_this_process(tiny, monkeypatch):
    asked = []

    class Asked(pool.InProcess):
        def __init__(self, study, note):
            super().__init__(study, note)
            asked.append("in-process")

    monkeypatch.setattr(pool, "InProcess", Asked)
    processes = lambda make, count: asked.append(count) or Asked(make(), print)  # noqa: E731
    monkeypatch.setattr(pool, "Processes", processes)
    monkeypatch.setattr(Study, "record", lambda self, cell, on_step: None)
    for seeds, workers in (([0, 1], 2), ([0, 1, 2], 1), ([0, 1, 2], 2)):
        study = tiny(seeds=seeds, workers=workers)
        with contextlib.suppress(HealingError):  # nothing was recorded
            study.run("baseline")
    assert asked == ["in-process", "in-process", 2, "in-process"]


def test_here_the_name_of_a_cell_and_its_steps_are_told(study, monkeypatch):
    def record(cell, on_step):
        on_step(1, 2, 0.5)

    notes = []
    backend = pool.InProcess(SimpleNamespace(store=study.store, record=record), notes.append)
    assert list(pool.outcomes(study, cells("a"), lambda c: set(), backend, notes.append))
    assert notes[:2] == ["a", "a: step 1/2, loss 0.500"]
