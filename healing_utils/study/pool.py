"""Cells computed side by side: in processes on this machine, or on a Ray cluster.

`outcomes` claims cells, which keeps two runs on one folder off each other's, hands them out where
there is room, each after the models that it needs, and yields each once it is done or has failed.
Where the driver dies, its processes end with it, and the same call goes on from the records. A
process that is lost (killed, out of memory, its machine gone) costs the cell it was at, which is
handed out again, a few times at most; an error of the cell itself is reported and not tried again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

from healing_utils.base.errors import HealingError, Stopped, first_line

LOSSES = 3  # processes that a cell may lose before it is reported: it may be what kills them
LOOK = 0.2  # seconds between two looks for what another run has claimed
REACHED = 10.0  # seconds within which a cluster's address must answer
# Pages of 2 MiB for what malloc hands out (glibc from 2.35 on; elsewhere it means nothing): a step
# that passes over all weights then looks up fewer addresses. Only a new process can be told.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# New objects before Python looks for cycles among them; at its usual 700 (2,000 from 3.13 on) it
# looks over and over at what imports leave, a seventh of the time that they take.
COLLECT_AFTER = 10_000

Note = Callable[[str], None]


class Lost(Exception):
    """A process ended while it was at a cell. The message says how."""


def outcomes(
    study: Any, cells: list[Any], needs: Callable[[Any], set[str]], backend: Any, note: Note
) -> Iterator[tuple[Any, Exception | None]]:
    """Have the `cells` of a `Study` computed, each after those of `needs` (keys) among them; yield
    each with the error that it ended in.

    A `backend` has `room()` for so many cells at once; `submit(cell)` begins one and gives a future
    of the error that it ends in, or None; where that future itself ends in one of `lost`, the cell
    is handed out again; `close()` ends all that runs, which is done where this is stopped.
    """
    wanted = {cell.key: needs(cell) for cell in cells}
    waiting, pending = list(cells), set(wanted)  # pending: neither done nor failed
    running: dict[Future, Any] = {}
    claims: dict[str, contextlib.ExitStack] = {}
    losses: Counter[str] = Counter()
    try:
        while waiting or running:
            room = backend.room()
            for cell in list(waiting):
                if len(running) >= room:
                    break
                if wanted[cell.key] & pending:
                    continue
                claim = claims[cell.key] = contextlib.ExitStack()
                mine = claim.enter_context(study.store.claim(cell.key))
                if study.store.read(cell.stage, cell.key) is not None:  # by another run
                    claim.close()
                    waiting.remove(cell)
                    pending.discard(cell.key)
                    yield cell, None
                elif mine:
                    waiting.remove(cell)
                    running[backend.submit(cell)] = cell
            if not running:
                if waiting:
                    note(f"waiting for another run: {waiting[0].name}")
                    time.sleep(LOOK)
                continue
            first = next(iter(running.values())).name
            note(first if len(running) == 1 else f"{len(running)} at work, first {first}")
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED)[0]:
                cell = running.pop(future)
                claims[cell.key].close()
                try:
                    error = future.result()
                except backend.lost as loss:
                    losses[cell.key] += 1
                    print(f"lost over {cell.name}: {first_line(loss)}", file=sys.stderr)
                    if losses[cell.key] < LOSSES:
                        waiting.insert(0, cell)
                        continue
                    what = f"{LOSSES} processes were lost over it, out of memory?"
                    error = HealingError(f"{what} {first_line(loss)}")
                except Exception as failure:  # Ray's own are pages long
                    error = HealingError(f"{type(failure).__name__}: {first_line(failure)}")
                    error.add_note(str(failure))
                pending.discard(cell.key)
                yield cell, error
    except BaseException as stop:
        backend.close()
        if isinstance(stop, KeyboardInterrupt):
            raise Stopped("finished cells are kept, and the same call goes on from there") from None
        raise
    finally:
        for claim in claims.values():
            claim.close()


def compute(make: Callable[[], Any], cell: Any, *on_step: Callable[..., None]) -> Exception | None:
    """Compute a cell of the study that `make` gives; its error, of which one that is not meant for
    people has the traceback as a note."""
    try:
        make().record(cell, *on_step)
    except Exception as error:
        trace, for_people = traceback.format_exc(), isinstance(error, HealingError)
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # a library's own, which cannot travel between processes
            error = HealingError(f"{type(error).__name__}: {error}")
        if not for_people:
            error.add_note(trace)
        return error
    return None


class InProcess:
    """One cell after the other, here, with a note on its steps."""

    lost = ()

    def __init__(self, study: Any, note: Note):
        self.study, self.note = study, note

    def room(self) -> int:
        return 1

    def submit(self, cell: Any) -> Future:
        def on_step(step: int, steps: int, loss: float) -> None:
            self.note(f"{cell.name}: step {step}/{steps}, loss {loss:.3f}")

        self.note(cell.name)
        future: Future = Future()
        future.set_result(compute(lambda: self.study, cell, on_step))
        return future

    def close(self) -> None:
        pass


# -- processes -------------------------------------------------------------------------------------


class Processes:
    """`count` processes on this machine, which `make` gives the study; they are started when the
    first cells come, and stay until `close`. With GPUs, each takes one in turn."""

    lost = Lost

    def __init__(self, make: Callable[[], Any], count: int):
        self.make, self.count = make, count
        self.workers: dict[int, subprocess.Popen] = {}
        self.asked: dict[int, Future] = {}
        self.threads = ThreadPoolExecutor(count)  # each talks to one process

    def room(self) -> int:
        return self.count

    def submit(self, cell: Any) -> Future:
        done = (at for at in range(self.count) if at not in self.asked or self.asked[at].done())
        place = next(done)
        worker = self.workers.get(place)
        new = worker is None or worker.poll() is not None
        if new:
            self.workers[place] = _start(place)
        what = [self.make, cell] if new else [cell]
        self.asked[place] = self.threads.submit(self._ask, place, what)
        return self.asked[place]

    def _ask(self, place: int, what: list[Any]) -> Exception | None:
        worker = self.workers[place]
        try:
            for one in what:
                pickle.dump(one, worker.stdin)
            worker.stdin.flush()
            return pickle.load(worker.stdout)
        except Exception:  # it ended, maybe in the middle of an answer
            worker.kill()
            raise Lost(f"a process ended with code {worker.wait()}") from None

    def close(self) -> None:
        for worker in self.workers.values():
            worker.kill()
        for worker in self.workers.values():
            worker.wait()
        wait(self.asked.values())  # all were killed


def _start(place: int) -> subprocess.Popen:
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "healing_utils.study.pool", str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=HUGE_PAGES | os.environ | {"PYTHONPATH": path, "HEALING_PROGRESS": "quiet"},
        start_new_session=True,  # Ctrl-C is for the driver, which then ends it
    )


def serve(place: int) -> None:
    """Compute cells as they come on standard input, until it ends: in a process of `Processes`."""
    import gc

    gc.set_threshold(COLLECT_AFTER)
    cells: queue.SimpleQueue[Any] = queue.SimpleQueue()
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not mix with the answers
    try:
        make = cache(pickle.load(source))
    except EOFError:  # the driver is gone already
        return

    def listen() -> None:
        with contextlib.suppress(EOFError, pickle.UnpicklingError):  # it died in mid-word
            while True:
                cells.put(pickle.load(source))
        os._exit(0)  # the driver is gone, even on its SIGKILL

    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    threading.Thread(target=listen, daemon=True).start()
    while True:
        pickle.dump(compute(make, cells.get()), sink)
        sink.flush()


# -- a cluster -------------------------------------------------------------------------------------


class Ray:
    """A Ray cluster whose machines share the run's folder, and the files of models and data, under
    the same paths: the one at `address`; without one, that of ``RAY_ADDRESS``; without that, a new
    one on this machine, which no other machine can reach.

    The driver plans and claims; a task loads what it needs by the study that `make` gives, as here,
    and writes record and weights. Raises HealingError where Ray is not installed, the cluster
    cannot be reached, or no node of it has what a cell takes.
    """

    def __init__(self, study: Any, make: Callable[[], Any], address: str | None = None):
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        if address == "local":  # Ray reads it when it is imported, and else listens everywhere
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        try:
            import ray
        except ImportError as error:
            raise HealingError(
                "the executor 'ray' needs the package ray: pip install .[cluster] in a checkout"
            ) from error
        self.ray, errors = ray, ray.exceptions
        self.lost = (
            errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError,
            errors.OutOfMemoryError, errors.ObjectLostError,
        )  # fmt: skip
        if not ray.is_initialized():
            _connect(ray, address)
        cpus = study.parameters["threads"]
        gpus = int("GPU" in ray.cluster_resources() and study.parameters["device"] != "cpu")
        self.takes = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
        if not self._places():
            raise HealingError(
                f"no node of the Ray cluster has the {cpus} CPUs of a cell's threads"
                f"{' and a GPU' * gpus}; start nodes with more, or set threads, which is part of "
                "the cells' keys"
            )
        # Losses are counted by the driver: Ray would try again in silence. Given here and not as
        # options later, so that Ray ends a GPU's process with its cell: one that is reused stays on
        # the card that it saw first.
        self.remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(compute_there)
        self.store, self.driver, self.make = study.store, uuid.uuid4().hex, ray.put(make)
        self.tasks: dict[Future, Any] = {}

    def room(self) -> int:
        """One ahead, so that no worker waits; nodes may come and go."""
        return 1 + self._places()

    def _places(self) -> int:
        """For how many cells the nodes have what one takes; a cell is on one node."""
        alive = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return sum(
            min(int(has.get(what, 0) // n) for what, n in self.takes.items()) for has in alive
        )

    def submit(self, cell: Any) -> Future:
        claim = str(self.store.claim_path(cell.key))
        task = self.remote.remote(self.driver, claim, self.make, cell)
        future = task.future()
        self.tasks[future] = task
        future.add_done_callback(self.tasks.pop)
        return future

    def close(self) -> None:
        for task in list(self.tasks.values()):
            with contextlib.suppress(Exception):  # the cluster itself may be gone
                self.ray.cancel(task, force=True)


_studies: dict[str, Any] = {}  # of the driver that this process last worked for


def compute_there(driver: str, claim: str, make: Any, cell: Any) -> Exception | None:
    if not Path(claim).exists():  # the driver has it in the run's folder
        return HealingError(
            f"node {socket.gethostname()} does not see the run's folder {Path(claim).parents[1]}: "
            "give --out a folder that all nodes share, under the same path"
        )
    if driver not in _studies:
        _studies.clear()
        _studies[driver] = make()
    return compute(lambda: _studies[driver], cell)


def _connect(ray: Any, address: str) -> None:
    """Once a process; the connection ends with it. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here stays silent
    package, quiet = str(Path(__file__).resolve().parents[1]), {"HEALING_PROGRESS": "quiet"}
    settings = {"py_modules": [package], "env_vars": quiet}
    try:
        if host and port.isdigit():
            host = host.rpartition("/")[2].strip("[]")
            socket.create_connection((host, int(port)), REACHED).close()
        ray.init(address, runtime_env=settings, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray's own, or the address is none
        what = (
            "start a Ray cluster" if address == "local" else f"reach the Ray cluster at {address}"
        )
        raise HealingError(f"cannot {what}: {first_line(error)}") from error


if __name__ == "__main__":
    serve(int(sys.argv[1]))
