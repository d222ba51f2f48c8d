"""Measures of recovery by their definitions, and verdicts on A1 to A3 against planted effects."""

import math

import numpy as np
import pandas as pd
import pytest

from healing_utils.analysis.claims import recovery_claims
from healing_utils.analysis.effects import t_interval
from healing_utils.analysis.recovery import measures, summary
from healing_utils.base.errors import HealingError

LEVELS = (1 / 6, 1 / 3, 0.5, 1.0)


def planted(side, level):
    return {"bottom": 0.20, "top": 0.08, "all": 0.20}[side] * level + 0.03


def study(
    loss=planted, tasks=("a", "b"), seeds=(0, 1, 2), levels=LEVELS, kind="reinit",
    model="some/model", noise=0.003, random=0, intact_score=0.9,
):  # fmt: skip
    """Results of a small study in which `loss(side, level)` is planted; broken falls to 0.55."""
    rng = np.random.default_rng(random)
    rows = []
    for task in tasks:
        for seed in seeds:
            base = intact_score + rng.normal(0, noise)
            rows.append((task, seed, "intact", "none", 0.0, "none", (), base))
            rows.append((task, seed, "scratch", "all", 1.0, "scratch", tuple(range(6)), 0.6))
            for level in levels:
                for side in ["all"] if level == 1 else ["bottom", "top"]:
                    n = round(6 * level)
                    layers = tuple(range(6 - n, 6)) if side == "top" else tuple(range(n))
                    where = (side, level, kind, layers)
                    healed = base - loss(side, level) + rng.normal(0, noise)
                    rows.append((task, seed, "healed", *where, healed))
                    rows.append((task, seed, "broken", *where, 0.55 + rng.normal(0, noise)))
    names = ["task", "seed", "state", "side", "level", "kind", "layers", "score"]
    table = pd.DataFrame(rows, columns=names)
    return table.assign(
        model=model, part="all", strength=math.nan, metric="accuracy", chance=0.5, chance_f1=0.33,
        test_size=400, score_f1=table.score - 0.02,
    )  # fmt: skip


def verdicts(results, **more):
    return recovery_claims(results, **more).set_index("claim")


# --- measures ---


def test_measures_follow_the_definitions():
    table = measures(study(noise=0.002))
    assert len(table) == 2 * 3 * 7  # tasks x seeds x (3 levels on 2 sides + all layers)
    row = table.query("task == 'b' and seed == 1 and side == 'top' and level == 0.5").iloc[0]
    assert row.retained == pytest.approx(row.healed / row.intact)
    assert row.retained_above_chance == pytest.approx((row.healed - 0.5) / (row.intact - 0.5))
    assert row.healing == pytest.approx((row.healed - row.broken) / (row.intact - row.broken))
    assert row.healing == pytest.approx((0.9 - 0.07 - 0.55) / 0.35, abs=0.05)
    assert (row.layers, row.metric, row.reason, row.scratch) == ((3, 4, 5), "accuracy", "", 0.6)
    assert (measures(study(), value="score_f1").chance == 0.33).all()


def test_measures_pair_the_intact_model_of_the_same_seed_and_task():
    results = study(lambda side, level: 0.0, noise=0.0)
    results.loc[results.eval("state == 'intact' and task == 'a' and seed == 2"), "score"] = 0.8
    table = measures(results)
    hit = (table.task == "a") & (table.seed == 2)
    assert table[hit].intact.unique() == [0.8]
    assert table[~hit].intact.unique() == [0.9]


def test_healing_is_missing_where_the_damage_is_noise():
    results = study(noise=0.004)
    harmless = (results.state == "broken") & (results.side == "top") & (results.level == 1 / 6)
    rng = np.random.default_rng(2)
    results.loc[harmless, "score"] = 0.9 + rng.normal(0, 0.01, harmless.sum())
    table = measures(results)
    hit = (table.side == "top") & (table.level < 0.2)
    assert table[hit].healing.isna().all()
    assert table[hit].reason.str.contains("interval of zero").all()
    assert table[hit].retained.notna().all()
    assert table[~hit].healing.notna().all() and (table[~hit].reason == "").all()


