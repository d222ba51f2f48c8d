"""Profiles and shards: understood or refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from healing_utils.base.errors import HealingError
from healing_utils.base.records import digest
from healing_utils.run import notebooks, profiles
from healing_utils.run.profiles import Shard
from healing_utils.study.parameters import read_parameters


def test_every_profile_of_the_project_names_known_parameters():
    found = sorted((notebooks.folder() / "profiles").glob("*.yaml"))
    assert {"quick", "minilm", "paper"} <= {path.stem for path in found}
    for path in found:
        name, given = profiles.read_profile(path)
        assert name == path.stem
        read_parameters(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold one 'name: value' a line"),
        ("1: 2\n", "must hold one"),
        ("a: [1\n", "not YAML"),
        ("model: !!python/object/apply:os.getcwd []\n", "not YAML"),  # no code is loaded
    ],
)
def test_a_profile_that_is_no_flat_mapping_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(HealingError, match=f"mine.yaml .*{message}"):
        profiles.read_profile(path)


@pytest.mark.parametrize(
    ("profile", "overrides", "message"),
    [
        ("quikc", [], "unknown profile 'quikc'.*Did you mean 'quick'"),
        ("quick", [("epoch", 3)], "unknown parameter 'epoch'.*did you mean 'epochs'"),
        ("quick", [("run", 5)], "parameter run is 5: must be text"),
        ("nowhere/none.yaml", [], "cannot read the profile"),
    ],
)  # fmt: skip
def test_wrong_names_and_values_are_refused(tmp_path, monkeypatch, profile, overrides, message):
    monkeypatch.setenv("HEALING_RUNS", str(tmp_path))
    with pytest.raises(HealingError, match=message):
        profiles.settle(profile, None, overrides)
    assert not list(tmp_path.iterdir())


def test_one_folder_holds_one_study(tmp_path, monkeypatch):
    monkeypatch.setenv("HEALING_RUNS", str(tmp_path))

    def settle(*overrides):
        return profiles.settle("quick", None, overrides)

    name, parameters = settle(("seeds", (0, 1)))
    assert name == "quick" and parameters["run"] == str(tmp_path / "quick")
    assert parameters["seeds"] == [0, 1] and parameters == json.loads(json.dumps(parameters))
    path = profiles.make_folder(parameters) / "parameters.json"
    assert settle(("seeds", [0, 1]), ("device", "cuda"))[1]["device"] == "cuda"
    with pytest.raises(HealingError, match=r"\(seeds \[0, 1\] there, \[2\] now\); choose another"):
        settle(("seeds", 2))
    # A parameter that an older run did not have counts as its default.
    kept = {k: v for k, v in parameters.items() if k != "head"}
    path.write_text(json.dumps(kept))
    settle(("seeds", [0, 1]))
    with pytest.raises(HealingError, match="head 'first' there, 'mean' now"):
        settle(("seeds", [0, 1]), ("head", "mean"))
    path.write_text("{")
    with pytest.raises(HealingError, match="not JSON"):
        settle()


@pytest.mark.parametrize("text", ["0/3", "4/3", "2", "a/b", "1/0", "-1/3", "1/3/5"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(HealingError, match="from 1 to n, such as 2/8"):
        Shard.read(text)


def test_shares_are_disjoint_cover_everything_and_depend_on_the_key_alone():
    cells = [SimpleNamespace(key=digest(number)) for number in range(30)]
    shares = [[c.key for c in cells if Shard.read(f"{i}/3").has(c)] for i in (1, 2, 3)]
    assert sorted(sum(shares, [])) == sorted(c.key for c in cells) and all(shares)
    assert all(Shard().has(c) for c in cells)
