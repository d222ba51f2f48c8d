"""What a run is: notebooks, a profile of their parameters, a folder, and a share of the cells."""

import ast
import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.paths import run_folder
from healing_utils.base.records import read_json
from healing_utils.study.parameters import read_parameters, read_yaml


def notebook_folder() -> Path:
    """The folder with the notebooks and profiles: the checkout's, else the installed copy."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "notebooks"
    return checkout if (checkout / "profiles").is_dir() else package / "_notebooks"


def sequence(models: Iterable[str]) -> list[Path]:
    """The notebooks to run, in order: that of the organism only where it is among the models."""
    found = sorted(notebook_folder().glob("[0-9][0-9]_*.ipynb"))
    return [path for path in found if "organism" in models or path.stem != "00_model_organism"]


def declared_parameters(path: Path) -> dict[str, Any]:
    """The parameters that a notebook declares, with their defaults: read as Python, as papermill's
    own inspection goes by lines. Raises HealingError if their cell holds anything but literals."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    try:
        source = "".join(text for cell in tagged for text in cell["source"])
        return dict(map(_assignment, ast.parse(source).body))
    except (ValueError, SyntaxError) as error:
        raise HealingError(f"in the parameters cell of {path}, {error}") from error


def _assignment(node: ast.stmt) -> tuple[str, Any]:
    match node:
        case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, value):
            with contextlib.suppress(ValueError):
                return name, ast.literal_eval(value)
    raise ValueError(f"line {node.lineno} is not one name and a plain literal")


def read_profile(profile: str | Path) -> dict[str, Any]:
    """The parameters of a profile, given by its name or as the path of a YAML file. Raises
    HealingError if there is no such profile or it is not a flat mapping."""
    path = Path(profile)
    if path.suffix not in (".yaml", ".yml"):
        profiles = {p.stem: p for p in sorted(notebook_folder().glob("profiles/*.y*ml"))}
        path = profiles[choose(str(profile), profiles, "profile")]
    try:
        values = read_yaml(path.read_text("utf-8")) or {}
    except (OSError, ValueError) as error:
        why = str(error).removeprefix("cannot be read as YAML: ")
        raise HealingError(f"cannot read the profile {path} as YAML: {why}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise HealingError(f"{path} must hold one 'name: value' a line")
    return {"run": f"data/runs/{path.stem}", **values}


def settle(profile: str | Path, out: str | Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """A profile's parameters with the `given` on top, checked; `run` is the absolute folder `out`,
    or the profile's own. Raises HealingError for a wrong name or value, and where the folder holds
    a run with other parameters."""
    parameters = read_parameters({**read_profile(profile), **given})
    target = Path(out).absolute() if out else run_folder(parameters["run"])
    parameters["run"] = str(target)
    path = target / "parameters.json"
    there = read_json(path)
    if path.exists() and not there:
        raise HealingError(f"{path} cannot be read; remove it to go on")
    # What that run did not know yet has its default there.
    for n, value in {**read_parameters({}), **there}.items() if there else ():
        if n not in ("run", "device") and value != parameters.get(n):  # those make no other run
            raise HealingError(
                f"{target} holds a run with other parameters ({n} {value!r} there, "
                f"{parameters.get(n)!r} now); choose another --out"
            )
    return parameters


def share(cells: list[Any], shard: str | None) -> list[Any]:
    """Those of the cells that are of a shard, ``2/8``; None is all. A cell's key alone decides, so
    that machines that never speak to each other agree. Raises HealingError for any other text."""
    found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", "1/1" if shard is None else shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise HealingError(f"shard {shard!r} must be i/n with i from 1 to n, such as 2/8")
    return [cell for cell in cells if int(cell.key, 16) % int(found[2]) == int(found[1]) - 1]
