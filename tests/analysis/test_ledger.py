"""The entries of the ledger find what is planted, by side, kind, recipe and budget."""

from __future__ import annotations

import pytest
from planted import INTACT, SEEDS, TASKS, Planted, again, cells, healed_study, study, together

from healing_utils.analysis.claims import LEDGER, decide, entries, in_words
from healing_utils.analysis.ledger import Tables


def verdicts(scored=None, made=None, claims=LEDGER):
    table = decide(Planted(made, scored), entries(*claims))[0]
    return table[table.n > 0].set_index(["claim", "variant"])


def healed(side="bottom", level=0.5, **more):
    n = round(6 * level)
    layers = tuple(range(6 - n, 6) if side == "top" else range(n))
    return {"side": side, "level": level, "layers": layers, **more}


def alone(costs, **more):
    """Cells of which one layer was hit, the first, the second, ..., with what that costs."""
    return [
        healed("custom", 1 / 6, score=0.9 - cost, layers=(i,), **more)
        for i, cost in enumerate(costs)
    ]


def all_layers(kind, score, strength=0.5):
    return healed("all", 1.0, state="broken", kind=kind, score=score, strength=strength)


def by_size(size, worth):
    more = {"train_size": size, "scan": "price" if size < 1000 else "main"}
    return [INTACT | more, healed("top", 1 / 6, score=0.9 - worth, **more)]


