"""The page of a run: its order, its words, what it says of what is missing, and that it stays
inside its own folder."""

import json
import re

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from healing_utils.analysis import statistics as st
from healing_utils.base.errors import HealingError
from healing_utils.run import page

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000d49444154789c6360000002000001e221bc330000000049454e44ae426082"
)
MODEL = "lab/<tiny>"  # names are text, never markup


def study():
    rows = []

    def add(task, seed, state, side, level, kind, layers, score):
        rows.append(
            dict(model=MODEL, task=task, seed=seed, state=state, side=side, level=level, kind=kind,
                 part="all", layers=layers, metric="accuracy", score=score, chance=0.5,
                 test_size=400, device="cpu", threads=2)
        )  # fmt: skip

    for task in ("sentiment", "topic"):
        for seed in (0, 1, 2):
            base = 0.9 + 0.001 * seed
            add(task, seed, "intact", "none", 0.0, "none", (), base)
            for level, n in ((1 / 6, 1), (0.5, 3)):
                for side, loss in (("bottom", 0.2), ("top", 0.08)):
                    healed = base - loss * level - 0.02
                    broken = 0.6 - 0.001 * seed
                    if side == "top" and n == 1:
                        broken = base + 0.01 * (seed - 1)
                    add(task, seed, "healed", side, level, "reinit", tuple(range(n)), healed)
                    add(task, seed, "broken", side, level, "reinit", tuple(range(n)), broken)
    return pd.DataFrame(rows)


def notebook(*cells, title="Recovery"):
    made = nbformat.v4.new_notebook(metadata={"papermill": {"duration": 61.2}})
    made.cells = [nbformat.v4.new_markdown_cell(f"# {title}\n\ntext"), *cells]
    return made


def code(source, *outputs, count=1):
    return nbformat.v4.new_code_cell(source, execution_count=count, outputs=list(outputs))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "quick"
    for name in ("tables", "figures", "notebooks", "records/recovery"):
        (folder / name).mkdir(parents=True)
    results = study()
    results.to_csv(folder / "tables/results.csv", index=False)
    st.measures(results).to_csv(folder / "tables/measures.csv", index=False)
    st.claims(results).to_csv(folder / "tables/claims.csv", index=False)
    for name in ("zeta", "alpha", "uncaptioned"):
        (folder / f"figures/{name}.png").write_bytes(PNG)
    captions = {n: {"caption": f"Caption of {n}.", "alt": f"Alt of {n}"} for n in ("zeta", "alpha")}
    (folder / "figures/captions.json").write_text(json.dumps(captions))
    parameters = {"run": "/secret/place", "model": [MODEL], "task": ["sentiment", "topic"],
                  "levels": [1 / 6, 0.5], "seeds": [0, 1, 2], "scratch": True}  # fmt: skip
    (folder / "parameters.json").write_text(json.dumps(parameters))
    stream = nbformat.v4.new_output("stream", text="hello")
    nbformat.write(notebook(code("1 + 1", stream)), folder / "notebooks/03_recovery.ipynb")
    for i in range(3):
        record = {"made": {"device": "cpu", "threads": 2, "versions": {"torch": f"2.1{i // 2}.0"}},
                  "times": {"finished": f"2024-05-0{i + 1}T10:00:00Z"}}  # fmt: skip
        (folder / f"records/recovery/k{i}.json").write_text(json.dumps(record))
    return folder


def soup(run):
    path = page.write_page(run)
    assert path == run / "index.html"
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def words(tag):
    return " ".join(tag.get_text(" ").split())


def test_sections_come_in_the_designs_order(run):
    found = soup(run)
    assert [s["id"] for s in found.find_all("section")] == [
        "verdicts", "figures", "results", "notebooks", "parameters", "made",
    ]  # fmt: skip
    assert found.h1.get_text() == "Healing study: quick"
    facts = words(found.find("dl"))
    assert MODEL in facts and "sentiment, topic" in facts and "03 May 2024, 10:00 UTC" in facts


