"""Which notebooks of a run need not be executed again.

``RUN/finished/NAME.json`` says what an executed notebook was made from (its source, its parameters,
the package's code) and which records, tables and figures were there when it ended. It stands for as
long as these are, and every cell of its stages, planned anew from models and data as they are now,
has a whole record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from healing_utils.base.records import Store, canonical, digest, write_atomically

READS_ALL = "analysis"  # this notebook draws whatever records there are, so a new one changes it


def mark(notebook: Path, run: Path, parameters: Mapping[str, Any]) -> None:
    """Note that `notebook` has been executed in the folder `run` with `parameters`."""
    kept = {"made_from": _made_from(notebook, parameters), "files": _files(run)}
    write_atomically(_path(notebook, run), canonical(kept))


def unmark(notebook: Path, run: Path) -> None:
    """Forget it: the notebook is about to be executed."""
    _path(notebook, run).unlink(missing_ok=True)


def is_finished(
    notebook: Path, run: Path, parameters: Mapping[str, Any], stages: Sequence[str]
) -> bool:
    """Whether executing `notebook` again would compute and show the same.

    `stages` are those whose cells it computes. A corrupt record among them is set aside, as where
    it is read for its table. Raises HealingError where cells cannot be planned.
    """
    try:
        kept = json.loads(_path(notebook, run).read_text("utf-8"))
        made_from, files = kept["made_from"], set(kept["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if made_from != _made_from(notebook, parameters):
        return False
    if not (run / "notebooks" / notebook.name).exists():
        return False
    now = set(_files(run))
    new = {name for name in now - files if name.startswith("records/")}
    if not files <= now or (new and notebook.stem.endswith(READS_ALL)):
        return False
    if not stages:
        return True
    from healing_utils.study.study import Study

    store, study = Store(run), Study(parameters)
    return all(
        store.read(cell.stage, cell.key) is not None
        for stage in stages
        for cell in study.plan(stage)
    )


def _path(notebook: Path, run: Path) -> Path:
    return run / "finished" / f"{notebook.stem}.json"


def _files(run: Path) -> list[str]:
    """The records, tables and figures of a run, in order."""
    found = (
        p for pattern in ("records/*/*.json", "tables/*", "figures/*") for p in run.glob(pattern)
    )
    return sorted(path.relative_to(run).as_posix() for path in found)


def _made_from(notebook: Path, parameters: Mapping[str, Any]) -> str:
    """A digest of the cells of the notebook (not their outputs), its parameters, and the code."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    source = [["".join(cell["source"]), cell["metadata"].get("tags")] for cell in cells]
    return digest({"cells": source, "parameters": dict(parameters), "code": _code()})


def _code() -> str:
    """A digest of the package's modules."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()
