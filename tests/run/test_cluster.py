"""A real Ray cluster of two nodes, on the loopback interface: what is lost costs time, and no more.

Models and tasks are named by relative paths, which mean nothing to the cluster's processes: what
they read has come through the object store.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import contents, save_tiny_bert, tiny_study, write_planted_task
from loopback import loopback_cluster

ray = pytest.importorskip("ray", reason="ray is not installed; make test-cluster installs it")

import psutil  # noqa: E402

from healing_utils.base.errors import HealingError  # noqa: E402
from healing_utils.base.records import Store  # noqa: E402
from healing_utils.study.study import STAGES, Study  # noqa: E402

HERE = Path(__file__).resolve().parents[1]
LONG = {"epochs": 40.0, "batch_size": 4, "seeds": [0, 1, 2, 3]}  # time to lose something
PATIENCE = 300.0  # seconds, where the machine has other work; minutes less where it has none


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    save_tiny_bert(folder / "model")
    write_planted_task(folder / "task")
    return folder


@pytest.fixture(scope="module")
def cluster():
    with loopback_cluster(2) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def on_cluster(cluster, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HEALING_PROGRESS", "quiet")
    monkeypatch.setenv("HEALING_EXECUTOR", "ray")
    monkeypatch.setenv("HEALING_RAY_ADDRESS", cluster.address)
    monkeypatch.setenv("HEALING_SHARD", "")


@pytest.fixture(scope="module")
def alone(folder):
    """What one process makes of `LONG`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HEALING_PROGRESS", "quiet")
        patch.setenv("HEALING_EXECUTOR", "in-process")
        Study(study("alone")).run("baseline")
    return contents(folder / "alone")


def study(run: str, **changes: object) -> dict[str, object]:
    return tiny_study(Path(run).absolute(), Path("model"), Path("task"), **{**LONG, **changes})


def computing(node) -> list[psutil.Process]:
    """Processes of a node that are at a cell."""
    found = []
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in raylet.children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::compute_cell"):
                found.append(process)
        except (psutil.Error, IndexError):
            pass
    return found


def wait_for(found):
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return value


class Meanwhile(threading.Thread):
    """Does something beside the test, and says at the end of the block what came of it."""

    def __init__(self, act):
        super().__init__(daemon=True)
        self.act, self.error = act, None

    def run(self):
        try:
            self.act()
        except BaseException as error:
            self.error = error

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, kind, *_):
        self.join(PATIENCE)
        assert kind is not None or self.error is None, self.error


def test_a_cluster_gives_the_records_of_one_process(folder, monkeypatch):
    """All kinds of cells: those that start from a fine-tuned model and those that look into one."""
    few = {
        "seeds": [0], "epochs": 1.0, "batch_size": 8,
        "start": "fine-tuned", "recipe": "distillation", "corpus": ["organism"], "column": ["pos"],
        "probe_levels": ["1/3"], "probe_train": 12, "probe_test": 6,
    }  # fmt: skip
    stages = (*STAGES, "probing")
    for run, executor in (("one", "in-process"), ("many", "ray")):
        monkeypatch.setenv("HEALING_EXECUTOR", executor)
        whole = Study(study(run, **few))
        for stage in stages:
            assert len(whole.run(stage))
    made = contents(folder / "one")
    assert made == contents(folder / "many")
    assert len({Path(path).parent for path in made}) == len(stages)
    assert not list((folder / "many" / "claims").iterdir())
    names = [{p.name for p in (folder / run / "weights").iterdir()} for run in ("one", "many")]
    assert names[0] == names[1]


def test_a_worker_killed_in_the_middle_of_a_cell(cluster, folder, alone):
    def kill():
        wait_for(lambda: computing(cluster.head_node))[0].kill()

    with Meanwhile(kill):
        Study(study("killed")).run("baseline")
    assert contents(folder / "killed") == alone


def test_a_cell_that_takes_its_workers_along_is_given_up_and_the_others_are_done(
    cluster, folder, alone, monkeypatch
):
    """Whichever workers die: after three of them a cell is reported, and not tried for ever."""
    from healing_utils.run import cluster as module

    doomed, deaths = [], []
    submit = module._Cluster.submit

    def follow(self, cell):
        # One cell at a time on the cluster, so that what is killed is this cell's.
        if not doomed:
            doomed.append(cell.key)
        return submit(self, cell)

    def kill():
        nodes = (cluster.head_node, *cluster.worker_nodes)
        while len(deaths) < module.LOSSES:
            for process in wait_for(lambda: [p for n in nodes for p in computing(n)]):
                process.kill()
                deaths.append(process.pid)
                process.wait(PATIENCE)

    monkeypatch.setattr(module._Cluster, "submit", follow)
    monkeypatch.setattr(module._Cluster, "room", lambda self: 1)
    with Meanwhile(kill), pytest.raises(HealingError, match="1 of 4 cells .* 3 workers were lost"):
        Study(study("doomed")).run("baseline")
    done = contents(folder / "doomed")
    assert done == {p: r for p, r in alone.items() if Path(p).stem != doomed[0]}


def test_a_cell_that_fails_is_reported_once_and_stops_no_other(folder, capsys):
    """Its model's weights are cut off: each worker that gets it fails to load them."""
    broken = shutil.copytree(folder / "model", folder / "broken", dirs_exist_ok=True)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    parameters = study("failing", seeds=[0, 1], epochs=1.0) | {"model": ["broken", "model"]}
    with pytest.raises(HealingError, match="2 of 4 cells .* cannot load model 'broken'"):
        Study(parameters).run("baseline")
    said = capsys.readouterr().err
    assert said.count("--- broken task intact") == 2
    assert said.count("On the cluster:\nTraceback") == 2 and "load_classifier" in said
    records = list(Store(folder / "failing").records("baseline"))
    assert [r["cell"]["model"] for r in records] == ["model", "model"]


def test_a_driver_killed_and_started_again(cluster, folder, alone):
    run = folder / "restarted"
    code = f"from healing_utils import Study; Study({study('restarted')!r}).run('baseline')"
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    driver = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    try:
        wait_for(lambda: list(run.glob("records/*/*.json")))
    finally:
        driver.kill()
        driver.wait()
    done = contents(run)
    assert 0 < len(done) < len(alone), "it had ended before it was killed"
    # Ray ends the workers of a driver that is gone.
    nodes = (cluster.head_node, *cluster.worker_nodes)
    wait_for(lambda: not any(computing(node) for node in nodes))
    Study(study("restarted")).run("baseline")
    assert contents(run) == alone
    assert not list((run / "claims").iterdir())


def test_a_node_lost_in_the_middle_of_a_cell(cluster, folder, alone):
    (node,) = cluster.worker_nodes

    def lose():
        wait_for(lambda: computing(node))
        cluster.remove_node(node, allow_graceful=False)

    with Meanwhile(lose):
        Study(study("lost")).run("baseline")
    assert contents(folder / "lost") == alone


def test_what_no_node_can_compute_is_refused(folder):
    with pytest.raises(HealingError, match="no node of the Ray cluster has the 3 CPUs"):
        Study(study("large", threads=3)).run("baseline")