def test_verdicts_are_told_in_words_with_their_numbers(run):
    claims = st.claims(study()).set_index("claim")
    rows = soup(run).find(id="verdicts").tbody.find_all("tr")[1:]
    assert len(rows) == 3
    for name, row in zip(("A1", "A2", "A3"), rows, strict=True):
        text = words(row)
        expected = claims.loc[name]
        assert f"{name} {expected.statement}." in text and expected.definition in text
        assert f"{100 * expected.effect:+.1f}" in text
        assert f"[{100 * expected.low:.1f}, {100 * expected.high:.1f}]" in text
        assert "at best 0.0156" in text and "2 tasks x 3 seeds" in text
        assert row.find(class_="verdict").get_text() == "✓ holds"
        assert expected.reason in text
    header = words(soup(run).find(id="verdicts").tbody.tr)
    assert header == f"{MODEL}, reinit"


def test_the_organisms_demonstration_stands_beside_its_verdict(run):
    claims = st.claims(study().assign(model="organism"))
    claims.to_csv(run / "tables/claims.csv", index=False)
    rows = soup(run).find(id="verdicts").tbody.find_all("tr")[1:]
    assert ["never evidence" in words(row) for row in rows] == [False, False, True]


def test_figures_keep_their_order_captions_and_alternative_text(run):
    found = soup(run).find(id="figures").find_all("figure")
    assert [f.img["src"] for f in found] == [
        "figures/zeta.png", "figures/alpha.png", "figures/uncaptioned.png",
    ]  # fmt: skip
    assert found[0].img["alt"] == "Alt of zeta" and "Caption of zeta." in words(found[0])
    assert found[2].img["alt"]


def test_results_show_every_setting_and_why_healing_is_missing(run):
    bodies = soup(run).find(id="results").find_all("tbody")
    assert len(bodies) == 2  # tasks
    rows = [[words(td) for td in tr.find_all("td")] for tr in bodies[0].find_all("tr")[1:]]
    assert [(r[1].split()[0], r[2]) for r in rows] == [
        ("1/6", "bottom"), ("1/6", "top"), ("1/2", "bottom"), ("1/2", "top"),
    ]  # fmt: skip
    table = st.summary(st.measures(study())).query("task == 'sentiment' and side == 'bottom'")
    half = table[table.level == 0.5].iloc[0]
    names = ("intact", "broken", "healed", "healing", "retained")
    for cell, name in zip(rows[2][4:9], names, strict=True):
        assert cell.startswith(f"{half[name]:.3f} [{half[name + '_low']:.3f}, ")
    assert "test set's own standard error 0.015 on 400" in words(bodies[0].tr)
    assert rows[1][7] == "none" and "interval of zero" in rows[1][9]


def test_results_are_measured_where_only_the_scores_are_there(run):
    before = words(soup(run).find(id="results"))
    (run / "tables/measures.csv").unlink()
    assert words(soup(run).find(id="results")) == before


def test_mixed_versions_are_said_at_the_top_and_below(run):
    found = soup(run)
    assert "torch differs between cells" in words(found.header)
    assert "torch 2.10.0 (2 cells), 2.11.0 (1 cell)" in words(found.find(id="made"))
    (run / "records/recovery/k2.json").write_text("{")
    found = soup(run)
    assert "between cells" not in words(found.header)
    assert "1 record could not be read" in words(found.find(id="made"))
    assert "All 2 cells were made with the same" in words(found.find(id="made"))


def test_parameters_are_shown_without_the_place_of_the_run(run):
    text = words(soup(run).find(id="parameters"))
    assert "levels 1/6, 1/2" in text and "scratch yes" in text
    assert "secret" not in (run / "index.html").read_text()


def test_an_empty_run_says_what_is_not_there(tmp_path):
    found = soup(tmp_path)
    for section, missing in (
        ("verdicts", "tables/claims.csv"), ("figures", "not drawn"),
        ("results", "tables/results.csv"), ("notebooks", "no executed notebook"),
        ("parameters", "parameters.json"), ("made", "no records"),
    ):  # fmt: skip
        assert missing in words(found.find(id=section).find(class_="note")), section


