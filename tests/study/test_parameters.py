"""Parameters as they come from notebooks, profiles and command lines: understood or refused."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from healing_utils.base.errors import HealingError
from healing_utils.study.parameters import (
    Parameters,
    for_task,
    notebook_parameters,
    read_parameters,
)


def read(name: str, value: object) -> object:
    return read_parameters({name: value})[name]


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("levels", "1/6", ["1/6"]), ("levels", "1/6, 1/2,1", ["1/6", "1/2", "1"]),
        ("levels", "[1/6, 0.5]", ["1/6", "0.5"]), ("levels", [], []), ("levels", None, []),
        ("layers", "[0,2]", [0, 2]), ("layers", "3", [3]), ("layers", (4, 5), [4, 5]),
        ("layers", "null", None), ("seeds", "0,1,2", [0, 1, 2]), ("seeds", 7, [7]),
        ("learning_rate", "2e-5", 2e-5), ("learning_rate", 3e-4, 3e-4), ("epochs", "0.25", 0.25),
        ("epochs", "{sst2: 4.5, emotion: 9}", {"sst2": 4.5, "emotion": 9.0}),
        ("train_size", {"sst2": "80", "my/a.csv": None}, {"sst2": 80, "my/a.csv": None}),
        ("learning_rate", {"sst2": "2e-4"}, {"sst2": 2e-4}), ("head", "mean", "mean"),
        ("epochs", 3, 3.0), ("batch_size", "16", 16), ("train_size", "null", None),
        ("scratch", "false", False), ("task", "sst2", ["sst2"]),
        ("task", "sst2,emotion", ["sst2", "emotion"]), ("sides", "top", ["top"]),
        ("task", "nyu-mll/glue:cola", ["nyu-mll/glue:cola"]),
        ("kind", "[reinit, init]", ["reinit", "init"]), ("precision", "bfloat16", "bfloat16"),
        ("text_column", "premise,hypothesis", ["premise", "hypothesis"]), ("column", 1, ["1"]),
        ("column", "[1, -1]", ["1", "-1"]), ("device", "None", None), ("model_revision", "", None),
        ("scans", "{a: {layers: each, seeds: 0}}", {"a": {"layers": "each", "seeds": [0]}}),
        ("scans", "{}", {}), ("scratch", "no", False), ("learning_rate", ".5", 0.5),
        # Names and paths stay text.
        ("task", "bücher #1.csv", ["bücher #1.csv"]), ("task", "a: b.csv", ["a: b.csv"]),
        ("task", "my reviews, final.csv", ["my reviews, final.csv"]), ("run", "012", "012"),
        ("corpus", "$UD_EWT,conll2000", ["$UD_EWT", "conll2000"]), ("label_column", "No", "No"),
        ("text_column", "tweet #", ["tweet #"]), ("text_column", "No,1", ["No", "1"]),
        ("text_column", 1234567, ["1234567"]), ("label_column", 1, "1"),
        ("model_revision", "1:30", "1:30"), ("metric", "null", None),
    ],
)  # fmt: skip
def test_values_and_their_text_forms(name, given, value):
    got = read(name, given)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        ("levels", "1/0", "above 0 and at most 1"), ("levels", "half", "such as 0.5 or 1/6"),
        ("levels", [0.5, "1/2"], "twice"), ("levels", 1.5, "at most 1"),
        ("layers", "0,two", "valid integer"), ("layers", -1, "must be greater than or equal to 0"),
        ("layers", True, "must be a number"), ("seeds", [], "at least 1 item"),
        ("seeds", "0 1 2", "valid integer"), ("seeds", None, "must be a valid list"),
        ("learning_rate", "fast", "must be a valid number"), ("learning_rate", {}, "at least 1"),
        ("learning_rate", 0, "must be greater than 0"),
        ("learning_rate", "nan", "must be greater than"),
        ("epochs", float("inf"), "less than or equal to 1000"),
        ("epochs", {"sst2": 0}, "sst2 must be greater than 0"),
        ("train_size", {"sst2": "many"}, "sst2 must be a valid integer"),
        ("batch_size", {"sst2": 8}, "must be a valid integer"),
        ("batch_size", 0, "greater than or equal to 1"),
        ("train_size", 0, "greater than or equal to 1"), ("scratch", "maybe", "valid boolean"),
        ("scratch", 1, "valid boolean"), ("task", ["sst2", 3], "must be text"),
        ("task", "sst2,sst2", "twice"), ("sides", "botom", "Did you mean 'bottom'"),
        ("kind", "reinnit", "Did you mean 'reinit'"), ("head", "means", "Did you mean 'mean'"),
        ("precision", "float23", "Did you mean 'float32'"), ("run", None, "must be text"),
        ("run", " ", "must be text"), ("scans", [1], "must be a valid dictionary"),
        ("scans", {"a": 3}, "a must be a valid dictionary"),
        ("scans", {"a": {"recipe": "transplants"}}, "Did you mean 'transplant'"),
        ("scans", {"a": {"kind": "noise"}}, "needs a strength"),
        ("scans", {"a": {"kind": "reinit=2"}}, "no strength"),
        ("scans", {"a": {"layers": "all"}}, "a, layers"),
        ("scans", {"a": {"epochs": {"sst2": -1}}}, ": a, epochs, sst2 must be greater than 0"),
        # What YAML would take for something else.
        ("epochs", "1:30", "valid number"), ("seeds", "012", "without leading zeros"),
        ("batch_size", "1_6", "underscores"), ("learning_rate", "2026-01-01", "valid number"),
        ("batch_size", "!!int x", "valid integer"), ("seeds", "[!!int 3]", "or a tag in line 1"),
        ("epochs", "{a: 1, a: 2}", "a key twice"), ("scans", "{a: &x {}, b: *x}", "alias"),
        ("task", "[x].csv", "as YAML"), ("task", "{a: b}", "must be text"),
        ("levels", "1e999999999", "a fraction such as"),
        # Values without end.
        ("evaluations", 1e9, "less than or equal to 10000"), ("workers", 5000, "equal to 256"),
        ("seeds", 2**64, "less than 2147483648"), ("seeds", float("inf"), "finite number"),
        ("kind", "noise=inf", "from 0 up"), ("max_grad_norm", "inf", "less than or equal"),
        ("levels", "-1/2", "above 0"), ("levels", [True], "above 0 and at most 1"),
        ("label_column", True, "must be text"), ("task", "a\0b", "must be text"),
        ("sides", [], "at least 1 item"), ("kind", "[]", "at least 1 item"),
        ("layers", "[]", "at least 1 item"),
    ],
)  # fmt: skip
def test_a_refused_value_names_the_parameter_and_what_is_allowed(name, given, allowed):
    with pytest.raises(HealingError) as caught:
        read(name, given)
    message = str(caught.value)
    assert message.startswith(f"parameter {name} is {given!r}: ")
    assert allowed in message and "\n" not in message


def test_an_existing_file_s_name_is_never_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "[a]", "reviews, final.csv", "final.csv", "other.csv"):
        (tmp_path / name).touch()
        assert read("task", name) == [name]
    assert read("task", "final.csv,other.csv") == ["final.csv", "other.csv"]
    assert read("task", "sst2, final.csv") == ["sst2", "final.csv"]
    assert read("task", "final.csv, lost.csv") == ["final.csv, lost.csv"]  # there is none: said


DEEP, LONG = "[" * 50_000, "9" * 5000


def test_a_value_without_end_is_one_short_line_before_torch_is_there():
    given = [{"layers": DEEP}, {"scans": DEEP.replace("[", "{")}, {"seeds": LONG}, {LONG: 1}]
    given += [{"task": LONG, "seeds": [LONG]}, {"threads": "1:30"}, {"sseds": 1}, {"\ud800": 1}]
    given += [{"scans": {LONG: {"x": 1}}}]
    code = (
        "import sys\nfrom healing_utils.study.parameters import read_parameters\n"
        f"for given in [*{given!r}, {{'seeds': 10 ** 6000}}]:\n"
        "    try:\n        read_parameters(given)\n"
        "    except ValueError as error:\n        print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *lines, torch = done.stdout.splitlines()
    assert (len(lines), torch) == (len(given) + 1, "False"), done.stderr
    assert max(map(len, lines)) <= 1000 and not done.stderr


def test_an_unknown_name_names_the_nearest_or_all():
    for given, message in (
        ({"seeds": 1, "learning_rte": 1e-4}, "'learning_rte'; did you mean 'learning_rate'"),
        ({"xyzzy": 1}, "'xyzzy'; known: run, model, "),
        ({"scans": {"a": {"prat": "all"}}}, "field of scan 'a' 'prat'; did you mean 'part'"),
    ):
        with pytest.raises(HealingError, match=message):
            read_parameters(given)


def test_defaults_read_as_themselves_and_are_not_shared():
    once = read_parameters({})
    assert list(once) == list(Parameters.model_fields)
    defaults = {name: field.default for name, field in Parameters.model_fields.items()}
    assert once == {**defaults, "model": ["organism"]}  # one name is a list of one
    once["seeds"].append(99)
    assert read_parameters({})["seeds"] == [0, 1, 2]
    assert read_parameters(once) == once  # clean values are clean


def test_a_notebooks_variables_are_its_parameters():
    namespace = {
        # What IPython itself puts there, and what the cells before have imported and defined.
        "__name__": "__main__", "_": "", "_i1": "run = 'x'", "In": ["", "x"], "Out": {},
        "_dh": ["/"], "exit": object(), "get_ipython": len, "sys": types, "install": lambda: None,
        "run": "data/runs/x", "seeds": [3], "levels": "1/2",
    }  # fmt: skip
    got = notebook_parameters(namespace)
    assert (got["run"], got["seeds"], got["levels"]) == ("data/runs/x", [3], ["1/2"])
    assert set(got) == {"run", "seeds", "levels"}  # a `Study` knows the others
    # What papermill injected under a wrong name is refused.
    with pytest.raises(HealingError, match="'seed'; did you mean 'seeds'"):
        notebook_parameters({"run": "data/runs/x", "seeds": [3], "seed": 4})


def test_for_a_task_every_parameter_has_one_value():
    given = read_parameters({"epochs": {"sst2": 2, "cola": 3}, "train_size": 500})
    assert for_task(given, "cola")["epochs"] == 3 and for_task(given, "cola")["train_size"] == 500
    assert given["epochs"] == {"sst2": 2, "cola": 3}
    with pytest.raises(HealingError, match="epochs is given for sst2, cola and not for task 'rte'"):
        for_task(given, "rte")
