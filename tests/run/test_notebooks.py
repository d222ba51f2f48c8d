"""The committed notebooks: how each opens, that it was executed and is clean, what it declares."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import papermill
import pytest
from helpers import save_tiny_bert, tiny_study, write_corpus, write_planted_task

from healing_utils.base.records import Store
from healing_utils.run import profiles
from healing_utils.study.parameters import Parameters, notebook_parameters, read_parameters
from healing_utils.study.study import Study

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))
CORE = {"00_model_organism", "01_baseline", "02_corruption", "03_recovery", "05_analysis"}
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
each_notebook = pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)


@each_notebook
def test_a_committed_notebook_is_complete_executed_and_clean(path):
    stored = json.loads(path.read_text("utf-8"))  # nbformat would silently mend the ids
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in stored["cells"]}) == len(stored["cells"])
    assert path.stat().st_size < 1_000_000  # GitHub stops rendering not far above
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"

    title, set_up, parameters = notebook.cells[:3]
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    assert BADGE in title.source and f"/blob/main/notebooks/{path.name})" in title.source
    assert set_up.source == nbformat.read(COMMITTED[0], as_version=4).cells[1].source
    assert "install" in set_up.source and set_up.metadata.jupyter.source_hidden
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [parameters]

    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
        data = output.get("data", {})
        for kind in {"image/png", "image/jpeg", "image/svg+xml"} & set(data):
            assert output.metadata.get(kind, output.metadata).get("alt"), "no alternative text"
        texts += [data.get("text/html", ""), output.get("text", "")]
    for text in texts:
        bare = [
            tag for tag in re.findall(r"<img\b[^>]*>", text) if not re.search(r"\balt=.\w", tag)
        ]
        assert not bare + re.findall(r"!\[\s*\]\(", text), "no alternative text"


@each_notebook
def test_papermill_sees_what_python_sees_and_a_notebook_by_itself_is_the_quick_run(path):
    # It goes by lines: a comment with an equals sign in it hides the parameter.
    declared = {}
    exec(nbformat.read(path, as_version=4).cells[2].source, {}, declared)
    assert set(papermill.inspect_notebook(str(path))) == set(declared)
    assert profiles.declared_parameters(path) == set(declared) <= set(Parameters.model_fields)
    # What the profile leaves out has the same default in the notebook as in the package.
    quick = profiles.read_profile("quick")
    if "scans" not in declared:  # the package has none: they belong to 02 and 03
        quick.pop("scans")
    elif path.stem == "04_linguistics":  # which looks into those that say so
        quick["scans"] = {n: scan for n, scan in quick["scans"].items() if scan.get("probed")}
    assert read_parameters(declared) == read_parameters(quick)


def test_notebooks_by_themselves_are_one_study_in_any_order(tmp_path):
    Store(tmp_path).write("baseline", "k", {})
    for path in [*COMMITTED, *COMMITTED[::-1]]:
        namespace = {}
        exec(nbformat.read(path, as_version=4).cells[2].source, {}, namespace)
        Study({**notebook_parameters(namespace), "run": str(tmp_path)}).keep_parameters()
    kept, quick = (tmp_path / "parameters.json").read_text(), profiles.read_profile("quick")
    assert {**read_parameters(json.loads(kept)), "run": quick["run"]} == read_parameters(quick)


def test_every_parameter_of_a_profile_is_known_and_reaches_a_notebook():
    assert {path.stem for path in COMMITTED} >= CORE
    declared = {name for path in COMMITTED for name in profiles.declared_parameters(path)}
    found = {p.stem: profiles.read_profile(p) for p in (ROOT / "notebooks/profiles").glob("*.yaml")}
    assert {"quick", "minilm", "paper"} <= set(found)
    for name, given in found.items():
        assert read_parameters(given) and set(given) <= declared, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [{"layers": [0, 1], "start": "fine-tuned"}, {"part": "embeddings", "kind": "noise=1"}]
)
def test_other_damage_than_the_usual_goes_through_all_notebooks(tmp_path, damage):
    corpus = write_corpus(tmp_path / "cues-train.tsv", 16)
    write_corpus(tmp_path / "cues-test.tsv", 6, seed=1)
    given = tiny_study(
        tmp_path / "run", save_tiny_bert(tmp_path / "model"), write_planted_task(tmp_path / "task"),
        seeds=[0], levels=["1/3"], init_levels=[], scans={}, corpus=str(corpus), column="1",
        probe_train=12, probe_test=6, probe_levels=["1/3"], **damage,
    )  # fmt: skip
    for path in COMMITTED[2:]:  # 02 makes the baseline that it needs
        declared = profiles.declared_parameters(path)
        papermill.execute_notebook(
            path, tmp_path / path.name, {n: x for n, x in given.items() if n in declared},
            kernel_name="python3", progress_bar=False,
        )  # fmt: skip
    shown = (tmp_path / "03_recovery.ipynb").read_text("utf-8")
    assert "no figure here: no healed model beside its intact one" in shown


@pytest.mark.skipif(not shutil.which("make") or not shutil.which("perl"), reason="no make or perl")
def test_one_command_writes_the_address_everywhere(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "README.md", tmp_path)
    (here,) = re.findall(r"^git clone https://github\.com/(\S+)", README, re.MULTILINE)[:1]
    old = here  # a fork has its own
    for new in ("some-one/re.pair", "other/healing", "healing", "https://github.com/a/b", "a b/c"):
        command = ["make", "badges", f"REPO={new}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or "owner/name" in done.stderr
        assert (done.returncode == 0) == (new in ("some-one/re.pair", "other/healing"))
        old = new if done.returncode == 0 else old
        for path in COMMITTED:
            text = (tmp_path / "notebooks" / path.name).read_text("utf-8")
            assert text.count(f"github.com/{old}\\") == text.count(f"github/{old}/blob") == 1
            assert text.replace(old, here) == path.read_text("utf-8")
        text = (tmp_path / "README.md").read_text("utf-8")
        assert text.count(f"git clone https://github.com/{old} ") == 2
        assert text.replace(old, here) == README
