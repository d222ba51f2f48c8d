"""What a run is: a profile, the folder that it goes to, and a share of its cells."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from healing_utils.base.errors import HealingError, choose
from healing_utils.base.paths import run_folder
from healing_utils.base.records import write_atomically
from healing_utils.run.notebooks import folder as notebook_folder
from healing_utils.study.parameters import read_parameters

NOT_COMPARED = ("run", "device")  # where a run lies and what it runs on do not make it another run


def read_profile(profile: str | Path) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a profile, given by its name or as the path of a YAML file.

    Raises HealingError if there is no such profile or it is not a flat mapping.
    """
    path = Path(profile)
    if path.suffix not in (".yaml", ".yml"):
        profiles = {p.stem: p for p in sorted(notebook_folder().glob("profiles/*.y*ml"))}
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


def settle(
    profile: str | Path, out: str | Path | None, overrides: Iterable[tuple[str, Any]]
) -> tuple[str, dict[str, Any]]:
    """A profile's name, and its parameters with `overrides` on top, checked; `run` is the absolute
    folder `out`, or the profile's own. Raises HealingError for a wrong name or value, and where the
    folder holds a run with other parameters."""
    name, given = read_profile(profile)
    parameters = read_parameters({"run": f"data/runs/{name}", **given, **dict(overrides)})
    target = Path(out).absolute() if out else run_folder(parameters["run"])
    parameters = json.loads(json.dumps({**parameters, "run": str(target)}))
    path = target / "parameters.json"
    if path.exists():
        try:
            stored = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise HealingError(f"{path} is not JSON ({error}); remove it to go on") from error
        # A parameter that came after that run has its default there.
        with contextlib.suppress(HealingError):
            stored = json.loads(json.dumps(read_parameters(stored)))
        names = sorted((stored.keys() | parameters.keys()) - set(NOT_COMPARED))
        differ = [n for n in names if stored.get(n) != parameters.get(n)]
        if differ:
            shown = "; ".join(
                f"{n} {stored.get(n)!r} there, {parameters.get(n)!r} now" for n in differ
            )
            raise HealingError(
                f"{target} holds a run with other parameters ({shown}); choose another --out"
            )
    return name, parameters


def make_folder(parameters: Mapping[str, Any]) -> Path:
    """Make a run's folder, with its parameters in it."""
    target = Path(parameters["run"])
    try:
        (target / "notebooks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HealingError(f"cannot make the folder {target}: {error.strerror}") from error
    write_atomically(target / "parameters.json", json.dumps(dict(parameters), indent=2) + "\n")
    return target


@dataclass(frozen=True)
class Shard:
    """Share `index` (from 1) of `count`: a cell's key alone decides whose it is, so that machines
    that never speak to each other agree, whatever each has done already."""

    index: int = 1
    count: int = 1

    @classmethod
    def read(cls, text: str) -> Shard:
        """``2/8``. Raises HealingError for anything else."""
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise HealingError(f"shard {text!r} must be i/n with i from 1 to n, such as 2/8")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, cell: Any) -> bool:
        return int(cell.key, 16) % self.count == self.index - 1
