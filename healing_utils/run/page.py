"""The page of a run: its analysis notebook as HTML, in `templates/healing`, and around it what else
the run holds. It needs nothing but the run's folder: no script runs, no address outside is asked.
"""

import html
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import yaml
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter

from healing_utils.base.errors import HealingError
from healing_utils.base.paths import project_root
from healing_utils.base.records import read_json, write_atomically
from healing_utils.run.status import progress

ANALYSIS = ("05_analysis", "05_analysis.failed")  # the page's notebook, or as far as it came
HARMFUL = ["script", "iframe", "object", "embed", "link", "base", "meta", "form"]
TEMPLATES = str(Path(__file__).parent / "templates")
EXPORTER = HTMLExporter(template_name="healing", extra_template_basedirs=[TEMPLATES])
OUTSIDE = re.compile(r"\s*(?!data:image/)([a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)
CODE_ADDRESS = re.compile(r"\s*(javascript|data):", re.IGNORECASE)


def write_page(run: Path) -> Path:
    """Write ``index.html`` and ``notebooks/NAME.html`` into a run's folder; return the page's path.
    What is missing or cannot be read is named there; HealingError where the folder is missing."""
    if not run.is_dir():
        raise HealingError(f"no such run: {run}")
    name = run.resolve().name
    books = {path.stem: _book(path, run) for path in sorted(run.glob("notebooks/*.ipynb"))}
    missing = [f"{b['name']} {b['status']}" for b in books.values() if b["state"] != "good"]
    if ANALYSIS[0] not in books:
        missing.append(f"{ANALYSIS[0]} is not there yet")
    for stage, cells, left in progress(run):
        missing += [f"{len(left)} of {len(cells)} cells of {stage}"] if left else []
    title = f"Healing study: {name}"
    empty = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {title}")])
    shown = (books[stem]["notebook"] for stem in ANALYSIS if "href" in books.get(stem, {}))
    notebook = next(shown, empty)
    parameters = read_json(run / "parameters.json")
    parameters.pop("run", None)  # where it lay when it was made means nothing to a reader
    page = {
        "index": True, "name": name, "title": title, "missing": missing, "parameters": parameters,
        "profile": yaml.safe_dump(parameters, sort_keys=False, default_flow_style=None, width=90),
        "figures": _figures(run / "figures", notebook), "notebooks": list(books.values()),
        "tables": sorted(path.name for path in run.glob("tables/*.csv")), **_made(run),
    }  # fmt: skip
    write_atomically(run / "index.html", _render(notebook, run, page))
    return run / "index.html"


def _book(path: Path, run: Path) -> dict[str, Any]:
    """An executed notebook, made HTML beside it, and what the page says about it."""
    book: dict[str, Any] = {"name": path.stem, "title": path.stem}
    try:
        notebook = book["notebook"] = nbformat.read(path, as_version=4)
        code = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
        errors = [o.ename for c in code for o in c.outputs if o.output_type == "error"]
        ran = sum(cell.execution_count is not None for cell in code)
        book["state"] = "bad" if errors else "good" if ran == len(code) else "half"
        stopped = f", then it stopped with {errors[0]}" if errors else ""
        book["status"] = f"{ran} of {len(code)} code cells ran{stopped}"
        book["seconds"] = notebook.metadata.get("papermill", {}).get("duration")
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        book["title"] = (re.findall(r"^# (.+)", text, re.MULTILINE) or [path.stem])[0]
        write_atomically(path.with_suffix(".html"), _render(notebook, run, book))
        book["href"] = f"notebooks/{path.stem}.html"
    except Exception as error:  # one bad notebook must not hide the others
        book |= {"state": "bad", "status": f"cannot be shown: {type(error).__name__}: {error}"}
    return book


def _figures(folder: Path, notebook: nbformat.NotebookNode) -> list[dict[str, Any]]:
    """The saved figures in their order; `shown` are those that the notebook shows itself."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    body = "".join(str(output.get("data", {}).get("text/html", "")) for output in outputs)
    captions, figures = read_json(folder / "captions.json"), []
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
        match read_json(path):
            case {"made": {"versions": versions, **settings}, "times": {"finished": moment}}:
                cells += 1
                finished = max(finished, moment[:16].replace("T", " "))
                for name, value in (settings | versions).items():
                    made.setdefault(name, Counter())[str(value)] += 1
            case _:
                unreadable += 1
    mixed = [name for name, values in made.items() if len(values) > 1]
    return dict(made=made, mixed=mixed, cells=cells, unreadable=unreadable, finished=finished)


def _render(notebook: nbformat.NotebookNode, run: Path, page: dict[str, Any]) -> str:
    """The notebook in the template, without what reaches out of the run or names its place."""
    text, _ = EXPORTER.from_notebook_node(notebook, {"page": page})
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
    text, places = str(soup), dict.fromkeys((run.resolve(), run.absolute()), run.resolve().name)
    for place, name in (places | {project_root(): ".", os.path.expanduser("~"): "~"}).items():
        if str(place) != "/":
            text = re.sub(rf"(?<![\w+/.-]){re.escape(str(place))}(?![\w.-])", name, text)
    return text
