"""The builder: verdicts on planted units, what makes them undecided, and how often it errs."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
from planted import INTACT, Planted, cells
from scipy import stats

from healing_utils.analysis import claims as builder
from healing_utils.analysis.claims import Claim, contrast, decide, in_words, units
from healing_utils.base.errors import HealingError
from healing_utils.report.figures import claims_figure

SPREAD = np.array([-3e-3, -2e-3, -1e-3, 1e-3, 2e-3, 3e-3])


def entry(
    effects, name="T", main=False, tasks=("a",), variant="", model="m", **more
) -> dict[str, Claim]:
    """A ledger of one claim whose units have these effects: (tasks, seeds) or (seeds,)."""
    table = np.atleast_2d(effects)
    index = pd.MultiIndex.from_product([tasks, range(table.shape[1])])
    names = {"model": model, "variant": variant, "main": main}
    found = [units(names, pd.Series(table.ravel(), index))]
    return {name: Claim(name, "It is so", "a paper", "units", lambda _: found, **more)}


def decided(ledger, **given):
    return decide(Planted(scored=cells(INTACT), **given), ledger)[0]


def one(effects, lost=(), **more):
    return decided(entry(effects, **more), lost=lost).iloc[0]


@pytest.mark.parametrize(
    ("direction", "mean", "verdict", "reason"),
    [
        ("more", 0.05, "holds", "above 1 point"),
        ("more", 0.005, "fails", "negligible: not above 1 point"),
        ("more", -0.05, "fails", "reversed"),
        ("more", -0.0003, "fails", "negligible: not above 1 point"),
        ("more", 0.011, "undecided", "not clear of 1 point"),
        ("not worse", 0.0, "holds", "not below minus 1 point"),
        ("not worse", -0.05, "fails", "beyond 1 point"),
        ("not worse", -0.009, "undecided", "not clear of 1 point"),
        ("same", 0.002, "holds", "within 1 point of zero"),
        ("same", 0.05, "fails", "beyond 1 point"),
        ("same", -0.05, "fails", "beyond 1 point"),
        ("same", 0.0095, "undecided", "not clear of 1 point"),
    ],
)
def test_a_planted_effect_gets_its_verdict(direction, mean, verdict, reason):
    row = one(mean + SPREAD, direction=direction)
    assert (row.verdict, row.reason) == (verdict, reason)
    assert row.effect == pytest.approx(mean) and (row.n, row.smallest_p) == (6, 1 / 64)
    assert (row.seeds_needed >= 5) == (verdict == "undecided")


def test_few_seeds_decide_nothing_and_it_is_said_how_many_would():
    row = one([0.05, 0.051, 0.052])
    assert row.verdict == "undecided" and row.reason == "3 seeds cannot reach p below 0.05"
    assert row.seeds_needed == 5  # 1/32 is the first p below 0.05
    assert one([0.05]).reason == "fewer than two seeds"


def test_the_unit_is_the_seed_and_each_task_stands_beside():
    effects = np.array([0.05 + SPREAD, 0.25 + 3 * SPREAD])
    table, by_task = decide(Planted(scored=cells(INTACT)), entry(effects, tasks=("a", "b")))
    row = table.iloc[0]
    assert (row.n, row.tasks) == (6, "a, b") and row.effect == pytest.approx(0.15)
    expected = effects.mean(axis=0)
    assert row.high - row.low == pytest.approx(2 * 2.5706 * expected.std(ddof=1) / 6**0.5, rel=1e-4)
    assert (row.without_low, row.without_high) == pytest.approx((0.05, 0.25))
    assert by_task.set_index("task").effect.to_dict() == pytest.approx({"a": 0.05, "b": 0.25})


def test_primary_claims_are_corrected_and_all_others_exploratory():
    ledger = entry(0.05 + SPREAD, "A1", main=True) | entry(0.05 + SPREAD, "A3", main=True)
    ledger |= entry(0.05 + SPREAD, "H", main=True) | entry(0.05 + SPREAD, "T", main=True)
    table = decided(ledger).set_index("claim")
    assert table.primary.to_dict() == {"A1": True, "A3": True, "H": True, "T": False}
    assert table.p_corrected[["A1", "A3", "H"]].tolist() == [3 / 64] * 3
    assert (table.verdict == "holds").all() and math.isnan(table.p_corrected["T"])
    said = in_words(table.reset_index())
    assert "corrected p 0.047" in said[0] and "p 0.016, exploratory" in said[3]
    # A primary claim that was not made counts in the family all the same.
    assert one(0.05 + SPREAD, name="A1", main=True).p_corrected == 3 / 64
    # Off the main grid a claim is exploratory whatever its name.
    assert not one(0.05 + SPREAD, name="A1").primary


def test_what_is_missing_leaves_it_undecided_and_is_named():
    row = one(0.05 + SPREAD, lost=("scans",), stages=("recovery", "scans"))
    assert row.verdict == "undecided" and row.reason == "1 planned cell missing: a cell of scans"
    # The main grid does not rest on the scans, and a claim not on stages that it does not read.
    assert one(0.05 + SPREAD, lost=("scans",), stages=("recovery", "scans"), main=True).n == 6
    assert one(0.05 + SPREAD, lost=("probing",)).verdict == "holds"
    gap = [0.05, 0.05, math.nan, 0.05, 0.05, 0.05]
    row = one(gap)
    assert (row.verdict, row.n) == ("undecided", 5)
    assert row.reason == "1 unit without an effect: a seed 2"


def test_a_claim_without_units_is_not_tested_and_says_what_it_needs():
    nothing = Claim("T", "It is so", "a paper", "a machine", lambda tables: iter(()))
    table = decided({"T": nothing})
    assert table.verdict.tolist() == ["not tested"] and table.reason[0] == "it needs a machine"
    assert in_words(table) == ["T, m: It is so. Not tested: it needs a machine."]


def test_units_twice_are_refused():
    index = pd.MultiIndex.from_tuples([("a", 0), ("a", 0)])
    twice = Claim("T", "", "", "", lambda _: [units({"model": "m"}, pd.Series([1.0, 2], index))])
    with pytest.raises(HealingError, match="1 duplicate cell"):
        decided({"T": twice})


def test_the_organism_demonstrates_and_a_caveat_stays():
    ledger = entry(0.05 + SPREAD, model="data/organism", caveat="one head")
    found = decided(ledger).query("model == 'data/organism'")
    assert found.evidence.tolist() == [f"{builder.DEMONSTRATION}; one head"]


def test_a_unit_of_ones_own_is_told_and_what_more_seeds_would_show():
    few = {"unit": "hundredths of the depth"}
    low, high = (
        decided(entry(mean + np.array([-2e-3, 0, 2e-3]), **few)) for mean in (0.005, 0.015)
    )
    assert "not clear of 1 hundredth of the depth" in low.reason[0]
    assert "0.5 hundredths of the depth, 95 % interval" in in_words(low)[0]
    for table, ends in ((low, "fails"), (high, "holds")):
        assert re.search(rf"were it exactly so, some \d+ seeds would show that it {ends}",
                         in_words(table)[0])  # fmt: skip
    assert math.isnan(decided(entry(0.005 + SPREAD[:2])).seeds_needed[0])


def test_the_error_of_the_test_items_is_paired():
    """All cells and seeds answer the same items: what they have in common is no error."""
    rng = np.random.default_rng(0)
    right = {f"{name}{seed}": rng.random(400) < share for seed in range(6)
             for name, share in (("a", 0.8), ("b", 0.7))}  # fmt: skip
    rows = pd.DataFrame(
        {"task": "t", "seed": int(key[1:]), "key": key, "score": x.mean(),
         "weight": 1.0 if key[0] == "a" else -1.0} for key, x in right.items()
    )  # fmt: skip
    entry = Claim("T", "", "", "", lambda _: [contrast({"model": "m"}, rows, rows["weight"])])
    found = decided({"T": entry}, right=right).iloc[0]
    items = np.mean([right[f"a{i}"] * 1.0 - right[f"b{i}"] for i in range(6)], axis=0)
    assert (found.effect, found.test_error) == pytest.approx((items.mean(), stats.sem(items)))
    assert f"test items {100 * stats.sem(items):.1f}" in in_words(found.to_frame().T)[0]
    right.pop("b3")  # a record from before they were kept
    assert math.isnan(decided({"T": entry}, right=right).test_error[0])


def test_a_researcher_adds_a_claim_in_one_place(monkeypatch):
    """In at most 25 lines; the table, the sentence, the figure and `entries` then have it."""
    monkeypatch.setattr(builder, "LEDGER", {})

    @builder.claim("N", "The top costs nothing", "a paper, section 2", "healed tops",
                   direction="not worse")  # fmt: skip
    def top_is_free(tables):
        top = tables.cells[tables.cells["side"] == "top"]
        for model, part in top.groupby("model"):
            yield contrast({"model": model}, part, other="intact")

    table = cells(INTACT, {"side": "top", "layers": (3, 4, 5), "score": 0.895})
    found = decide(Planted(scored=table), builder.entries("N"))[0]
    row = found.iloc[0]
    assert (row.verdict, row.n) == ("holds", 6) and row.effect == pytest.approx(-0.005, abs=1e-3)
    assert (row.cells, row.censored) == (12, 0)
    assert in_words(found)[0].startswith("N, m: The top costs nothing. Holds: -0.5 points")
    (axis,) = claims_figure(found).axes
    assert [t.get_text() for t in axis.get_yticklabels()] == ["N  The top costs nothing"]
    assert decided(builder.entries("N")).reason.tolist() == ["it needs healed tops"]
