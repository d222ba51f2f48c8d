"""Measures of linguistic knowledge by their definitions, on tables with planted effects."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted import healed_study, study
from scipy import stats
from sklearn.metrics import f1_score

from healing_utils.analysis import knowledge
from healing_utils.analysis.recovery import summary
from healing_utils.base.errors import HealingError


def test_guesses_are_not_above_chance_although_their_f1_is():
    """A coin's macro-F1 on two even classes is about 0.5, the majority label's 0.34."""
    made = study(seeds=range(5))
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1], [131, 146]))
    scores = made.scores.assign(metric="f1", score_accuracy=0.9, chance_accuracy=0.5)
    right = []
    for row in scores.index[(scores.task == "flat") & (scores.state == "intact")]:
        answers = rng.integers(2, size=len(labels))
        f1 = f1_score(labels, answers, average="macro")
        right.append((answers == labels).mean())
        names = ["score", "chance", "score_accuracy", "chance_accuracy"]
        scores.loc[row, names] = [f1, 0.345, right[-1], 146 / 277]
    assert scores[scores.task == "flat"].score.min() > 0.4
    kept, left_out = knowledge.above_chance(scores)
    assert list(left_out.task) == ["flat"] and set(kept.task) == {"sst2", "mrpc"}
    assert set(kept.metric) == {"accuracy"} and (kept.reason == "").all()
    row = left_out.iloc[0]
    theirs = stats.ttest_1samp(np.array(right) - 146 / 277, 0).confidence_interval(0.95)
    assert (row.low, row.high) == pytest.approx((theirs.low, theirs.high))
    assert "not above zero" in row.reason and row.n == 5
    # A correlation is compared with 0, whatever the accuracy.
    kept, _ = knowledge.above_chance(scores.assign(metric="matthews"))
    assert set(kept.metric) == {"matthews"} and "flat" in set(kept.task)


def test_the_depth_table_leaves_out_seeds_that_lack_a_cell():
    made = study({"sst2": 0.6}, noise=0.02)
    gone = (made.probing.state == "intact") & (made.probing.task == "sst2")
    kept = knowledge.kept_depth(made.probing[~(gone & (made.probing.seed == 1))]).set_index("task")
    assert kept.kept_share["sst2"] == pytest.approx(0.25, abs=0.1)
    assert kept.kept_share["flat"] == pytest.approx(1, abs=0.05)
    assert kept.kept_share_low["sst2"] < kept.kept_share["sst2"] < kept.kept_share_high["sst2"]
    assert (kept.n["sst2"], kept.n["flat"]) == (5, 6)
    table = knowledge.kept_depth(made.probing.assign(accuracy=-0.01))
    assert table.kept_share.isna().all()  # there was nothing to keep


@pytest.mark.parametrize("measure", ["selectivity", "accuracy"])
def test_healing_holds_what_was_planted(measure):
    made = healed_study(noise=0.0)
    by_cell = knowledge.healing_by_cell(made.probing, made.scores, measure=measure)
    assert len(by_cell) == 2 * 2 * 6 and (by_cell.reason == "").all()
    scale = 0.5 if measure == "selectivity" else 1.0
    expected = {
        "task_loss": 0.04, "task_healing": 0.9, "knowledge_healing": 0.3, "cka": 0.25,
        "knowledge_loss": 0.14 * scale, "knowledge_loss_all": 0.14 * scale * 3 / 7,
    }  # fmt: skip
    table = summary(by_cell, list(expected))
    assert len(table) == 4 and set(table.n) == {6}
    for name, value in expected.items():
        assert np.allclose(table[[name, f"{name}_low", f"{name}_high"]], value)
    assert set(table.layers) == {(0, 1, 2), (3, 4, 5)}


@pytest.mark.parametrize(
    ("table", "where", "said"),
    [
        ("probing", dict(state="healed", seed=0, side="top", column="pos"), "missing: healed"),
        ("probing", dict(state="intact", seed=0, column="pos", layer=5), "missing: intact"),
        ("scores", dict(state="broken", seed=0, side="top"), "missing: broken"),
        ("scores", dict(seed=0, side="top"), "no scores of this cell"),
    ],
)
def test_what_is_missing_is_missing_with_its_reason(table, where, said):
    made = healed_study()
    frame = getattr(made, table)
    hit = np.logical_and.reduce([frame[name] == value for name, value in where.items()])
    assert hit.any()
    setattr(made, table, frame[~hit])
    found = knowledge.healing_by_cell(made.probing, made.scores)
    lost = found[(found.seed == 0) & (found.side == "top")]
    assert lost.reason.str.contains(said).all()
    assert lost[["task_healing", "knowledge_healing"]].isna().any(axis=1).all()
    assert (found[found.seed != 0].reason == "").all()


def test_other_kinds_other_layers_and_untrained_models_play_no_part():
    made = healed_study()
    before, probing = knowledge.healing_by_cell(made.probing, made.scores), made.probing
    untrained = probing[probing.state == "pretrained"].assign(state="untrained", selectivity=0.0)
    init = probing[probing.side != "none"].assign(kind="init", selectivity=0.0)
    chosen = probing[probing.side == "top"].assign(side="custom", selectivity=0.0)
    probing = pd.concat([probing, untrained, init, chosen])
    after = knowledge.healing_by_cell(probing, made.scores)
    pd.testing.assert_frame_equal(after, before)


def test_bad_tables_are_refused():
    made = healed_study()
    mixed = made.probing.copy()
    healed = (mixed.side == "top") & (mixed.seed == 0)
    mixed["layers"] = [(5,) if h else x for h, x in zip(healed, mixed.layers, strict=True)]
    for message, probing in (
        (r"duplicate cells \(probing\)", pd.concat([made.probing, made.probing])),
        ("different depths",
         made.probing.assign(n_layers=np.where(made.probing.seed == 0, 12, 6))),
        ("top 1/2: cells of different layers", mixed),
        ("no broken or healed cell of kind reinit", study().probing),
    ):  # fmt: skip
        with pytest.raises(HealingError, match=message):
            knowledge.healing_by_cell(probing, made.scores)
    with pytest.raises(HealingError, match="duplicate cells"):
        knowledge.checked(pd.concat([made.neurons, made.neurons]), "neurons")
    with pytest.raises(HealingError, match="Did you mean 'accuracy'"):
        knowledge.healing_by_cell(made.probing, made.scores, measure="acuracy")
