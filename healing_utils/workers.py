"""Further processes that compute cells beside the one that asked for them.

Small models gain more from a second process than from a second thread. The processes share nothing
but the run's folder: claims keep them off each other's cells, and only whole records count. One
that dies costs the cell it was at, which another computes again.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PATIENCE = 10.0  # seconds a worker gets to release its claim when its work is not needed any more


@contextlib.contextmanager
def helping(parameters: Mapping[str, Any], stage: str, count: int) -> Iterator[None]:
    """Have `count` workers compute cells of `stage` for as long as the block runs."""
    package = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "HEALING_PROGRESS": "quiet",
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }
    workers = []
    for _ in range(count):
        worker = subprocess.Popen(
            [sys.executable, "-m", "healing_utils.workers", stage],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what fails here fails again, and is told, where it counts
            env=environment,
            text=True,
        )
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(json.dumps(dict(parameters)))
            worker.stdin.close()
        workers.append(worker)
    try:
        yield
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
    """Compute cells of the stage named on the command line; parameters come in as JSON."""
    import signal

    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the claim is released
    parameters = json.load(sys.stdin)

    def orphaned() -> bool:
        return os.getppid() != parent

    from healing_utils.study import Study

    Study(parameters).help(sys.argv[1], stop=orphaned)


if __name__ == "__main__":
    main()
