"""The entries of the ledger find what is planted, by side, kind, recipe and budget."""

from __future__ import annotations

import pandas as pd
import pytest
from planted import INTACT, SEEDS, TASKS, Planted, again, cells, healed_study, study, together

from healing_utils.analysis.claims import LEDGER, decide, entries, in_words
from healing_utils.analysis.ledger import Tables


def verdicts(scored=None, made=None, lost=(), model=None):
    table = decide(Planted(made, scored, lost), LEDGER)[0]
    table = table if model is None else table[table.model == model]
    return table[table.n > 0].set_index(["claim", "variant"])


def healed(side="bottom", level=0.5, **more):
    n = round(6 * level)
    return {"side": side, "level": level, "layers": tuple(range(6 - n, 6) if side == "top" else
                                                          range(n)), **more}  # fmt: skip


GRID = [
    healed("bottom", 1 / 6, score=0.75), healed("bottom", 0.5, score=0.65),
    healed("top", 1 / 6, score=0.88), healed("top", 0.5, score=0.84),
]  # fmt: skip


def test_a1_to_a3_by_side():
    found = verdicts(cells(INTACT, *GRID, healed("all", 1.0, score=0.5)))
    assert found.effect["A1", "reinit"] == pytest.approx((0.15 + 0.25 + 0.02 + 0.06) / 4, abs=1e-3)
    assert found.effect["A1", "reinit, bottom"] == pytest.approx(0.2, abs=1e-3)
    assert found.effect["A1", "reinit, all layers"] == pytest.approx(0.4, abs=1e-3)
    assert found.effect["A2", "reinit"] == pytest.approx((0.10 + 0.04) / 2, abs=1e-3)
    assert found.effect["A2", "reinit, top"] == pytest.approx(0.04, abs=1e-3)
    assert found.effect["A3", "reinit"] == pytest.approx((0.13 + 0.19) / 2, abs=1e-3)
    assert found.primary.groupby("claim").sum().to_dict()["A1"] == 1
    assert (found.verdict[["A1", "A2", "A3"]] == "holds").all()


def test_other_kinds_recipes_and_budgets_are_variants_beside_their_own_intact_model():
    longer = {"epochs": 6.0, "steps": 21.0, "scan": "long"}
    rows = [INTACT, *GRID, INTACT | longer | {"score": 0.95}]
    rows += [row | longer | {"score": 0.9} for row in GRID]
    rows += [row | {"recipe": "drop", "scan": "aside", "score": 0.8} for row in GRID]
    rows += [row | {"kind": "noise", "strength": 0.5, "scan": "kinds"} for row in GRID[:2]]
    found = verdicts(cells(*rows))
    assert found.effect["A1", "reinit, 3 times the steps, 1/2"] == pytest.approx(0.05, abs=1e-3)
    assert found.verdict["A3", "reinit, 3 times the steps, 1/6"] == "fails"
    assert found.verdict["A3", "reinit, by drop, 1/2"] == "fails"
    assert found.effect["A1", "noise 0.5, 1/2, bottom"] == pytest.approx(0.25, abs=1e-3)
    assert ("A3", "noise 0.5, 1/2") not in found.index  # one side only
    assert found.effect["D", "reinit, bottom 1/2"] == pytest.approx(0.15, abs=1e-3)
    assert found.primary.sum() == 2  # A1 and A3 of the main grid; H has no probes here


def test_scans_of_other_seeds_and_levels_neither_widen_nor_empty_a_variant():
    usual = {"epochs": 1.0, "steps": 3.5}
    few = [{**row, **usual, "scan": "many", "seed": s, "score": 0.7} for row in GRID[::2]
           for s in (0, 1, 2)]  # fmt: skip
    rows = [INTACT, *GRID, INTACT | usual | {"scan": "usual"}]
    rows += [{**row, **usual, "scan": "usual", "score": 0.8} for row in GRID[1::2]]
    few = cells(*few, seeds=[0]).assign(key=lambda table: "few " + table["key"])
    found = verdicts(again(cells(*rows), few))
    assert found.n["A1", "reinit, 1/2 of the steps, 1/2"] == 6
    assert found.n["A1", "reinit, 1/2 of the steps, 1/6"] == 3
    assert found.primary["A1", "reinit"] and found.n["A1", "reinit"] == 6


