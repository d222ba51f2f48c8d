"""The page of a run: its analysis notebook as HTML, and around it what else the run holds.

`index.html` needs nothing but the run's folder: no script runs and no address outside of it is
asked. How it looks is in `templates/healing`. What a run does not hold (yet) is said on the page.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from bs4 import BeautifulSoup

from healing_utils.base.errors import HealingError
from healing_utils.base.paths import project_root
from healing_utils.base.records import write_atomically
from healing_utils.run.notebooks import fold_parameters, quick_import
from healing_utils.run.status import progress

with quick_import():
    import nbformat
    from nbconvert import HTMLExporter

ANALYSIS = ("05_analysis", "05_analysis.failed")  # the page's notebook, or as far as it came
HARMFUL = ["script", "iframe", "object", "embed", "link", "base", "meta", "form"]
OUTSIDE = re.compile(r"\s*(?!data:image/)([a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)
CODE_ADDRESS = re.compile(r"\s*(javascript|data):", re.IGNORECASE)


def write_page(run_folder: str | Path) -> Path:
    """Write ``index.html`` and ``notebooks/NAME.html`` into a run's folder; return the page's path.

    Reads ``notebooks/*.ipynb``, ``figures/`` with ``captions.json``, ``parameters.json``, and what
    plans and records say about progress, versions and devices. A part that is missing or cannot be
    read is named on the page. Raises HealingError only where the folder itself does not exist.
    """
    run = Path(run_folder)
    if not run.is_dir():
        raise HealingError(f"no such run: {run}")
    books = {path.stem: _book(path, run) for path in sorted(run.glob("notebooks/*.ipynb"))}
    name = run.resolve().name
    title = f"Healing study: {name}"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {title}")])
    for stem in reversed(ANALYSIS):
        if "href" in books.get(stem, {}):
            notebook = nbformat.read(run / "notebooks" / f"{stem}.ipynb", as_version=4)
    parameters = _read(run / "parameters.json")
    parameters.pop("run", None)  # where it lay when it was made means nothing to a reader
    page = {
        "index": True,
        "name": name,
        "title": title,
        "missing": _missing(run, books),
        "figures": _figures(run / "figures", notebook),
        "tables": sorted(path.name for path in run.glob("tables/*.csv")),
        "notebooks": list(books.values()),
        "parameters": parameters,
        "profile": yaml.safe_dump(parameters, sort_keys=False, default_flow_style=None, width=90),
        **_made(run),
    }
    write_atomically(run / "index.html", _render(notebook, run, page))
    return run / "index.html"


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the run; empty where it is missing or cannot be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _book(path: Path, run: Path) -> dict[str, Any]:
    """An executed notebook, made HTML beside it, and what the page says about it."""
    book = {"name": path.stem, "title": path.stem}
    try:
        fold_parameters(path)
        notebook = nbformat.read(path, as_version=4)
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        book["title"] = (re.findall(r"^# (.+)", text, re.MULTILINE) or [path.stem])[0]
        book["seconds"] = notebook.metadata.get("papermill", {}).get("duration")
        book["state"], book["status"] = _status(notebook)
        write_atomically(path.with_suffix(".html"), _render(notebook, run, book))
        book["href"] = f"notebooks/{path.stem}.html"
    except Exception as error:  # one bad notebook must not hide the others
        book |= {"state": "bad", "status": f"cannot be shown: {type(error).__name__}: {error}"}
    return book


def _status(notebook: nbformat.NotebookNode) -> tuple[str, str]:
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for number, cell in enumerate(code, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                return "bad", f"stopped in code cell {number} with {output.ename}"
    ran = sum(cell.execution_count is not None for cell in code)
    if ran < len(code):
        return "half", f"{ran} of {len(code)} code cells ran"
    return "good", f"ran to its end, {ran} code cell{'' if ran == 1 else 's'}"


def _missing(run: Path, books: dict[str, Any]) -> list[str]:
    """What is planned or has begun and is not done, in words."""
    unfinished = [book for book in books.values() if book["state"] != "good"]
    missing = [f"{book['name']} {book['status']}" for book in unfinished]
    if ANALYSIS[0] not in books:
        missing.append(f"{ANALYSIS[0]} is not there yet")
    for stage, cells, left in progress(run):
        if left:
            missing.append(f"{len(left)} of {len(cells)} cells of {stage}")
    return missing


def _figures(folder: Path, notebook: nbformat.NotebookNode) -> list[dict[str, Any]]:
    """The saved figures in their order; `shown` are those that the notebook shows itself."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    body = "".join(str(output.get("data", {}).get("text/html", "")) for output in outputs)
    captions = _read(folder / "captions.json")
    figures = []
    for name in dict.fromkeys([*captions, *sorted(path.stem for path in folder.glob("*.png"))]):
        if (folder / f"{name}.png").exists():
            figure = {"name": name, "alt": "", "caption": "", **captions.get(name, {})}
            figure["svg"] = (folder / f"{name}.svg").exists()
            figure["shown"] = f'alt="{html.escape(figure["alt"])}"' in body
            figures.append(figure)
    return figures


def _made(run: Path) -> dict[str, Any]:
    """What made the records: how many cells by version, device and threads, and when the last."""
    made: dict[str, Counter[str]] = {}
    cells, unreadable, finished = 0, 0, ""
    for path in run.glob("records/*/[!.]*.json"):
        match _read(path):
            case {"made": {"versions": versions, **settings}, "times": {"finished": moment}}:
                cells += 1
                finished = max(finished, moment)
                for name, value in (settings | versions).items():
                    made.setdefault(name, Counter())[str(value)] += 1
            case _:
                unreadable += 1
    mixed = [name for name, values in made.items() if len(values) > 1]
    found = {"made": made, "mixed": mixed, "cells": cells, "unreadable": unreadable}
    return found | {"finished": finished[:16].replace("T", " ")}


@functools.cache
def _exporter() -> HTMLExporter:
    templates = str(Path(__file__).parent / "templates")
    return HTMLExporter(template_name="healing", extra_template_basedirs=[templates])


def _render(notebook: nbformat.NotebookNode, run: Path, page: dict[str, Any]) -> str:
    """The notebook in the template, without what reaches out of the run or names its place."""
    text, _ = _exporter().from_notebook_node(notebook, {"page": page})
    soup = BeautifulSoup(text, "html.parser")
    for tag in soup.body(HARMFUL):
        tag.decompose()
    for tag in soup.body(True):
        for name in [n for n in tag.attrs if n.lower().startswith("on") or n == "srcset"]:
            del tag[name]
        address = tag.get("href", "")
        if OUTSIDE.match(tag.get("src", "")):
            tag.replace_with(f"[{tag['alt']}]" if tag.get("alt") else "")
        elif CODE_ADDRESS.match(address):
            del tag["href"]
        elif address.endswith(".ipynb") and not OUTSIDE.match(address):
            tag["href"] = ("notebooks/" if "index" in page else "") + address[:-5] + "html"
        elif tag.name == "table":
            tag.wrap(soup.new_tag("div", attrs={"class": "wide", "tabindex": "0"}))
    text = str(soup)
    places = {run.resolve(): run.resolve().name, run.absolute(): run.resolve().name}
    for place, name in (places | {project_root(): ".", os.path.expanduser("~"): "~"}).items():
        if str(place) != "/":
            text = re.sub(rf"(?<![\w+/.-]){re.escape(str(place))}(?![\w.-])", name, text)
    return text
