"""A real Ray cluster of two nodes, on the loopback interface: what is lost costs time, no more."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import contents, write_corpus
from loopback import loopback_cluster

pytest.importorskip("ray", reason="ray is not installed; make test-cluster installs it")

import psutil  # noqa: E402

from healing_utils.base.errors import HealingError  # noqa: E402
from healing_utils.base.records import Store  # noqa: E402
from healing_utils.study import pool  # noqa: E402
from healing_utils.study.study import Study  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LONG = {"epochs": 40.0, "batch_size": 4, "seeds": [0, 1, 2]}  # time to lose something
PATIENCE = 300.0  # seconds, where the machine has other work; minutes less where it has none


@pytest.fixture(scope="module")
def cluster():
    with loopback_cluster(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def alone(tiny):
    """What one process makes of `LONG`."""
    study = tiny(**LONG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEALING_PROGRESS", "quiet")
        study.run("baseline")
    return contents(study.run_folder)


def run(study: Study, cluster, cells=None) -> None:
    study.compute(cells or study.plan("baseline"), "baseline", "ray", cluster.address)


def computing(*nodes) -> list[psutil.Process]:
    """Processes of nodes that are at a cell."""
    found = []
    for node in nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in raylet.children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                if process.cmdline()[0].startswith("ray::compute"):
                    found.append(process)
    return found


def wait_for(found):
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def meanwhile(act):
    """Does something beside the block, and says at its end what came of it."""
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(act)
        yield
        done.result(PATIENCE)


def test_a_cluster_gives_the_records_of_one_process(cluster, tiny, tmp_path):
    """All kinds of cells: those that start from a fine-tuned model and those that look into one."""
    corpus = write_corpus(tmp_path / "cues-train.tsv", 16)
    write_corpus(tmp_path / "cues-test.tsv", 6, seed=1)
    how = {"start": "fine-tuned", "recipe": "distillation", "corpus": str(corpus), "column": "1"}
    how |= {"seeds": [0], "levels": ["1/3"], "probe_train": 12, "probe_test": 6}
    one, many = tiny(**how), tiny(**how)
    one.compute(one.keep_plans(), "all stages", "in-process")
    run(many, cluster, many.keep_plans())
    made = contents(one.run_folder)
    assert made == contents(many.run_folder)
    assert len({Path(path).parent for path in made}) == 5
    assert not list((many.run_folder / "claims").iterdir())
    kept = [{p.name for p in (s.run_folder / "weights").iterdir()} for s in (one, many)]
    assert kept[0] == kept[1]


def test_a_cell_that_kills_its_workers_is_tried_again_then_reported(
    cluster, tiny, alone, monkeypatch
):
    """One cell at a time on the cluster, so that what is killed is the first cell's."""
    doomed = tiny(**LONG)

    def kill():
        for _ in range(pool.LOSSES):
            for process in wait_for(lambda: computing(cluster.head_node, *cluster.worker_nodes)):
                process.kill()
                process.wait(PATIENCE)

    monkeypatch.setattr(pool.Ray, "room", lambda self: 1)
    with meanwhile(kill), pytest.raises(HealingError, match="1 of 3 .* 3 processes were lost"):
        run(doomed, cluster)
    first = doomed.plan("baseline")[0].key
    done = contents(doomed.run_folder)
    assert done == {p: r for p, r in alone.items() if Path(p).stem != first}


def test_a_driver_killed_and_started_again(cluster, tiny, alone):
    study = tiny(**LONG)
    code = (
        "from healing_utils import Study\n"
        f"study = Study({study.parameters!r})\n"
        f"study.compute(study.plan('baseline'), 'cells', 'ray', {cluster.address!r})"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    driver = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    try:
        wait_for(lambda: list(study.run_folder.glob("records/*/*.json")))
    finally:
        driver.kill()
        driver.wait()
    done = contents(study.run_folder)
    assert 0 < len(done) < len(alone), "it had ended before it was killed"
    # Ray ends the workers of a driver that is gone.
    wait_for(lambda: not computing(cluster.head_node, *cluster.worker_nodes))
    run(study, cluster)
    assert contents(study.run_folder) == alone
    assert not list((study.run_folder / "claims").iterdir())


ALONE = """
import psutil, sys
from types import SimpleNamespace
from healing_utils.study import pool

study = SimpleNamespace(store=None, parameters={"threads": 1, "device": "cpu"})
pool.Ray(study, int)
for process in psutil.Process().children(recursive=True):
    for connection in process.net_connections("inet"):
        if connection.status == "LISTEN":
            print(connection.laddr.ip)
"""


def test_without_an_address_no_other_machine_can_reach_it():
    usual = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
    usual["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), usual.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", ALONE], env=usual, capture_output=True, text=True)
    assert "127.0.0.1" in done.stdout, done.stderr
    assert set(done.stdout.split()) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_what_the_cluster_cannot_do_is_refused_with_one_line(cluster, tiny, monkeypatch):
    try:
        with pytest.raises(HealingError, match="no node of the Ray cluster has the 3 CPUs"):
            run(tiny(threads=3), cluster)
    finally:
        torch.set_num_threads(1)
    with pytest.raises(HealingError, match="1 of 1 cells .* cannot load model"):
        study = tiny(seeds=[0])
        cells = study.plan("baseline")
        run(study, cluster, [replace(cell, model="/nowhere") for cell in cells])
    study, submit = tiny(seeds=[0]), pool.Ray.submit

    def elsewhere(self, cell):  # a node that does not share the folder
        self.store = Store("/nowhere")
        return submit(self, cell)

    monkeypatch.setattr(pool.Ray, "submit", elsewhere)
    with pytest.raises(HealingError, match="1 of 1 .* does not see the run's folder /nowhere: "):
        run(study, cluster)
    assert not (study.run_folder / "records").exists()


def test_a_node_lost_in_the_middle_of_a_cell(cluster, tiny, alone):
    study, (node,) = tiny(**LONG), cluster.worker_nodes

    def lose():
        wait_for(lambda: computing(node))
        cluster.remove_node(node, allow_graceful=False)

    with meanwhile(lose):
        run(study, cluster)
    assert contents(study.run_folder) == alone