def test_a_training_that_broke_off_stays_in_its_variant_and_others_evaluations_count_once():
    table = cells(INTACT, *GRID)
    broke = (table["seed"] == 3) & (table["side"] == "top")
    table.loc[broke, ["steps", "score"]] = [2.0, 0.3]
    seldom = table[table["state"] == "healed"].assign(
        evaluations=1, scan="seldom", key=lambda table: "seldom " + table["key"]
    )
    found = verdicts(again(table, seldom))
    assert found.n["A3", "reinit"] == 6 and set(found.loc["A3"].index) == {"reinit"}


def test_a_censored_cell_is_never_counted_as_not_recovering():
    """It says how fast it heals: A1 holds only where it would if what is censored had recovered."""
    scored = cells(INTACT, *GRID)
    healed_keys = set(scored["key"][scored["state"] == "healed"])
    bottom = set(scored["key"][scored["side"] == "bottom"])

    def row(unfinished, claim="A1"):
        table = decide(Planted(scored=scored, unfinished=unfinished), entries(claim))[0]
        return table.iloc[0], in_words(table)[0]

    (found, said), every = row(bottom), row(healed_keys)[0]
    assert (found.verdict, found.cells, found.censored) == ("holds", 30, 12)  # 6 intact, 24 healed
    assert "12 of 30 cells censored, which tells how fast they heal and not how far" in said
    assert every.verdict == "undecided" and "counted as recovered" in every.reason
    assert found.effect == every.effect  # and nothing else changes
    assert row(healed_keys, "A3")[0].verdict == "holds"
    assert "censored" not in row(set())[1]


def test_parts_and_chosen_layers_stay_out():
    other = [{**row, "part": "attention", "score": 0.1, "scan": "parts"} for row in GRID]
    other += [healed("custom", 1 / 6, score=0.1, scan="layers") | {"layers": (3,)}]
    before = verdicts(cells(INTACT, *GRID)).effect
    after = verdicts(cells(INTACT, *GRID, *other)).effect
    assert after[before.index].to_numpy() == pytest.approx(before.to_numpy(), abs=1e-3)


def test_controls_tell_the_bottom_from_how_much_is_hit():
    rows = [
        healed(score=0.6),
        healed("random", score=0.75, scan="controls") | {"layers": (1, 4, 5)},
        healed("scattered", score=0.6, scan="controls") | {"layers": tuple(range(6))},
    ]
    found = verdicts(cells(INTACT, *rows))
    assert found.verdict["A3-random", "reinit"] == "holds"
    assert found.effect["A3-random", "reinit"] == pytest.approx(0.15, abs=1e-3)
    assert found.verdict["A3-scattered", "reinit"] == "fails"


def test_recipes_are_compared_on_the_same_damage():
    scores = {"full": 0.7, "corrupted_only": 0.695, "low_rank": 0.6, "corrupted_frozen": 0.8,
              "head_only": 0.5}  # fmt: skip
    rows = [healed(recipe=name, score=score) for name, score in scores.items()]
    rows += [{"state": "scratch", "score": 0.72}, healed("custom", recipe="low_rank", score=0.1)]
    found = verdicts(cells(INTACT, *rows))
    where = "reinit, bottom 1/2"
    assert found.verdict["S1", where] == found.verdict["R1", where] == "holds"
    assert found.effect["X1", where] == pytest.approx(0.3, abs=1e-3)
    assert found.verdict["W", where] == "fails"  # worth less than random values
    assert found.effect["W", where] == pytest.approx(-0.02, abs=1e-3)


def test_the_critical_layer_is_judged_by_the_other_seeds():
    rows = [
        healed("custom", 1 / 6, state="broken", score=0.4 if i == 3 else 0.85) | {"layers": (i,)}
        for i in range(6)
    ]
    found = verdicts(cells(INTACT, *rows))
    assert found.verdict["C1", ""] == "holds"
    assert found.effect["C1", ""] == pytest.approx(0.45 / 0.9, abs=1e-3)
    # Seeds that have the lowest and the highest layer alone tell nothing about the median.
    ends = [{**row, "seed": 9} for row in (rows[0], rows[5])]
    both = pd.concat([cells(INTACT, *rows), cells(*ends, seeds=[9]).assign(key="end")])
    assert verdicts(both).n["C1", ""] == 6
    same = [row | {"score": 0.85} for row in rows]
    assert verdicts(cells(INTACT, *same)).verdict["C1", ""] == "fails"


