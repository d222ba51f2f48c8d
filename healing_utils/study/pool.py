"""Cells computed side by side: in processes on this machine, or on a Ray cluster.

`outcomes` plans nothing and knows no cell's content: it claims cells, hands them out where there is
room, waits for a cell's models before the cell, and yields each cell once it is done or has failed.
Claims keep two runs on one folder off each other's cells. Where the driver dies, its processes end
with it, and the same call goes on from the records.

A process that is lost (killed, out of memory, its machine gone) costs the cell it was at, which is
handed out again, a few times at most. An error of the cell itself is reported and not tried again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from healing_utils.base.errors import HealingError

LOSSES = 3  # processes that a cell may lose before it is reported: it may be what kills them
PATIENCE = 10.0  # seconds a process gets to end
LOOK = 0.2  # seconds between two looks for what another run has claimed
SPEAK = 1.0  # seconds between two notes on a cell's steps
# Pages of 2 MiB for what malloc hands out (glibc from 2.35 on; elsewhere it means nothing): a step
# that passes over all weights then looks up fewer addresses. Only a new process can be told.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# New objects before Python looks for cycles among them; at its usual 700 (2,000 from 3.13 on) it
# looks over and over at what imports leave, a seventh of the time that they take.
COLLECT_AFTER = 10_000

Note = Callable[[str], None]
Outcome = tuple[Any, Exception | None]  # a cell, and the error that it ended in


class Lost(Exception):
    """A process ended while it was at a cell. The message says how."""


class Backend(Protocol):
    """Where cells are computed."""

    def room(self) -> int:
        """How many cells may be there at once."""

    def submit(self, cell: Any) -> Any:
        """Begin a cell; what stands for it until it is finished."""

    def finished(self, note: Note) -> Iterable[tuple[Any, Exception | None]]:
        """Wait a little; of the cells that ended, what `submit` gave, and the error, `Lost` too."""

    def close(self) -> None:
        """End all that runs."""


def outcomes(
    study: Any, cells: list[Any], needs: Callable[[Any], set[str]], backend: Backend, note: Note
) -> Iterator[Outcome]:
    """Have the `cells` of a `Study` computed, each after those of `needs` (keys) among them.

    Where it is stopped, or an error is none of a cell, the backend is closed.
    """
    wanted = {cell.key: needs(cell) for cell in cells}
    waiting, pending = list(cells), set(wanted)  # pending: neither done nor failed
    running: dict[Any, tuple[Any, contextlib.ExitStack]] = {}
    losses: dict[str, int] = {}
    try:
        while waiting or running:
            room = backend.room()
            for cell in list(waiting):
                if len(running) >= room:
                    break
                if wanted[cell.key] & pending:
                    continue
                claim = contextlib.ExitStack()
                mine = claim.enter_context(study.store.claim(cell.key))
                if study.store.read(cell.stage, cell.key) is not None:  # by another run
                    claim.close()
                    waiting.remove(cell)
                    pending.discard(cell.key)
                    yield cell, None
                elif mine:
                    waiting.remove(cell)
                    try:
                        running[backend.submit(cell)] = cell, claim
                    except BaseException:  # stopped: no other run may wait for this one's claim
                        claim.close()
                        raise
            if not running:
                if waiting:
                    note(f"waiting for another run: {waiting[0].name}")
                    time.sleep(LOOK)
                continue
            first = next(iter(running.values()))[0]
            note(first.name if len(running) == 1 else f"{len(running)} at work, first {first.name}")
            for task, error in backend.finished(note):
                cell, claim = running.pop(task)
                claim.close()
                if isinstance(error, Lost):
                    losses[cell.key] = losses.get(cell.key, 0) + 1
                    print(f"lost over {cell.name}: {error}", file=sys.stderr)
                    if losses[cell.key] < LOSSES:
                        waiting.insert(0, cell)
                        continue
                    error = HealingError(
                        f"{LOSSES} processes were lost over it, out of memory? {error}"
                    )
                pending.discard(cell.key)
                yield cell, error
    except BaseException:
        backend.close()
        raise
    finally:
        for _, claim in running.values():
            claim.close()


class InProcess:
    """One cell after the other, here."""

    def __init__(self, study: Any):
        self.study, self.cell = study, None

    def room(self) -> int:
        return 1

    def submit(self, cell: Any) -> Any:
        self.cell = cell
        return cell.key

    def finished(self, note: Note) -> Iterator[tuple[Any, Exception | None]]:
        yield self.cell.key, compute(self.study, self.cell, note)

    def close(self) -> None:
        pass


def compute(study: Any, cell: Any, note: Note) -> Exception | None:
    """Compute and record a cell; the error that it ended in, with its traceback as a note."""
    spoken = 0.0

    def on_step(step: int, steps: int, loss: float) -> None:
        nonlocal spoken
        if time.monotonic() - spoken > SPEAK:
            spoken = time.monotonic()
            note(f"{cell.name}: step {step}/{steps}, loss {loss:.3f}")

    try:
        study.record(cell, on_step)
    except Exception as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # a library's own, which cannot travel between processes
            error = HealingError(f"{type(error).__name__}: {error}")
        error.add_note(trace)
        return error
    return None


class Processes:
    """`count` processes on this machine, which `make` gives the study; they are started when the
    first cell comes, and stay until `close`. With GPUs, each takes one in turn."""

    def __init__(self, make: Callable[[], Any], count: int):
        self.make, self.count = make, count
        # Process, what it says (note, end, unable), and of what.
        self.events: queue.SimpleQueue[tuple[subprocess.Popen, str, Any]] = queue.SimpleQueue()
        self.workers: dict[int, subprocess.Popen] = {}
        self.busy: set[int] = set()

    def room(self) -> int:
        return self.count

    def submit(self, cell: Any) -> int:
        place = min(set(range(self.count)) - self.busy)
        worker = self.workers.get(place)
        if worker is None or worker.poll() is not None:
            worker = self.workers[place] = self._start(place)
        self.busy.add(place)
        with contextlib.suppress(BrokenPipeError):  # it has just died: its end is told below
            pickle.dump(cell, worker.stdin)
            worker.stdin.flush()
        return place

    def _start(self, place: int) -> subprocess.Popen:
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        worker = subprocess.Popen(
            [sys.executable, "-m", "healing_utils.study.pool", str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=HUGE_PAGES | os.environ | {"PYTHONPATH": path, "HEALING_PROGRESS": "quiet"},
            start_new_session=True,  # Ctrl-C is for the driver, which then ends it in order
        )
        pickle.dump(self.make, worker.stdin)

        def listen() -> None:
            with contextlib.suppress(Exception):  # it ended, maybe in the middle of a message
                while True:
                    self.events.put((worker, *pickle.load(worker.stdout)))
            worker.kill()
            end = Lost(f"a process ended with code {worker.wait()}")
            self.events.put((worker, "end", end))

        threading.Thread(target=listen, daemon=True).start()
        return worker

    def finished(self, note: Note) -> Iterator[tuple[int, Exception | None]]:
        with contextlib.suppress(queue.Empty):
            worker, what, said = self.events.get(timeout=1.0)
            place = next((p for p, w in self.workers.items() if w is worker), None)
            if what == "note":
                note(said)
            elif what == "unable":
                raise HealingError(f"a process could not start: {said}")
            elif place in self.busy:  # not of one that died idle, and has been replaced since
                self.busy.discard(place)
                yield place, said

    def close(self) -> None:
        for worker in self.workers.values():
            with contextlib.suppress(OSError):
                worker.stdin.close()  # which ends it, whatever it is at
        for worker in self.workers.values():
            try:
                worker.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()
        self.busy.clear()


def serve(place: int) -> None:
    """Compute cells as they come on standard input, until it ends: in a process of `Processes`."""
    import gc

    gc.set_threshold(COLLECT_AFTER)
    cells: queue.SimpleQueue[Any] = queue.SimpleQueue()
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not mix with the answers

    def listen() -> None:
        with contextlib.suppress(EOFError):
            while True:
                cells.put(pickle.load(source))
        os._exit(0)  # the driver is gone or needs no more, even on its SIGKILL

    def tell(what: str, said: Any) -> None:
        pickle.dump((what, said), sink)
        sink.flush()

    try:
        study = pickle.load(source)()
    except Exception as error:  # no cell's fault, and the next process would fare no better
        return tell("unable", f"{type(error).__name__}: {error}")

    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    threading.Thread(target=listen, daemon=True).start()
    while True:
        tell("end", compute(study, cells.get(), functools.partial(tell, "note")))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