GRID = [
    healed("bottom", 1 / 6, score=0.75), healed("bottom", 0.5, score=0.65),
    healed("top", 1 / 6, score=0.88), healed("top", 0.5, score=0.84),
]  # fmt: skip
DROPPED = {"state": "broken", "recipe": "drop"}
FEW = {"train_size": 10, "scan": "few"}
COSTS = (0.4, 0.05, 0.01, 0.01, 0.05, 0.2)
HEALED = {"healed_tasks": ("sst2", "mrpc")}
# Cells beside the intact ones, or what a study of probes is planted with; effects with verdicts by
# claim and variant, None where there must be none.
FOUND = {
    "sides and levels": ([
        *GRID, healed("all", 1.0, score=0.5), {"state": "scratch", "score": 0.5}], {
        ("W", "reinit"): (0.28, "holds"), ("W", "reinit, all layers"): (0.0, "fails"),
        ("A1", "reinit"): (0.12, "holds"), ("A1", "reinit, bottom"): (0.2, "holds"),
        ("A1", "reinit, all layers"): (0.4, "holds"), ("A2", "reinit"): (0.07, "holds"),
        ("A2", "reinit, top"): (0.04, "holds"), ("A3", "reinit"): (0.16, "holds")}),
    "is it the bottom": ([
        healed(score=0.6), healed("random", score=0.75, scan="controls", layers=(1, 4, 5)),
        healed("scattered", score=0.6, scan="controls", layers=tuple(range(6)))], {
        ("A3-random", "reinit"): (0.15, "holds"), ("A3-scattered", "reinit"): (0.0, "fails")}),
    "recipes on the same damage": ([
        healed(recipe="full", score=0.7), healed(recipe="corrupted_only", score=0.695),
        healed(recipe="low_rank", score=0.6), healed(recipe="corrupted_frozen", score=0.8),
        healed(recipe="head_only", score=0.5), healed("custom", recipe="low_rank", score=0.1),
        {"state": "scratch", "score": 0.72}], {
        ("S1", "reinit, bottom 1/2"): (-0.005, "holds"), ("W", "reinit, bottom 1/2"):
        (-0.02, "fails"), ("R1", "reinit, bottom 1/2"): (0.1, "holds"),
        ("X1", "reinit, bottom 1/2"): (0.3, "holds")}),
    "a critical layer": (alone([0.05, 0.05, 0.05, 0.5, 0.05, 0.05], state="broken"), {
        ("C1", ""): (0.5, "holds")}),
    "no critical layer": (alone([0.05] * 6, state="broken"), {("C1", ""): (0.0, "fails")}),
    "more examples": ([*by_size(10, 0.1), *by_size(100, 0.2), *by_size(1000, 0.3)], {
        ("T2", "top layer"): (0.1, "holds"), ("T2", "bottom layer"): None}),
    "a fresh top, few examples": ([
        healed("top", 1 / 6, kind="init", score=0.7), INTACT | FEW | {"score": 0.6},
        healed("top", 1 / 6, kind="init", score=0.61, **FEW)], {
        ("Z1", "top 1/6, 10 examples"): (0.01, "holds"), ("Z1", "top 1/6"): None}),
    "a fresh top, as many examples, or half of the layers": ([
        healed("top", 1 / 6, kind="init", score=0.7), INTACT | FEW | {"score": 0.6},
        healed("top", 1 / 2, kind="init", score=0.61, **FEW)], {("Z1", ""): None}),
    "outliers": ([all_layers("outliers", 0.4), all_layers("outliers_control", 0.85),
                  all_layers("outliers", 0.9, 1)], {
        ("K1", "outliers 0.5, all layers"): (0.45, "holds"),
        ("K1", "outliers 1, all layers"): None}),
    "bits": ([all_layers("bits_exponent", 0.4), all_layers("bits_other", 0.85)], {
        ("G1", "bits exponent 0.5, all layers"): (0.45, "holds")}),
    "each layer taken out": (alone(COSTS, **DROPPED), {("L1", ""): (0.27, "holds")}),
    "the top taken out": ([healed("top", 1 / 6, score=0.898, **DROPPED)], {
        ("P1", "top 1/6"): (-0.002, "holds")}),
    "not taken out, or not all": ([
        *alone(COSTS, **DROPPED)[1:], healed("top", 1 / 6, state="broken", score=0.1)], {
        ("L1", ""): None, ("P1", "top 1/6"): None}),
    "forgetting": ({}, {("B1", ""): (0.15, "holds"), ("B2", ""): (0.15, "holds")}),
    "the other tasks forget": ({"forgets": {"sst2": 0.05, "mrpc": 0.2}}, {
        ("B1", ""): (-0.15, "fails")}),
    "all tasks forget alike": ({"forgets": {"sst2": 0.1, "mrpc": 0.1}}, {
        ("B1", ""): (0.0, "fails")}),
    "tasks of one group": ({"tasks": ("sst2", "flat")}, {("B1", ""): None}),
    "a set that rises": ({"shift": -0.15}, {("B2", ""): (-0.15, "fails")}),
    "a set that stays": ({"shift": 0.0}, {("B2", ""): (0.0, "fails")}),
    "nothing forgotten": ({"forgets": {}}, {("M1", ""): (0.0, "holds")}),
    "much forgotten": ({"forgets": dict.fromkeys(TASKS, 0.2)}, {("M1", ""): (0.6 / 7, "fails")}),
    "the task heals further": (HEALED, {
        ("H", "accuracy"): (0.6, "holds"), ("H", "selectivity"): (0.6, "holds"),
        ("H", "codelength"): None, ("H-gap", "accuracy, top"): (0.14, "holds")}),
    "words heal further": ({**HEALED, "task_healing": 0.3, "knowledge_healing": 0.6}, {
        ("H", "accuracy"): (-0.3, "fails")}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_is_planted_is_found(name):
    given, expected = FOUND[name]
    claims = dict.fromkeys(claim for claim, _ in expected)
    if isinstance(given, dict):
        found = verdicts(made=study(noise=5e-4, **given), claims=claims)
    else:
        found = verdicts(cells(INTACT, *given), claims=claims)
    for at, says in expected.items():
        if says is None:
            assert at not in found.index
        else:
            assert found.effect[at] == pytest.approx(says[0], abs=0.01), at
            assert found.verdict[at] == says[1], at


def test_other_kinds_recipes_and_budgets_are_variants_beside_their_own_intact_model():
    longer = {"epochs": 6.0, "steps": 21.0, "scan": "long"}
    rows = [INTACT, *GRID, INTACT | longer | {"score": 0.95}]
    rows += [row | longer | {"score": 0.9} for row in GRID]
    rows += [row | {"recipe": "drop", "scan": "aside", "score": 0.8} for row in GRID]
    rows += [row | {"kind": "noise", "strength": 0.5, "scan": "kinds"} for row in GRID[:2]]
    found = verdicts(cells(*rows), claims=["A1", "A3", "D", "H"])
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
    found = verdicts(again(cells(*rows), few), claims=["A1"])
    assert found.n["A1", "reinit, 1/2 of the steps, 1/2"] == 6
    assert found.n["A1", "reinit, 1/2 of the steps, 1/6"] == 3
    assert found.primary["A1", "reinit"] and found.n["A1", "reinit"] == 6


def test_what_broke_off_stays_in_its_variant_and_parts_layers_and_evaluations_stay_out():
    table = cells(INTACT, *GRID)
    broke = (table["seed"] == 3) & (table["side"] == "top")
    table.loc[broke, ["steps", "score"]] = [2.0, 0.3]
    seldom = table[table["state"] == "healed"].assign(
        evaluations=1, scan="seldom", key=lambda table: "seldom " + table["key"]
    )
    other = [{**row, "part": "attention", "score": 0.1, "scan": "parts"} for row in GRID]
    other = cells(*other, *alone([0.8], scan="layers")).assign(key=lambda t: "other " + t["key"])
    found = verdicts(again(table, seldom, other), claims=["A1", "A3"])
    assert found.n["A3", "reinit"] == 6 and set(found.loc["A3"].index) == {"reinit"}
    before = verdicts(table, claims=["A1", "A3"]).effect
    assert found.effect[before.index].to_numpy() == pytest.approx(before.to_numpy(), abs=1e-3)


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


def test_seeds_that_lack_layers_tell_nothing_about_the_critical_one():
    rows = alone([0.05, 0.05, 0.05, 0.5, 0.05, 0.05], state="broken")
    ends = cells(rows[0], rows[5], seeds=[9]).assign(key="end")
    assert verdicts(again(cells(INTACT, *rows), ends), claims=["C1"]).n["C1", ""] == 6


@pytest.mark.parametrize(("falls", "verdict"), [(True, "fails"), (False, "holds")])
def test_layers_that_probes_like_may_or_may_not_be_the_needed_ones(falls, verdict):
    made = study(tasks=TASKS[:1])
    made.probing["model"] = "m"
    made.probing["accuracy"] -= 0.05 * made.probing["layer"]  # the lowest layers know most
    rows = alone([0.4 - 0.05 * (i if falls else -i) for i in range(6)])
    found = verdicts(cells(INTACT, *rows), made, ["T1"])
    assert found.effect["T1", ""] == pytest.approx(-1 if falls else 1)
    assert found.verdict["T1", ""] == verdict


def test_a_task_at_chance_is_left_out_of_b1_and_is_b2s_control():
    made = study()
    at_chance = (made.scores.task == "mrpc") & (made.scores.state == "intact")
    made.scores.loc[at_chance, "score"] = [0.49, 0.52, 0.50, 0.51, 0.5, 0.49]
    found = verdicts(made=made, claims=["B1", "B2"])
    assert "B1" not in found.index
    assert found.tasks["B2", ""] == "flat, sst2"
    assert found.tasks["B2", "tasks at chance, the negative control"] == "mrpc"


def test_b3_compares_three_architectures():
    amounts = {"bert": 0.05, "roberta": 0.2, "xlnet": 0.2}
    parts = [
        study(dict.fromkeys(TASKS, lost), model=f"some/{name}", architecture=name, random=i)
        for i, (name, lost) in enumerate(amounts.items())
    ]
    row = verdicts(made=together(*parts), claims=["B3"]).loc[("B3", "")]
    assert row.verdict == "holds" and row.effect == pytest.approx(0.15 / 0.8, abs=0.01)
    assert row.model == "all" and "one model each" in row.evidence
    assert verdicts(made=together(*parts[:2]), claims=["B3"]).empty


def test_h_names_the_tasks_that_have_no_quotient_and_the_units_that_were_not_probed():
    made = healed_study(noise=0.01)
    hit = (made.scores.task == "mrpc") & made.scores.state.isin(["broken", "healed"])
    made.scores.loc[hit, "score"] = 0.9  # no damage, no quotient
    row = verdicts(made=made, claims=["H"]).loc[("H", "accuracy, without mrpc")]
    assert row.primary and row.tasks == "sst2" and row.effect == pytest.approx(0.6, abs=0.1)
    made = healed_study()
    gone = made.probing.state.eq("healed") & made.probing.side.eq("top") & made.probing.seed.eq(2)
    made.probing = made.probing[~gone]
    row = verdicts(made=made, claims=["H"]).loc[("H", "accuracy")]
    assert row.verdict == "undecided" and "mrpc seed 2, sst2 seed 2" in row.reason


def test_every_claim_has_an_answer_on_an_empty_folder_and_on_a_small_run(tmp_path):
    assert decide(Tables(tmp_path))[0].empty
    table = decide(Planted(scored=cells(INTACT, *GRID)))[0]
    assert set(table.claim) == set(LEDGER)
    assert table[table.verdict == "not tested"].reason.str.startswith("it needs").all()
    assert (table.n[table.verdict != "not tested"] == len(SEEDS)).all()
