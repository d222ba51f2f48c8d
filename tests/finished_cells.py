"""Put quick's shipped records into a run's folder, less those of one seed's main grid, probes and
neurons: the notebooks compute every kind of these cells anew, and find all others finished.

``python tests/finished_cells.py RUN``
"""

import json
import shutil
import sys
from pathlib import Path

QUICK = Path(__file__).resolve().parents[1] / "data" / "results" / "quick"
ANEW, SEED = ("baseline", "corruption", "recovery", "probing", "neurons"), 0

if __name__ == "__main__":
    records = shutil.copytree(QUICK / "records", Path(sys.argv[1]) / "records")
    for stage in ANEW:
        plan = json.loads((QUICK / "plans" / f"{stage}.json").read_text("utf-8"))
        for cell in plan["cells"]:
            if cell["cell"]["seed"] == SEED:
                (records / cell["stage"] / f"{cell['key']}.json").unlink()
