"""The page of a run: its analysis notebook as HTML, in `templates/healing`, and around it what else
the run holds. It needs nothing but the run's folder: no script runs, no address outside is asked.
"""

import csv
import html
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nbformat
import nh3
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter

from healing_utils.base.errors import HealingError
from healing_utils.base.paths import project_root
from healing_utils.base.records import read_json, write_atomically
from healing_utils.run.status import progress

ANALYSIS = ("05_analysis", "05_analysis.failed")  # the page's notebook, or as far as it came
GROUPS = {
    "Claims": "claims|controls", "Damage": "similarity|vulnerability|harms",
    "Healing": "healing|time_to_heal|recovery|scores|learning|price|league",
    "Knowledge": "layers|states|neurons|accuracy|knowledge|healed|ablation",
}  # fmt: skip
# What an image may come from: itself, or a file of the run.
IMAGE = re.compile(r"data:image/[a-z+]+;base64,[\w+/=\s]*|(?!/)[\w.%~/-]+", re.ASCII)
STYLES = """background-color border-radius color font-size font-weight height line-height margin
    margin-top max-width padding text-align width"""


def _allowed(tag: str, name: str, value: str) -> str | None:
    if name == "href":
        return None if re.match(r"\W*data\W*:", value, re.IGNORECASE) else value
    return value if name != "src" or IMAGE.fullmatch(value) else None


