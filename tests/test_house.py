"""The house: floors that only look down, rooms that are read in one sitting, no private doors."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "healing_utils"
# What each floor may import, beside itself; everything below `run` may be used by the command line.
BELOW = {
    "base": set(),
    "organism": {"base"},
    "texts": {"base", "organism"},
    "healing": {"base", "texts", "organism"},  # whose weights are a model by name
    "probing": {"base", "texts", "healing"},
    "analysis": {"base"},
    "report": {"base", "analysis"},
    "study": {"base", "texts", "healing", "probing", "analysis"},
    "run": {"base", "study", "texts", "healing", "organism"},
    "cli": {"base", "run", "study", "__init__"},
    "__main__": {"cli"},
    "__init__": set(),
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def imported(path: Path) -> set[tuple[str, str]]:
    """(module, name) of every import of the package's own, wherever in the file it stands."""
    found, here = (
        set(),
        name_of(path) if path.name == "__init__.py" else name_of(path.parent / "__init__.py"),
    )
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"{here}.{node.module or ''}".rstrip(".") if node.level else node.module
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.add((whole, "") if whole in NAMES else (module, alias.name))
    return {pair for pair in found if pair[0].startswith("healing_utils")}


def floor(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_imports_go_down_and_take_no_private_name(name):
    for module, taken in imported(NAMES[name]):
        assert floor(module) in BELOW[floor(name)] | {floor(name)}, f"{name} imports {module}"
        assert not taken.startswith("_") or taken.startswith("__"), f"{name}: {module}.{taken}"


def test_no_import_goes_in_a_circle():
    graph = {name: {m for m, _ in imported(path)} - {name} for name, path in NAMES.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_rooms_are_small_and_the_house_is_thin():
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert {path.name: n for path, n in lines.items() if n > 500} == {}
    assert sum(lines.values()) <= 11450
