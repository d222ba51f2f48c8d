"""What a run is: notebooks, a profile of their parameters, a folder, and a share of the cells."""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from healing_utils import organism
from healing_utils.base.errors import HealingError, choose
from healing_utils.base.paths import run_folder
from healing_utils.study.parameters import Parameters, read_parameters, read_yaml, refuse_another


def notebook_folder() -> Path:
    """The folder with the notebooks and profiles: the checkout's, else the installed copy."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "notebooks"
    return checkout if (checkout / "profiles").is_dir() else package / "_notebooks"


def known_profiles() -> dict[str, Path]:
    """The profiles that a name stands for."""
    return {path.stem: path for path in sorted(notebook_folder().glob("profiles/*.y*ml"))}


def sequence(parameters: Mapping[str, Any]) -> list[Path]:
    """The notebooks to run, in order: that of the organism only where it is studied on its own
    texts."""
    found = sorted(notebook_folder().glob("[0-9][0-9]_*.ipynb"))
    own = "organism" in parameters["model"] and set(organism.TASKS) & set(parameters["task"])
    return [path for path in found if own or path.stem != "00_model_organism"]


def declared_parameters(path: Path) -> set[str]:
    """The names that a notebook's parameters cell assigns. (Papermill's own inspection goes by
    lines, and loses those with an equals sign in the comment.)"""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    source = "".join(text for cell in tagged for text in cell["source"])
    return set(re.findall(r"^(\w+)\b[^=\n]*=", source, re.MULTILINE))


def describe_parameters() -> str:
    """Every parameter with its default and what it means, a line each."""
    source = inspect.getsource(Parameters)
    said = dict(re.findall(r"^    (\w+): .*  # (.+)$", source, re.MULTILINE))
    defaults = {name: json.dumps(value) for name, value in read_parameters({}).items()}
    lines = [f"  {name:18} {value:24} {said.get(name, '')}" for name, value in defaults.items()]
    return "\n".join(["parameters, with their defaults:", *map(str.rstrip, lines), ""])


def read_profile(profile: str | Path) -> dict[str, Any]:
    """The parameters of a profile, given by its name or as the path of a YAML file. Raises
    HealingError if there is no such profile or it is not a flat mapping."""
    path = Path(profile)
    if path.suffix not in (".yaml", ".yml"):
        profiles = known_profiles()
        path = profiles[choose(str(profile), profiles, "profile")]
    if not path.is_file():
        raise HealingError(f"no such profile: {path}")
    try:
        values = read_yaml(path.read_text("utf-8")) or {}
    except (OSError, ValueError) as error:
        raise HealingError(f"profile {path}: {error}") from error
    if not isinstance(values, dict):
        raise HealingError(f"{path} must hold one 'name: value' a line")
    return {"run": f"data/runs/{path.stem}", **values}


def settle(profile: str | Path, out: str | Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """A profile's parameters with the `given` on top, checked; `run` is the absolute folder `out`,
    or the profile's own. Raises HealingError for a wrong name or value, and where the folder holds
    a run with other parameters."""
    parameters = read_parameters({**read_profile(profile), **given})
    target = run_folder(out or parameters["run"])
    refuse_another(target, parameters)
    return parameters | {"run": str(target)}


def share(cells: list[Any], shard: str | None) -> list[Any]:
    """Those of the cells that are of a shard, ``2/8``; None is all. A cell's key alone decides, so
    that machines that never speak to each other agree. Raises HealingError for any other text."""
    found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", "1/1" if shard is None else shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise HealingError(f"shard {shard!r} must be i/n with i from 1 to n, such as 2/8")
    return [cell for cell in cells if int(cell.key, 16) % int(found[2]) == int(found[1]) - 1]
