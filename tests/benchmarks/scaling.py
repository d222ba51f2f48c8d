"""One worker against two, as processes and on Ray, on the same cells of the organism.

    make scaling

16 cells (eight corruptions of two seeds on `sentiment`, quick's settings, one thread a cell) are
healed in a fresh folder for each way, one way at a time, in processes of their own; the tables have
to be equal. Seconds are those of the stage, so that starting the workers counts. Writes
``scaling.json`` and ``scaling.md`` beside this file.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WAYS = {
    "in-process": "in-process", "2 processes": "workers", "Ray, 1 CPU": "ray",
    "Ray, 2 nodes of 1 CPU": "ray",
}  # fmt: skip
sys.path.insert(0, str(HERE.parent))  # what the tests have for clusters and records


def measure(way: str) -> dict[str, Any]:
    """Run the stage in this process, or from it."""
    from helpers import contents

    from healing_utils.base.records import digest
    from healing_utils.run.profiles import settle
    from healing_utils.study.study import Study

    os.environ["HEALING_PROGRESS"] = "quiet"
    given = {"scans": {}, "task": "sentiment", "seeds": [0, 1], "workers": 2}
    with (
        tempfile.TemporaryDirectory(prefix="scaling-") as folder,
        contextlib.ExitStack() as running,
    ):
        study = Study(settle("quick", folder, given))
        cells = study.plan("recovery")  # so that the data are made
        start, address = time.perf_counter(), None
        if way.startswith("Ray"):
            from loopback import loopback_cluster

            cluster = running.enter_context(loopback_cluster(2 if "nodes" in way else 1))
            address = cluster.address
        begun = time.perf_counter()
        study.compute(cells, way, WAYS[way], address)
        seconds = time.perf_counter() - begun
        study.close()
        spent = [record["times"]["seconds"] for record in study.store.records("recovery")]
        return {
            "way": way, "cells": len(spent), "seconds": seconds, "cluster": begun - start,
            "in_cells": sum(spent), "digest": digest(contents(Path(folder))),
        }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| cells computed | seconds | against in-process | within cells, summed |"]
    lines.append("|---|---:|---:|---:|")
    for row in rows:
        ratio, told = rows[0]["seconds"] / row["seconds"], f"{row['way']} | {row['seconds']:.1f}"
        lines.append(f"| {told} | {ratio:.2f} × | {row['in_cells']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", help="measure one way, as JSON")
    work = parser.parse_args()
    if work.way:
        print(json.dumps(measure(work.way)))
        return
    rows = []
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    if len({row["digest"] for row in rows}) > 1:
        raise SystemExit("the records differ")
    (HERE / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "scaling.md").write_text(markdown(rows))
    print("\n" + markdown(rows))


if __name__ == "__main__":
    main()
