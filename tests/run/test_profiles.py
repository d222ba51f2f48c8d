"""Notebooks' parameters, profiles and shards: understood or refused."""

import json
from types import SimpleNamespace

import nbformat
import pytest

from healing_utils.base.errors import HealingError
from healing_utils.base.records import digest
from healing_utils.run import profiles


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold one 'name: value' a line"), ("1: 2\n", "must hold one"),
        ("a: [1\n", "as YAML: "), (None, "as YAML: "), ("run: 5", "run is 5: must be text"),
        ("model: !!python/object/apply:os.getcwd []\n", "as YAML"),  # no code is loaded
    ],
)  # fmt: skip
def test_a_profile_that_is_none_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(HealingError, match=message):
        profiles.settle(tmp_path / "mine.yaml", tmp_path / "run", {})


def test_values_that_arrive_as_text_mean_what_they_say(tmp_path):
    given = {
        "seeds": ("[0,2]", [0, 2]), "epochs": ("0.5", 0.5), "levels": ("[1/6, 1]", ["1/6", "1"]),
        "scratch": ("false", False), "device": ("null", None), "learning_rate": ("2e-5", 2e-5),
        "model_revision": ("012", "012"), "data_revision": ("1:30", "1:30"), "task": ("a", ["a"]),
        "kind": ("[noise=0.5, prune=0.9]", ["noise=0.5", "prune=0.9"]),
    }  # fmt: skip
    found = profiles.settle("quick", tmp_path, {name: text for name, (text, _) in given.items()})
    assert {name: found[name] for name in given} == {name: v for name, (_, v) in given.items()}


def test_one_folder_holds_one_study(tmp_path, monkeypatch):
    monkeypatch.setenv("HEALING_RUNS", str(tmp_path))

    def settle(**given):
        return profiles.settle("quick", None, given)

    parameters = settle(seeds=(0, 1))
    assert parameters["run"] == str(tmp_path / "quick")
    assert parameters["seeds"] == [0, 1] and parameters == json.loads(json.dumps(parameters))
    (tmp_path / "quick").mkdir()
    path = tmp_path / "quick" / "parameters.json"
    path.write_text(json.dumps(parameters))
    assert settle(seeds=[0, 1], device="cuda")["device"] == "cuda"
    with pytest.raises(HealingError, match=r"\(seeds \[0, 1\] there, \[2\] now\); choose another"):
        settle(seeds=2)
    # A parameter that an older run did not have counts as its default.
    path.write_text(json.dumps({k: v for k, v in parameters.items() if k != "head"}))
    settle(seeds=[0, 1])
    with pytest.raises(HealingError, match="head 'first' there, 'mean' now"):
        settle(seeds=[0, 1], head="mean")
    path.write_text("{")
    with pytest.raises(HealingError, match="cannot be read; remove it"):
        settle()


def test_shares_are_disjoint_cover_everything_and_depend_on_the_key_alone():
    cells = [SimpleNamespace(key=digest(number)) for number in range(30)]
    shares = [[c.key for c in profiles.share(cells, f"{i}/3")] for i in (1, 2, 3)]
    assert sorted(sum(shares, [])) == sorted(c.key for c in cells) and all(shares)
    assert profiles.share(cells, None) == cells
    for text in ("0/3", "4/3", "2", "a/b", "1/0", "-1/3", "1/3/5", ""):
        with pytest.raises(HealingError, match="from 1 to n, such as 2/8"):
            profiles.share(cells, text)


def test_a_parameters_cell_holds_literals_and_nothing_else(tmp_path):
    def declared(source):
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
        return profiles.declared_parameters(tmp_path / "a.ipynb")

    assert declared("a = 1  # b=2 is not meant\nc: int | None = None") == {"a": 1, "c": None}
    for source, said in (
        ("a = 1\nb = a + 1", "line 2 is not"), ("a =", "invalid syntax"),
        ("import os", "line 1 is not"), ("a = b = 1", "line 1 is not"), ("a += 1", "line 1 is"),
    ):  # fmt: skip
        with pytest.raises(HealingError, match=f"in the parameters cell of .*{said}"):
            declared(source)


def test_the_organism_is_made_only_where_it_is_studied(tmp_path, monkeypatch):
    for name in ("00_model_organism", "01_baseline"):
        (tmp_path / f"{name}.ipynb").touch()
    monkeypatch.setattr(profiles, "notebook_folder", lambda: tmp_path)
    found = profiles.sequence(["organism", "bert-base-uncased"])
    assert [path.stem[:2] for path in found] == ["00", "01"]
    assert [path.stem[:2] for path in profiles.sequence(["bert-base-uncased"])] == ["01"]
