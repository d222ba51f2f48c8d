"""What is declared, what is pinned, what is imported and what travels in a wheel, held together."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import healing_utils

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LOCK = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
CLUSTER_LOCK = (ROOT / "requirements-cluster.lock").read_text("utf-8").splitlines()
EXTRAS = PROJECT["project"]["optional-dependencies"]
DECLARED = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
ALL = DECLARED + [Requirement(text) for extra in EXTRAS.values() for text in extra]
# Distributions whose module has another name.
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
# Needed at run time without an import statement: `corpora` imports the last two by name.
NOT_IMPORTED = {"ipykernel", "conllu", "nltk"}
# Imported by their own names, brought by a dependency that cannot do without them.
BROUGHT = {
    "IPython": ("ipykernel", "ipython"),
    "PIL": ("matplotlib", "pillow"),
    "bs4": ("nbconvert", "beautifulsoup4"),
    "huggingface_hub": ("transformers", "huggingface-hub"),
    "markupsafe": ("jinja2", "markupsafe"),
    "pygments": ("nbconvert", "pygments"),
    "threadpoolctl": ("scikit-learn", "threadpoolctl"),
    "tokenizers": ("transformers", "tokenizers"),
}


def pins():
    lines = (line.split("==") for line in LOCK + CLUSTER_LOCK)
    return {canonicalize_name(name): version for name, version in lines}


def test_the_locks_hold_exact_versions_and_nothing_else():
    for line in LOCK + CLUSTER_LOCK:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line
    assert len(pins()) == len(LOCK + CLUSTER_LOCK), "a package is pinned twice"
    assert not any(line.startswith("ray==") for line in LOCK), "all would install it, few need it"
    foreign = [name for name in pins() if re.match(r"nvidia-|cuda-|triton$|pip$|healing", name)]
    assert not foreign, "these depend on the machine that made the lock"


@pytest.mark.parametrize("requirement", ALL, ids=lambda r: r.name)
def test_every_dependency_is_pinned_within_its_range(requirement):
    pinned = pins()[canonicalize_name(requirement.name)]
    assert Version(pinned) in requirement.specifier
    # loose: an environment that is already there keeps its own, as long as it is not too old
    assert {s.operator for s in requirement.specifier} == {">="}


def test_ranges_leave_room_for_what_colab_has():
    ranges = {r.name: r.specifier for r in DECLARED}
    assert "2.9.0" in ranges["torch"] and "5.10.0" in ranges["transformers"]


def test_every_dependency_says_why_it_is_there():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for requirement in ALL:
        (line,) = re.findall(rf'^  "{re.escape(requirement.name)}[>=].*$', text, re.MULTILINE)
        assert re.search(r'",\s+# \w+', line), line


def test_conda_users_get_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.lock"]}]


def imported_modules():
    names = set()
    for path in (ROOT / "healing_utils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"healing_utils"}


def test_the_package_imports_what_it_declares_and_declares_what_it_imports():
    declared = {MODULES.get(r.name, r.name) for r in DECLARED if r.name not in NOT_IMPORTED}
    declared |= {Requirement(text).name for text in EXTRAS["cluster"]}  # where it is asked for
    assert imported_modules() - set(BROUGHT) == declared
    for by, name in BROUGHT.values():
        needed = [Requirement(text) for text in requires(by)]
        assert name in {canonicalize_name(r.name) for r in needed if r.marker is None}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as it is installed: its wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    zipfile.ZipFile(path).extractall(folder / "installed")
    return folder / "installed"


def test_a_wheel_carries_the_organism_the_notebooks_and_the_licence(wheel):
    for source, copy in (("data/organism", "organism/weights"), ("notebooks", "_notebooks")):
        kept = {p.relative_to(ROOT / source) for p in (ROOT / source).rglob("*") if p.is_file()}
        kept = {path for path in kept if ".ipynb_checkpoints" not in path.parts}
        packed = wheel / "healing_utils" / copy
        assert kept == {p.relative_to(packed) for p in packed.rglob("*") if p.is_file()}, source
        assert kept, f"{source} is empty: there is nothing to study"
    assert list(wheel.glob("*.dist-info/licenses/LICENSE"))
    assert not list(wheel.glob("tests")) and not list(wheel.glob("data"))


def test_an_installed_wheel_finds_what_it_carries(wheel, tmp_path):
    code = (
        "from healing_utils import notebooks, organism, runner\n"
        "print(notebooks.folder()); print(organism.folder())\n"
        "print(runner.read_profile('quick')[0])"
    )
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    package = wheel / "healing_utils"
    expected = [package / "_notebooks", package / "organism" / "weights", "quick"]
    assert done.stdout.split("\n")[:3] == [str(line) for line in expected]


@pytest.fixture
def set_up(tmp_path):
    """A folder in which set-up has been done; returns what `make` would do next."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    os.utime(tmp_path / ".venv" / ".ready")

    def planned():
        command = ["make", "--dry-run", "study"]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    return tmp_path, planned


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("changed", [None, "requirements.lock", "pyproject.toml"])
def test_set_up_is_done_again_only_when_what_it_installs_has_changed(set_up, changed):
    folder, planned = set_up
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(folder / name, (0, 0) if name != changed else None)
    os.utime(folder / ".venv" / ".ready", (10, 10))
    assert ("pip" in planned()) == (changed is not None)
    assert "healing run quick" in planned()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    listed = re.findall(r"^  make ([a-z-]+) +\w", shown.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())


def test_continuous_integration_is_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text("utf-8").splitlines()[-1] == "exec make test"


def test_ray_is_imported_where_it_is_asked_for_and_nowhere_else():
    code = (
        "import sys, healing_utils.study.study, healing_utils.run.cluster\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_citation_names_this_version_and_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == healing_utils.__version__
    assert citation["license"] == PROJECT["project"]["license"] == "Apache-2.0"
    cited = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert cited == ["arXiv:2406.14459", "arXiv:2105.15179"]
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")


@pytest.mark.parametrize("unwanted", [False, True])
def test_notebooks_are_read_without_the_grammars_of_web_addresses(unwanted):
    """Compiling them takes a second in each process; who has imported them keeps them."""
    pytest.importorskip("rfc3987_syntax")
    code = (
        f"import sys\nif {not unwanted}: import rfc3987_syntax\n"
        "from healing_utils.run.notebooks import quick_import\n"
        "with quick_import():\n    import papermill, nbformat\n"
        f"assert ('rfc3987_syntax' in sys.modules) is {not unwanted}\n"
        f"assert ('lark' in sys.modules) is {not unwanted}\n"
        "nbformat.validate(nbformat.v4.new_notebook())\n"
        "import rfc3987_syntax\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
