"""Records of runs that are not finished: the code as it is finds every one of them again.

They lie in data/records-next/PROFILE until the run is whole; what is whole is shipped already.
A change of what goes into a cell's key, or of how that is spelt, would have all of it computed
anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from healing_utils.base.errors import HealingError
from healing_utils.base.records import Store, canonical, digest
from healing_utils.study.cells import ALL_STAGES, NUMERICS, PROBING_NUMERICS, RECIPE
from healing_utils.study.study import Study

ROOT = Path(__file__).resolve().parents[2]
FOUND = sorted(path.parent for path in (ROOT / "data" / "records-next").glob("*/records"))
FOUND += [ROOT / "data" / "results" / name for name in ("minilm_long", "mpnet")]


def records(folder: Path) -> list[dict]:
    stages = [path.name for path in (folder / "records").iterdir() if path.is_dir()]
    return [record for stage in stages for record in Store(folder).records(stage)]


each = pytest.mark.parametrize("folder", FOUND, ids=lambda folder: folder.name)


@each
def test_every_record_is_whole_and_named_after_what_determines_it(folder):
    found = records(folder)
    assert len(found) == len(list((folder / "records").glob("*/*.json"))) > 0
    for record in found:
        known = record["determinants"]
        assert digest(canonical(known)) == record["key"]
        if "stage" in known:
            assert known["numerics"] == PROBING_NUMERICS
            known = known["network"]
        if "recipe" in known:
            assert known["numerics"] == NUMERICS and set(known["recipe"]) == set(RECIPE)
        assert known["model"].startswith("sha256:")


@each
def test_every_record_is_found_by_the_profiles_plan(folder, tmp_path):
    if "UD_EWT" not in os.environ:
        pytest.skip("needs the profile's models, data sets and corpora")
    name = folder.name.removesuffix("_long")
    profile = yaml.safe_load((ROOT / "notebooks/profiles" / f"{name}.yaml").read_text())
    try:
        study = Study({**profile, "run": str(tmp_path)})
        planned = {cell.key for stage in ALL_STAGES for cell in study.plan(stage)}
    except HealingError as error:
        pytest.skip(f"needs the profile's models, data sets and corpora: {error}")
    assert not [record["cell"] for record in records(folder) if record["key"] not in planned]
