"""Measures of recovery by their definitions."""

import math

import numpy as np
import pandas as pd
import pytest

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


def test_measures_refuse_duplicates_and_mixed_metrics():
    results = study()
    with pytest.raises(HealingError, match="42 duplicate cells"):
        measures(pd.concat([results, results[results.state == "healed"]]))
    mixed = results.assign(metric=results.metric.where(results.state != "healed", "f1"))
    with pytest.raises(HealingError, match="several metrics: accuracy, f1"):
        measures(mixed)


def test_summary_gives_means_and_intervals_over_seeds():
    measured = measures(study())
    table = summary(measured)
    assert len(table) == 14 and (table.n == 3).all()
    where = "task == 'a' and side == 'bottom' and level == 0.5"
    row, values = table.query(where).iloc[0], measured.query(where).healed
    assert (row.healed, row.healed_low, row.healed_high) == pytest.approx(t_interval(values)[:3])
    assert row.test_error == pytest.approx(math.sqrt(row.intact * (1 - row.intact) / 400))
    assert summary(measured.assign(metric="matthews")).test_error.isna().all()
