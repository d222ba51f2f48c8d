"""Statistics against independent computation, and verdicts against planted effects."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from healing_utils.analysis import statistics as st
from healing_utils.base.errors import HealingError

LEVELS = (1 / 6, 1 / 3, 0.5, 1.0)
LAYERS = {1 / 6: 1, 1 / 3: 2, 0.5: 3, 1.0: 6}


def study(
    loss,
    tasks=("a", "b"),
    seeds=(0, 1, 2),
    levels=LEVELS,
    kind="reinit",
    model="some/model",
    noise=0.003,
    random=0,
    intact_score=0.9,
):
    """Results of a small study in which `loss(side, level)` is planted; broken falls to 0.55."""
    rng = np.random.default_rng(random)
    rows = []

    def row(task, seed, state, side, level, kind, layers, score):
        rows.append(
            dict(
                model=model, task=task, seed=seed, state=state, side=side, level=level, kind=kind,
                part="all", strength=math.nan, layers=layers, metric="accuracy", score=score,
                score_f1=score - 0.02, chance=0.5, chance_f1=0.33, test_size=400,
            )
        )  # fmt: skip

    for task in tasks:
        for seed in seeds:
            base = intact_score + rng.normal(0, noise)
            row(task, seed, "intact", "none", 0.0, "none", (), base)
            row(task, seed, "scratch", "all", 1.0, "scratch", tuple(range(6)), 0.6)
            for level in levels:
                for side in ["all"] if level == 1 else ["bottom", "top"]:
                    n = LAYERS[level]
                    layers = tuple(range(6 - n, 6)) if side == "top" else tuple(range(n))
                    healed = base - loss(side, level) + rng.normal(0, noise)
                    broken = 0.55 + rng.normal(0, noise)
                    row(task, seed, "healed", side, level, kind, layers, healed)
                    row(task, seed, "broken", side, level, kind, layers, broken)
    return pd.DataFrame(rows)


def planted(side, level):
    return {"bottom": 0.20, "top": 0.08, "all": 0.20}[side] * level + 0.03


def one(table, claim):
    return table.set_index("claim").loc[claim]


# --- intervals ---


def test_t_interval_agrees_with_scipy():
    x = np.random.default_rng(1).normal(0.03, 0.02, 7)
    ours = st.t_interval(x)
    theirs = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert ours.mean == pytest.approx(x.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.n == 7


def test_t_interval_of_too_few_and_of_equal_values():
    assert st.t_interval([0.4])[0] == 0.4 and math.isnan(st.t_interval([0.4]).low)
    assert st.t_interval([]).n == 0 and math.isnan(st.t_interval([]).mean)
    assert st.t_interval([0.5, 0.5, 0.5])[:3] == (0.5, 0.5, 0.5)


def test_a_missing_value_is_refused_rather_than_dropped():
    with pytest.raises(HealingError, match="1 of 3 values"):
        st.t_interval([0.1, math.nan, 0.2])
    with pytest.raises(HealingError, match="1 of 3 values"):
        st.sign_flip([0.1, math.inf, 0.2])


def test_t_interval_covers_at_three_values_where_the_bootstrap_does_not():
    rng = np.random.default_rng(0)
    studies = rng.normal(0.0, 1.0, (2000, 3))
    t_covers = np.mean([i.low <= 0 <= i.high for i in map(st.t_interval, studies)])
    # All 27 resamples of three values are few enough to list: the percentile bootstrap, exactly.
    resamples = np.array(list(itertools.product(range(3), repeat=3)))
    means = studies[:, resamples].mean(axis=2)
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    bootstrap_covers = np.mean((low <= 0) & (0 <= high))
    # 2,000 studies: the standard error of a coverage of 0.95 is 0.005
    assert t_covers == pytest.approx(0.95, abs=0.02)
    assert bootstrap_covers < 0.85


# --- sign flips ---


def brute_force(x, alternative):
    x = np.asarray(x)
    sums = np.array([(x * s).sum() for s in itertools.product([1, -1], repeat=len(x))])
    eps = 1e-9 * np.abs(x).sum()
    if alternative == "greater":
        return np.mean(sums >= x.sum() - eps)
    if alternative == "less":
        return np.mean(sums <= x.sum() + eps)
    return np.mean(np.abs(sums) >= abs(x.sum()) - eps)


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 11])
def test_sign_flip_is_exact(n, alternative):
    rng = np.random.default_rng(n)
    for shift in (-0.5, 0.0, 1.0):
        x = rng.normal(shift, 1, n)
        assert st.sign_flip(x, alternative).p == pytest.approx(brute_force(x, alternative))
        tied = np.round(x, 0)  # zeros and equal magnitudes
        assert st.sign_flip(tied, alternative).p == pytest.approx(brute_force(tied, alternative))


def test_sign_flip_agrees_with_scipys_permutation_test():
    x = np.random.default_rng(3).normal(0.4, 1, 9)
    theirs = stats.permutation_test(
        (x,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert st.sign_flip(x).p == pytest.approx(theirs.pvalue)


def test_sign_flip_of_thirty_units_is_exact():
    # The sum of 30 equal values under random signs is binomial: an answer known in closed form.
    x = [1.0] * 25 + [-1.0] * 5
    assert st.sign_flip(x).p == pytest.approx(stats.binom.sf(24, 30, 0.5))
    assert st.sign_flip(x).smallest_p == pytest.approx(0.5**30)


def test_smallest_reachable_p():
    assert st.sign_flip([0.1, 0.2, 0.3]) == (1 / 8, 1 / 8)
    assert st.sign_flip([0.1, 0.2, 0.3, 0.1, 0.2, 0.3]) == (1 / 64, 1 / 64)
    assert st.sign_flip([0.1, 0.2, 0.3], "two-sided") == (1 / 4, 1 / 4)
    assert math.isnan(st.sign_flip([]).p)


def test_sign_flip_refuses_what_it_cannot_do():
    with pytest.raises(HealingError, match="at most 44 units, got 45"):
        st.sign_flip(np.ones(45))
    with pytest.raises(HealingError, match="Did you mean 'greater'"):
        st.sign_flip([1, 2], "greatr")


def test_sign_flip_keeps_its_level():
    rng = np.random.default_rng(5)
    rejected = np.mean([st.sign_flip(rng.normal(0, 1, 6)).p <= 3 / 64 for _ in range(2000)])
    assert rejected == pytest.approx(3 / 64, abs=0.015)  # exact, so equal up to simulation noise


# --- Holm ---


def test_holm_worked_by_hand():
    # sorted 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.2 x 1, made monotone
    assert st.holm([0.02, 0.2, 0.01, 0.03]) == pytest.approx([0.06, 0.2, 0.04, 0.06])
    assert st.holm([1 / 64] * 3) == pytest.approx([3 / 64] * 3)
    assert st.holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert len(st.holm([])) == 0


def test_holm_counts_a_test_that_could_not_be_made():
    corrected = st.holm([0.01, math.nan, 0.04])
    assert corrected[0] == pytest.approx(0.03)
    assert math.isnan(corrected[1])
    assert corrected[2] == pytest.approx(0.08)


def test_binomial_error():
    assert st.binomial_error(0.82, 872) == pytest.approx(0.013, abs=0.0001)
    table = st.binomial_error(pd.Series([0.5, 0.9, -0.1]), pd.Series([100, 100, 100]))
    assert table[:2] == pytest.approx([0.05, 0.03])
    assert math.isnan(table[2])  # a negative correlation has no binomial error


# --- measures ---


def test_measures_follow_the_definitions():
    table = st.measures(study(planted, noise=0.002))
    assert len(table) == 2 * 3 * 7  # tasks x seeds x (3 levels on 2 sides + all layers)
    row = table[
        (table.task == "b") & (table.seed == 1) & (table.side == "top") & (table.level == 0.5)
    ].iloc[0]
    assert row.retained == pytest.approx(row.healed / row.intact)
    assert row.retained_above_chance == pytest.approx((row.healed - 0.5) / (row.intact - 0.5))
    assert row.healing == pytest.approx((row.healed - row.broken) / (row.intact - row.broken))
    assert row.healing == pytest.approx((0.9 - 0.07 - 0.55) / 0.35, abs=0.05)
    assert (row.layers, row.metric, row.reason, row.scratch) == ((3, 4, 5), "accuracy", "", 0.6)


def test_measures_pair_the_intact_model_of_the_same_seed_and_task():
    results = study(lambda side, level: 0.0, noise=0.0)
    shifted = (results.state == "intact") & (results.task == "a") & (results.seed == 2)
    results.loc[shifted, "score"] = 0.8
    table = st.measures(results)
    hit = (table.task == "a") & (table.seed == 2)
    assert table[hit].intact.unique() == [0.8]
    assert table[~hit].intact.unique() == [0.9]


def test_healing_is_missing_where_the_damage_is_noise():
    results = study(planted, noise=0.004)
    harmless = (results.state == "broken") & (results.side == "top") & (results.level == 1 / 6)
    rng = np.random.default_rng(2)
    results.loc[harmless, "score"] = 0.9 + rng.normal(0, 0.01, harmless.sum())
    table = st.measures(results)
    hit = (table.side == "top") & (table.level < 0.2)
    assert table[hit].healing.isna().all()
    assert table[hit].reason.str.contains("interval of zero").all()
    assert table[hit].retained.notna().all()
    assert table[~hit].healing.notna().all() and (table[~hit].reason == "").all()


def test_healing_of_one_seed_or_of_no_damage_is_missing_with_its_reason():
    single = st.measures(study(planted, seeds=(0,)))
    assert single.healing.isna().all() and single.reason.str.contains("one seed").all()
    results = study(planted, noise=0.001)
    results.loc[results.state == "broken", "score"] += 0.5
    assert st.measures(results).reason.str.contains("did no damage").all()


def test_a_cell_without_its_partner_is_kept_and_named():
    results = study(planted)
    gone = (results.state == "broken") & (results.side == "top") & (results.seed == 1)
    table = st.measures(results[~gone])
    assert len(table) == 42
    hit = (table.side == "top") & (table.seed == 1)
    assert (table[hit].reason == "missing: broken").all()
    assert table[hit].retained.notna().all() and table[hit].healing.isna().all()
    assert (table[~hit].reason == "").all()


def test_an_intact_score_at_chance_has_no_retention_above_chance():
    table = st.measures(study(planted, intact_score=0.45, noise=0.001))
    assert table.retained_above_chance.isna().all()
    assert table.reason.str.contains("not above chance").all()


def test_measures_in_another_score_use_its_own_chance():
    table = st.measures(study(planted), value="score_f1")
    assert (table.chance == 0.33).all()


def test_measures_refuse_duplicates_mixed_metrics_and_missing_columns():
    results = study(planted)
    with pytest.raises(HealingError, match="42 duplicate cells"):
        st.measures(pd.concat([results, results[results.state == "healed"]]))
    mixed = results.copy()
    mixed.loc[mixed.state == "healed", "metric"] = "macro-F1"
    with pytest.raises(HealingError, match="several metrics: accuracy, macro-F1"):
        st.measures(mixed)
    with pytest.raises(HealingError, match="Did you mean 'score_f1'"):
        st.measures(results, value="scoref1")


def test_measures_survive_a_csv_file(tmp_path):
    results = study(planted)
    results.to_csv(tmp_path / "results.csv", index=False)
    read = st.measures(pd.read_csv(tmp_path / "results.csv"))
    pd.testing.assert_frame_equal(read, st.measures(results), check_dtype=False)
    read_claims = st.claims(pd.read_csv(tmp_path / "results.csv"))
    pd.testing.assert_frame_equal(read_claims, st.claims(results))


def test_summary_gives_means_and_intervals_over_seeds():
    measured = st.measures(study(planted))
    table = st.summary(measured)
    assert len(table) == 14 and (table.n == 3).all()
    row = table[(table.task == "a") & (table.side == "bottom") & (table.level == 0.5)].iloc[0]
    values = measured[
        (measured.task == "a") & (measured.side == "bottom") & (measured.level == 0.5)
    ].healed
    assert (row.healed, row.healed_low, row.healed_high) == pytest.approx(st.t_interval(values)[:3])
    assert row.test_error == pytest.approx(math.sqrt(row.intact * (1 - row.intact) / 400))
    assert st.summary(measured.assign(metric="matthews")).test_error.isna().all()


# --- claims ---


def test_planted_effects_are_found():
    table = st.claims(study(planted))
    assert list(table.claim) == ["A1", "A2", "A3"]
    assert list(table.verdict) == ["holds"] * 3
    assert (table.n == 6).all() and table.smallest_p.tolist() == [1 / 64] * 3
    assert table.p_corrected.tolist() == pytest.approx([3 / 64] * 3)
    level_mean = {x: np.mean([planted("bottom", x), planted("top", x)]) for x in LEVELS[:3]}
    level_mean[1.0] = planted("all", 1.0)
    assert one(table, "A1").effect == pytest.approx(np.mean(list(level_mean.values())), abs=0.006)
    # Level 1 has no part in A2: it holds the bottom, whatever side it is counted for.
    below = {level: loss for level, loss in level_mean.items() if level < 1}
    slope = np.polyfit(list(below), list(below.values()), 1)[0]
    rise = slope * (max(below) - min(below))
    assert one(table, "A2").effect == pytest.approx(rise, abs=0.008)
    assert "levels 1/6, 1/3, 1/2" in one(table, "A2").definition
    assert one(table, "A3").effect == pytest.approx(0.12 * 1 / 3, abs=0.006)  # mean level is 1/3
    assert (table.evidence == "evidence").all()
    assert (table.low < table.effect).all() and (table.effect < table.high).all()


def test_absent_effects_are_not_found():
    table = st.claims(study(lambda side, level: 0.0, noise=0.002))
    assert list(table.verdict) == ["fails"] * 3
    assert table.reason.str.contains("within 1 point of zero").all()


def test_claims_rarely_hold_where_nothing_is_planted():
    tables = [
        st.claims(study(lambda side, level: 0.0, noise=0.03, random=r, levels=LEVELS[:2]))
        for r in range(40)
    ]
    held = sum((t.verdict == "holds").any() for t in tables)
    assert held <= 6  # 5 % of 40 studies is 2


def test_the_opposite_effect_fails():
    table = st.claims(study(lambda side, level: 0.02 + (0.1 * level if side == "top" else 0.0)))
    assert one(table, "A3").verdict == "fails"
    assert "other side" in one(table, "A3").reason
    assert one(table, "A1").verdict == "holds"


def test_level_one_has_no_part_in_the_comparison_of_sides():
    with_all = st.claims(study(planted))
    other = study(lambda side, level: 0.8 if side == "all" else planted(side, level))
    changed = st.claims(other)
    assert one(changed, "A3").effect == pytest.approx(one(with_all, "A3").effect)
    assert one(changed, "A1").effect > one(with_all, "A1").effect + 0.1


def test_three_units_cannot_hold_and_the_reason_says_so():
    table = st.claims(study(planted, tasks=("a",)))
    assert list(table.verdict) == ["undecided"] * 3
    assert table.smallest_p.tolist() == [1 / 8] * 3
    assert table.reason.str.contains("so few units cannot reach p below 0.05").all()


def test_a_missing_cell_makes_the_verdict_undecided_and_is_named():
    results = study(planted)
    gone = (
        (results.state == "healed") & (results.task == "a") & (results.seed == 1)
        & (results.side == "top") & (results.level == 1 / 3)
    )  # fmt: skip
    table = st.claims(results[~gone])
    assert list(table.verdict) == ["undecided"] * 3
    assert table.reason.str.contains("1 cell missing: a healed top 1/3 seed 1").all()
    assert (table.n == 5).all() and (table.n_expected == 6).all()
    nan = results.copy()
    nan.loc[gone, "score"] = math.nan  # a record without a score is no better than no record
    assert list(st.claims(nan).verdict) == ["undecided"] * 3


def test_a_missing_intact_cell_touches_only_the_losses():
    results = study(planted)
    gone = (results.state == "intact") & (results.task == "b") & (results.seed == 0)
    table = st.claims(results[~gone])
    assert list(table.verdict) == ["undecided", "undecided", "holds"]
    assert "b intact seed 0" in one(table, "A1").reason


def test_an_explicit_grid_asks_for_cells_that_never_ran_and_can_narrow():
    results = study(planted)
    wider = st.claims(results, grid={"seeds": [0, 1, 2, 3]})
    assert (wider.verdict == "undecided").all()
    assert wider.reason.str.contains("seed 3").all()
    narrower = st.claims(results, grid={"levels": [1 / 6, 0.5]})
    assert (narrower.verdict == "holds").all()
    assert "levels 1/6, 1/2" in one(narrower, "A1").definition
    with pytest.raises(HealingError, match="Did you mean 'levels'"):
        st.claims(results, grid={"level": [0.5]})


def test_duplicate_cells_are_an_error():
    results = study(planted)
    healed = results[(results.state == "healed") & (results.side == "top")].head(1)
    with pytest.raises(HealingError, match="1 duplicate cell .*side top"):
        st.claims(pd.concat([results, healed]))


def test_other_parts_and_chosen_layers_stay_out_of_the_claims():
    results = study(planted)
    extra = results[(results.state == "healed") & (results.level == 0.5)].copy()
    part, custom = extra.assign(part="attention"), extra.assign(side="custom", score=0.1)
    table = st.claims(pd.concat([results, part, custom]))
    pd.testing.assert_frame_equal(table, st.claims(results))


def test_the_other_kind_runs_by_the_same_rules():
    both = pd.concat(
        [
            study(planted),
            study(planted, levels=(0.5,), kind="init", random=0).query(
                "state in ('healed', 'broken')"
            ),
        ]
    )
    table = st.claims(both, kind="init")
    assert (table.kind == "init").all()
    assert one(table, "A3").verdict == "holds"
    assert one(table, "A2").verdict == "undecided" and one(table, "A2").reason == "one level only"
    none = st.claims(study(planted), kind="init")
    assert none.reason.str.contains("no healed cell of kind init").all()


def test_one_side_alone_cannot_be_compared():
    results = study(planted)
    table = st.claims(results[results.side != "top"])
    assert one(table, "A3").verdict == "undecided" and "side top" in one(table, "A3").reason
    assert "bottom" in one(table, "A1").definition and "top" not in one(table, "A1").definition


def test_the_organism_is_a_demonstration_for_the_sides_only():
    for name in ("organism", "data/organism"):
        table = st.claims(study(planted, model=name))
        assert one(table, "A3").evidence.startswith("demonstration, never evidence")
        assert one(table, "A1").evidence == "evidence"


def test_each_model_is_a_family_of_its_own():
    both = pd.concat([study(planted, model="m1"), study(planted, model="m2", tasks=("a",))])
    table = st.claims(both)
    assert table.groupby("model").verdict.agg(list).to_dict() == {
        "m1": ["holds"] * 3,
        "m2": ["undecided"] * 3,
    }


@pytest.mark.parametrize(
    "low, high, p, missing, expected",
    [
        (0.02, 0.05, 0.01, (), "holds"),
        (0.02, 0.05, 0.05, (), "undecided"),  # p must be below, not at
        (0.01, 0.05, 0.01, (), "undecided"),  # the interval must be beyond the margin
        (0.005, 0.05, 0.01, (), "undecided"),
        (-0.02, 0.05, 0.3, (), "undecided"),
        (0.001, 0.009, 0.01, (), "fails"),  # real, but too small to matter
        (-0.01, 0.01, 0.9, (), "fails"),
        (-0.05, -0.02, 1.0, (), "fails"),
        (-0.05, -0.001, 1.0, (), "fails"),
        (-0.05, 0.005, 0.9, (), "undecided"),
        (0.02, 0.05, 0.01, ("1 cell missing: x",), "undecided"),
        (-0.05, -0.02, 1.0, ("1 cell missing: x",), "undecided"),
        (math.nan, math.nan, math.nan, (), "undecided"),
    ],
)
def test_verdict_table(low, high, p, missing, expected):
    name, reason = st.verdict(low, high, p, missing=missing)
    assert name == expected
    assert reason
