"""What is declared, what is pinned, what is imported and what travels in a wheel, held together."""

import ast
import os
import re
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
TEXT = (ROOT / "pyproject.toml").read_text("utf-8")
PROJECT = tomllib.loads(TEXT)["project"]
LOCK = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
CLUSTER_LOCK = (ROOT / "requirements-cluster.lock").read_text("utf-8").splitlines()
PINS = {canonicalize_name(n): v for n, v in (line.split("==") for line in LOCK + CLUSTER_LOCK)}
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [Requirement(text) for text in PROJECT["dependencies"]]
ALL = DECLARED + [Requirement(text) for extra in EXTRAS.values() for text in extra]
# Distributions whose module has another name.
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
# Needed at run time without an import statement.
NOT_IMPORTED = {"ipykernel"}
# Imported by their own names, brought by a dependency that cannot do without them.
BROUGHT = {
    "IPython": ("ipykernel", "ipython"),
    "PIL": ("matplotlib", "pillow"),
    "bs4": ("nbconvert", "beautifulsoup4"),
    "huggingface_hub": ("transformers", "huggingface-hub"),
    "threadpoolctl": ("scikit-learn", "threadpoolctl"),
    "tokenizers": ("transformers", "tokenizers"),
}


def python(code, **more):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)


def test_the_locks_hold_exact_versions_and_nothing_else():
    for line in LOCK + CLUSTER_LOCK:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line
    assert len(PINS) == len(LOCK + CLUSTER_LOCK), "a package is pinned twice"
    assert not any(line.startswith("ray==") for line in LOCK), "all would install it, few need it"
    foreign = [name for name in PINS if re.match(r"nvidia-|cuda-|triton$|pip$|healing", name)]
    assert not foreign, "these depend on the machine that made the lock"
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.lock"]}]


@pytest.mark.parametrize("requirement", ALL, ids=lambda r: r.name)
def test_every_dependency_is_pinned_within_its_range_and_says_why_it_is_there(requirement):
    assert Version(PINS[canonicalize_name(requirement.name)]) in requirement.specifier
    # loose: an environment that is already there keeps its own, as long as it is not too old
    assert {s.operator for s in requirement.specifier} == {">="}
    colab = {"torch": "2.9.0", "transformers": "5.10.0"}.get(requirement.name)
    assert colab is None or colab in requirement.specifier
    (line,) = re.findall(rf'^  "{re.escape(requirement.name)}[>=].*$', TEXT, re.MULTILINE)
    assert re.search(r'",\s+# \w+', line), line


def test_the_package_imports_what_it_declares_and_declares_what_it_imports():
    names = set()
    for path in (ROOT / "healing_utils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    declared = {MODULES.get(r.name, r.name) for r in DECLARED if r.name not in NOT_IMPORTED}
    declared |= {Requirement(text).name for text in EXTRAS["cluster"]}  # where it is asked for
    names -= set(sys.stdlib_module_names) | {"healing_utils"}
    assert names - set(BROUGHT) == declared
    for by, name in BROUGHT.values():
        needed = [Requirement(text) for text in requires(by)]
        assert name in {canonicalize_name(r.name) for r in needed if r.marker is None}


def test_a_wheel_carries_what_a_study_needs_and_finds_it(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = tmp_path.glob("*.whl")
    wheel = tmp_path / "installed"
    zipfile.ZipFile(path).extractall(wheel)
    package = wheel / "healing_utils"
    for source, copy in (
        ("data/organism", "organism/weights"), ("notebooks", "_notebooks"),
        ("healing_utils/run/templates", "run/templates"),
    ):  # fmt: skip
        kept = {p.relative_to(ROOT / source) for p in (ROOT / source).rglob("*") if p.is_file()}
        kept = {path for path in kept if ".ipynb_checkpoints" not in path.parts}
        packed = {p.relative_to(package / copy) for p in (package / copy).rglob("*") if p.is_file()}
        assert kept == packed and kept, source
    assert list(wheel.glob("*.dist-info/licenses/LICENSE"))
    assert not list(wheel.glob("tests")) and not list(wheel.glob("data"))
    found = python(
        "from healing_utils import organism\nfrom healing_utils.run import notebooks, profiles\n"
        "name, _ = profiles.read_profile('quick')\n"
        "print(notebooks.folder(), organism.folder(), name, sep='\\n')",
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(wheel)},
    )  # fmt: skip
    expected = [package / "_notebooks", package / "organism" / "weights", "quick"]
    assert found.stdout.splitlines() == [str(line) for line in expected], found.stderr


@pytest.mark.parametrize("changed", [None, "requirements.lock", "pyproject.toml"])
def test_set_up_is_done_again_only_when_what_it_installs_has_changed(tmp_path, changed):
    (tmp_path / ".venv").mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml", ".venv/.ready"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes() if name == "Makefile" else b"")
        os.utime(tmp_path / name, {".venv/.ready": (10, 10), changed: (20, 20)}.get(name, (0, 0)))
    planned = subprocess.check_output(["make", "--dry-run", "study"], cwd=tmp_path, text=True)
    assert ("pip" in planned) == (changed is not None) and "healing run quick" in planned


def test_make_help_lists_every_target_and_ci_makes_one_of_them():
    shown = subprocess.check_output(["make", "help"], cwd=ROOT, text=True)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert sorted(re.findall(r"^  make ([a-z-]+) +\w", shown, re.MULTILINE)) == sorted(
        phony.split()
    )
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1] == "exec make test"


def test_ray_is_imported_where_it_is_asked_for_and_nowhere_else():
    code = "import sys, healing_utils.study.study, healing_utils.study.cluster\n"
    assert python(code + "assert 'ray' not in sys.modules", cwd=ROOT).returncode == 0


def test_the_citation_names_this_version_and_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == healing_utils.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    cited = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert cited == ["arXiv:2406.14459", "arXiv:2105.15179"]
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")


def test_notebooks_are_read_without_the_grammars_of_web_addresses():
    """Compiling them takes a second in each process; who has imported them keeps them."""
    pytest.importorskip("rfc3987_syntax")
    done = python(
        "import sys\nfrom healing_utils.run.notebooks import quick_import\n"
        "with quick_import():\n    import papermill, nbformat\n"
        "assert not {'rfc3987_syntax', 'lark'} & set(sys.modules)\n"
        "nbformat.validate(nbformat.v4.new_notebook())\n"
        "import rfc3987_syntax\nwith quick_import():\n    import rfc3987_syntax as kept\n"
        "assert kept is sys.modules['rfc3987_syntax'] is rfc3987_syntax",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
