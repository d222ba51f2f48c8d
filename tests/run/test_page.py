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
    files = {
        "tables/claims.csv": "claim\nA1\n", "figures/uncaptioned.png": "", "figures/zeta.png": "",
        "figures/alpha.png": "", "figures/alpha.svg": "",
        "figures/captions.json": json.dumps(
            {n: {"caption": f"Caption of {n}.", "alt": f"{n}'s words"} for n in ("zeta", "alpha")}
        ),
        "parameters.json": json.dumps({"run": "/secret/place", **PARAMETERS}),
        "plans/a.json": json.dumps({"cells": [{"key": f"k{i}"} for i in range(3)]}),
    }  # fmt: skip
    for i in range(3):
        made = {"device": "cpu", "versions": {"torch": f"2.1{i // 2}.0"}}
        times = {"finished": f"2024-05-0{i + 1}T10:00:00Z"}
        files[f"records/a/k{i}.json"] = json.dumps({"made": made, "times": times})
    for name, content in files.items():
        (tmp_path / "quick" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "quick" / name).write_text(content)
    (tmp_path / "quick/notebooks").mkdir()
    write_notebook(tmp_path / "quick", "03_recovery", code("1 + 1"))
    write_notebook(
        tmp_path / "quick", "05_analysis",
        code("install()", jupyter={"source_hidden": True}),
        code("run = 'data/runs/quick'", tags=["parameters"]),
        code("run = '/secret/place'", tags=["injected-parameters"]),
        code("print(run)", output(text=f"in {tmp_path}/quick/records"),
             output(text="a warning", name="stderr")),
        code("show()", output(data={"text/html": '<img alt="zeta&#x27;s words">'})),
        v4.new_markdown_cell("From [`03`](03_recovery.ipynb)."),
    )  # fmt: skip
    return tmp_path / "quick"


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
    expected = (
        "Run quick Model lab/<tiny> Task sentiment, topic Cells 3 Last result 2024-05-03 10:00"
    )
    assert expected in words(found.dl) and not found.find(id="missing")
    assert found.find("a", string="claims.csv")["href"] == "tables/claims.csv"
    assert yaml.safe_load(found.find(id="parameters").pre.get_text()) == PARAMETERS
    first = (run / "index.html").read_bytes()
    assert page.write_page(run).read_bytes() == first


def test_code_and_messages_are_folded_and_noise_is_gone(run):
    main = soup(run).main
    folded = [words(tag) for tag in main.find_all("details")]
    assert folded == ["Code print ( run )", "Messages a warning", "Code show ()"]
    assert "in quick/records" in words(main) and "In [" not in words(main)
    whole = (run / "index.html").read_text()
    assert "secret" not in whole and str(run.parent) not in whole
    stored = nbformat.read(run / "notebooks/05_analysis.ipynb", as_version=4)
    assert [c.metadata.get("jupyter") is not None for c in stored.cells[:5]] == [0, 1, 0, 1, 0]


def test_figures_that_the_notebook_does_not_show_follow_with_their_words(run):
    section = soup(run).find(id="figures")
    assert [(f.img["src"], f.img["alt"], words(f)) for f in section.find_all("figure")] == [
        ("figures/alpha.png", "alpha's words", "Caption of alpha."),
        ("figures/uncaptioned.png", "Figure uncaptioned, without alternative text",
         "uncaptioned (saved without a caption)"),
    ]  # fmt: skip
    files = ["zeta.png", "alpha.png", "alpha.svg", "uncaptioned.png"]
    assert [a["href"] for a in section.find_all("a")] == [f"figures/{name}" for name in files]


def test_notebooks_are_linked_with_how_far_they_got(run):
    write_notebook(
        run, "04_error", code("1"), code("f()", output(ename="ValueError", traceback=[]))
    )
    write_notebook(run, "04_half", code("1"), code("2", count=None))
    found = soup(run)
    items = found.find(id="notebooks").find_all("li")
    names = ["03_recovery", "04_error", "04_half", "05_analysis"]
    assert [item.a["href"] for item in items] == [f"notebooks/{name}.html" for name in names]
    assert "Title of 03_recovery ran to its end, 1 code cell 61 s" in words(items[0])
    missing = "04_error stopped in code cell 2 with ValueError; 04_half 1 of 2 code cells ran"
    assert missing in words(found.find(id="missing"))
    assert found.main.find("a", string="03")["href"] == "notebooks/03_recovery.html"
    other = soup(run, "notebooks/05_analysis")
    assert other.main.find("a", string="03")["href"] == "03_recovery.html"
    assert other.find("a", string="this run's")["href"] == "../index.html#parameters"


def test_mixed_versions_are_said_at_the_top_and_below(run):
    found = soup(run)
    assert "torch differs between cells" in words(found.header)
    assert "torch 2.10.0 (2 cells), 2.11.0 (1 cell)" in words(found.find(id="made"))
    (run / "records/a/k2.json").write_text("{")
    found = soup(run)
    assert "between cells" not in words(found.header)
    for said in ("1 record could not be read", "All 2 cells were made with the same"):
        assert said in words(found.find(id="made"))


def test_what_is_missing_is_named(run, tmp_path):
    (run / "records/a/k1.json").unlink()
    (run / "notebooks/05_analysis.ipynb").unlink()
    write_notebook(
        run, "05_analysis.failed", code("1", output(ename="KeyError", traceback=["a trace"]))
    )
    found = soup(run)
    for said in ("05_analysis is not there yet", "1 of 3 cells of a", "cell 1 with KeyError"):
        assert said in words(found.find(id="missing"))
    assert "a trace" in words(found.main)
    (tmp_path / "empty").mkdir()
    found = soup(tmp_path / "empty")
    assert found.h1.get_text().startswith("Healing study: empty")
    for section in ("figures", "tables", "notebooks", "parameters", "made"):
        assert "Nothing yet" in words(found.find(id=section).find(class_="note")), section
    with pytest.raises(HealingError, match="no such run"):
        page.write_page(tmp_path / "nowhere")


def test_broken_files_are_named_and_hide_nothing_else(run):
    for name in ("figures/captions.json", "parameters.json", "plans/a.json"):
        (run / name).write_text("{")
    (run / "notebooks/04_bad.ipynb").write_text('{"cells": [')
    found = soup(run)
    assert "04_bad cannot be shown" in words(found.find(id="missing"))
    assert "03_recovery : Title" in words(found.find(id="notebooks"))
    assert len(found.find(id="figures").find_all("figure")) == 3
    assert "cannot be read" in words(found.find(id="parameters"))


@pytest.mark.parametrize("name", ["index", "notebooks/05_analysis"])
def test_pages_run_no_script_and_load_nothing_from_elsewhere(run, name):
    badge = "[![Open in Colab](https://example.org/badge.svg)](https://example.org/open)"
    write_notebook(
        run,
        "05_analysis",
        v4.new_markdown_cell(badge),
        code("1", output(data={"text/html": STEALING})),
    )
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
