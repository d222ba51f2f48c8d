"""A run: every cell that the profile plans, in one pool; then the notebooks under papermill, which
find them all; then the page. It can be stopped at any moment, and the same call goes on."""

import hashlib
import json
import logging
import os
import random
import re
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from healing_utils.base.errors import HealingError
from healing_utils.base.records import digest, read_json, write_atomically
from healing_utils.run import estimate, profiles
from healing_utils.run.page import ANALYSIS, write_page
from healing_utils.study.pool import COLLECT_AFTER, HUGE_PAGES, Ray
from healing_utils.study.study import Study

KERNEL_STARTS = 3  # two kernels that start at once can pick the same port


def say(line: str) -> None:
    """A line about progress, on standard error; none where ``HEALING_PROGRESS`` is ``quiet``."""
    if line and os.environ.get("HEALING_PROGRESS") != "quiet":
        print(line, file=sys.stderr, flush=True)


def run(
    profile: str | Path,
    out: str | Path | None = None,
    parameters: dict[str, Any] | None = None,
    executor: str = "workers",
    address: str | None = None,
    shard: str | None = None,
    again: bool = False,
) -> str:
    """Compute a profile's cells, run its notebooks, write the page; return the page's path.

    `parameters` go before the profile's; `executor` and `address` as of `Study.compute`. With a
    `shard` (``2/8``) only that share of the cells is computed and no notebook is run, as they need
    the cells of all shards. With `again` notebooks are executed anew that would show the same.
    Raises HealingError before anything runs if a name or value is wrong or Ray is not there, and
    for cells that failed or a notebook that does not reach its end."""
    profiles.share([], shard)
    settled = profiles.settle(profile, out, parameters or {})
    books = {p: profiles.declared_parameters(p) for p in profiles.sequence(settled)}
    study = Study(settled)
    if executor == "ray":  # before anything is written
        Ray(study, lambda: Study(settled), address).close()
    target, what = Path(settled["run"]), f"shard {shard}" if shard else "all stages"
    cells = study.keep_plans()  # and the parameters; the first that is written
    say(f"Profile {profile}, {what}, in {target}")
    say("\n".join(study.vocabulary_notes()))
    mine = profiles.share(cells, shard)
    study.compute(mine, what, executor, address)
    study.close()
    say(estimate.compare(study, mine))
    if shard:
        return (
            f"Shard {shard}: its {len(mine)} of {len(cells)} cells are done, in {target}\nCopy the "
            "records folders of all shards together, then give the same command without a shard."
        )
    for number, (path, declared) in enumerate(books.items(), 1):
        passed = {name: value for name, value in settled.items() if name in declared}
        finished = not again and _is_finished(path, target, passed)
        say(f"[{number}/{len(books)}] {path.stem}{': finished before' if finished else ''}")
        if not finished:
            execute(path, target, passed)
    return str(write_page(target))


def report(run: Path) -> str:
    """Draw a run's analysis again where its tables and figures are not what its records gave, and
    write its page; return the page's path. An analysis that fails is told there."""
    path = profiles.notebook_folder() / f"{ANALYSIS[0]}.ipynb"
    known = read_json(run / "parameters.json") | {"run": str(run.absolute())}
    passed = {name: known[name] for name in known.keys() & profiles.declared_parameters(path)}
    if any(run.glob("records/*/*.json")) and not _is_finished(path, run, passed):
        try:
            execute(path, run, passed)
        except HealingError as error:
            say(str(error))
    return str(write_page(run))


def execute(path: Path, target: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook to ``target/notebooks``, with what it was made from and made in its metadata.
    Raises HealingError where it stops, and keeps it as far as it came, as ``.failed.ipynb``."""
    if not target.is_dir():  # a kernel would begin it a second time
        raise HealingError(f"the run's folder {target} is gone; was it moved?")
    done, place, cause = target / "notebooks" / path.name, "its start", ""
    failed = done.with_suffix(".failed.ipynb")

    def on_cell_start(cell: Any, cell_index: int) -> None:
        nonlocal place
        if cell.cell_type == "code":
            code = re.sub(r"(?m)^\s*[#%].*\n?", "", cell.source)  # without comments
            place = f"cell {cell_index + 1}: {textwrap.shorten(code, 60)}"

    # Bars written to the terminal reach it and stay out of the notebook.
    usual = {"HEALING_PROGRESS": "terminal", "JUPYTER_PREFER_ENV_PATH": "1", **HUGE_PAGES}
    os.environ.update(usual | os.environ)
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # it is all told here
    done.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="healing-") as scratch:
        # The half-executed notebook lies outside the run's folder, which may be a slow drive.
        executed = Path(scratch) / path.name
        settings = [
            "--IPKernelApp.capture_fd_output=False", "--IPKernelApp.log_level=50",
            f"--IPKernelApp.exec_lines=import gc; gc.set_threshold({COLLECT_AFTER})",
        ]  # fmt: skip
        try:
            for left in range(KERNEL_STARTS)[::-1]:
                try:
                    papermill.execute_notebook(
                        path, executed, parameters, kernel_name="python3", progress_bar=False,
                        on_cell_start=on_cell_start, extra_arguments=settings,
                    )  # fmt: skip
                    break
                except Exception:
                    if place != "its start" or not left:
                        raise
                    time.sleep(random.uniform(0.5, 2))
        except PapermillExecutionError as error:
            said = re.sub(r"\x1b\[[0-9;]*m", "", error.evalue or "").strip() or "no message"
            cause = f"{error.ename}: {said.splitlines()[0]}"
        except DeadKernelError:
            cause = "the kernel died: killed, out of memory, or crashed"
        except Exception as error:  # the kernel's, or the connection's to it
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        book = read_json(executed)
    if book:
        made = _drawn(target) if path.stem == ANALYSIS[0] else {}  # the others draw nothing
        book["metadata"]["healing"] = {"from": _made_from(path, target, parameters), "made": made}
        write_atomically(failed if cause else done, json.dumps(book, indent=1, ensure_ascii=False))
    if cause:
        kept = f" (as far as it came: {failed})" if book else ""
        raise HealingError(
            f"{path.stem} stopped at {place}: {cause}{kept}; finished cells are kept, and the same "
            "command goes on from there"
        )
    failed.unlink(missing_ok=True)


def _drawn(target: Path) -> dict[str, str]:
    """Hashes of the tables and figures there are, by their names."""
    files = [*target.glob("tables/*"), *target.glob("figures/*")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:20] for f in files if f.is_file()}


def _is_finished(path: Path, target: Path, parameters: dict[str, Any]) -> bool:
    """Whether executing the notebook again would show the same, and what it drew is as it was."""
    match read_json(target / "notebooks" / path.name):
        case {"metadata": {"healing": {"from": str(source), "made": dict(made)}}}:
            same = source == _made_from(path, target, parameters)
            return same and made.items() <= _drawn(target).items()
    return False


def _made_from(path: Path, target: Path, parameters: dict[str, Any]) -> str:
    """A digest of what a notebook shows: its cells (not their outputs), parameters, the code, and
    which records there are."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    source = [["".join(cell["source"]), cell["metadata"].get("tags")] for cell in cells]
    modules = sorted(Path(__file__).parents[1].rglob("*.py"))
    records = sorted(record.stem for record in target.glob("records/*/*.json"))
    return digest([source, parameters, [module.read_text("utf-8") for module in modules], records])
