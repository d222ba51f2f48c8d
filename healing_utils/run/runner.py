"""The sequence of notebooks under papermill, as one run that can be stopped and goes on.

Each notebook runs in a process of its own: papermill is not safe across threads. The process tells
this one what it does, one JSON object a line on its standard output; what the kernel itself writes
to the terminal goes to standard error. The process ends when its standard input does, so that even
after a SIGKILL of the run no kernel goes on computing behind its back.

Where cells are shared by several processes, the further ones are started here, once: they compute
beside each notebook and run ahead to the stages of those that follow.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.paths import run_folder
from healing_utils.base.records import STALE, write_atomically
from healing_utils.run import executors, finished
from healing_utils.run import notebooks as notebook_files
from healing_utils.run.workers import COLLECT_AFTER

ORGANISM_NOTEBOOK = "00_model_organism"  # only worth running where the organism is studied
# In the order of the study: each notebook, by its name without the number, and its stages.
STAGES_OF = {
    "baseline": ("baseline",),
    "corruption": ("corruption", "harms"),
    "recovery": ("recovery", "scans"),
    "linguistics": ("probing", "neurons"),
}
BESIDE = {"linguistics": ("networks",)}  # and what else is computed for it, planned by no stage
STAGES = [stage for stages in STAGES_OF.values() for stage in stages]
NOT_COMPARED = ("run", "device")  # where a run lies and what it runs on do not make it another run
ESTIMATE = "estimate.json"  # in the run's folder, where `healing plan` was asked
DISK_WANTED = 2e9  # bytes free; the weights of the intact models are the largest part of a run
KERNEL_STARTS = 3  # tries: two kernels that start at once can pick the same port
# Pages of 2 MiB for what malloc hands out (glibc from 2.35 on; elsewhere it means nothing): a step
# that passes over all weights then looks up fewer addresses. Only a new process can be told.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SPEAK_EVERY = 60.0  # seconds between lines about a cell that takes long
STOP_PATIENCE = 15.0  # seconds a stopped notebook gets to release what it holds


class NotebookFailed(RuntimeError):
    """A notebook did not reach its end. The message names notebook, cell and cause."""


# -- where things are --------------------------------------------------------------------------


def find_run(name: str | None = None) -> Path:
    """The folder of a run, given as a path or as its name below data/runs; without a name, the run
    that something was written to last. Raises HealingError if there is none.
    """
    runs = {p.parent.name: p.parent for p in run_folder("data/runs").glob("*/parameters.json")}
    if name is not None:
        if Path(name).is_dir():
            return Path(name)
        return runs[choose(name, runs, "run")] if runs else _no_runs()
    return max(runs.values(), key=_last_written) if runs else _no_runs()


def _no_runs() -> Path:
    raise HealingError(f"no runs in {run_folder('data/runs')}; start one with: healing run quick")


def _last_written(run: Path) -> float:
    parts = (run, run / "plans", run / "notebooks", *(run / "records").glob("*"), run / "claims")
    return max(part.stat().st_mtime for part in parts if part.exists())


def read_profile(profile: str | Path, folder: Path | None = None) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a profile, given by its name or as the path of a YAML file.

    Raises HealingError if there is no such profile or it is not a flat mapping.
    """
    path = Path(profile)
    if path.suffix not in (".yaml", ".yml"):
        profiles = {
            p.stem: p for p in sorted((folder or default_notebooks()).glob("profiles/*.y*ml"))
        }
        path = profiles[choose(str(profile), profiles, "profile")]
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise HealingError(f"cannot read the profile {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HealingError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise HealingError(f"{path} must hold one 'name: value' a line")
    return path.stem, values


def default_notebooks() -> Path:
    """The folder with the project's notebooks."""
    return notebook_files.folder()


# -- what a run is -----------------------------------------------------------------------------


def computed_by(notebook: Path) -> tuple[str, ...]:
    """The stages whose cells a notebook computes, in order, and what it computes beside them."""
    subject = notebook.stem[3:]
    return (*BESIDE.get(subject, ()), *STAGES_OF.get(subject, ()))


def sequence(
    folder: Path, stages: Iterable[str] | None, parameters: Mapping[str, Any]
) -> list[Path]:
    """The notebooks to run, in order: all, or those named (``baseline`` or ``01_baseline``)."""
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise HealingError(f"no notebooks in {folder}")
    if stages is not None:
        named = {path.stem: path for path in found} | {path.stem[3:]: path for path in found}
        wanted = {named[choose(stage, named, "stage")] for stage in stages}
        return [path for path in found if path in wanted]
    models = parameters.get("model", [])
    with_organism = "organism" in ([models] if isinstance(models, str) else models)
    return [path for path in found if with_organism or path.stem != ORGANISM_NOTEBOOK]


def keep_parameters(run: Path, parameters: Mapping[str, Any], check: Callable) -> None:
    """Write ``parameters.json``, or see that the run's own are the same.

    Raises HealingError that says which differ: one folder holds one study.
    """
    path = run / "parameters.json"
    wanted = json.loads(json.dumps(dict(parameters)))
    if path.exists():
        try:
            stored = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise HealingError(f"{path} is not JSON ({error}); remove it to go on") from error
        # A parameter that came after that run has its default there.
        with contextlib.suppress(HealingError):
            stored = json.loads(json.dumps(check(stored)))
        names = sorted((stored.keys() | wanted.keys()) - set(NOT_COMPARED))
        differ = [name for name in names if stored.get(name) != wanted.get(name)]
        if differ:
            shown = "; ".join(f"{n} {stored.get(n)!r} there, {wanted.get(n)!r} now" for n in differ)
            raise HealingError(
                f"{run} holds a run with other parameters ({shown}); choose another --out"
            )
    write_atomically(path, json.dumps(wanted, indent=2) + "\n")


def settle(
    profile: str | Path,
    out: str | Path | None = None,
    overrides: Iterable[tuple[str, Any]] = (),
    folder: Path | None = None,
    check: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> tuple[str, Path, dict[str, Any]]:
    """A profile's name, the folder of its run, and its parameters with `overrides` on top, checked.

    Raises HealingError for a wrong name or value.
    """
    if check is None:
        from healing_utils.study.parameters import read_parameters as check
    name, given = read_profile(profile, folder)
    given |= dict(overrides)
    target = Path(out).absolute() if out else run_folder(given.get("run", f"data/runs/{name}"))
    return name, target, check({**given, "run": str(target)})


def run(
    profile: str | Path,
    out: str | Path | None = None,
    overrides: Iterable[tuple[str, Any]] = (),
    stages: Iterable[str] | None = None,
    *,
    notebooks: Path | None = None,
    check: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
    write_page: Callable[[Path], Path] | None = None,
    cell_timeout: float | None = None,
    again: bool = False,
) -> Path:
    """Run the notebooks of a profile, one after the other; return the path of the run's page.

    A notebook that would compute and show the same as before (`finished`) is not executed anew,
    unless `again`.

    `overrides` are ``(name, value)`` pairs on top of the profile. `check` turns given parameters
    into clean values (default `parameters.read_parameters`), `write_page` writes the page (default
    `page.write_page`). `cell_timeout` in seconds bounds each cell. Everything that finished is kept
    whatever happens, and the same call goes on from there.

    Raises HealingError before anything runs if a name or value is wrong, NotebookFailed if a
    notebook does not reach its end, KeyboardInterrupt if it is stopped.
    """
    folder = Path(notebooks or default_notebooks())
    name, target, chosen = _prepare(profile, out, overrides, stages, folder, check)
    say = _Speaker()
    say(f"Run of profile {name} in {target}")
    free = shutil.disk_usage(target).free
    if free < DISK_WANTED:
        say(f"Warning: only {free / 1e9:.1f} GB are free there, {DISK_WANTED / 1e9:.0f} are wanted")
    start = time.monotonic()
    computing = [path for path in chosen if computed_by(path)]

    def is_finished(path: Path) -> bool:
        stages = STAGES_OF.get(path.stem[3:], ())
        return not again and finished.is_finished(path, target, chosen[path], stages)

    with contextlib.ExitStack() as running:
        for number, (path, passed) in enumerate(chosen.items(), 1):
            if is_finished(path):
                say(f"[{number}/{len(chosen)}] {path.stem}: finished before")
                continue
            say(f"[{number}/{len(chosen)}] {path.stem}")
            # What lies before is finished; where the rest is too, workers have nothing to do.
            if not all(is_finished(p) for p in list(chosen)[number - 1 :] if p in computing):
                jobs = [(chosen[p], computed_by(p)) for p in computing]
                running.enter_context(executors.ahead(jobs, HUGE_PAGES))
                computing = []
            finished.unmark(path, target)
            _run_notebook(path, target, passed, say, cell_timeout)
            finished.mark(path, target, passed)
    say(f"All {len(chosen)} notebooks done in {duration(time.monotonic() - start)}")
    if write_page is None:
        from healing_utils.run.page import write_page
    page = Path(write_page(target))
    for line in _compared(target):
        say(line)
    return page


def _compared(target: Path) -> list[str]:
    """Estimated against measured time, where `healing plan` was asked."""
    if not (target / ESTIMATE).exists():
        return []
    from healing_utils.run.plan import compare

    return compare(target)


def run_shard(
    profile: str | Path,
    out: str | Path | None = None,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    notebooks: Path | None = None,
) -> str:
    """Compute the cells of all stages of a profile that are this shard's; return what was done.

    One task and seed is finished before the next begins. No notebook is run: tables, figures and
    page need the cells of all shards. Arguments as of `run`. Raises HealingError where input is
    wrong or cells failed, after all others are done.
    """
    from healing_utils.study.study import Study

    folder, share = Path(notebooks or default_notebooks()), executors.shard()
    name, target, chosen = _prepare(profile, out, overrides, None, folder, None)
    say = _Speaker()
    say(f"Shard {share} of profile {name} in {target}")
    # As in the notebooks: a parameter that none of them declares has its default.
    study = Study({k: v for passed in chosen.values() for k, v in passed.items()})
    for stage in STAGES:
        study.keep_plan(stage)
    cells = study.compute("everything", plan=False)
    for line in _compared(target):
        say(line)
    mine = sum(map(share.has, cells))
    return (
        f"Shard {share}: its {mine} of {len(cells)} cells are done, in {target / 'records'}\n"
        "Tables, figures and page need the cells of all shards: copy their records folders "
        "together,\nthen give the same command without a shard."
    )


def _prepare(
    profile: str | Path,
    out: str | Path | None,
    overrides: Iterable[tuple[str, Any]],
    stages: Iterable[str] | None,
    folder: Path,
    check: Callable[[Mapping[str, Any]], dict[str, Any]] | None,
) -> tuple[str, Path, dict[Path, dict[str, Any]]]:
    """Check everything, then make the run's folder; the profile's name, that folder, and the
    notebooks in order, each with the parameters that it is given."""
    if check is None:
        from healing_utils.study.parameters import read_parameters as check
    name, target, parameters = settle(profile, out, overrides, folder, check)
    chosen = sequence(folder, stages, parameters)
    declared = {path: notebook_files.declared_parameters(path) for path in chosen}
    _make_folder(target)
    keep_parameters(target, parameters, check)
    plain = json.loads(json.dumps(parameters))
    passed = {
        path: {k: v for k, v in plain.items() if k in there} for path, there in declared.items()
    }
    return name, target, passed


def _make_folder(target: Path) -> None:
    try:
        (target / "notebooks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HealingError(f"cannot make the folder {target}: {error.strerror}") from error


# -- one notebook ------------------------------------------------------------------------------


class _Speaker:
    """Lines about progress, on standard error; none where ``HEALING_PROGRESS`` is ``quiet``."""

    def __init__(self) -> None:
        self.quiet = os.environ.get("HEALING_PROGRESS") == "quiet"
        # A bar may stand on the terminal's current line.
        self.clear = "\r\x1b[K" if sys.stderr.isatty() else ""

    def __call__(self, line: str) -> None:
        if not self.quiet:
            print(self.clear + line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _run_notebook(
    path: Path, target: Path, parameters: dict[str, Any], say: _Speaker, timeout: float | None
) -> None:
    """Run one notebook to its place in the run's folder, starting its kernel again if need be."""
    done, failed = (target / "notebooks" / f"{path.stem}{end}.ipynb" for end in ("", ".failed"))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="healing-") as scratch:
        # The half-executed notebook lies outside the run's folder, which may be a slow drive.
        executed = Path(scratch) / path.name
        job = {"notebook": str(path), "executed": str(executed), "parameters": parameters}
        for trial in range(1, KERNEL_STARTS + 1):
            end = _watch({**job, "timeout": timeout}, target, path.stem, say)
            if end["event"] != "not started" or trial == KERNEL_STARTS:
                break
            say(f"  the kernel did not start ({end['cause']}); trying again")
            time.sleep(random.uniform(0.5, 2.0))
        if end["event"] == "done":
            write_atomically(done, executed.read_bytes())
            failed.unlink(missing_ok=True)
            say(f"  done in {duration(time.monotonic() - start)}{_recorded(target, path.stem)}")
            return
        if executed.exists():
            write_atomically(failed, executed.read_bytes())
    where = (
        f"cell {end['cell']} of {end['of']}: {end['source']}" if end.get("cell") else "its start"
    )
    kept = f"\n  The notebook as far as it came: {failed}" if failed.exists() else ""
    raise NotebookFailed(
        f"{path.stem} stopped at {where}\n  {end['cause']}{kept}\n"
        "  Finished cells of the study are kept: the same command goes on from there."
    )


def _watch(job: dict[str, Any], target: Path, name: str, say: _Speaker) -> dict[str, Any]:
    """Run a job in a process of its own, say how it goes, and return its last event."""
    usual = {"HEALING_PROGRESS": "terminal", "JUPYTER_PREFER_ENV_PATH": "1", **HUGE_PAGES}
    child = subprocess.Popen(
        [sys.executable, "-m", "healing_utils.run.runner"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=usual | os.environ,
        text=True,
        # Ctrl-C goes to this process alone, which then ends the child in order.
        start_new_session=True,
    )
    events: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        for line in child.stdout:
            events.put(json.loads(line))
        events.put(None)

    threading.Thread(target=listen, daemon=True).start()
    last: dict[str, Any] = {"event": "none"}
    cell_start = spoken = time.monotonic()
    try:
        child.stdin.write(json.dumps(job) + "\n")
        child.stdin.flush()
        while True:
            with contextlib.suppress(queue.Empty):
                event = events.get(timeout=1.0)
                if event is None:
                    break
                last = {**last, **event}
                cell_start = time.monotonic()
            now = time.monotonic()
            if last.get("cell") and now - spoken > SPEAK_EVERY:
                spoken = now
                say(
                    f"  cell {last['cell']} of {last['of']}, {duration(now - cell_start)}"
                    f"{_recorded(target, name)}: {last['source']}"
                )
    except BrokenPipeError:
        pass  # the child died before it read its job; its exit code says how
    finally:
        _end(child)
    if last["event"] not in ("done", "failed", "not started"):
        code = child.returncode
        cause = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        last |= {"event": "failed", "cause": f"the process that ran the notebook ended: {cause}"}
    return last


def _end(child: subprocess.Popen) -> None:
    """End a notebook's process: its standard input ends, and it has some seconds to follow."""
    with contextlib.suppress(OSError):
        child.stdin.close()
    try:
        child.wait(STOP_PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _recorded(target: Path, name: str) -> str:
    """``, 12 of 24 cells recorded`` for the stages that the notebook called `name` computes."""
    mine = [s for s in progress(target) if s.name in STAGES_OF.get(name[3:], ())]
    if not mine:
        return ""
    return f", {sum(s.done for s in mine)} of {sum(s.planned for s in mine)} cells recorded"


# -- inside a notebook's process ---------------------------------------------------------------


def _execute() -> int:
    """Execute the job on standard input; tell what happens on standard output."""
    # Whatever else writes to standard output, the kernel included, must not mix with the events.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as events:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        tell = _Teller(events)
        job = json.loads(sys.stdin.readline())
        threading.Thread(target=_follow_parent, daemon=True).start()
        tell(**_execute_notebook(job, tell))
        return 0


class _Teller:
    """Writes events; without a listener there is no one to tell."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __call__(self, **event: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(event), file=self.stream, flush=True)


def _follow_parent() -> None:
    """Stop when the parent does: its end of standard input closes, even on SIGKILL."""
    sys.stdin.read()
    signal.raise_signal(signal.SIGTERM)  # nbclient interrupts the kernel and shuts it down
    time.sleep(STOP_PATIENCE / 2)
    os._exit(1)


def _execute_notebook(job: dict[str, Any], tell: _Teller) -> dict[str, Any]:
    """Run papermill; return the last event, which says how it ended."""
    import logging

    gc.set_threshold(COLLECT_AFTER)
    with notebook_files.quick_import():
        import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # it is all told below
    place: dict[str, Any] = {}

    def on_cell_start(cell: Any, cell_index: int) -> None:
        if cell.cell_type == "code" and cell.source.strip():
            place["cell"] = place.get("cell", 0) + 1
            tell(event="cell", of=total, source=_first_line(cell.source), **place)

    total = _code_cells(job)
    try:
        papermill.execute_notebook(
            job["notebook"],
            job["executed"],
            parameters=job["parameters"],
            kernel_name="python3",
            progress_bar=False,
            execution_timeout=job["timeout"],
            on_cell_start=on_cell_start,
            # Bars written to the terminal reach it and stay out of the notebook.
            extra_arguments=[
                "--IPKernelApp.capture_fd_output=False",
                "--IPKernelApp.log_level=40",
                f"--IPKernelApp.exec_lines=import gc; gc.set_threshold({COLLECT_AFTER})",
            ],
        )
    except PapermillExecutionError as error:
        value = re.sub(r"\x1b\[[0-9;]*m", "", error.evalue or "").strip()
        cause = f"{error.ename}: {value.splitlines()[0] if value else ''}".rstrip(": ")
    except CellTimeoutError:
        cause = f"the cell took longer than {duration(job['timeout'])}"
    except Exception as error:  # the kernel's, or the connection's to it
        message = " ".join(str(error).split())
        if not place:
            return {"event": "not started", "cause": f"{type(error).__name__}: {message}"}
        cause = f"{type(error).__name__}: {message}"
        if isinstance(error, DeadKernelError):
            cause = "the kernel died: killed, out of memory, or crashed"
    else:
        return {"event": "done"}
    return {"event": "failed", "cause": cause}


def _code_cells(job: dict[str, Any]) -> int:
    """How many code cells will run; papermill adds one where it passes parameters."""
    cells = json.loads(Path(job["notebook"]).read_text("utf-8"))["cells"]
    code = sum(c["cell_type"] == "code" and bool("".join(c["source"]).strip()) for c in cells)
    return code + bool(job["parameters"])


def _first_line(source: str) -> str:
    """The first line of code of a cell, without comments, short enough for a terminal."""
    lines = [line.strip() for line in source.splitlines()]
    code = [line for line in lines if line and not line.startswith(("#", "%"))] or lines
    return code[0] if len(code[0]) <= 60 else code[0][:57] + "..."


# -- how far a run is --------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A stage's cells: how many are planned and done, which are missing, which are being computed.

    `missing` and `running` are names; `running` also says by whom and since when.
    """

    name: str
    planned: int
    done: int
    missing: list[str]
    running: list[str]


def progress(target: Path) -> Iterator[Stage]:
    """What each planned stage has done, read from the run's folder; nothing there is changed."""
    plans = []
    for path in (target / "plans").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            plans.append(json.loads(path.read_text("utf-8")))
    order = {name: number for number, name in enumerate(STAGES)}
    for plan in sorted(plans, key=lambda p: (order.get(p["stage"], len(order)), p["stage"])):
        records = target / "records"
        missing = [
            cell
            for cell in plan["cells"]
            # A cell of a scan is recorded in the stage that it belongs to.
            if not (records / cell.get("stage", plan["stage"]) / f"{cell['key']}.json").exists()
        ]
        claims = {cell["key"]: _claim(target, cell["key"]) for cell in missing}
        yield Stage(
            name=plan["stage"],
            planned=len(plan["cells"]),
            done=len(plan["cells"]) - len(missing),
            missing=[cell["name"] for cell in missing if not claims[cell["key"]]],
            running=[f"{c['name']} {claims[c['key']]}" for c in missing if claims[c["key"]]],
        )


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
    for stage in progress(target):
        lines.append(f"  {stage.name:12} {stage.done} of {stage.planned} cells done")
        lines += [f"    running  {name}" for name in stage.running]
        lines += [f"    missing  {name}" for name in stage.missing[:shown]]
        if len(stage.missing) > shown:
            lines.append(f"    missing  and {len(stage.missing) - shown} more")
    if len(lines) == 1:
        lines.append("  no stage has started")
    done = sorted(p.stem for p in (target / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    failed = [name for name in done if name.endswith(".failed")]
    lines.append("  notebooks done: " + (", ".join(sorted(set(done) - set(failed))) or "none"))
    lines += [f"  notebook failed: {target / 'notebooks' / name}.ipynb" for name in failed]
    if (target / "index.html").exists():
        lines.append(f"  page: {target / 'index.html'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(_execute())
