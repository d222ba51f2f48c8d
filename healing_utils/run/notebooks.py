"""The notebooks as files: where they lie, and what parameters they declare."""

from __future__ import annotations

import ast
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from healing_utils.base.errors import HealingError
from healing_utils.base.records import write_atomically


def folder() -> Path:
    """The folder with the notebooks and profiles: the checkout's, else the installed copy."""
    here = Path(__file__).resolve().parents[1]
    for candidate in (here.parent / "notebooks", here / "_notebooks"):
        if (candidate / "profiles").is_dir():
            return candidate
    raise HealingError(f"no notebooks beside {here}; install the package again")


def declared_parameters(path: Path) -> dict[str, Any]:
    """The parameters that the notebook at `path` declares, with their defaults.

    They are read as Python, since papermill's own inspection goes by lines and passes over what it
    cannot parse. Raises HealingError if the cell tagged ``parameters`` holds anything but literals.
    """
    cells = json.loads(Path(path).read_text("utf-8"))["cells"]
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", []):
            try:
                return literals("".join(cell["source"]))
            except (ValueError, SyntaxError) as error:
                raise HealingError(f"in the parameters cell of {path}, {error}") from error
    return {}


def literals(source: str) -> dict[str, Any]:
    """Names and values of a cell that only assigns plain literals; ValueError otherwise."""
    values = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target = node.target
        else:
            raise ValueError(f"line {node.lineno} is not an assignment of one name")
        if not isinstance(target, ast.Name):
            raise ValueError(f"line {node.lineno} is not an assignment of one name")
        try:
            values[target.id] = ast.literal_eval(node.value)
        except ValueError:
            raise ValueError(f"{target.id} is not a plain literal") from None
    return values


def fold_parameters(path: Path) -> None:
    """Fold the copy of the parameters that papermill put into the executed notebook at `path`."""
    notebook = json.loads(path.read_text("utf-8"))
    for cell in notebook["cells"]:
        about = cell["metadata"]
        if "injected-parameters" in about.get("tags", []) and "jupyter" not in about:
            about["jupyter"] = {"source_hidden": True}
            write_atomically(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def quick_import() -> Iterator[None]:
    """Import nbformat, or what imports it, without compiling the grammars of web addresses.

    jsonschema reads them, for a second, in each process that imports it, to check formats that
    notebooks do not have. What is imported already is left as it is.
    """
    grammars = "rfc3987_syntax"
    unwanted = grammars not in sys.modules
    if unwanted:
        sys.modules[grammars] = None  # so that importing it fails, which jsonschema allows for
    try:
        yield
    finally:
        if unwanted:
            del sys.modules[grammars]
