"""How far a run is, as its folder says: without torch, so that it is told at once, also while the
run has the machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.paths import run_folder
from healing_utils.base.progress import duration
from healing_utils.base.records import STALE
from healing_utils.study.cells import ALL_STAGES


def find_run(name: str | None = None) -> Path:
    """The folder of a run, given as a path or as its name below data/runs; without a name, the run
    that something was written to last. Raises HealingError if there is none."""
    if name is not None and Path(name).is_dir():
        return Path(name)
    runs = {p.parent.name: p.parent for p in run_folder("data/runs").glob("*/parameters.json")}
    if not runs:
        where = run_folder("data/runs")
        raise HealingError(f"no runs in {where}; start one with: healing run quick")
    if name is not None:
        return runs[choose(name, runs, "run")]

    def last_written(run: Path) -> float:
        parts = (run, *(run / n for n in ("plans", "notebooks", "claims")), *run.glob("records/*"))
        return max(part.stat().st_mtime for part in parts if part.exists())

    return max(runs.values(), key=last_written)


def progress(target: Path) -> Iterator[tuple[str, list[dict], list[dict]]]:
    """Name, planned and missing cells of every planned stage, read from the run's folder; nothing
    there is changed."""
    order = {stage: place for place, stage in enumerate(ALL_STAGES)}
    plans = {path.stem: path for path in target.glob("plans/*.json")}
    for stage in sorted(plans, key=lambda name: (order.get(name, len(order)), name)):
        try:
            cells = json.loads(plans[stage].read_text("utf-8"))["cells"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        missing = [
            cell
            for cell in cells
            # A cell of a scan is recorded in the stage that it belongs to.
            if not (target / "records" / cell.get("stage", stage) / f"{cell['key']}.json").exists()
        ]
        yield stage, cells, missing


def _claim(target: Path, key: str) -> str | None:
    """``(by host:pid for 35 s)`` for a claimed cell; None without a claim."""
    path = target / "claims" / f"{key}.json"
    try:
        beat = time.time() - path.stat().st_mtime
        claim = json.loads(path.read_text("utf-8"))
        owner = ":".join(str(claim["owner"]).split(":")[:2])
        since = f"for {duration(time.time() - claim['since'])}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "(claimed, by whom cannot be read)"
    silent = f", silent for {duration(beat)}: that run is gone" if beat > STALE else ""
    return f"(by {owner} {since}{silent})"


def describe(target: Path, shown: int = 5) -> str:
    """The state of a run as text: stages, running and missing cells, notebooks."""
    lines = [f"Run {target}"]
    for stage, cells, missing in progress(target):
        lines.append(f"  {stage:12} {len(cells) - len(missing)} of {len(cells)} cells done")
        claims = {cell["key"]: _claim(target, cell["key"]) for cell in missing}
        lines += [
            f"    running  {c['name']} {claims[c['key']]}" for c in missing if claims[c["key"]]
        ]
        names = [c["name"] for c in missing if not claims[c["key"]]]
        lines += [f"    missing  {name}" for name in names[:shown]]
        if len(names) > shown:
            lines.append(f"    missing  and {len(names) - shown} more")
    if len(lines) == 1:
        lines.append("  no stage has started")
    done = sorted(p.stem for p in (target / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    failed = [name for name in done if name.endswith(".failed")]
    lines.append("  notebooks done: " + (", ".join(n for n in done if n not in failed) or "none"))
    lines += [f"  notebook failed: {target / 'notebooks' / name}.ipynb" for name in failed]
    if (target / "index.html").exists():
        lines.append(f"  page: {target / 'index.html'}")
    return "\n".join(lines)
