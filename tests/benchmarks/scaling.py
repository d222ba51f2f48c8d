"""One worker against two, as processes and on Ray, on the same cells of the organism.

    make scaling

16 cells (eight corruptions of two seeds on `sentiment`, quick's settings, one thread a cell) are
healed in a fresh folder for each way, one way at a time, in processes of their own; the tables have
to be equal. Seconds are those of the stage, so that starting the workers counts. Writes
``scaling.json`` and ``scaling.md`` beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WAYS = ("in-process", "2 processes", "Ray, 1 CPU", "Ray, 2 nodes of 1 CPU")
EXECUTORS = ("in-process", "workers", "ray", "ray")
sys.path.insert(0, str(HERE.parent))  # what the tests have for clusters and records


def measure(way: str) -> dict[str, Any]:
    """Run the stage in this process, or from it."""
    import yaml
    from helpers import contents

    from healing_utils.base.records import Store, digest
    from healing_utils.study.parameters import read_parameters
    from healing_utils.study.study import Study

    os.environ["HEALING_PROGRESS"] = "quiet"
    profile = yaml.safe_load((ROOT / "notebooks" / "profiles" / "quick.yaml").read_text())
    folder = Path(tempfile.mkdtemp(prefix="scaling-"))
    given = {
        **profile, "scans": {}, "task": "sentiment", "seeds": [0, 1], "run": str(folder),
        "workers": 2,
    }  # fmt: skip
    study = Study(read_parameters(given))
    cells = study.plan("recovery")  # so that the data are made
    start, address = time.perf_counter(), None
    with contextlib.ExitStack() as running:
        if way.startswith("Ray"):
            from loopback import loopback_cluster

            cluster = running.enter_context(loopback_cluster(2 if way == WAYS[3] else 1))
            address = cluster.address
        begun = time.perf_counter()
        study.compute(cells, way, EXECUTORS[WAYS.index(way)], address)
        seconds = time.perf_counter() - begun
    spent = [record["times"]["seconds"] for record in Store(folder).records("recovery")]
    made = digest(contents(folder))
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "way": way, "cells": len(spent), "seconds": seconds, "cluster": begun - start,
        "in_cells": sum(spent), "digest": made,
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| cells computed | seconds | against in-process | within cells, summed |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        ratio = rows[0]["seconds"] / row["seconds"]
        lines.append(
            f"| {row['way']} | {row['seconds']:.1f} | {ratio:.2f} × | {row['in_cells']:.1f} |"
        )
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
