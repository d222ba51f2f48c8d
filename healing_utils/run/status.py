"""How far a run is, as its folder says; without torch, so that it is told at once."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.paths import run_folder
from healing_utils.base.progress import duration
from healing_utils.base.records import STALE, Store, read_json
from healing_utils.study.cells import ALL_STAGES


def find_run(name: str | None = None) -> Path:
    """The folder of a run, given as a path or as its name below data/runs; without a name, the run
    that something was written to last. Raises HealingError if there is none."""
    if name is not None and run_folder(name).is_dir():
        return run_folder(name)
    where = run_folder("data/runs")
    marks = ("parameters.json", "plans", "records")  # one of these makes a folder a run's
    runs = {path.parent.name: path.parent for mark in marks for path in where.glob(f"*/{mark}")}
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
    """Name, planned and missing cells of every planned stage, each cell where it is first planned;
    a plan that is none is passed over. Nothing in the folder is changed."""
    keys, store = set(), Store(run)
    for stage in ALL_STAGES:
        plan = read_json(run / "plans" / f"{stage}.json").get("cells")
        if isinstance(plan, list) and all(isinstance(cell, dict) for cell in plan):
            # A cell of a scan is recorded in the stage that it belongs to.
            cells = [{"stage": stage, "name": "?", **cell} for cell in plan]
            try:
                there = {c["key"]: store.path(c["stage"], c["key"]).exists() for c in cells}
            except (HealingError, KeyError, TypeError):  # a name that is none
                continue
            cells = [cell for cell in cells if cell["key"] not in keys]
            keys |= there.keys()
            yield stage, cells, [cell for cell in cells if not there[cell["key"]]]


def _claim(path: Path) -> str:
    """``(by host:pid for 35 s)``; empty without a claim."""
    try:
        silent = time.time() - path.stat().st_mtime
        claim = json.loads(path.read_text("utf-8"))
        owner, since = claim["owner"].rpartition(":")[0], duration(time.time() - claim["since"])
    except FileNotFoundError:
        return ""
    except Exception:  # whatever it holds
        return "(claimed, by whom cannot be read)"
    gone = f", silent for {duration(silent)}: that run is gone" if silent > STALE else ""
    return f"(by {owner} for {since}{gone})"


def describe(run: Path) -> str:
    """The state of a run as text: stages, running and missing cells, notebooks."""
    lines, stages = [f"Run {run.absolute()}"], list(progress(run))
    for stage, cells, missing in (stage for stage in stages if stage[1]):
        lines.append(f"  {stage:12} {len(cells) - len(missing)} of {len(cells)} cells done")
        claims = [(c["name"], _claim(run / "claims" / f"{c['key']}.json")) for c in missing]
        lines += [f"    running  {name} {claim}" for name, claim in claims if claim]
        left = [f"    missing  {name}" for name, claim in claims if not claim]
        lines += left[:5]
        lines += [f"    missing  and {len(left) - 5} more"] if len(left) > 5 else []
    known = [stage for stage, *_ in stages]
    damaged = [p.stem for p in sorted(run.glob("plans/*.json")) if p.stem not in known]
    lines += [f"  {stage:12} its plan cannot be read; a run makes it again" for stage in damaged]
    planned, left = (sum(len(stage[i]) for stage in stages) for i in (1, 2))
    everything = f"all          {planned - left} of {planned} cells done"
    lines.append(f"  {everything if stages else 'no stage has started'}")
    books = [path.stem for path in sorted((run / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
    done = [name for name in books if not name.endswith(".failed")]
    lines.append(f"  notebooks done: {', '.join(done) or 'none'}")
    lines += [f"  notebook failed: {run / 'notebooks' / n}.ipynb" for n in books if n not in done]
    lines += [f"  page: {run / 'index.html'}"] if (run / "index.html").exists() else []
    return "\n".join(lines)
