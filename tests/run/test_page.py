"""The page of a run: the analysis notebook, what stands around it, and what it says is missing."""

import json
import re

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from healing_utils.base.errors import HealingError
from healing_utils.run import page

v4 = nbformat.v4
PARAMETERS = {"model": ["lab/<tiny>"], "task": ["sentiment", "topic"], "levels": ["1/6", "1/2"]}
STEALING = (
    '<script>steal()</script><img src="https://example.org/x.png" alt="far" onload="steal()">'
    '<img src="//example.org/y.png"><iframe src="https://example.org"></iframe>'
    '<a href="javascript:steal()">go</a><img alt="near" src="data:image/png;base64,AAAA">'
    '<meta http-equiv="refresh" content="0"><b onclick="steal()">kept</b>'
)


def code(source, *outputs, count=1, **metadata):
    return v4.new_code_cell(source, execution_count=count, outputs=list(outputs), metadata=metadata)


def output(**content):
    kind = "error" if "ename" in content else "stream" if "text" in content else "display_data"
    return v4.new_output(kind, **content)


def write_notebook(run, name, *cells):
    notebook = v4.new_notebook(metadata={"papermill": {"duration": 61.2}})
    notebook.cells = [v4.new_markdown_cell(f"# Title of {name}\n\ntext"), *cells]
    nbformat.write(notebook, run / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def run(tmp_path):
    """A finished run with an analysis, another notebook, figures, a table, a plan and records."""
    captions = {
        n: {"caption": f"Caption of {n}.", "alt": f"{n}'s words"} for n in ("zeta", "alpha")
    }
    files = {
        "tables/claims.csv": "claim\nA1\n", "figures/uncaptioned.png": "", "figures/zeta.png": "",
        "figures/alpha.png": "", "figures/alpha.svg": "", "notebooks/none": "",
        "figures/captions.json": json.dumps(captions),
        "parameters.json": json.dumps({"run": "/secret/place", **PARAMETERS}),
        "plans/scans.json": json.dumps({"cells": [{"key": f"k{i}"} for i in range(3)]}),
    }  # fmt: skip
    for i in range(3):
        made = {"device": "cpu", "versions": {"torch": f"2.1{i // 2}.0"}}
        times = {"finished": f"2024-05-0{i + 1}T10:00:00Z"}
        files[f"records/scans/k{i}.json"] = json.dumps({"made": made, "times": times})
    run = tmp_path / "quick"
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)
    write_notebook(run, "03_recovery", code("1 + 1"))
    write_notebook(
        run, "05_analysis", code("install()", jupyter={"source_hidden": True}),
        code("run = 'data/runs/quick'", tags=["parameters"]),
        code("run = '/secret/place'", tags=["injected-parameters"]),
        code("print(run)", output(text=f"in {run}/records"), output(text="alas", name="stderr")),
        code("show()", output(data={"text/html": '<img alt="zeta&#x27;s words">'})),
        v4.new_markdown_cell("From [`03`](03_recovery.ipynb)."),
    )  # fmt: skip
    return run


def soup(run, name="index"):
    assert page.write_page(run) == run / "index.html"
    return BeautifulSoup((run / f"{name}.html").read_text("utf-8"), "html.parser")


def words(tag):
    return " ".join(tag.get_text(" ").split())


def test_the_page_is_the_analysis_notebook_with_the_run_around_it(run):
    found = soup(run)
    assert found.h1.get_text().startswith("Title of 05_analysis")
    order = [tag["id"] for tag in found.find_all(["main", "section"])]
    assert order == ["notebook", "figures", "tables", "notebooks", "parameters", "made"]
    expected = "Run quick Model lab/<tiny> Task sentiment, topic Cells 3 Last result 2024-05-03 10:"
    assert expected in words(found.dl) and not found.find(id="missing")
    assert found.find("a", string="claims.csv")["href"] == "tables/claims.csv"
    assert yaml.safe_load(found.find(id="parameters").pre.get_text()) == PARAMETERS
    # Code and messages are folded, and noise is gone.
    folded = [words(tag) for tag in found.main.find_all("details")]
    assert folded == ["Code print ( run )", "Messages alas", "Code show ()"]
    assert "in quick/records" in words(found.main) and "In [" not in words(found.main)
    whole = (run / "index.html").read_text()
    assert "secret" not in whole and str(run.parent) not in whole
    # Figures that the notebook does not show follow with their words.
    figures = found.find(id="figures")
    assert [(f.img["src"], f.img["alt"], words(f)) for f in figures.find_all("figure")] == [
        ("figures/alpha.png", "alpha's words", "Caption of alpha."),
        ("figures/uncaptioned.png", "Figure uncaptioned, without alternative text",
         "uncaptioned (saved without a caption)"),
    ]  # fmt: skip
    files = ["zeta.png", "alpha.png", "alpha.svg", "uncaptioned.png"]
    assert [a["href"] for a in figures.find_all("a")] == [f"figures/{name}" for name in files]
    # Mixed versions are said at the top and below.
    assert "torch differs between cells" in words(found.header)
    assert "torch 2.10.0 (2 cells), 2.11.0 (1 cell)" in words(found.find(id="made"))
    (run / "records/scans/k2.json").write_text("{")
    found = soup(run)
    assert "between cells" not in words(found.header)
    for said in ("1 record could not be read", "All 2 cells were made with the same"):
        assert said in words(found.find(id="made"))


