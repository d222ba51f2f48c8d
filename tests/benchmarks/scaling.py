"""One worker against two, as processes and on Ray, on the same cells of the organism.

    make scaling

16 cells (eight corruptions of two seeds on `sentiment`, quick's settings, one thread a cell) are
healed in a fresh folder for each way, one way at a time, in processes of their own; the tables have
to be equal. Seconds are those of the stage, so that starting the workers counts. Writes
``scaling.json`` and ``scaling.md`` beside this file.
"""

from __future__ import annotations

import argparse
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
WAYS = ("in-process", "1 further process", "Ray, 1 CPU", "Ray, 2 nodes of 1 CPU")
BESIDE_THE_CELLS = ("times", "checksum")


def measure(way: str) -> dict[str, Any]:
    """Run the stage in this process, or from it."""
    import yaml

    from healing_utils.parameters import read_parameters
    from healing_utils.records import digest
    from healing_utils.study import Study

    # Ray puts the machine's outer address in the place of 127.0.0.1 unless this is set.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ |= {"HEALING_PROGRESS": "quiet", "HEALING_EXECUTOR": "workers"}
    profile = yaml.safe_load((ROOT / "notebooks" / "profiles" / "quick.yaml").read_text())
    folder = Path(tempfile.mkdtemp(prefix="scaling-"))
    given = {
        **profile, "scans": {}, "task": "sentiment", "seeds": [0, 1], "run": str(folder),
        "workers": 2 if way == WAYS[1] else 1,
    }  # fmt: skip
    study, cluster = Study(read_parameters(given)), None
    study.plan("recovery")  # so that the data are made
    start = time.perf_counter()
    if way.startswith("Ray"):
        from ray.cluster_utils import Cluster

        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder)}
        (folder / "ray").mkdir()
        node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}
        cluster = Cluster(True, head_node_args={**node, "include_dashboard": False})
        if way == WAYS[3]:
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        os.environ |= {"HEALING_EXECUTOR": "ray", "HEALING_RAY_ADDRESS": cluster.address}
    begun = time.perf_counter()
    study.run("recovery")
    seconds = time.perf_counter() - begun
    records = {
        path.stem: json.loads(path.read_text())
        for path in sorted((folder / "records" / "recovery").glob("*.json"))
    }
    if cluster is not None:
        import ray

        ray.shutdown()
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    kept = {
        key: {k: v for k, v in record.items() if k not in BESIDE_THE_CELLS}
        for key, record in records.items()
    }
    return {
        "way": way, "cells": len(records), "seconds": seconds, "cluster": begun - start,
        "in_cells": sum(r["times"]["seconds"] for r in records.values()), "digest": digest(kept),
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