@pytest.mark.parametrize(
    ("results", "measure", "reason"),
    [
        (study(seeds=(0,)), "healing", "one seed"),
        (study().assign(score=lambda t: t.score + 0.5 * (t.state == "broken")), "healing",
         "did no damage"),
        (study(intact_score=0.45), "retained_above_chance", "not above chance"),
    ],
)  # fmt: skip
def test_a_measure_that_cannot_be_made_is_missing_with_its_reason(results, measure, reason):
    table = measures(results)
    assert table[measure].isna().all() and table.reason.str.contains(reason).all()


def test_a_cell_without_its_partner_is_kept_and_named():
    table = measures(study().query("not (state == 'broken' and side == 'top' and seed == 1)"))
    assert len(table) == 42
    hit = (table.side == "top") & (table.seed == 1)
    assert (table[hit].reason == "missing: broken").all()
    assert table[hit].retained.notna().all() and table[hit].healing.isna().all()
    assert (table[~hit].reason == "").all()


def test_measures_refuse_duplicates_mixed_metrics_and_missing_columns():
    results = study()
    with pytest.raises(HealingError, match="42 duplicate cells"):
        measures(pd.concat([results, results[results.state == "healed"]]))
    mixed = results.assign(metric=results.metric.where(results.state != "healed", "macro-F1"))
    with pytest.raises(HealingError, match="several metrics: accuracy, macro-F1"):
        measures(mixed)
    with pytest.raises(HealingError, match="Did you mean 'score_f1'"):
        measures(results, value="scoref1")


def test_measures_and_claims_survive_a_csv_file(tmp_path):
    results = study()
    results.to_csv(tmp_path / "results.csv", index=False)
    again = pd.read_csv(tmp_path / "results.csv")
    pd.testing.assert_frame_equal(measures(again), measures(results), check_dtype=False)
    pd.testing.assert_frame_equal(recovery_claims(again), recovery_claims(results))


def test_summary_gives_means_and_intervals_over_seeds():
    measured = measures(study())
    table = summary(measured)
    assert len(table) == 14 and (table.n == 3).all()
    where = "task == 'a' and side == 'bottom' and level == 0.5"
    row, values = table.query(where).iloc[0], measured.query(where).healed
    assert (row.healed, row.healed_low, row.healed_high) == pytest.approx(t_interval(values)[:3])
    assert row.test_error == pytest.approx(math.sqrt(row.intact * (1 - row.intact) / 400))
    assert summary(measured.assign(metric="matthews")).test_error.isna().all()


# --- claims ---


def test_planted_effects_are_found():
    table = verdicts(study())
    assert list(table.index) == ["A1", "A2", "A3"] and (table.verdict == "holds").all()
    assert (table.n == 6).all() and table.smallest_p.tolist() == [1 / 64] * 3
    assert table.p_corrected.tolist() == pytest.approx([3 / 64] * 3)
    level_mean = {x: np.mean([planted("bottom", x), planted("top", x)]) for x in LEVELS[:3]}
    # Level 1 has no part in A2: it holds the bottom, whatever side it is counted for.
    rise = np.polyfit(list(level_mean), list(level_mean.values()), 1)[0] * (1 / 2 - 1 / 6)
    mean = np.mean([*level_mean.values(), planted("all", 1.0)])
    assert table.effect.tolist() == pytest.approx([mean, rise, 0.12 / 3], abs=0.008)
    assert "levels 1/6, 1/3, 1/2" in table.definition["A2"]
    assert (table.evidence == "evidence").all()
    assert (table.low < table.effect).all() and (table.effect < table.high).all()


def test_absent_and_opposite_effects_fail():
    table = verdicts(study(lambda side, level: 0.0, noise=0.002))
    assert (table.verdict == "fails").all()
    assert table.reason.str.contains("within 1 point of zero").all()
    table = verdicts(study(lambda side, level: 0.02 + (0.1 * level if side == "top" else 0.0)))
    assert table.verdict["A3"] == "fails" and "other side" in table.reason["A3"]
    assert table.verdict["A1"] == "holds"


def test_claims_rarely_hold_where_nothing_is_planted():
    tables = [
        recovery_claims(study(lambda side, level: 0.0, noise=0.03, random=r, levels=LEVELS[:2]))
        for r in range(40)
    ]
    assert sum((t.verdict == "holds").any() for t in tables) <= 6  # 5 % of 40 studies is 2