def test_notebooks_are_linked_with_how_far_they_got(run):
    error = output(ename="ValueError", traceback=[])
    write_notebook(run, "04_error", code("1"), code("f()", error), code("2", count=None))
    write_notebook(run, "04_half", code("1"), code("2", count=None))
    found = soup(run)
    items = found.find(id="notebooks").find_all("li")
    names = ["03_recovery", "04_error", "04_half", "05_analysis"]
    assert [item.a["href"] for item in items] == [f"notebooks/{name}.html" for name in names]
    assert "Title of 03_recovery 1 of 1 code cells ran 61 s" in words(items[0])
    said = "04_error 2 of 3 code cells ran, then it stopped with ValueError; 04_half 1 of 2"
    assert said in words(found.find(id="missing"))
    assert found.main.find("a", string="03")["href"] == "notebooks/03_recovery.html"
    other = soup(run, "notebooks/05_analysis")
    assert other.main.find("a", string="03")["href"] == "03_recovery.html"
    assert other.find("a", string="this run's")["href"] == "../index.html#parameters"


def test_what_is_missing_or_broken_is_named_and_hides_nothing_else(run, tmp_path):
    (run / "records/scans/k1.json").unlink()
    (run / "notebooks/05_analysis.ipynb").unlink()
    (run / "notebooks/04_bad.ipynb").write_text('{"cells": [')
    trace = output(ename="KeyError", traceback=["a trace"])
    write_notebook(run, "05_analysis.failed", code("1", trace))
    found = soup(run)
    missing = words(found.find(id="missing"))
    for said in ("05_analysis is not there yet", "1 of 3 cells of scans", "stopped with KeyError"):
        assert said in missing and "04_bad cannot be shown" in missing
    assert "a trace" in words(found.main)
    assert "03_recovery : Title" in words(found.find(id="notebooks"))
    for name in ("figures/captions.json", "parameters.json", "plans/scans.json"):
        (run / name).write_text("{")
    found = soup(run)
    assert len(found.find(id="figures").find_all("figure")) == 3
    assert "cannot be read" in words(found.find(id="parameters"))
    (tmp_path / "empty").mkdir()
    found = soup(tmp_path / "empty")
    assert found.h1.get_text().startswith("Healing study: empty")
    for section in ("figures", "tables", "notebooks", "parameters", "made"):
        assert "Nothing yet" in words(found.find(id=section).find(class_="note")), section
    with pytest.raises(HealingError, match="no such run"):
        page.write_page(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["index", "notebooks/05_analysis"])
def test_pages_run_no_script_and_load_nothing_from_elsewhere(run, name):
    badge = "[![Open in Colab](https://example.org/badge.svg)](https://example.org/open)"
    stealing = code("1", output(data={"text/html": STEALING}))
    write_notebook(run, "05_analysis", v4.new_markdown_cell(badge), stealing)
    found = soup(run, name)
    assert not found(["script", "iframe", "link", "object"]) and len(found("meta")) == 3
    policy = found.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file:")
    assert not [tag for tag in found(src=True) if re.match(r"(https?:)?//", tag["src"])]
    assert "url(" not in found.style.get_text() and "@import" not in found.style.get_text()
    assert not [tag for tag in found(True) if any(a.startswith("on") for a in tag.attrs)]
    assert not found("a", href=re.compile("javascript"))
    assert found.find("a", string="[Open in Colab]")["href"] == "https://example.org/open"
    assert found.b.get_text() == "kept" and found.find("img", alt="near")