def test_a_layer_is_worth_more_with_fewer_examples():
    rows = []
    for size, worth in ((10, 0.3), (100, 0.2), (1000, 0.1)):
        more = {"train_size": size, "scan": "price" if size < 1000 else "main"}
        rows.append(INTACT | more)
        rows.append(healed("top", 1 / 6, score=0.9 - worth) | more)
    found = verdicts(cells(*rows))
    assert found.effect["T2", "top layer"] == pytest.approx(0.1, abs=1e-3)
    assert found.verdict["T2", "top layer"] == "holds"
    assert not [name for name in found.index if name[0] == "T2" and "bottom" in name[1]]


def test_a_fresh_top_is_judged_at_the_fewest_examples():
    few = {"train_size": 10, "scan": "few"}
    fresh = healed("top", 1 / 6, kind="init", score=0.7)
    rows = [INTACT, fresh, INTACT | few | {"score": 0.6}, fresh | few | {"score": 0.61}]
    found = verdicts(cells(*rows))
    assert found.verdict["Z1", "top 1/6, 10 examples"] == "holds"
    assert found.effect["Z1", "top 1/6, 10 examples"] == pytest.approx(0.01, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "kind", "control"),
    [("K1", "outliers", "outliers_control"), ("G1", "bits_exponent", "bits_other")],
)
def test_kinds_are_compared_with_their_controls_at_one_place_and_strength(name, kind, control):
    def broken(kind, score, strength=0.5):
        return healed("all", 1.0, state="broken", kind=kind, score=score, strength=strength)

    found = verdicts(cells(INTACT, broken(kind, 0.4), broken(control, 0.85), broken(kind, 0.9, 1)))
    (where,) = found.loc[name].index
    assert where == f"{kind.replace('_', ' ')} 0.5, all layers"
    assert found.verdict[name, where] == "holds"
    assert found.effect[name, where] == pytest.approx(0.45, abs=1e-3)
    assert name not in verdicts(cells(INTACT, broken(kind, 0.4))).index.get_level_values(0)


def test_layers_that_are_taken_out_without_training():
    costs = (0.4, 0.05, 0.01, 0.01, 0.05, 0.2)
    rows = [
        healed("custom", 1 / 6, state="broken", recipe="drop", score=0.9 - cost) | {"layers": (i,)}
        for i, cost in enumerate(costs)
    ]
    rows.append(healed("top", 1 / 6, state="broken", score=0.1))  # redrawn, and still there
    found = verdicts(cells(INTACT, *rows))
    assert found.effect["L1", ""] == pytest.approx(0.3 - 0.03, abs=1e-3)
    assert found.verdict["L1", ""] == "holds"
    assert "P1" not in found.index.get_level_values(0)
    rows.append(healed("top", 1 / 6, state="broken", recipe="drop", score=0.898))
    assert verdicts(cells(INTACT, *rows)).verdict["P1", "top 1/6"] == "holds"
    assert ("L1", "") not in verdicts(cells(INTACT, *rows[1:])).index  # a layer is missing


@pytest.mark.parametrize(("falls", "verdict"), [(True, "fails"), (False, "holds")])
def test_layers_that_probes_like_may_or_may_not_be_the_needed_ones(falls, verdict):
    made = study(tasks=TASKS[:1])
    made.probing["model"] = "m"
    made.probing["accuracy"] -= 0.05 * made.probing["layer"]  # the lowest layers know most
    rows = [
        healed("custom", 1 / 6, score=0.5 + 0.05 * (i if falls else -i)) | {"layers": (i,)}
        for i in range(6)
    ]
    found = verdicts(cells(INTACT, *rows), made)
    assert found.effect["T1", ""] == pytest.approx(-1 if falls else 1)
    assert found.verdict["T1", ""] == verdict


# --- what is known ---


