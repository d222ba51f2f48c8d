"""Notebooks' parameters, profiles and shards: understood or refused."""

import json
from types import SimpleNamespace

import pytest

from healing_utils.base.errors import HealingError
from healing_utils.base.records import Store, digest
from healing_utils.run import profiles


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold one 'name: value' a line"), ("1: 2\n", "parameter '1'"),
        ("a: [1\n", "as YAML: "), (None, "no such profile"), ("a" * 9, "must hold one"),
        ("model: !!python/object/apply:os.getcwd []\n", "as YAML"),  # no code is loaded
        ("seeds: 1\nseeds: 2\n", "key twice"), ("a: &a [1]\nb: *a\n", "an alias"),
        (f"a: {'[' * 9999}", "too deeply"), ("a: \0\n", "as YAML: "),
    ],
)  # fmt: skip
def test_a_profile_that_is_none_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(HealingError, match=message):
        profiles.settle(tmp_path / "mine.yaml", tmp_path / "run", {})


def test_one_folder_holds_one_study(tmp_path, monkeypatch):
    monkeypatch.setenv("HEALING_RUNS", str(tmp_path))
    (tmp_path / "quick").mkdir()
    path = tmp_path / "quick" / "parameters.json"

    def settle(**given):
        return profiles.settle("quick", None, given)

    parameters = settle(seeds=(0, 1))
    assert parameters["run"] == str(tmp_path / "quick")
    assert parameters["seeds"] == [0, 1] and parameters == json.loads(json.dumps(parameters))
    for text in ("{", "[]", "null", "[" * 10**5, json.dumps(parameters)):
        path.write_text(text)
        settle(seeds=2, task="anything")  # a folder without records takes any study
    Store(tmp_path / "quick").write("baseline", "k", {})
    assert settle(seeds=[0, 1], device="cuda")["device"] == "cuda"
    with pytest.raises(HealingError, match=r"\(seeds \[0, 1\] there, \[2\] now\); choose another"):
        settle(seeds=2)


def test_shares_are_disjoint_cover_everything_and_depend_on_the_key_alone():
    cells = [SimpleNamespace(key=digest(number)) for number in range(30)]
    shares = [[c.key for c in profiles.share(cells, f"{i}/3")] for i in (1, 2, 3)]
    assert sorted(sum(shares, [])) == sorted(c.key for c in cells) and all(shares)
    assert profiles.share(cells, None) == cells
    for text in ("0/3", "4/3", "2", "a/b", "1/0", "-1/3", "1/3/5", ""):
        with pytest.raises(HealingError, match="from 1 to n, such as 2/8"):
            profiles.share(cells, text)


def test_the_organism_is_made_only_where_it_is_studied_on_its_own_texts(tmp_path, monkeypatch):
    for name in ("00_model_organism", "01_baseline"):
        (tmp_path / f"{name}.ipynb").touch()
    monkeypatch.setattr(profiles, "notebook_folder", lambda: tmp_path)
    for model, task, made in (
        ("organism", "topic", True), ("organism", "my.csv", False), ("bert", "topic", False),
    ):  # fmt: skip
        found = profiles.sequence({"model": ["x", model], "task": [task, "sst2"]})
        assert [path.stem[:2] for path in found] == ["00", "01"][not made :]
