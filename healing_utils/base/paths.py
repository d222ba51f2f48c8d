"""Where things lie. Writers and readers of a run's folder both ask here."""

import os
from pathlib import Path


def project_root() -> Path:
    """The checkout that the package lies in, or the current folder for an installed package."""
    here = Path(__file__).resolve().parents[2]
    return here if (here / "pyproject.toml").is_file() else Path.cwd()


def run_folder(run: str | Path) -> Path:
    """The folder of a run: absolute, or below the project root; ``data/runs/NAME`` lies in the
    folder `HEALING_RUNS` where that is set, as tests and shared machines do."""
    run = Path(run).expanduser()
    elsewhere = os.environ.get("HEALING_RUNS")
    if elsewhere and run.parts[:2] == ("data", "runs"):
        return Path(elsewhere).expanduser().resolve().joinpath(*run.parts[2:])
    return project_root() / run
