"""Further processes that compute cells beside the one that asked for them.

Small models gain more from a second process than from a second thread. The processes share nothing
but the run's folder: claims keep them off each other's cells, and only whole records count. One
that dies costs the cell it was at, which another computes again.

A kernel has its workers help at the stage that it is at. `healing run` starts one set of them for
its whole sequence: they go from stage to stage by themselves, so that they compute on while a
notebook draws its figures and the next kernel starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# New objects before Python looks for cycles among them; at its usual 700 (2,000 from 3.13 on) it
# looks over and over at what imports leave, a seventh of the time that they take.
COLLECT_AFTER = 10_000
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
    package = str(Path(__file__).resolve().parents[1])
    environment = {
        **(usual or {}),
        **os.environ,
        "HEALING_PROGRESS": "quiet",
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }
    workers = []
    for _ in range(count):
        worker = subprocess.Popen(
            [sys.executable, "-m", "healing_utils.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what fails here fails again, and is told, where it counts
            env=environment,
            text=True,
        )
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(given)
            worker.stdin.close()
        workers.append(worker)
    try:
        yield workers
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            try:
                worker.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def main() -> None:
    """Compute cells of the jobs that come in as JSON."""
    import gc
    import signal

    gc.set_threshold(COLLECT_AFTER)
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the claim is released
    jobs = json.load(sys.stdin)

    def orphaned() -> bool:
        return os.getppid() != parent

    from healing_utils.study import Study

    for parameters, stages in jobs:
        study = Study(parameters)
        for stage in stages:
            study.help(stage, stop=orphaned)


if __name__ == "__main__":
    main()
