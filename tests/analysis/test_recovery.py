"""Measures of recovery by their definitions."""

import math

import numpy as np
import pandas as pd
import pytest
from planted import healed_study
from scipy import stats

from healing_utils.analysis.recovery import measures, summary
from healing_utils.base.errors import HealingError


def study(**settings):
    """Scores of two tasks, six seeds and both halves: intact 0.9, broken 0.5, healed 0.86."""
    table = healed_study(tasks=("sst2", "mrpc"), **settings).scores
    scratch = table[table.state == "intact"].assign(state="scratch", score=0.6)
    return pd.concat([table, scratch], ignore_index=True)


def hit(table, state="broken", side="top"):
    return (table.state == state) & (table.side == side)


def test_measures_follow_the_definitions_within_a_task_and_seed():
    results = study()
    results.loc[results.eval("state == 'intact' and task == 'mrpc' and seed == 2"), "score"] = 0.8
    table = measures(results)
    assert len(table) == 2 * 6 * 2  # tasks x seeds x sides
    row = table.query("task == 'mrpc' and seed == 2 and side == 'top'").iloc[0]
    assert row.retained == pytest.approx(row.healed / 0.8)
    assert row.retained_above_chance == pytest.approx((row.healed - 0.5) / (0.8 - 0.5))
    assert row.healing == pytest.approx((row.healed - row.broken) / (0.8 - row.broken))
    assert (row.layers, row.metric, row.reason, row.scratch) == ((3, 4, 5), "accuracy", "", 0.6)
    rest = table.query("task == 'sst2' or seed != 2")
    assert rest.intact.min() > 0.89 and rest.healing.mean() == pytest.approx(0.9, abs=0.01)


def test_healing_is_missing_where_the_damage_is_noise_and_named_where_a_cell_is_missing():
    results = study(noise=0.004)
    rng = np.random.default_rng(2)
    results.loc[hit(results), "score"] = 0.9 + rng.normal(0, 0.01, hit(results).sum())
    gone = hit(results, side="bottom") & (results.seed == 1)
    table = measures(results[~gone])
    top, alone = table.side == "top", (table.side == "bottom") & (table.seed == 1)
    assert len(table) == 24 and table.retained.notna().all()
    assert (table.healing.isna() == (top | alone)).all()
    assert table[top].reason.str.contains("interval of zero").all()
    assert (table[alone].reason == "missing: broken").all()
    assert (table[~top & ~alone].reason == "").all()


@pytest.mark.parametrize(
    ("results", "measure", "reason"),
    [
        (study(seeds=(0,)), "healing", "one seed"),
        (study().assign(score=lambda t: t.score + 0.5 * (t.state == "broken")), "healing",
         "did no damage"),
        (study().assign(chance=0.95), "retained_above_chance", "not above chance"),
    ],
)  # fmt: skip
def test_a_measure_that_cannot_be_made_is_missing_with_its_reason(results, measure, reason):
    table = measures(results)
    assert table[measure].isna().all() and table.reason.str.contains(reason).all()


def test_measures_refuse_duplicates_and_mixed_metrics():
    results = study()
    with pytest.raises(HealingError, match="24 duplicate cells"):
        measures(pd.concat([results, results[results.state == "healed"]]))
    mixed = results.assign(metric=results.metric.where(results.state != "healed", "f1"))
    with pytest.raises(HealingError, match="several metrics: accuracy, f1"):
        measures(mixed)


def test_summary_gives_means_and_intervals_over_seeds():
    measured = measures(study())
    table = summary(measured)
    assert len(table) == 4 and (table.n == 6).all()
    row = table.query("task == 'sst2' and side == 'bottom'").iloc[0]
    values = measured.query("task == 'sst2' and side == 'bottom'").healed
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = (row.healed, row.healed_low, row.healed_high)
    assert found == pytest.approx((values.mean(), theirs.low, theirs.high))
    assert row.test_error == pytest.approx(math.sqrt(row.intact * (1 - row.intact) / 400))
    assert summary(measured.assign(metric="matthews")).test_error.isna().all()