def test_b1_has_its_direction():
    assert verdicts(made=study()).verdict["B1", ""] == "holds"
    assert verdicts(made=study()).effect["B1", ""] == pytest.approx(0.15, abs=0.01)
    turned = study(forgets={"sst2": 0.05, "mrpc": 0.2})
    assert verdicts(made=turned).reason["B1", ""] == "reversed"
    # It is about the deeper half, and about tasks of both groups.
    alike = study(forgets={"sst2": 0.1, "mrpc": 0.1})
    assert verdicts(made=alike).verdict["B1", ""] == "fails"
    assert ("B1", "") not in verdicts(made=study(tasks=("sst2", "flat"))).index


def test_a_task_at_chance_is_left_out_of_b1_and_is_b2s_control():
    made = study()
    at_chance = (made.scores.task == "mrpc") & (made.scores.state == "intact")
    made.scores.loc[at_chance, "score"] = [0.49, 0.52, 0.50, 0.51, 0.5, 0.49]
    found = verdicts(made=made)
    assert ("B1", "") not in found.index
    assert found.tasks["B2", ""] == "flat, sst2"
    assert found.tasks["B2", "tasks at chance, the negative control"] == "mrpc"


@pytest.mark.parametrize(("shift", "verdict"), [(0.15, "holds"), (-0.15, "fails"), (0.0, "fails")])
def test_b2_finds_the_set_that_sinks(shift, verdict):
    row = verdicts(made=study(shift=shift)).loc[("B2", "")]
    assert row.verdict == verdict and row.effect == pytest.approx(shift, abs=0.005)


def test_b3_compares_three_architectures():
    amounts = {"bert": 0.05, "roberta": 0.2, "xlnet": 0.2}
    parts = [
        study(dict.fromkeys(("sst2", "mrpc", "flat"), lost), model=f"some/{name}",
              architecture=name, random=i)
        for i, (name, lost) in enumerate(amounts.items())
    ]  # fmt: skip
    row = verdicts(made=together(*parts)).loc[("B3", "")]
    assert row.verdict == "holds" and row.effect == pytest.approx(0.15 / 0.8, abs=0.01)
    assert row.model == "all" and "one model each" in row.evidence
    assert ("B3", "") not in verdicts(made=together(*parts[:2])).index


def test_h_finds_that_the_task_heals_further_by_every_measure():
    found = verdicts(made=healed_study())
    assert found.effect["H", "accuracy"] == pytest.approx(0.6, abs=0.03)
    assert found.verdict["H", "accuracy"] == "holds" and found.primary["H", "accuracy"]
    assert found.effect["H", "selectivity"] == pytest.approx(0.6, abs=0.05)
    assert not found.primary["H", "selectivity"] and ("H", "codelength") not in found.index
    assert found.effect["H-gap", "accuracy, top"] == pytest.approx(0.14, abs=0.01)
    made = healed_study(noise=0.01)
    hit = (made.scores.task == "mrpc") & made.scores.state.isin(["broken", "healed"])
    made.scores.loc[hit, "score"] = 0.9  # no damage, no quotient
    row = verdicts(made=made).loc[("H", "accuracy, without mrpc")]
    assert row.primary and row.tasks == "sst2" and row.effect == pytest.approx(0.6, abs=0.1)
    turned = verdicts(made=healed_study(task_healing=0.3, knowledge_healing=0.6))
    assert turned.reason["H", "accuracy"] == "reversed"


def test_h_lacks_a_unit_where_a_side_was_not_probed():
    made = healed_study()
    gone = made.probing.state.eq("healed") & made.probing.side.eq("top") & made.probing.seed.eq(2)
    made.probing = made.probing[~gone]
    row = verdicts(made=made).loc[("H", "accuracy")]
    assert row.verdict == "undecided" and "mrpc seed 2, sst2 seed 2" in row.reason


def test_m1_is_a_claim_of_sameness():
    assert verdicts(made=study(forgets={})).verdict["M1", ""] == "holds"
    lost = study(forgets=dict.fromkeys(("sst2", "mrpc", "flat"), 0.2))
    assert verdicts(made=lost).verdict["M1", ""] == "fails"


def test_every_claim_has_an_answer_on_an_empty_folder_and_on_a_small_run(tmp_path):
    assert decide(Tables(tmp_path))[0].empty
    table = decide(Planted(scored=cells(INTACT, *GRID)))[0]
    assert set(table.claim) == set(LEDGER)
    assert table[table.verdict == "not tested"].reason.str.startswith("it needs").all()
    assert (table.n[table.verdict != "not tested"] == len(SEEDS)).all()