CLEANER = nh3.Cleaner(
    tags=nh3.ALLOWED_TAGS | {"main", "section"}, url_schemes={"http", "https", "mailto", "data"},
    attributes={
        "*": {"class", "id", "style", "title", "tabindex", "aria-label"}, "a": {"href"},
        "img": {"src", "alt", "width", "height", "loading"}, "details": {"open"},
        "th": {"scope", "colspan", "rowspan"}, "td": {"colspan", "rowspan", "data-label"},
    },
    attribute_filter=_allowed, filter_style_properties=set(STYLES.split()), link_rel=None,
)  # fmt: skip
EXPORTER = HTMLExporter(
    template_name="healing", extra_template_basedirs=[str(Path(__file__).parent / "templates")],
    # Cell by cell, so that none swallows another.
    sanitize_html=True, filters={"clean_html": CLEANER.clean},
)  # fmt: skip


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
    stages = list(progress(run))
    short = [(len(left), len(cells), stage) for stage, cells, left in stages if left]
    missing += ["{} of {} cells of {}".format(*numbers) for numbers in short]
    title = f"Healing study: {name}"
    empty = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {title}")])
    shown = (books[stem]["notebook"] for stem in ANALYSIS if "href" in books.get(stem, {}))
    notebook = next(shown, empty)
    parameters = read_json(run / "parameters.json")
    parameters.pop("run", None)  # where it lay when it was made means nothing to a reader
    about = {n: parameters[n] for n in ("model", "task", "seeds") if n in parameters}
    page = {
        "index": True, "name": name, "title": title, "missing": missing,
        "about": {n: ", ".join(map(str, v if type(v) is list else [v])) for n, v in about.items()},
        "parameters": {n: json.dumps(v, ensure_ascii=False) for n, v in parameters.items()},
        "notebooks": list(books.values()),
        "figures": _figures(run / "figures", notebook),
        "tables": sorted(path.name for path in run.glob("tables/*.csv")),
        "found": _found(run / "tables" / "claims.csv"),
        "planned": sum(len(cells) for _, cells, _ in stages),
        "left": sum(len(left) for *_, left in stages),
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
        seconds = notebook.metadata.get("papermill", {}).get("duration")
        book["seconds"] = f"{seconds:.0f} s" if seconds else ""
        text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        book["title"] = (re.findall(r"^# (.+)", text, re.MULTILINE) or [path.stem])[0]
        write_atomically(path.with_suffix(".html"), _render(notebook, run, book))
        book["href"] = f"notebooks/{path.stem}.html"
    except Exception as error:  # one bad notebook must not hide the others
        book |= {"state": "bad", "status": f"cannot be shown: {type(error).__name__}: {error}"}
    return book


def _found(claims: Path) -> str:
    """What was found, in two sentences, as the table of claims says; empty without one."""
    try:
        rows, said, others = csv.DictReader(claims.read_text("utf-8").splitlines()), [], Counter()
        for row in rows:
            if row["primary"] != "True":
                others[row["verdict"]] += 1
                continue
            known = [100 * float(row[name]) for name in ("effect", "low", "high") if row[name]]
            alone = "{:.1f} " + row.get("unit", "points")
            effect = ["no estimate", alone, "", alone + " [{:.1f}, {:.1f}]"]
            evidence = row["evidence"].partition(":")[0]  # of the organism there is none
            said.append("{statement} ({claim}, {model}): {verdict}, ".format(**row))
            said[-1] += effect[len(known)].format(*known)
            said[-1] += f", a {evidence}" if evidence.startswith("demonstration") else ""
    except Exception:  # whatever it holds
        return ""
    beside = ", ".join(f"{n} {verdict}" for verdict, n in others.items()) or "nothing"
    first = "; ".join(said) or "nothing that could be tested"
    told = f"Named before any run: {first}. Exploratory, beside it: {beside}."
    return told if said or others else ""


def _figures(folder: Path, notebook: nbformat.NotebookNode) -> list[dict[str, Any]]:
    """The saved figures in their order; `shown` are those that the notebook shows itself."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    body = "".join(str(output.get("data", {}).get("text/html", "")) for output in outputs)
    captions, figures = read_json(folder / "captions.json"), []
    there = sorted(path.stem for path in folder.glob("*.png"))
    for name in dict.fromkeys([*filter(there.__contains__, captions), *there]):
        said = captions[name] if isinstance(captions.get(name), dict) else {}
        alt, caption = (str(said.get(words, "")) for words in ("alt", "caption"))
        groups = [group for group, names in GROUPS.items() if re.match(names, name)]
        figures.append({
            "name": name, "alt": alt, "caption": caption, "group": (groups or ["Others"])[0],
            "svg": (folder / f"{name}.svg").exists(), "shown": f'alt="{html.escape(alt)}"' in body,
        })  # fmt: skip
    return figures


def _render(notebook: nbformat.NotebookNode, run: Path, page: dict[str, Any]) -> str:
    """The notebook in the template, without what reaches out of the run or names its place."""
    text, _ = EXPORTER.from_notebook_node(notebook, {"page": page})
    head, _, body = text.partition("<body>")
    soup = BeautifulSoup(body, "html.parser")
    for tag in soup("img", src=lambda src: not IMAGE.fullmatch(src or "")):
        tag.replace_with(f"[{tag['alt']}]" if tag.get("alt") else "")
    for tag in soup.main("a", href=re.compile(r"^[^:]*\.ipynb(#.*)?$")):
        tag["href"] = tag["href"].replace(".ipynb", ".html")
        tag["href"] = f"notebooks/{tag['href']}" if "index" in page else tag["href"]
    for tag in soup(re.compile("^h[1-6]$"), id=True):  # a link to it is decoded once
        tag["id"] = unquote(tag["id"])
    for table in soup("table"):
        names = [cell.get_text() for cell in table.thead("th")] if table.thead else []
        # More than six columns do not fit a tablet.
        table["class"] = "rows many" if len(names) > 6 else "rows" if names else "plain"
        for row in table("tr"):
            for name, cell in zip(names, row("td"), strict=False):
                cell["data-label"] = name
        table.wrap(soup.new_tag("div", attrs={"class": "wide", "tabindex": "0"}))
    text = f"{head}<body>\n{CLEANER.clean(str(soup))}\n</body>\n</html>\n"
    places = dict.fromkeys((run.resolve(), run.absolute()), run.resolve().name)
    for place, name in (places | {project_root(): ".", os.path.expanduser("~"): "~"}).items():
        if str(place) != "/":
            text = re.sub(rf"(?<![\w+/.-]){re.escape(str(place))}(?![\w.-])", name, text)
    return text
