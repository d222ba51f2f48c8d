"""Where things lie. Writers and readers of a run's folder both ask here."""

import os
import re
from pathlib import Path

from healing_utils.base.records import digest


def file_name(name: str) -> str:
    """`name` as a file may be called: of a path in it the last part, and a short hash where it had
    to be changed, as two names may become one."""
    last = re.sub(r"^([^/\\_]*_)?.*[/\\]", r"\1", name)  # after a prefix: healed_owner/name
    plain = re.sub(r"[^\w.-]+", "-", last)[-60:]
    return name if plain == name else f"{plain}-{digest(name)[:6]}"


def project_root() -> Path:
    """The checkout that the package lies in, or the caller's folder for an installed package."""
    here = Path(__file__).resolve().parents[2]
    return here if (here / "pyproject.toml").is_file() else Path.cwd()


def run_folder(run: str | Path) -> Path:
    """The absolute folder of a run. A relative one lies below the caller's folder, as every path
    that a person gives; but the project's own, ``data/runs/NAME`` and ``data/results/NAME``, lie in
    the checkout whoever asks from where, and the former in the folder `HEALING_RUNS` where that is
    set, as tests and shared machines do."""
    run = Path(os.path.expanduser(run))  # which leaves a ~ that means nothing here
    elsewhere = os.environ.get("HEALING_RUNS")
    if elsewhere and run.parts[:2] == ("data", "runs"):
        return Path(os.path.expanduser(elsewhere)).resolve().joinpath(*run.parts[2:])
    own = run.parts[:2] in (("data", "runs"), ("data", "results"))
    return project_root() / run if own else Path.cwd() / run


def shown_folder(folder: Path) -> str:
    """A run's folder for people: what lies in the checkout by its place there, so that notebooks
    read alike everywhere, else its absolute path."""
    root = project_root()
    inside = root in folder.parents
    return f"{folder.relative_to(root)} in the project's folder" if inside else str(folder)
