"""The page of a run: the analysis notebook, what stands around it, and what it says is missing."""

import json
import re

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup, Comment

from healing_utils.base.errors import HealingError
from healing_utils.run import page

v4 = nbformat.v4
PARAMETERS = {"model": ["lab/<tiny>"], "task": ["sentiment", "topic"], "levels": ["1/6", "1/2"]}
# What reached a browser before, or might: none of it is to be left.
HARMFUL = """<script>steal()</script><img src="https://example.org/x.png" onload="steal()">
<img src="//example.org/y.png"><img src="ht\ntps://example.org/z.png"><img src="/etc/z.png">
<iframe src="https://example.org"></iframe><a href="javascript:steal()">go</a>
<a href="java\nscript:steal()">go</a><a href=" data:text/html,<b>1</b>">go</a>
<a href="vbscript:steal()">go</a><meta http-equiv="refresh" content="0"><base href="//example.org">
<svg><a xlink:href="javascript:steal()"><text>go</text></a><style>@import "//e.org"</style></svg>
<form action="//example.org"><button formaction="javascript:steal()">go</button><input></form>
<style>@import "https://example.org/x.css";</style><!--[if]><b onclick="steal()"></b><![endif]-->
<math><mtext><mglyph><style><!--</style><img title="--><img src=1 onerror=steal()>"></math>
<div style="background:url(//example.org);position:fixed;color:red">tinted</div></main></body>
<img src="data:image/svg+xml,<svg onload=steal()>"><object data="x"></object><link href="//e">"""
KEPT = '<img alt="near" src="data:image/png;base64,AAAA"><b onclick="steal()">kept</b>'


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
    """A finished run with an analysis, another notebook, figures, tables and plans."""
    captions = {
        n: {"caption": f"Caption of {n}.", "alt": f"{n}'s words"} for n in ("scores", "layers")
    }
    rows = ["claim,statement,model,effect,low,high,primary,verdict,evidence"]
    rows += ["H,One seed alone,tiny,0.5,,,True,undecided,", "A3,None,tiny,,,,True,undecided,"]
    rows += ["A1,All heal,tiny,0.17,0.14,-0.2,True,undecided,demonstration: it was built so"]
    rows += [f"A2,More,tiny,,,,False,{verdict}," for verdict in ("holds", "fails", "fails")]
    files = {
        "tables/claims.csv": "\n".join(rows), "figures/uncaptioned.png": "",
        "figures/scores.png": "", "figures/layers.png": "", "figures/layers.svg": "",
        "notebooks/none": "", "figures/captions.json": json.dumps(captions),
        "parameters.json": json.dumps({"run": "/secret/place", **PARAMETERS}),
        "plans/scans.json": json.dumps({"cells": [{"key": f"k{i}"} for i in range(3)]}),
        "plans/probing.json": json.dumps({"cells": [{"key": "k0", "stage": "scans"}]}),
    }  # fmt: skip
    files |= {f"records/{name}.json": "{}" for name in ("scans/k0", "scans/k1", "scans/k2")}
    files["records/scans/of_another_plan.json"] = "{}"
    run = tmp_path / "quick"
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)
    write_notebook(run, "03_recovery", code("1 + 1"))
    head = "<thead><tr><th>n</th><th>score</th></tr></thead>"
    table = f"<table>{head}<tr><td>3</td><td>9</td></tr></table>"
    write_notebook(
        run, "05_analysis", code("install()", jupyter={"source_hidden": True}),
        code("run = 'data/runs/quick'", tags=["parameters"]),
        code("run = '/secret/place'", tags=["injected-parameters"]),
        code("print(run)", output(text=f"in {run}/records"), output(text="alas", name="stderr")),
        code("show()", output(data={"text/html": f'<img alt="scores&#x27;s words">{table}'})),
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
    title = found.h1
    assert title.get_text().startswith("Title of 05_analysis")
    assert title.a["href"] == f"#{title['id']}"
    order = [tag["id"] for tag in found.find_all(["main", "section"])]
    assert order == ["notebook", "figures", "tables", "notebooks", "parameters"]
    assert [a["href"] for a in found.nav("a")] == [f"#{name}" for name in order]
    # A cell of two plans counts once, a record of none does not.
    expected = "Run quick Model lab/<tiny> Task sentiment, topic Cells 3"
    assert words(found.dl) == expected and not found.find(id="missing")
    assert words(found.find(id="found")) == (
        "Named before any run: One seed alone (H, tiny): undecided, 50.0 points; None (A3, tiny): "
        "undecided, no estimate; All heal (A1, tiny): undecided, 17.0 points [14.0, -20.0], a "
        "demonstration. Exploratory, beside it: 1 holds, 2 fails."
    )
    assert found.find("a", string="claims.csv")["href"] == "tables/claims.csv"
    folded = found.find(id="parameters").details
    assert "open" not in folded.attrs and yaml.safe_load(folded.pre.get_text()) == PARAMETERS
    # Code and messages are folded, and noise is gone.
    folded = [words(tag) for tag in found.main.find_all("details")]
    assert folded == ["Code print ( run )", "Messages alas", "Code show ()"]
    assert "in quick/records" in words(found.main) and "In [" not in words(found.main)
    whole = (run / "index.html").read_text()
    assert "secret" not in whole and str(run.parent) not in whole
    assert [cell["data-label"] for cell in found.main.table("td")] == ["n", "score"]  # rows stack
    # Figures in groups; those that the notebook does not show follow with their words.
    figures = found.find(id="figures")
    groups = [words(tag) for tag in figures(["h3", "ul"])]
    assert groups == ["Healing", "scores, above: PNG", "Knowledge", "layers : PNG , SVG",
                      "Others", "uncaptioned : PNG"]  # fmt: skip
    assert [(f.img["src"], f.img["alt"], words(f)) for f in figures.find_all("figure")] == [
        ("figures/layers.png", "layers's words", "Caption of layers."),
        ("figures/uncaptioned.png", "Figure uncaptioned, without alternative text",
         "uncaptioned (saved without a caption)"),
    ]  # fmt: skip
    assert figures.find("a", string="layers")["href"] == f"#{figures.figure['id']}"


def test_notebooks_are_linked_with_how_far_they_got(run):
    error = output(ename="ValueError", traceback=[])
    write_notebook(run, "04_error", code("1"), code("f()", error), code("2", count=None))
    write_notebook(run, "04_half", code("1"), code("2", count=None))
    found = soup(run)
    items = found.find(id="notebooks").find_all("li")
    for item, name in zip(
        items, ("03_recovery", "04_error", "04_half", "05_analysis"), strict=True
    ):
        links = [f"notebooks/{name}.html", f"notebooks/{name}.ipynb"]
        assert [a["href"] for a in item("a")] == links
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
    assert "a trace" in words(found.main) and "Cells 2 of 3" in words(found.dl)
    assert "03_recovery : Title" in words(found.find(id="notebooks"))
    deep = "[" * 500 + "]" * 500
    for text in ("{", "[]", "null", f'{{"cells": {deep}, "scores": 1, "a": {deep}}}', "[" * 10**6):
        for name in ("figures/captions.json", "parameters.json", "plans/scans.json"):
            (run / name).write_text(text)
        (run / "tables/claims.csv").write_text(text[:1000])
        found = soup(run)
        assert len(found.find(id="figures").find_all("figure")) == 3
        assert not found.find(id="found")
    (tmp_path / "empty").mkdir()
    found = soup(tmp_path / "empty")
    assert found.h1.get_text().startswith("Healing study: empty") and not found("section")
    assert "05_analysis is not there yet" in words(found.find(id="missing"))
    with pytest.raises(HealingError, match="no such run"):
        page.write_page(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["index", "notebooks/05_analysis"])
def test_pages_run_no_script_and_load_nothing_from_elsewhere(run, name):
    badge = "[![Open in Colab](https://example.org/badge.svg)](https://example.org/open)"
    cells = [code("1", output(data={"text/html": text})) for text in (KEPT, HARMFUL)]
    cells += [v4.new_markdown_cell(HARMFUL), code("1", output(text=HARMFUL))]
    write_notebook(run, "05_analysis", v4.new_markdown_cell(badge), *cells)
    found = soup(run, name)
    policy = found.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file:")
    assert "url(" not in found.style.get_text() and "@import" not in found.style.get_text()
    assert {tag.name for tag in found(True)} <= page.nh3.ALLOWED_TAGS | {
        "html", "head", "meta", "title", "style", "body", "main", "section"
    }  # fmt: skip
    assert len(found("style")) == 1 and len(found("meta")) == 3
    attributes = {n for tag in found.body(True) for n in tag.attrs}
    assert attributes <= {"alt", "aria-label", "class", "data-label", "href", "id", "loading",
                          "src", "style", "tabindex", "title"}  # fmt: skip
    assert {tag["src"].partition(":")[0] for tag in found("img", src=True)} <= {
        "data", "figures/layers.png", "figures/scores.png", "figures/uncaptioned.png", "1"
    }  # fmt: skip
    assert not found("a", href=re.compile(r"^\W*(java|vb|data)", re.IGNORECASE))
    assert not found(string=lambda text: isinstance(text, Comment))
    assert [tag["style"] for tag in found("div", string="tinted")] == ["color:red"] * 2
    assert found.find("a", string="[Open in Colab]")["href"] == "https://example.org/open"
    assert found.b.get_text() == "kept" and found.find("img", alt="near")
