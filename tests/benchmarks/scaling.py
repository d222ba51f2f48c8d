"""One worker against two, as processes and on Ray, on the same cells of the organism.

    make scaling

16 cells (eight corruptions of two seeds on `sentiment`, quick's settings, one thread a cell) are
healed in a fresh folder for each way, one way at a time, in processes of their own; the tables have
to be equal. Seconds are those of the stage, so that starting the workers counts. Writes
``scaling.json`` and ``scaling.md`` beside this file.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shared import HERE, apart, table, write

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
    with contextlib.ExitStack() as running:
        folder = running.enter_context(tempfile.TemporaryDirectory(prefix="scaling-"))
        study = Study(settle("quick", folder, given))
        cells, address = study.plan("recovery"), None  # so that the data are made
        if way.startswith("Ray"):
            from loopback import loopback_cluster

            nodes = 2 if "nodes" in way else 1
            address = running.enter_context(loopback_cluster(nodes)).address
        begun = time.perf_counter()
        study.compute(cells, way, WAYS[way], address)
        seconds = time.perf_counter() - begun
        study.close()
        spent = [record["times"]["seconds"] for record in study.store.records("recovery")]
        records = digest(contents(Path(folder)))
    return {"way": way, "seconds": seconds, "in_cells": sum(spent), "digest": records}


def main() -> None:
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1])))
        return
    found = []
    for way in WAYS:
        found.append(apart(__file__, way))
        print(found[-1], flush=True)
    if len({row["digest"] for row in found}) > 1:
        raise SystemExit("the records differ")
    rows = []
    for row in found:
        ratio = f"{found[0]['seconds'] / row['seconds']:.2f} ×"
        rows.append([row["way"], f"{row['seconds']:.1f}", ratio, f"{row['in_cells']:.1f}"])
    head = ["cells computed", "seconds", "against in-process", "within cells, summed"]
    write("scaling", found, table(head, rows))


if __name__ == "__main__":
    main()
