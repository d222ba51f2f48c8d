"""The committed notebooks, and the check that says what a committed notebook must be."""

import copy
import json
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest

from healing_utils.base.errors import HealingError
from healing_utils.run import notebooks, runner
from healing_utils.study.parameters import PARAMETERS, read_parameters

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))
CORE = [
    "00_model_organism", "01_baseline", "02_corruption", "03_recovery", "04_linguistics",
    "05_analysis",
]  # fmt: skip


def test_the_core_notebooks_are_there():
    assert set(CORE) <= {path.stem for path in COMMITTED}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_notebook_is_complete_executed_and_clean(path):
    assert notebooks.problems(path) == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_papermill_sees_the_parameters_that_python_sees(path):
    # It goes by lines: a comment with an equals sign in it hides the parameter.
    declared = notebooks.declared_parameters(path)
    assert set(papermill.inspect_notebook(str(path))) == set(declared) <= set(PARAMETERS)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_notebook_by_itself_is_the_quick_run(path):
    # What the profile leaves out has the same default in the notebook as in the package.
    declared = notebooks.declared_parameters(path)
    quick = runner.read_profile("quick")[1]
    if "scans" not in declared:  # the package has none: they belong to 02 and 03
        quick.pop("scans")
    elif path.stem == "04_linguistics":  # which looks into those that say so
        quick["scans"] = {n: scan for n, scan in quick["scans"].items() if scan.get("probed")}
    assert read_parameters(declared) == read_parameters(quick)


def test_every_parameter_of_a_profile_reaches_a_notebook():
    declared = {name for path in COMMITTED for name in notebooks.declared_parameters(path)}
    for profile in sorted((ROOT / "notebooks" / "profiles").glob("*.yaml")):
        assert set(runner.read_profile(profile)[1]) <= declared, profile.name


# -- the check itself, on notebooks that are wrong in one way each -----------------------------


@pytest.fixture
def sound(tmp_path):
    """A notebook in which nothing is wrong, and a function that checks a changed copy of it."""
    v4 = nbformat.v4
    image = v4.new_output("display_data", {"image/png": "aGk="})
    image.metadata["image/png"] = {"alt": "what the figure shows"}
    stream = v4.new_output("stream", name="stdout", text="a result\n")
    nb = v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    nb.cells = [
        v4.new_markdown_cell("# A title\n\n" + notebooks.badge("07_mine"), id="title"),
        v4.new_code_cell(notebooks.bootstrap_cell(), id="bootstrap", execution_count=1),
        v4.new_code_cell(
            'run = "data/runs/quick"  # a reason\nseeds = [0, -1]',
            id="parameters",
            metadata={"tags": ["parameters"]},
            execution_count=2,
        ),  # fmt: skip
        v4.new_code_cell("print(1)", id="last", execution_count=3, outputs=[stream, image]),
    ]

    def found(change=lambda nb: None):
        changed = copy.deepcopy(nb)
        change(changed)
        path = tmp_path / "07_mine.ipynb"
        path.write_text(json.dumps(changed))
        return notebooks.problems(path)

    return found


def test_a_sound_notebook_passes(sound):
    assert sound() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda nb: nb.update(nbformat_minor=4), "4.5"),
        (lambda nb: nb.cells[3].update(id="title"), "ids are missing or repeated"),
        (lambda nb: nb.metadata.kernelspec.update(name="colab"), "not python3"),
        (lambda nb: nb.cells[3].update(source="#" * 1_000_000), "the limit is"),
        (lambda nb: nb.cells[0].update(source=notebooks.badge("07_mine")), "not a title"),
        (lambda nb: nb.cells[0].update(source="# T\n" + notebooks.badge("other")), "badge"),
        (lambda nb: nb.cells[1].update(source="import healing_utils"), "bootstrap"),
        (lambda nb: nb.cells[2].metadata.clear(), "tagged 'parameters'"),
        (lambda nb: nb.cells[3].metadata.update(tags=["parameters"]), "and no other"),
        (lambda nb: nb.cells[2].update(source="n = 2\nm = n + 1"), "m is not a plain literal"),
        (lambda nb: nb.cells[2].update(source="import os"), "not an assignment"),
        (lambda nb: nb.cells[3].update(execution_count=None), "top to bottom"),
        (lambda nb: nb.cells[3].update(execution_count=9), "top to bottom"),
        (lambda nb: nb.cells[3].outputs[0].update(name="stderr"), "wrote to standard error"),
        (lambda nb: nb.cells[3].outputs[1].metadata.clear(), "cell 3 shows an image without"),
        (lambda nb: nb.cells[0].update(source=nb.cells[0].source + "\n![](a.png)"), "without"),
        (
            lambda nb: nb.cells[3].outputs.append(
                nbformat.v4.new_output("display_data", {"text/html": "<img src='a' alt=''>"})
            ),
            "without alternative text",
        ),
        (
            lambda nb: nb.cells[3].outputs.append(nbformat.v4.new_output("error", ename="E")),
            "ended in E",
        ),
    ],
)
def test_what_is_wrong_is_named(sound, change, said):
    found = sound(change)
    assert len(found) == 1 and said in found[0]


# -- the repository's address ------------------------------------------------------------------


def test_one_command_writes_the_address_everywhere(tmp_path):
    (tmp_path / "healing_utils" / "run").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    module = tmp_path / "healing_utils" / "run" / "notebooks.py"
    shutil.copy(ROOT / "healing_utils" / "run" / "notebooks.py", module)
    nb = nbformat.v4.new_notebook()
    nb.cells = [
        nbformat.v4.new_markdown_cell("# T\n" + notebooks.badge("07_mine")),
        nbformat.v4.new_code_cell(notebooks.bootstrap_cell()),
    ]
    nbformat.write(nb, tmp_path / "notebooks" / "07_mine.ipynb")
    for address in ("some-one/re.pair", "other/healing"):
        assert len(notebooks.write_repository(address, tmp_path)) == 2
        written = nbformat.read(tmp_path / "notebooks" / "07_mine.ipynb", as_version=4)
        namespace = {"__name__": "written", "__file__": str(module)}
        exec(compile(module.read_text(), str(module), "exec"), namespace)
        assert namespace["REPOSITORY"] == address
        assert namespace["badge"]("07_mine") in written.cells[0].source
        assert namespace["bootstrap_cell"]() == written.cells[1].source
        assert f'install("{address}")' in written.cells[1].source
    assert notebooks.write_repository("other/healing", tmp_path) == []  # nothing left to change


@pytest.mark.parametrize("address", ["healing", "https://github.com/a/b", "a/b/c", "a b/c"])
def test_what_is_no_address_is_refused(address, tmp_path):
    with pytest.raises(HealingError, match="owner/name"):
        notebooks.write_repository(address, tmp_path)


# -- what a notebook declares ------------------------------------------------------------------


def test_a_comment_with_an_equals_sign_hides_no_parameter_from_the_runner(tmp_path):
    cell = nbformat.v4.new_code_cell("a = 1  # b=2 is not meant\nc: int | None = None")
    cell.metadata.tags = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    assert notebooks.declared_parameters(tmp_path / "a.ipynb") == {"a": 1, "c": None}


def test_a_parameters_cell_that_computes_is_refused(tmp_path):
    cell = nbformat.v4.new_code_cell("a = 1\nb = a + 1", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    with pytest.raises(HealingError, match="b is not a plain literal"):
        notebooks.declared_parameters(tmp_path / "a.ipynb")
