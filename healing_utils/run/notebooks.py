"""The notebooks as files: what every one of them opens with, and what a committed one must be.

The repository's address is written here once. ``make badges REPO=owner/name`` puts another one into
this module and into every notebook.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from healing_utils.base.errors import HealingError

REPOSITORY = "OWNER/healing"

SIZE_LIMIT = 1_000_000  # bytes; GitHub stops rendering notebooks not far above
IMAGES = ("image/png", "image/jpeg", "image/svg+xml")

# Its variables live in a function: what a notebook's namespace holds after the parameter cell are
# parameters, and nothing else.
BOOTSTRAP = """\
# Where the project is not installed (on Colab, say), install it and keep the torch that is there.
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile


def install(repository):
    source = os.environ.get("HEALING_REPOSITORY") or f"https://github.com/{repository}"
    if not os.path.exists(source) and not source.startswith("git+"):
        source = "git+" + source
    command = [sys.executable, "-m", "pip", "install", "--quiet", source]
    if importlib.util.find_spec("torch"):
        with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as constraint:
            constraint.write("torch==" + importlib.metadata.version("torch"))
        command += ["--constraint", constraint.name]
    subprocess.run(command, check=True)
    importlib.invalidate_caches()
    import torch

    gpu = torch.cuda.is_available()
    print("Installed. Device:", torch.cuda.get_device_name() if gpu else "CPU, no GPU was found")


if importlib.util.find_spec("healing_utils") is None:
    install("@REPOSITORY@")
"""


def folder() -> Path:
    """The folder with the notebooks and profiles: the checkout's, else the installed copy."""
    here = Path(__file__).resolve().parents[1]
    for candidate in (here.parent / "notebooks", here / "_notebooks"):
        if (candidate / "profiles").is_dir():
            return candidate
    raise HealingError(f"no notebooks beside {here}; install the package again")


def bootstrap_cell() -> str:
    """The source of every notebook's second cell."""
    return BOOTSTRAP.replace("@REPOSITORY@", REPOSITORY).strip()


def badge(name: str) -> str:
    """Markdown of the Colab badge of the notebook called `name`, for example ``01_baseline``."""
    address = "https://colab.research.google.com/github"
    return (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"({address}/{REPOSITORY}/blob/main/notebooks/{name}.ipynb)"
    )


def write_repository(address: str, root: Path | None = None) -> list[Path]:
    """Replace the repository's address wherever the checkout at `root` gives it; return the files.

    Raises HealingError if `address` is not ``owner/name``.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+", address):
        raise HealingError(f"{address!r} is not a repository's address; expected owner/name")
    root = Path(root or Path(__file__).resolve().parents[2])
    module = root / "healing_utils" / "run" / "notebooks.py"
    stated = re.search(r'^REPOSITORY = "(.+)"$', module.read_text("utf-8"), re.MULTILINE)
    if stated is None:
        raise HealingError(f"{module} states no REPOSITORY")
    old = stated[1]
    changed = []
    # Text, not JSON, is replaced, so that nothing else in a notebook changes.
    for path in [module, root / "README.md", *sorted((root / "notebooks").glob("*.ipynb"))]:
        text = path.read_text("utf-8") if path.exists() else ""
        new = re.sub(rf"(?<![\w.-]){re.escape(old)}(?![\w-])", address, text)
        if new != text:
            path.write_text(new, "utf-8")
            changed.append(path)
    return changed


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


def problems(path: Path) -> list[str]:
    """What keeps the notebook at `path` from being committed, one line each; empty if nothing does.

    A committed notebook opens with title, badge, bootstrap and parameters; it was executed from top
    to bottom, without errors and without noise; its images can be read aloud; it is small.
    """
    with quick_import():
        import nbformat

    path = Path(path)
    found = []
    text = path.read_text("utf-8")
    stored = json.loads(text)  # reading with nbformat would silently mend the ids
    if (stored["nbformat"], stored["nbformat_minor"]) != (4, 5):
        return [f"nbformat is {stored['nbformat']}.{stored['nbformat_minor']}, expected 4.5"]
    ids = [cell.get("id") for cell in stored["cells"]]
    if None in ids or len(set(ids)) < len(ids):
        return ["cell ids are missing or repeated"]
    nb = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    try:
        nbformat.validate(nb)
    except nbformat.ValidationError as error:
        found.append("not a valid notebook: " + str(error).splitlines()[0])
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    if path.stat().st_size >= SIZE_LIMIT:
        found.append(f"{path.stat().st_size:,} bytes, the limit is {SIZE_LIMIT:,}")
    return found + _opening_problems(nb, path.stem) + _output_problems(nb)


def _opening_problems(nb: Any, name: str) -> list[str]:
    """Title and badge, bootstrap, parameters: the first three cells."""
    found = []
    if len(nb.cells) < 3:
        return ["fewer than three cells"]
    title, bootstrap, parameters = nb.cells[:3]
    if title.cell_type != "markdown" or not title.source.startswith("# "):
        found.append("the first cell is not a title")
    if badge(name) not in title.source:
        found.append("the first cell has no Colab badge of this notebook")
    if bootstrap.source.strip() != bootstrap_cell():
        found.append("the second cell is not the bootstrap cell")
    tagged = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or tagged[0] is not parameters or parameters.cell_type != "code":
        return [*found, "the third cell, and no other, must be code tagged 'parameters'"]
    try:
        literals(parameters.source)
    except (ValueError, SyntaxError) as error:
        found.append(f"in the parameters cell, {error}")
    return found


def _output_problems(nb: Any) -> list[str]:
    """Executed in order, no error, no noise, alternative text for every image."""
    found = []
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("the cells were not executed from top to bottom, once each")
    for number, cell in enumerate(code, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number} ended in {output.ename}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {number} wrote to standard error: {output.text.strip()[:60]!r}")
            for kind in set(IMAGES) & set(output.get("data", {})):
                described = output.metadata.get(kind, {}).get("alt") or output.metadata.get("alt")
                if not described:
                    found.append(f"cell {number} shows an image without alternative text")
            for text in (output.get("data", {}).get("text/html", ""), output.get("text", "")):
                found += _plain_images("".join(text), f"cell {number}")
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "markdown":
            found += _plain_images(cell.source, f"text cell {number}")
    return found


def _plain_images(text: str, where: str) -> list[str]:
    """Images in HTML or Markdown that have no alternative text."""
    bare = [
        tag for tag in re.findall(r"<img\b[^>]*>", text) if not re.search(r"\balt=.[^'\"]", tag)
    ]
    bare += re.findall(r"!\[\s*\]\(", text)
    return [f"{where} shows an image without alternative text"] * len(bare)


if __name__ == "__main__":
    import sys

    try:
        for written in write_repository(sys.argv[1]):
            print("wrote", written)
    except HealingError as error:
        sys.exit(str(error))
