"""Put the shipped records of quick's scans into a run's folder: the notebooks then compute the main
grid, the probes and the neurons again, which is half of it, and find the scans finished.

``python tests/finished_scans.py RUN``; a cell that the main grid has too is left to be computed.
"""

import json
import shutil
import sys
from pathlib import Path

QUICK = Path(__file__).resolve().parents[1] / "data" / "results" / "quick"


def planned(stage: str) -> dict[str, str]:
    """Stage of its record by key, of every cell of a stage's plan."""
    plan = json.loads((QUICK / "plans" / f"{stage}.json").read_text("utf-8"))
    return {cell["key"]: cell["stage"] for cell in plan["cells"]}


if __name__ == "__main__":
    main = planned("baseline") | planned("corruption") | planned("recovery")
    for key, stage in (planned("harms") | planned("scans")).items():
        if key not in main:
            place = Path(sys.argv[1]) / "records" / stage / f"{key}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(QUICK / "records" / stage / f"{key}.json", place)
