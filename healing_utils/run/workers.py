"""Further processes that compute cells beside the one that asked for them.

Small models gain more from a second process than from a second thread. The processes share nothing
but the run's folder: claims keep them off each other's cells, and only whole records count. One
that is killed costs the cell it was at, which another computes again; a new one takes its place.

A kernel has its workers help at the stage that it is at. `healing run` starts one set of them for
its whole sequence: they go from stage to stage by themselves, so that they compute on while a
notebook draws its figures and the next kernel starts.

Where there are GPUs, the process that asks takes the first, and its workers those that follow, in
turn; with more processes than GPUs, several share one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# New objects before Python looks for cycles among them; at its usual 700 (2,000 from 3.13 on) it
# looks over and over at what imports leave, a seventh of the time that they take.
COLLECT_AFTER = 10_000
REPLACED = 3  # times a worker is, in a run: memory that does not suffice for it ends it every time
LOOK_AGAIN = 1.0  # seconds between two looks at whether all workers live
PATIENCE = 10.0  # seconds a worker gets to release its claim when its work is not needed any more

Job = tuple[Mapping[str, Any], Sequence[str]]  # a study's parameters, and stages of it in order


@contextlib.contextmanager
def helping(
    jobs: Iterable[Job], count: int, usual: Mapping[str, str] | None = None
) -> Iterator[list[subprocess.Popen]]:
    """Have `count` workers, which the block is given, compute cells of `jobs` while it runs.

    They take jobs and stages in order: one is begun when every cell of that before has its record.
    `usual` is their environment where this process's own says nothing else.
    """
    given = json.dumps([(dict(parameters), list(stages)) for parameters, stages in jobs])
    package = str(Path(__file__).resolve().parents[2])
    environment = {
        **(usual or {}),
        **os.environ,
        "HEALING_PROGRESS": "quiet",
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }

    def start(place: int) -> subprocess.Popen:
        worker = subprocess.Popen(
            [sys.executable, "-m", "healing_utils.run.workers", str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what fails here fails again, and is told, where it counts
            env=environment,
            text=True,
        )
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(given)
            worker.stdin.close()
        return worker

    workers, over = [start(place) for place in range(count)], threading.Event()
    watch = threading.Thread(target=_replace, args=(workers, start, over), daemon=True)
    watch.start()
    try:
        yield workers
    finally:
        over.set()
        watch.join()
        for worker in workers:
            worker.terminate()
        for worker in workers:
            try:
                worker.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def _replace(
    workers: list[subprocess.Popen],
    start: Callable[[int], subprocess.Popen],
    over: threading.Event,
) -> None:
    """Start a new worker for each of `workers` that a signal has ended, in its place, until the
    work is `over`; say so."""
    left = REPLACED * len(workers)
    while left and not over.wait(LOOK_AGAIN):
        for place, worker in enumerate(workers):
            code = worker.poll()
            if left and code is not None and code < 0:
                left -= 1
                workers[place] = start(place)
                then = "a new one takes its place"
                if not left:
                    then += f", the last of {REPLACED * len(workers)}"
                name = signal.Signals(-code).name
                print(f"a worker process was ended by {name}; {then}", file=sys.stderr)


def take_gpu(place: int) -> None:
    """Have torch's device ``cuda`` be this worker's: the one after the asking process's, and so on
    round. Does nothing where torch sees no GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device((place + 1) % torch.cuda.device_count())


def main(place: int) -> None:
    """Compute cells of the jobs that come in as JSON, as the worker at `place` among all."""
    import gc

    gc.set_threshold(COLLECT_AFTER)
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the claim is released
    jobs = json.load(sys.stdin)

    def orphaned() -> bool:
        return os.getppid() != parent

    from healing_utils.study.study import Study

    take_gpu(place)
    for parameters, stages in jobs:
        study = Study(parameters)
        for stage in stages:
            study.help(stage, stop=orphaned)


if __name__ == "__main__":
    main(int(sys.argv[1]))
