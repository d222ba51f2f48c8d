"""What harm costs and which first aid works: planted effects are found, and nothing else is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
from planted import INTACT, SEEDS, again, cells, curves

from healing_utils.analysis import harm, price, results
from healing_utils.analysis.claims import decide, entries
from healing_utils.analysis.ledger import Tables
from healing_utils.base.errors import HealingError
from healing_utils.report import harm_figures

QUICK = Path(__file__).resolve().parents[2] / "data" / "results" / "quick"
FIRST = {"side": "custom", "layers": (0,), "level": 1 / 6, "score": 0.8}


def test_the_planted_layer_is_the_vulnerable_one_and_nothing_else_is_in_the_map():
    rows = [FIRST | {"layers": (i,), "score": 0.5 if i == 3 else 0.85} for i in range(6)]
    table = cells(INTACT, *rows)
    found = harm.vulnerability(table)
    assert found["layer"].tolist() == list(range(6)) and (found["n"] == len(SEEDS)).all()
    assert found.loc[found["retained"].idxmin(), "layer"] == 3
    assert found["retained"].min() == pytest.approx(0.5 / 0.9, abs=1e-3)
    twice = table[table["state"] == "healed"].assign(scan="layers")
    assert harm.vulnerability(pd.concat([table, twice])).equals(found)
    strange = [
        {"recipe": "drop"}, {"start": "fine-tuned"}, {"epochs": 3.0}, {"kind": "zero"},
        {"side": "scattered"},
    ]  # fmt: skip
    strange = cells(*({**FIRST, "score": 0.1} | other for other in strange))
    strange["key"] = "other " + strange["key"]
    assert harm.vulnerability(again(table, strange)).equals(found)


def test_the_league_finds_what_helps_and_what_hurts_the_same_layers():
    scores = {"full": 0.7, "drop": 0.8, "transplant": 0.7, "corrupted_only": 0.5}
    rows = [{"recipe": name, "score": score} for name, score in scores.items()]
    other = [FIRST | {"layers": (i,), "score": 0.1 * i} for i in range(3)]
    table = harm.league(cells(INTACT, *rows, *other)).set_index("recipe")
    assert list(table.index)[0] == "drop" and list(table.index)[-1] == "corrupted_only"
    assert table["gain"].to_dict() == pytest.approx(
        {"drop": 0.1, "transplant": 0.0, "corrupted_only": -0.2}, abs=1e-3
    )
    assert table.loc["drop", "gain_low"] > 0.09 and (table["n"] == len(SEEDS)).all()
    assert set(table["place"]) == {"bottom 1/2"}


def test_a_budget_is_compared_with_its_own_intact_model():
    """What was trained less is no worse healed for it, where its intact model is beside it."""
    less = {"epochs": 1.0, "steps": 3.0, "scan": "usual"}
    table = cells(INTACT, {"score": 0.8}, INTACT | less | {"score": 0.6}, {"score": 0.54} | less)
    short = table[table["epochs"] == 1.0]
    assert (short["budget"] == "3/7 of the steps").all() and not short["usual"].any()
    assert short[short["state"] == "healed"]["retained"].mean() == pytest.approx(0.9, abs=1e-3)
    # A table of kinds takes the budget at which most kinds were tried.
    kinds = [{"score": 0.5, "kind": kind} | less for kind in ("zero", "init")]
    found = harm.by_harm(cells(INTACT, {"score": 0.8}, INTACT | less, *kinds))
    assert set(found["harm"]) == {"zero", "init"}
    # Broken cells whose intact model is missing are beside none, and hide no others.
    alone = {"score": 0.5, "state": "broken", "train_size": math.nan}
    assert harm.by_harm(cells(alone))["retained"].isna().all()
    known = harm.by_harm(again(cells(INTACT, {"score": 0.8}), cells(alone, seeds=[9])))
    assert known.set_index("state")["retained"]["healed"] == pytest.approx(0.8, abs=0.2)


def test_a_cell_that_a_scan_names_by_its_layers_still_counts_by_side():
    table = cells(INTACT, {"score": 0.6, "layers": (0,), "level": 1 / 6, "scan": "kinds"})
    again = table[table["state"] == "healed"].assign(side="custom", scan="layers")
    both = pd.concat([again, table])
    assert harm.by_harm(both).equals(harm.by_harm(table)) and len(harm.by_harm(both)) == 1


@pytest.mark.parametrize(
    ("scores", "needed"),
    [  # by number of examples; the intact score is 0.9
        ({25: 0.5, 50: 0.83, 100: 0.88}, ["50", "100", "more than 100"]),
        ({25: 0.895, 50: 0.895, 100: 0.895}, ["at most 25", "at most 25", "at most 25"]),
        ({25: 0.85, 50: 0.5, 100: 0.88}, ["100", "100", "more than 100"]),  # it falls again
    ],
)
def test_the_price_is_the_first_budget_that_reaches_the_share_and_stays(scores, needed):
    rows = [{"score": score, "train_size": size} for size, score in scores.items()]
    assert price.price(cells(INTACT, *rows))["needed"].tolist() == needed


def noisy(around, spread, **more):
    """Cells whose scores leave and reach a share, from seed to seed."""
    rows = [{"score": around + (spread if seed % 2 else -spread), "seed": seed, **more}
            for seed in SEEDS]  # fmt: skip
    return cells(*rows, seeds=[0]).assign(key=lambda t: f"noisy {more} " + t["key"])


def test_what_lies_within_the_noise_is_not_resolvable():
    sizes = [noisy(0.81, 0.05, train_size=size) for size in (50, 100)]
    found = price.price(pd.concat([cells(INTACT), *sizes])).set_index("share")
    assert found.loc[0.9, "needed"] == "not resolvable"
    assert found.loc[0.99, "needed"] == "more than 100"


def test_a_training_that_broke_off_has_not_reached_the_share():
    table = cells(INTACT, {"score": 0.89})
    broke = curves(table, shape=(1.0, 1.0, 1.0))
    broke = broke[(broke["state"] == "intact") | (broke["seed"] > 0) | (broke["step"] < 30)]
    found = price.time_to_heal(broke)
    assert set(found[found["state"] == "healed"]["needed"]) == {"more than 30"}


def test_only_trainings_that_differ_in_examples_alone_are_priced():
    other = {"score": 0.9, "train_size": 50, "epochs": 8.0, "steps": 13.0}
    assert price.price(cells(INTACT, {"score": 0.7}, other)).empty
    # The same steps on fewer examples are a price too.
    found = price.price(cells(INTACT, {"score": 0.9}, other | {"epochs": 4.0, "steps": 7.0}))
    assert found.set_index("share").loc[0.9, "from"] == 50


def test_time_to_heal_is_told_for_each_length_of_training():
    more = {"epochs": 8.0, "steps": 28.0, "scan": "long"}
    table = cells(INTACT, {"score": 0.8}, INTACT | more, {"score": 0.9} | more)
    found = price.time_to_heal(curves(table))
    healed = found[(found["state"] == "healed") & (found["share"] == 0.9)].set_index("epochs")
    assert healed.loc[2.0, "needed"] == "more than 30"  # 0.8 of 0.9
    assert healed.loc[8.0, "needed"] == "120"
    told = price.price_list(found)
    assert list(told["epochs"]) == [2.0, 8.0] * 2 and "what" in told


def test_healing_is_drawn_on_the_longest_training_with_its_floor():
    longer = {"epochs": 4.0, "steps": 14.0}
    long = cells(INTACT | longer, {"score": 0.9} | longer).assign(key=lambda t: "long " + t["key"])
    table = again(cells(INTACT, {"score": 0.8}, {"score": 0.85, "recipe": "drop"}), long)
    learning = curves(table).assign(floor=0.7)
    figure = harm_figures.healing_over_time(learning)
    (axis,) = figure.axes
    drawn = {line.get_label(): line for line in axis.get_lines()}
    # There is none without the redrawn layers that is trained for so long.
    assert {name for name in drawn if name[0] != "_"} == {
        "intact", "bottom, kept", "floor: no layers"}  # fmt: skip
    heights = [line.get_ydata() for line in axis.get_lines() if len(line.get_xdata()) == 3]
    assert list(heights[0]) == pytest.approx([0.4, 0.7, 1.0], abs=1e-3)
    assert [t.get_text() for t in axis.texts] == ["90 %", "95 %", "99 %"]
    with pytest.raises(HealingError, match="nothing to draw"):
        harm_figures.healing_over_time(learning[learning["state"] == "intact"])


def test_what_was_not_reached_is_open_with_an_arrow_and_what_is_unknown_left_out():
    one = FIRST | {"recipe": "corrupted_only", "layers": (2,), "score": 0.9}
    table = again(cells(INTACT, {"score": 0.8}, one), noisy(0.855, 0.08, side="top"))
    heal = price.time_to_heal(curves(table))
    figure = harm_figures.needed_figure(heal)
    (axis,) = figure.axes
    assert {t.get_text() for t in axis.get_yticklabels()} == {
        "intact", "layer 3, reinit, its neighbours frozen", "bottom 1/2, reinit"}  # fmt: skip
    arrows = [list(x.get_xdata()) for x in axis.get_lines() if "arrow" in str(x.get_marker())]
    assert sorted(arrows) == [[], *[[30]] * 3]  # the first of them is the legend's
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert named == {"90 %", "95 %", "99 %", "more than was tried"}  # nothing is dashed
    assert "bottom 1/2, reinit: more than 30, more than 30, more than 30" in figure.alt
    with pytest.raises(HealingError, match="nothing to draw"):
        harm_figures.needed_figure(heal[heal["needed"].str.startswith("not")])


def test_what_a_longer_training_gains_on_is_censored():
    more = {"epochs": 8.0, "steps": 28.0, "scan": "long"}
    table = cells(INTACT, {"score": 0.7}, INTACT | more, {"score": 0.85} | more)
    found = price.censored(table, curves(table, shape=(0.9, 1.0, 1.0)))
    found = found.set_index(["state", "epochs"])
    assert found["censored"].to_dict() == {
        ("intact", 2.0): False, ("intact", 8.0): False,
        ("healed", 2.0): True, ("healed", 8.0): False,
    }  # fmt: skip
    assert found.loc[("healed", 2.0), "gained"] == pytest.approx(0.15, abs=1e-3)
    # Where none is longer, the curve speaks.
    rising = price.censored(table, curves(table)).set_index(["state", "epochs"])
    assert rising.loc[("healed", 8.0), "censored"] and rising.loc[("healed", 8.0), "rise"] > 0.2


def test_a_run_that_stopped_in_its_scans_is_drawn_and_its_claims_stay_open(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(QUICK, run, ignore=shutil.ignore_patterns("tables"))
    plan = json.loads((run / "plans" / "scans.json").read_text())["cells"]
    entry = next(c for c in plan if c["cell"]["recipe"] == "drop")
    (run / "records" / entry["stage"] / f"{entry['key']}.json").unlink()
    assert len(harm.gather(run)) == len(harm.gather(QUICK)) - 1
    found = decide(Tables(run), entries("A3", "D"))[0].set_index(["claim", "variant"])
    assert entry["name"] in found.reason["D", "reinit, bottom 1/2"]
    assert "missing" not in found.reason["A3", "reinit"]  # the main grid is there


def test_what_a_kind_does_to_the_weights_is_read_from_the_records():
    changes = results.load_changes(QUICK, "corruption", "harms")
    alone = results.load_changes(QUICK, "corruption", "baseline")  # a stage that changed nothing
    assert alone.equals(results.load_changes(QUICK))
    changes = harm.most_kinds(changes.drop_duplicates("key")).set_index("harm")
    # The norm of noise as large as a standard deviation, over that of values around zero.
    assert changes.loc["noise=1", "change_feed_forward"] == pytest.approx(0.85, abs=0.25)
    assert (changes["not_finite"] == 0).all() and (changes["values"] > 0).all()
    assert len(changes) == 13


def test_the_deployed_fault_is_paired():
    row = harm.deployed(harm.gather(QUICK)).iloc[0]
    assert row["n"] == 2 and row["side"] == "bottom"
    assert row["gain"] == pytest.approx(row["healed_deployed"] - row["healed"])
