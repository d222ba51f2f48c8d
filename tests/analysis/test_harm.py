"""What harm costs and which first aid works: planted effects are found, and nothing else is."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
from helpers import save_tiny_bert, tiny_study, write_planted_task
from planted import INTACT, SEEDS, again, cells, curves

from healing_utils.analysis import harm, price, results
from healing_utils.analysis.claims import decide
from healing_utils.analysis.ledger import Tables
from healing_utils.base.errors import HealingError
from healing_utils.report import harm_figures
from healing_utils.study.study import Study

# --- The map --------------------------------------------------------------------------------------


def test_the_planted_layer_is_the_vulnerable_one():
    rows = [
        {"side": "custom", "layers": (i,), "level": 1 / 6, "score": 0.5 if i == 3 else 0.85}
        for i in range(6)
    ]
    table = harm.vulnerability(cells(INTACT, *rows))
    assert table["layer"].tolist() == list(range(6)) and (table["n"] == len(SEEDS)).all()
    assert table.loc[table["retained"].idxmin(), "layer"] == 3
    assert table["retained"].min() == pytest.approx(0.5 / 0.9, abs=1e-3)


def test_the_map_leaves_out_other_training_other_kinds_and_scattered_harm():
    one = {"side": "custom", "layers": (0,), "level": 1 / 6, "score": 0.8}
    strange = [
        {"recipe": "drop"}, {"start": "fine-tuned"}, {"epochs": 3.0}, {"kind": "zero"},
        {"side": "scattered"},
    ]  # fmt: skip
    table = harm.vulnerability(cells(INTACT, one, *({**one, "score": 0.1} | s for s in strange)))
    assert len(table) == 1 and table["retained"].item() == pytest.approx(0.8 / 0.9, abs=1e-3)


def test_a_cell_of_two_scans_counts_once():
    table = cells(INTACT, {"side": "custom", "layers": (0,), "level": 1 / 6, "score": 0.8})
    again = table[table["state"] == "healed"].assign(scan="layers")
    assert harm.vulnerability(pd.concat([table, again])).equals(harm.vulnerability(table))


# --- First aid ------------------------------------------------------------------------------------


def test_the_league_finds_what_helps_and_what_hurts():
    scores = {"full": 0.7, "drop": 0.8, "transplant": 0.7, "corrupted_only": 0.5}
    rows = [{"recipe": name, "score": score} for name, score in scores.items()]
    table = harm.league(cells(INTACT, *rows)).set_index("recipe")
    assert list(table.index)[0] == "drop" and list(table.index)[-1] == "corrupted_only"
    assert table["gain"].to_dict() == pytest.approx(
        {"drop": 0.1, "transplant": 0.0, "corrupted_only": -0.2}, abs=1e-3
    )
    assert table.loc["drop", "gain_low"] > 0.09 and (table["n"] == len(SEEDS)).all()


def test_recipes_for_different_layers_are_not_mixed():
    rows = [
        {"side": "custom", "layers": (i,), "level": 1 / 6, "score": score}
        for i, score in enumerate((0.5, 0.8, 0.85))
    ]
    rows.append({**rows[0], "recipe": "drop"})
    table = harm.league(cells(INTACT, *rows)).set_index("recipe")
    assert set(table["place"]) == {"layer 1"} and (table["n"] == len(SEEDS)).all()
    assert table.loc["drop", "gain"] == pytest.approx(0, abs=1e-3)


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


def test_a_cell_that_a_scan_names_by_its_layers_still_counts_by_side():
    table = cells(INTACT, {"score": 0.6, "layers": (0,), "level": 1 / 6, "scan": "kinds"})
    again = table[table["state"] == "healed"].assign(side="custom", scan="layers")
    both = pd.concat([again, table])
    assert harm.by_harm(both).equals(harm.by_harm(table)) and len(harm.by_harm(both)) == 1


# --- The price ------------------------------------------------------------------------------------


def priced(scores, **more):
    """Needed for each share, of scores by number of examples; the intact score is 0.9."""
    rows = [{"score": score, "train_size": size, **more} for size, score in scores.items()]
    table = price.price(cells(INTACT, *rows))
    return dict(zip(table["share"], table["needed"], strict=True))


def test_the_price_is_the_first_budget_that_reaches_the_share():
    assert priced({25: 0.5, 50: 0.83, 100: 0.88}) == {
        0.9: "50", 0.95: "100", 0.99: "more than 100",
    }  # fmt: skip
    assert priced({25: 0.895, 50: 0.895, 100: 0.895})[0.9] == "at most 25"


def test_a_budget_after_which_the_score_falls_again_does_not_count():
    assert priced({25: 0.85, 50: 0.5, 100: 0.88})[0.9] == "100"


def test_what_lies_within_the_noise_is_not_resolvable():
    rows = [
        {"score": 0.81 + (0.05 if seed % 2 else -0.05), "seed": seed, "train_size": size}
        for size in (50, 100)
        for seed in SEEDS
    ]  # fmt: skip
    table = cells(INTACT)
    planted = cells(*rows, seeds=[0])
    planted["key"] = "own " + planted["key"]
    table = pd.concat([table, planted])
    found = price.price(table).set_index("share")
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
    one = {"side": "custom", "level": 1 / 6, "recipe": "corrupted_only", "layers": (2,)}
    noisy = [{"side": "top", "score": 0.855 + (0.08 if seed % 2 else -0.08), "seed": seed}
             for seed in SEEDS]  # fmt: skip
    noisy = cells(*noisy, seeds=[0]).assign(key=lambda t: "noisy " + t["key"])
    table = again(cells(INTACT, {"score": 0.8}, one | {"score": 0.9}), noisy)
    heal = price.time_to_heal(curves(table))
    figure = harm_figures.needed_figure(heal)
    (axis,) = figure.axes
    assert {t.get_text() for t in axis.get_yticklabels()} == {
        "intact", "layer 3, reinit, its neighbours frozen", "bottom 1/2, reinit"}  # fmt: skip
    arrows = [x for x in axis.get_lines() if "arrow" in str(x.get_marker())]
    assert [list(x.get_xdata()) for x in arrows] == [[30]] * 3
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


# --- From real records ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harm")
    save_tiny_bert(folder / "model")
    write_planted_task(folder / "task")
    scans = {
        "layers": {"layers": "each", "part": ["all", "attention"]},
        "kinds": {"kind": "noise=0.5", "levels": "1/3"},
        "controls": {"sides": ["random", "scattered"], "levels": "1/3"},
        "recipes": {"recipe": ["drop", "transplant"], "levels": "1/3", "broken": False},
        "deployed": {"start": "fine-tuned", "levels": "1/3", "sides": "bottom", "broken": False},
        "price": {"state": ["intact", "healed", "scratch"], "levels": "1/3", "train_size": [8, 16],
                  "broken": False},
        "steps": {"state": ["intact", "healed"], "levels": "1/3", "epochs": 3.0, "evaluations": 6,
                  "learning_rate": [1e-3], "broken": False},
        "rates": {"state": "intact", "learning_rate": [3e-4]},
    }  # fmt: skip
    parameters = tiny_study(folder / "run", folder / "model", folder / "task", scans=scans)
    study = Study(parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEALING_PROGRESS", "quiet")
        for stage in ("baseline", "corruption", "harms", "recovery", "scans"):
            study.run(stage)
    return study.run_folder


def test_every_table_and_figure_is_made_from_a_run(run):
    every, learning = harm.gather(run), results.load_curves(run, scans=True)
    assert every["intact"].notna().all()
    assert set(every["scan"]) >= {"main", "layers", "kinds", "controls", "recipes", "deployed"}
    # Those of the main grid and of scans that train as it does; broken cells always.
    other = every[every["scan"].isin(["steps", "rates"])]
    assert not other["usual"].any() and every[every["state"] == "broken"]["usual"].all()
    tables = {
        "vulnerability": harm.vulnerability(every),
        "by_harm": harm.by_harm(every),
        "claims": decide(Tables(run))[0],
        "league": harm.league(every),
        "deployed": harm.deployed(every),
        "price": price.price(every),
        "steps": price.time_to_heal(learning),
        "censored": price.censored(every, learning),
    }
    assert not {name for name, table in tables.items() if table.empty}
    assert set(tables["vulnerability"]["part"]) == {"all", "attention"}
    assert len(tables["vulnerability"]) == 2 * 2 * 3  # states, parts, layers
    assert set(price.price_list(tables["price"])) >= {"what", "90%", "95%", "99%"}
    claims = tables["claims"].set_index("claim")
    assert claims.loc["A3", "n"].max() == 2 and claims.loc["B1", "verdict"] == "not tested"
    assert claims.loc["D", "variant"].tolist() == ["reinit, bottom 1/3", "reinit, top 1/3"]
    similar = pd.concat(
        [results.load_similarity(run, stage) for stage in ("corruption", "harms")]
    ).drop_duplicates(["key", "layer", "measure"])
    drawn = [
        harm_figures.vulnerability_map(tables["vulnerability"]),
        harm_figures.harm_curves(tables["by_harm"]),
        harm_figures.league_figure(tables["league"]),
        harm_figures.price_curves(every),
        harm_figures.harm_similarity(harm.most_kinds(similar)),
    ]
    for figure in drawn:
        assert figure.caption and len(figure.alt) > 40
        assert "nan" not in figure.caption + figure.alt


def test_a_run_that_stopped_in_its_scans_is_drawn_and_its_claims_stay_open(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    plan = json.loads((run / "plans" / "scans.json").read_text())["cells"]
    entry = next(c for c in plan if c["cell"]["recipe"] == "drop")
    (tmp_path / "run" / "records" / entry["stage"] / f"{entry['key']}.json").unlink()
    assert len(harm.gather(tmp_path / "run")) == len(harm.gather(run)) - 1
    found = decide(Tables(tmp_path / "run"))[0].set_index(["claim", "variant"])
    assert entry["name"] in found.reason["D", "reinit, top 1/3"]
    assert "missing" not in found.reason["A3", "reinit"]  # the main grid is there


def test_what_a_kind_does_to_the_weights_is_read_from_the_records(run):
    changes = pd.concat(
        [results.load_changes(run, stage) for stage in ("corruption", "harms")]
    ).drop_duplicates("key", ignore_index=True)
    noise = changes[changes["kind"] == "noise"]
    # The norm of noise as large as half a standard deviation, over that of values around zero.
    assert noise["change_feed_forward"].between(0.3, 0.55).all()
    assert (noise["not_finite"] == 0).all() and (noise["values"] > 0).all()
    assert harm.most_kinds(changes)["harm"].nunique() == 3  # reinit, init and noise


def test_the_deployed_fault_is_paired(run):
    table = harm.deployed(harm.gather(run))
    row = table.iloc[0]
    assert row["n"] == 2 and row["side"] == "bottom"
    assert row["gain"] == pytest.approx(row["healed_deployed"] - row["healed"])
