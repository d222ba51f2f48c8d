"""A run: every cell that the profile plans, in one pool; then the notebooks under papermill, one
after the other, which find them all; then the page.

A run can be stopped at any moment, and the same call goes on. A notebook whose source, parameters,
code and records are as they were is not executed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from healing_utils.base.progress import duration
from healing_utils.base.records import canonical, digest, write_atomically
from healing_utils.run import estimate, profiles
from healing_utils.run.notebooks import declared_parameters, quick_import
from healing_utils.run.notebooks import folder as notebook_folder
from healing_utils.run.page import write_page
from healing_utils.run.profiles import Shard
from healing_utils.study.pool import COLLECT_AFTER, HUGE_PAGES
from healing_utils.study.study import Study

with quick_import():
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

ORGANISM_NOTEBOOK = "00_model_organism"  # only worth running where the organism is studied
DISK_WANTED = 2e9  # bytes free; the weights of the intact models are the largest part of a run
KERNEL_STARTS = 3  # tries: two kernels that start at once can pick the same port


class NotebookFailed(RuntimeError):
    """A notebook did not reach its end. The message names notebook, cell and cause."""


def say(line: str) -> None:
    """A line about progress, on standard error; none where ``HEALING_PROGRESS`` is ``quiet``."""
    if os.environ.get("HEALING_PROGRESS") != "quiet":
        # A bar may stand on the terminal's current line.
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(clear + line, file=sys.stderr, flush=True)


def run(
    profile: str | Path,
    out: str | Path | None = None,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    executor: str = "workers",
    address: str | None = None,
    again: bool = False,
) -> Path:
    """Compute a profile's cells, run its notebooks, write the page; return the page's path.

    `overrides` are ``(name, value)`` pairs on top of the profile; `executor` and `address` as of
    `Study.compute`. With `again` notebooks are executed anew that would show the same. Everything
    finished is kept whatever happens, and the same call goes on from there.

    Raises HealingError before anything runs if a name or value is wrong, and for cells that failed,
    NotebookFailed if a notebook does not reach its end, KeyboardInterrupt if it is stopped.
    """
    name, parameters = profiles.settle(profile, out, overrides)
    notebooks = {path: declared_parameters(path) for path in sequence(parameters["model"])}
    target, start = profiles.make_folder(parameters), time.monotonic()
    say(f"Run of profile {name} in {target}")
    free = shutil.disk_usage(target).free
    if free < DISK_WANTED:
        say(f"Warning: only {free / 1e9:.1f} GB are free there, {DISK_WANTED / 1e9:.0f} are wanted")
    study = Study(parameters)
    study.compute(study.keep_plans(), "all stages", executor, address)
    study.close()
    for line in estimate.compare(target):
        say(line)
    for number, (path, declared) in enumerate(notebooks.items(), 1):
        passed = {k: v for k, v in parameters.items() if k in declared}
        if not again and _is_finished(path, target, passed):
            say(f"[{number}/{len(notebooks)}] {path.stem}: finished before")
            continue
        say(f"[{number}/{len(notebooks)}] {path.stem}")
        began = time.monotonic()
        _mark(path, target).unlink(missing_ok=True)
        execute(path, target, passed)
        made = {"made_from": _made_from(path, passed), "files": _files(target)}
        write_atomically(_mark(path, target), canonical(made))
        say(f"  done in {duration(time.monotonic() - began)}")
    say(f"All {len(notebooks)} notebooks done in {duration(time.monotonic() - start)}")
    return Path(write_page(target))


def run_shard(
    profile: str | Path,
    share: Shard,
    out: str | Path | None = None,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    executor: str = "workers",
    address: str | None = None,
) -> str:
    """Compute the cells of all stages of a profile that are this shard's; return what was done.

    One task and seed is finished before the next begins. No notebook is run: tables, figures and
    page need the cells of all shards. Raises as `run` does.
    """
    name, parameters = profiles.settle(profile, out, overrides)
    target = profiles.make_folder(parameters)
    say(f"Shard {share} of profile {name} in {target}")
    study = Study(parameters)
    cells = study.keep_plans()
    mine = [cell for cell in cells if share.has(cell)]
    study.compute(mine, f"shard {share}", executor, address)
    for line in estimate.compare(target):
        say(line)
    return (
        f"Shard {share}: its {len(mine)} of {len(cells)} cells are done, in {target / 'records'}\n"
        "Tables, figures and page need the cells of all shards: copy their records folders "
        "together,\nthen give the same command without a shard."
    )


def sequence(models: Iterable[str]) -> list[Path]:
    """The notebooks to run, in order: that of the organism only where it is among the models."""
    found = sorted(notebook_folder().glob("[0-9][0-9]_*.ipynb"))
    return [path for path in found if "organism" in models or path.stem != ORGANISM_NOTEBOOK]


# -- one notebook ----------------------------------------------------------------------------------


def execute(
    path: Path, target: Path, parameters: Mapping[str, Any], timeout: float | None = None
) -> None:
    """Run a notebook to ``target/notebooks``; `timeout` in seconds bounds each cell.

    Raises NotebookFailed; the notebook as far as it came is kept beside it, as ``.failed.ipynb``.
    """
    done, failed = (target / "notebooks" / f"{path.stem}{end}.ipynb" for end in ("", ".failed"))
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # it is all told below
    with tempfile.TemporaryDirectory(prefix="healing-") as scratch:
        # The half-executed notebook lies outside the run's folder, which may be a slow drive.
        executed = Path(scratch) / path.name
        for trial in range(1, KERNEL_STARTS + 1):
            place, cause = _execute(path, executed, parameters, timeout)
            if cause is None:
                write_atomically(done, executed.read_bytes())
                failed.unlink(missing_ok=True)
                return
            if place or trial == KERNEL_STARTS:
                break
            say(f"  the kernel did not start ({cause}); trying again")
            time.sleep(random.uniform(0.5, 2.0))
        if executed.exists():
            write_atomically(failed, executed.read_bytes())
    kept = f"\n  The notebook as far as it came: {failed}" if failed.exists() else ""
    raise NotebookFailed(
        f"{path.stem} stopped at {place or 'its start'}\n  {cause}{kept}\n"
        "  Finished cells of the study are kept: the same command goes on from there."
    )


def _execute(
    path: Path, executed: Path, parameters: Mapping[str, Any], timeout: float | None
) -> tuple[str, str | None]:
    """The last cell that was begun, and why it was the last, None where all were."""
    place = ""

    def on_cell_start(cell: Any, cell_index: int) -> None:
        nonlocal place
        if cell.cell_type == "code" and cell.source.strip():
            place = f"cell {cell_index + 1}: {_first_line(cell.source)}"

    # Bars written to the terminal reach it and stay out of the notebook.
    usual = {"HEALING_PROGRESS": "terminal", "JUPYTER_PREFER_ENV_PATH": "1", **HUGE_PAGES}
    for name, value in usual.items():
        os.environ.setdefault(name, value)
    try:
        papermill.execute_notebook(
            str(path),
            str(executed),
            parameters=dict(parameters),
            kernel_name="python3",
            progress_bar=False,
            execution_timeout=timeout,
            on_cell_start=on_cell_start,
            extra_arguments=[
                "--IPKernelApp.capture_fd_output=False",
                "--IPKernelApp.log_level=50",
                f"--IPKernelApp.exec_lines=import gc; gc.set_threshold({COLLECT_AFTER})",
            ],
        )
    except PapermillExecutionError as error:
        value = re.sub(r"\x1b\[[0-9;]*m", "", error.evalue or "").strip()
        return place, f"{error.ename}: {value.splitlines()[0] if value else ''}".rstrip(": ")
    except CellTimeoutError:
        return place, f"the cell took longer than {duration(timeout)}"
    except DeadKernelError:
        return place, "the kernel died: killed, out of memory, or crashed"
    except Exception as error:  # the kernel's, or the connection's to it
        return place, f"{type(error).__name__}: {' '.join(str(error).split())}"
    return place, None


def _first_line(source: str) -> str:
    """The first line of code of a cell, without comments, short enough for a terminal."""
    lines = [line.strip() for line in source.splitlines()]
    code = [line for line in lines if line and not line.startswith(("#", "%"))] or lines
    return code[0] if len(code[0]) <= 60 else code[0][:57] + "..."


# -- what is finished ------------------------------------------------------------------------------


def _mark(notebook: Path, target: Path) -> Path:
    return target / "finished" / f"{notebook.stem}.json"


def _is_finished(notebook: Path, target: Path, parameters: Mapping[str, Any]) -> bool:
    """Whether executing the notebook again would show the same: it was made from the same source,
    parameters and code, no record has come since, and nothing that was there is gone."""
    try:
        kept = json.loads(_mark(notebook, target).read_text("utf-8"))
        made_from, files = kept["made_from"], set(kept["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    now = set(_files(target))
    new = {name for name in now - files if name.startswith("records/")}
    executed = (target / "notebooks" / notebook.name).exists()
    return executed and files <= now and not new and made_from == _made_from(notebook, parameters)


def _files(target: Path) -> list[str]:
    """The records, tables and figures of a run, in order."""
    found = (p for part in ("records/*/*.json", "tables/*", "figures/*") for p in target.glob(part))
    return sorted(path.relative_to(target).as_posix() for path in found)


def _made_from(notebook: Path, parameters: Mapping[str, Any]) -> str:
    """A digest of the cells of the notebook (not their outputs), its parameters, and the code."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    source = [["".join(cell["source"]), cell["metadata"].get("tags")] for cell in cells]
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return digest({"cells": source, "parameters": dict(parameters), "code": code.hexdigest()})