def test_level_one_has_no_part_in_the_comparison_of_sides():
    before = verdicts(study())
    after = verdicts(study(lambda side, level: 0.8 if side == "all" else planted(side, level)))
    assert after.effect["A3"] == pytest.approx(before.effect["A3"])
    assert after.effect["A1"] > before.effect["A1"] + 0.1


def test_three_units_cannot_hold_and_the_reason_says_so():
    table = verdicts(study(tasks=("a",)))
    assert (table.verdict == "undecided").all() and table.smallest_p.tolist() == [1 / 8] * 3
    assert table.reason.str.contains("so few units cannot reach p below 0.05").all()


def test_a_missing_cell_makes_the_verdict_undecided_and_is_named():
    results = study()
    gone = results.eval("state == 'healed' and task == 'a' and seed == 1 and side == 'top'")
    gone &= results.level == 1 / 3
    # A record without a score is no better than no record.
    for lost in (results[~gone], results.assign(score=results.score.mask(gone))):
        table = verdicts(lost)
        assert (table.verdict == "undecided").all()
        assert table.reason.str.contains("1 value missing: a healed top 1/3 seed 1").all()
        assert (table.n == 5).all() and (table.n_expected == 6).all()
    table = verdicts(results.query("not (state == 'intact' and task == 'b' and seed == 0)"))
    assert table.verdict.tolist() == ["undecided", "undecided", "holds"]  # A3 needs no intact
    assert "b intact seed 0" in table.reason["A1"]


def test_an_explicit_grid_asks_for_cells_that_never_ran_and_can_narrow():
    wider = verdicts(study(), grid={"seeds": [0, 1, 2, 3]})
    assert (wider.verdict == "undecided").all() and wider.reason.str.contains("seed 3").all()
    narrower = verdicts(study(), grid={"levels": [1 / 6, 0.5]})
    assert (narrower.verdict == "holds").all()
    assert "levels 1/6, 1/2" in narrower.definition["A1"]
    with pytest.raises(HealingError, match="Did you mean 'levels'"):
        recovery_claims(study(), grid={"level": [0.5]})


def test_duplicate_cells_are_an_error():
    results = study()
    healed = results[(results.state == "healed") & (results.side == "top")].head(1)
    with pytest.raises(HealingError, match="1 duplicate cell .*side top"):
        recovery_claims(pd.concat([results, healed]))


def test_other_parts_and_chosen_layers_stay_out_of_the_claims():
    results = study()
    extra = results[(results.state == "healed") & (results.level == 0.5)]
    part, custom = extra.assign(part="attention"), extra.assign(side="custom", score=0.1)
    table = recovery_claims(pd.concat([results, part, custom]))
    pd.testing.assert_frame_equal(table, recovery_claims(results))


def test_other_kinds_and_single_sides_or_levels():
    init = study(levels=(0.5,), kind="init").query("state in ('healed', 'broken')")
    table = verdicts(pd.concat([study(), init]), kind="init")
    assert (table.kind == "init").all() and table.verdict["A3"] == "holds"
    assert (table.verdict["A2"], table.reason["A2"]) == ("undecided", "one level only")
    assert verdicts(study(), kind="init").reason.str.contains("no healed cell of kind init").all()
    table = verdicts(study().query("side != 'top'"))
    assert table.verdict["A3"] == "undecided" and "side top" in table.reason["A3"]
    assert "bottom" in table.definition["A1"] and "top" not in table.definition["A1"]


def test_the_organism_is_a_demonstration_for_the_sides_only():
    for name in ("organism", "data/organism"):
        table = verdicts(study(model=name))
        assert table.evidence["A3"].startswith("demonstration, never evidence")
        assert table.evidence["A1"] == "evidence"


def test_each_model_is_a_family_of_its_own():
    both = pd.concat([study(model="m1"), study(model="m2", tasks=("a",))])
    found = recovery_claims(both).groupby("model").verdict.agg(list).to_dict()
    assert found == {"m1": ["holds"] * 3, "m2": ["undecided"] * 3}
