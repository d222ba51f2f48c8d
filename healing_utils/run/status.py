"""How far a run is, as its folder says; without torch, so that it is told at once."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.paths import run_folder
from healing_utils.base.progress import duration
from healing_utils.base.records import STALE, read_json
from healing_utils.study.cells import ALL_STAGES


def find_run(name: str | None = None) -> Path:
    """The folder of a run, given as a path or as its name below data/runs; without a name, the run
    that something was written to last. Raises HealingError if there is none."""
    if name is not None and Path(name).is_dir():
        return Path(name)
    where = run_folder("data/runs")
    runs = {path.parent.name: path.parent for path in where.glob("*/parameters.json")}
    if not runs:
        raise HealingError(f"no runs in {where}; start one with: healing run quick")
    if name is not None:
        return runs[choose(name, runs, "run")]
    last = {
        run: max(p.stat().st_mtime for p in (run, *run.glob("*/"), *run.glob("records/*/")))
        for run in runs.values()
    }
    return max(last, key=last.get)


def progress(run: Path) -> Iterator[tuple[str, list[dict], list[dict]]]:
    """Name, planned and missing cells of every planned stage; nothing in the folder is changed."""
    for stage in ALL_STAGES:
        cells = read_json(run / "plans" / f"{stage}.json").get("cells")
        if cells is not None:
            # A cell of a scan is recorded in the stage that it belongs to.
            places = [run / "records" / c.get("stage", stage) / f"{c['key']}.json" for c in cells]
            there = [path.exists() for path in places]
            yield stage, cells, [c for c, done in zip(cells, there, strict=True) if not done]


def _claim(path: Path) -> str:
    """``(by host:pid for 35 s)``; empty without a claim."""
    try:
        silent = time.time() - path.stat().st_mtime
        claim = json.loads(path.read_text("utf-8"))
        owner, since = claim["owner"].rpartition(":")[0], time.time() - claim["since"]
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "(claimed, by whom cannot be read)"
    gone = f", silent for {duration(silent)}: that run is gone" if silent > STALE else ""
    return f"(by {owner} for {duration(since)}{gone})"


def describe(run: Path) -> str:
    """The state of a run as text: stages, running and missing cells, notebooks."""
    lines = [f"Run {run}"]
    for stage, cells, missing in progress(run):
        lines.append(f"  {stage:12} {len(cells) - len(missing)} of {len(cells)} cells done")
        claims = [(c["name"], _claim(run / "claims" / f"{c['key']}.json")) for c in missing]
        lines += [f"    running  {name} {claim}" for name, claim in claims if claim]
        left = [f"    missing  {name}" for name, claim in claims if not claim]
        lines += left[:5]
        lines += [f"    missing  and {len(left) - 5} more"] if len(left) > 5 else []
    lines += ["  no stage has started"] if len(lines) == 1 else []
    books = [path.stem for path in sorted((run / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
    done = [name for name in books if not name.endswith(".failed")]
    lines.append(f"  notebooks done: {', '.join(done) or 'none'}")
    lines += [f"  notebook failed: {run / 'notebooks' / n}.ipynb" for n in books if n not in done]
    lines += [f"  page: {run / 'index.html'}"] if (run / "index.html").exists() else []
    return "\n".join(lines)
