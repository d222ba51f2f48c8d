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
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}  # distributions and their modules
NOT_IMPORTED = {"ipykernel"}  # needed at run time without an import statement
# Imported by their own names, brought by a dependency that cannot do without them.
BROUGHT = {
    "IPython": ("ipykernel", "ipython"), "PIL": ("matplotlib", "pillow"),
    "bs4": ("nbconvert", "beautifulsoup4"), "huggingface_hub": ("transformers", "huggingface-hub"),
    "pyarrow": ("datasets", "pyarrow"),
    "threadpoolctl": ("scikit-learn", "threadpoolctl"),
    "tokenizers": ("transformers", "tokenizers"),
}  # fmt: skip


def test_the_locks_hold_exact_versions_and_nothing_else():
    for line in LOCK + CLUSTER_LOCK:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line
    assert len(PINS) == len(LOCK + CLUSTER_LOCK), "a package is pinned twice"
    assert not any(line.startswith("ray==") for line in LOCK), "all would install it, few need it"
    foreign = [name for name in PINS if re.match(r"nvidia-|cuda-|triton$|pip$|healing", name)]
    assert not foreign, "these depend on the machine that made the lock"
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.lock"]}]
    for requirement in ALL:
        name, colab = requirement.name, {"torch": "2.9.0", "transformers": "5.10.0"}
        assert Version(PINS[canonicalize_name(name)]) in requirement.specifier, name
        # loose: an environment that is already there keeps its own, as long as it is not too old
        assert {s.operator for s in requirement.specifier} == {">="}
        assert name not in colab or colab[name] in requirement.specifier
        (line,) = re.findall(rf'^  "{re.escape(name)}[>=].*$', TEXT, re.MULTILINE)
        assert re.search(r'",\s+# \w+', line), f"{line} does not say why it is there"


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
    code = (
        "import sys\nfrom healing_utils import organism\n"
        "from healing_utils.run import profiles, sequence\n"
        "run = profiles.read_profile('quick')['run']\n"
        "print(profiles.notebook_folder(), organism.folder(), run, sep='\\n')\n"
        # Ray is not needed, and compiling the grammars of web addresses takes a second.
        "import nbformat\nnbformat.validate(nbformat.v4.new_notebook())\n"
        "assert not {'ray', 'lark'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
    )  # fmt: skip
    expected = [package / "_notebooks", package / "organism" / "weights", "data/runs/quick"]
    assert found.stdout.splitlines() == [str(line) for line in expected], found.stderr
    assert found.returncode == 0, found.stderr


def test_the_citation_names_this_version_and_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == healing_utils.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    cited = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert cited == ["arXiv:2406.14459", "arXiv:2105.15179"]