def test_broken_files_are_named_and_hide_nothing_else(run):
    (run / "tables/claims.csv").write_text("")
    (run / "tables/measures.csv").write_text("model,task\na,b\n")
    (run / "figures/captions.json").write_text("[1")
    (run / "figures/zeta.png").write_bytes(b"not an image")
    (run / "parameters.json").write_text("{")
    (run / "notebooks/04_bad.ipynb").write_text('{"cells": [')
    found = soup(run)
    assert "Cannot be shown" in words(found.find(id="verdicts"))
    assert "Cannot be shown" in words(found.find(id="results"))
    assert len(found.find_all("figure")) == 3
    assert "cannot be read" in words(found.find(id="parameters"))
    notebooks = words(found.find(id="notebooks"))
    assert "04_bad cannot be shown" in notebooks and "03_recovery : Recovery" in notebooks


def test_a_run_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(HealingError, match="no such run"):
        page.write_page(tmp_path / "nowhere")


def test_notebooks_are_linked_with_how_far_they_got(run):
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=["x"])
    folder = run / "notebooks"
    nbformat.write(notebook(code("1"), code("f()", error, count=2)), folder / "04_error.ipynb")
    nbformat.write(notebook(code("1"), code("2", count=None)), folder / "05_half.ipynb")
    items = soup(run).find(id="notebooks").find_all("li")
    assert [i.a["href"] for i in items] == [
        f"notebooks/{n}.html" for n in ("03_recovery", "04_error", "05_half")
    ]
    assert "ran to its end, 1 code cell " in words(items[0]) and "61 s" in words(items[0])
    assert "stopped in code cell 2 with ValueError" in words(items[1])
    assert "1 of 2 code cells ran" in words(items[2])
    for item in items:
        assert (run / item.a["href"]).is_file()


def test_notebooks_run_no_script_and_load_nothing_from_elsewhere(run):
    html = (
        '<script>steal()</script><img src="https://example.org/x.png" alt="far" onload="steal()">'
        '<img src="//example.org/y.png"><iframe src="https://example.org"></iframe>'
        '<a href="javascript:steal()">go</a><img alt="near" src="data:image/png;base64,AAAA">'
        '<svg><image href="x"></image></svg><b onclick="steal()">kept</b>'
    )
    output = nbformat.v4.new_output("display_data", data={"text/html": html})
    badge = "[![Open in Colab](https://example.org/badge.svg)](https://example.org/open)"
    cells = nbformat.v4.new_markdown_cell(badge), code("show()", output)
    nbformat.write(notebook(*cells), run / "notebooks/06_outside.ipynb")
    page.write_page(run)
    text = (run / "notebooks/06_outside.html").read_text(encoding="utf-8")
    found = BeautifulSoup(text, "html.parser")
    for path in (run / "index.html", run / "notebooks/06_outside.html"):
        whole = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        assert not whole(["script", "iframe", "link", "object"])
        policy = whole.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
        assert policy.startswith("default-src 'none'")
        for tag in whole.find_all(src=True):
            assert not re.match(r"(https?:)?//", tag["src"])
        assert "url(" not in "".join(style.get_text() for style in whole("style"))
        assert "@import" not in path.read_text(encoding="utf-8")
    assert not [t for t in found.find_all(True) if any(a.startswith("on") for a in t.attrs)]
    assert not found.find_all("a", href=re.compile("javascript"))
    assert found.find("a", string="[Open in Colab]")["href"] == "https://example.org/open"
    assert found.find("b").get_text() == "kept" and found.find("img", alt="near")


def test_writing_again_replaces_the_page(run):
    first = page.write_page(run).read_bytes()
    assert page.write_page(run).read_bytes() == first
    (run / "tables/claims.csv").unlink()
    assert page.write_page(run).read_bytes() != first
