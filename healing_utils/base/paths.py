"""Where things lie. Writers and readers of a run's folder both ask here."""

from __future__ import annotations

import os
from pathlib import Path


def project_root() -> Path:
    """The checkout that the package lies in, or the current folder for an installed package."""
    here = Path(__file__).resolve().parents[2]
    return here if (here / "pyproject.toml").is_file() else Path.cwd()


def run_folder(run: str | Path) -> Path:
    """The folder of a run: absolute, or below the project root.

    With `HEALING_RUNS` set, ``data/runs/NAME`` lies in that folder instead: tests and shared
    machines keep runs out of the checkout with it.
    """
    run = Path(run).expanduser()
    if run.is_absolute():
        return run
    elsewhere = os.environ.get("HEALING_RUNS")
    if elsewhere and run.parts[:2] == ("data", "runs"):
        return Path(elsewhere).expanduser().resolve().joinpath(*run.parts[2:])
    return project_root() / run
