"""Claims on linguistic knowledge: planted effects are found, absent ones not, gaps are named."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from healing_utils.analysis import knowledge as kn
from healing_utils.analysis.claims import COLUMNS, DEMONSTRATION, in_words
from healing_utils.analysis.claims_knowledge import knowledge_claims
from healing_utils.analysis.effects import holm, task_permutation
from healing_utils.base.errors import HealingError
from healing_utils.report import figures

LAYERS = 6
CORPORA = (("organism", "pos"), ("organism", "chunk"))
TASKS, SEEDS = ("deep", "even", "flat"), (0, 1, 2, 3)
FORGETS = {"deep": 0.20, "even": 0.08, "flat": 0.0}  # selectivity lost in the deeper half
ARCHITECTURES = {"some/bert": "bert", "some/roberta": "roberta", "some/xlnet": "xlnet"}


def forget(amounts=FORGETS, half=LAYERS / 2):
    """Fine-tuning takes `amounts[task]` from every layer of the deeper half."""
    return lambda task, layer: amounts.get(task, 0.0) * (layer > half)


def study(
    drop=None, shift=0.15, task_healing=0.9, knowledge_healing=0.3, damage=0.20, tasks=TASKS,
    seeds=SEEDS, healed_tasks=(), sides=(("bottom", 0.5), ("top", 0.5)), model="some/model",
    n_layers=LAYERS, noise=0.002, random=0,
):  # fmt: skip
    """The three tables of a small study with planted effects, as attributes.

    Pre-trained selectivity is 0.4 in every layer and falls by `drop(task, layer)`; the minimal set
    sinks by `shift` of the depth; corruption takes `damage` of selectivity from the corrupted
    layers and 0.4 of the score, of which healing brings the given shares back. `noise` is the
    standard deviation of each cell's own level.
    """
    rng = np.random.default_rng(random)
    drop = drop or forget(half=n_layers / 2)
    probing, minimal, scores = [], [], []

    def cell(state, task="none", side="none", level=0.0, seed=0, layers=()):
        kind = "none" if side == "none" else "reinit"
        return dict(
            model=model, task=task, state=state, side=side, level=level, kind=kind, layers=layers,
            n_layers=n_layers, seed=seed,
        )  # fmt: skip

    def probe(knows, cka, **where):
        for corpus, column in CORPORA:
            level = rng.normal(0, noise)
            for layer in range(n_layers + 1):
                words = dict(corpus=corpus, column=column, key="k", layer=layer)
                measured = dict(selectivity=knows(layer) + level, cka=cka(layer))
                probing.append(cell(**where) | words | measured)

    def centre(depth, **where):
        for corpus, column in CORPORA:
            words = dict(corpus=corpus, column=column, key="k")
            minimal.append(
                cell(**where) | words | dict(center_of_mass=depth + rng.normal(0, noise))
            )

    def score(value, **where):
        measured = dict(part="all", strength=math.nan, metric="accuracy", chance=0.5, test_size=400)
        scores.append(cell(**where) | measured | dict(score=value + rng.normal(0, noise)))

    for seed in seeds:
        probe(lambda layer: 0.4, lambda layer: math.nan, state="pretrained", seed=seed)
        centre(0.6, state="pretrained", seed=seed)
        for task in tasks:
            own = dict(task=task, seed=seed, state="intact")
            probe(lambda x, t=task: 0.4 - drop(t, x), lambda x: math.nan, **own)
            centre(0.6 - shift, **own)
            score(0.9, **own)
        for task, (side, level) in itertools.product(healed_tasks, sides):
            count = round(level * n_layers)
            layers = tuple(range(n_layers - count, n_layers) if side == "top" else range(count))
            for state, knows, does in (
                ("broken", 0.0, 0.0), ("healed", knowledge_healing, task_healing)
            ):  # fmt: skip
                where = dict(state=state, task=task, seed=seed, side=side, level=level)
                where["layers"] = layers

                def curve(layer, hit=layers, knows=knows, task=task):
                    lost = damage * (1 - knows) if layer - 1 in hit else 0.0
                    return 0.4 - drop(task, layer) - lost

                probe(curve, lambda x, hit=layers: 0.25 if x - 1 in hit else 1.0, **where)
                score(0.9 - 0.4 * (1 - does), **where)
    return SimpleNamespace(
        probing=pd.DataFrame(probing), minimal=pd.DataFrame(minimal), scores=pd.DataFrame(scores)
    )


def healed_study(**settings):
    """The same with broken and healed models of two tasks."""
    return study(**{"healed_tasks": ("deep", "even"), **settings})


def together(*parts):
    names = ("probing", "minimal", "scores")
    return SimpleNamespace(**{n: pd.concat([getattr(p, n) for p in parts]) for n in names})


def architectures(bert=0.05, roberta=0.20, xlnet=0.20, **settings):
    """Three studies put together, each of which forgets so much in its deeper half."""
    return together(
        *(
            study(forget(dict.fromkeys(TASKS, amount), depth / 2), model=model, n_layers=depth,
                  random=i, **settings)
            for i, (model, amount, depth) in enumerate(
                zip(ARCHITECTURES, (bert, roberta, xlnet), (6, 12, 6), strict=True)
            )
        )
    )  # fmt: skip


def claims(made, **settings):
    return knowledge_claims(made.probing, made.minimal, made.scores, **settings)


def one(made, claim, **settings):
    return claims(made, **settings).set_index("claim").loc[claim]


def without(frame, **where):
    """The frame without the rows that have all of these values, of which there must be some."""
    hit = np.logical_and.reduce([frame[name] == value for name, value in where.items()])
    assert hit.any()
    return frame[~hit]


# --- measures ---


@pytest.mark.parametrize(
    ("before", "after", "depth", "share"),
    [
        ([0.1, 0.4, 0.4, 0.4, 0.4], [0.1, 0.4, 0.4, 0.4, 0.4], 1.0, 1.0),
        ([0.1, 0.4, 0.4, 0.4, 0.4], [0.1, 0.4, 0.3, 0.2, 0.1], 0.75, 0.375),  # half counts
        ([0.1, 0.4, 0.4, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1, 0.3], 1.0, 0.5),  # the deepest, not a run
        ([0.1, 0.4, 0.4, 0.4, 0.4], [0.1, 0.0, 0.0, 0.0, 0.0], 0.0, 0.0),  # only the embeddings
        ([0.1, 0.4, 0.2, 0.1, -0.1], [0.1, 0.4, 0.2, 0.1, 0.5], 0.75, math.nan),  # none to keep
        ([-0.1, 0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1, 0.1], math.nan, math.nan),
        ([0.1, 0.2, 0.2, 0.2, 0.2, 0.2], [0.1, 0.2, 0.2, 0.1, 0.1, 0.0], 0.8, 1 / 3),  # 5 layers
        ([0.3, 0.3], [0.3, 0.1], 0.0, 1 / 3),
        # A share of the mean sees what a depth in steps of a layer rounds away.
        ([0.4] * 13, [0.4] * 7 + [0.36] * 6, 1.0, 0.9),
        ([0.4] * 13, [0.4] * 7 + [0.22] * 6, 1.0, 0.55),
    ],
)
def test_depth_measures_of_curves_made_by_hand(before, after, depth, share):
    before, after = np.array(before), np.array(after)
    assert kn.half_depth(before, after) == pytest.approx(depth, nan_ok=True)
    assert kn.kept_share(before, after) == pytest.approx(share, nan_ok=True)


# --- above chance ---


def test_a_task_at_chance_is_left_out_of_b_and_named():
    made = healed_study()
    hit = (made.scores.task == "flat") & (made.scores.state == "intact")
    made.scores.loc[hit, "score"] = [0.49, 0.52, 0.50, 0.51]
    kept, left_out = kn.above_chance(made.scores)
    assert list(kept.task) == ["deep", "even"] and list(left_out.task) == ["flat"]
    row = left_out.iloc[0]
    theirs = stats.ttest_1samp([-0.01, 0.02, 0.0, 0.01], 0).confidence_interval(0.95)
    assert (row.low, row.high) == pytest.approx((theirs.low, theirs.high))
    assert (row.score, row.chance, row.above, row.n) == pytest.approx((0.505, 0.5, 0.005, 4))
    assert "not above zero" in row.reason and (kept.reason == "").all() and kept.low.min() > 0.3
    table = claims(made).set_index("claim")
    for claim in ("B1", "B2"):
        assert "left out, not above chance: flat (score - chance is 0.005 [" in table.reason[claim]
        assert (table.n[claim], table.n_expected[claim]) == (8, 8)
    assert "flat" not in table.reason["H"]
    # The task that forgets least is gone, so the one that forgets less stands for it.
    assert table.effect["B1"] == pytest.approx(0.12, abs=0.01)


def test_guesses_are_not_above_chance_although_their_f1_is():
    """A coin's macro-F1 on two even classes is about 0.5, the majority label's 0.34."""
    made = study(seeds=range(5))
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1], [131, 146]))
    scores = made.scores.assign(metric="f1", score_accuracy=0.9, chance_accuracy=0.5)
    for row in scores.index[(scores.task == "flat") & (scores.state == "intact")]:
        answers = rng.integers(2, size=len(labels))
        f1 = f1_score(labels, answers, average="macro")
        names = ["score", "chance", "score_accuracy", "chance_accuracy"]
        scores.loc[row, names] = [f1, 0.345, (answers == labels).mean(), 146 / 277]
    assert scores[scores.task == "flat"].score.min() > 0.4
    kept, left_out = kn.above_chance(scores)
    assert list(left_out.task) == ["flat"] and "flat" not in set(kept.task)
    assert set(kept.metric) == {"accuracy"}
    # A correlation is compared with 0, whatever the accuracy.
    kept, _ = kn.above_chance(scores.assign(metric="matthews"))
    assert set(kept.metric) == {"matthews"} and "flat" in set(kept.task)


# --- B1 ---


def test_b1_finds_the_tasks_that_forget():
    made = study(noise=0.01)
    row = one(made, "B1")
    assert row.verdict == "holds" and row.effect == pytest.approx(0.20, abs=0.02)
    assert row.p == row.smallest_p == 1 / 6**3
    assert row.reason.endswith("deep forgets most, flat least")
    assert "layers 4 to 6 of 6" in row.definition and "organism pos" in row.definition
    assert "98.33 %" in row.definition  # three pairs of tasks
    assert (row.n, row.n_expected, row.units) == (12, 12, "3 tasks x 4 seeds")
    # It is the drop of the deeper half, and its interval that of the pair.
    deep = made.probing[made.probing.layer > 3]
    table = deep.groupby(["state", "task", "seed"]).selectivity.mean()
    drops = {t: table["pretrained", "none"] - table["intact", t] for t in TASKS}
    paired = drops["deep"] - drops["flat"]
    theirs = stats.ttest_1samp(paired, 0).confidence_interval(1 - 0.05 / 3)
    expected = (paired.mean(), theirs.low, theirs.high)
    assert (row.effect, row.low, row.high) == pytest.approx(expected)
    assert row.p == pytest.approx(task_permutation([drops[t] for t in TASKS]).p)


@pytest.mark.parametrize(
    ("drop", "noise", "verdict"),
    [
        (lambda task, layer: 0.3 * (task == "deep") * (layer <= 3), 0.002, "fails"),  # lower half
        (forget(dict.fromkeys(TASKS, 0.2)), 0.002, "fails"),
        (forget(dict.fromkeys(TASKS, 0.2)), 0.1, "undecided"),
    ],
)
def test_b1_fails_where_all_tasks_forget_alike_and_is_undecided_in_noise(drop, noise, verdict):
    row = one(study(drop, noise=noise), "B1")
    assert row.verdict == verdict
    assert ("within 2 points of zero" in row.reason) == (verdict == "fails")


def test_b1_does_not_fail_while_another_pair_may_differ():
    made = study(forget({}), noise=0.0)
    # "deep" is 0.01 above the others on average and always so; "flat" is nothing on average,
    # but the seeds tell so little of it that it may differ from "even" by more.
    seesaw = dict(zip(SEEDS, (0.03, -0.03, 0.03, -0.03), strict=True))
    for i in made.probing[made.probing.state == "intact"].index:
        task, seed = made.probing.loc[i, ["task", "seed"]]
        change = {"deep": 0.01, "flat": -seesaw[seed], "even": 0.0}[task]
        made.probing.loc[i, "selectivity"] -= change
    two = SimpleNamespace(**{**vars(made), "probing": made.probing[made.probing.task != "flat"]})
    assert one(two, "B1").verdict == "fails"
    made.probing.loc[made.probing.task == "flat", "selectivity"] -= 0.0099
    row = one(made, "B1")
    assert row.effect == pytest.approx(0.01) and row.high < 0.02 and row.verdict == "undecided"
    assert row.reason.startswith("another pair's interval leaves the margin")


def test_b1_of_few_tasks():
    row = one(study(tasks=("deep",)), "B1")
    assert row.verdict == "undecided" and row.n == 0 and math.isnan(row.effect)
    assert row.reason == "one task cannot differ from itself"
    row = one(study(tasks=("deep", "flat"), seeds=(0, 1, 2)), "B1")
    assert row.p == row.smallest_p == 1 / 4 and row.low > 0.02
    assert row.verdict == "undecided" and "the smallest is 0.25" in row.reason


# --- B2 ---


@pytest.mark.parametrize(
    ("shift", "noise", "verdict"),
    [(0.15, 0.002, "holds"), (-0.15, 0.002, "fails"), (0.0, 0.002, "fails"),
     (0.0, 0.1, "undecided")],
)  # fmt: skip
def test_b2_finds_the_set_that_sinks(shift, noise, verdict):
    row = one(study(shift=shift, noise=noise), "B2")
    assert row.verdict == verdict and row.effect == pytest.approx(shift, abs=2.5 * noise)
    assert (row.margin, row.n, row.n_expected, row.smallest_p) == (0.02, 12, 12, 2.0**-12)


def test_b2_is_paired_with_the_pretrained_set_of_its_own_seed():
    made = study(shift=0.1, noise=0.0)
    made.minimal["center_of_mass"] += 0.1 * made.minimal.seed  # the same before and after
    row = one(made, "B2")
    assert (row.effect, row.low, row.high) == pytest.approx((0.1, 0.1, 0.1))


# --- B3 ---


def test_b3_finds_that_bert_keeps_more():
    row = one(architectures(), "B3", architectures=ARCHITECTURES)
    # 0.35 / 0.40 against 0.20 / 0.40
    assert row.verdict == "holds" and row.effect == pytest.approx(0.375, abs=0.02)
    assert row.model == "some/bert" and row.p == 2.0**-12
    assert "one model per architecture: nothing is said about architectures" in row.reason
    assert (row.n, row.n_expected) == (12, 12)


@pytest.mark.parametrize("drops", [(0.2, 0.05, 0.05), (0.1, 0.1, 0.1)])
def test_b3_reversed_and_absent_fail(drops):
    made = architectures(*drops)
    assert one(made, "B3", architectures=ARCHITECTURES).verdict == "fails"


def test_b3_averages_the_models_of_one_architecture_first():
    made = architectures(bert=0.0, roberta=0.08, xlnet=0.16, noise=0.0)
    row = one(made, "B3", architectures=ARCHITECTURES)
    assert row.effect == pytest.approx((0.2 + 0.4) / 2)
    more = study(forget(dict.fromkeys(TASKS, 0.32)), model="large/xlnet", noise=0.0)
    kinds = {**ARCHITECTURES, "large/xlnet": "xlnet"}
    row = one(together(made, more), "B3", architectures=kinds)
    assert row.effect == pytest.approx((0.2 + (0.4 + 0.8) / 2) / 2)
    assert "so few models per architecture" in row.reason


def test_b3_without_other_architectures_without_bert_and_without_any_is_undecided():
    row = one(study(), "B3", architectures={"some/model": "bert"})
    assert (row.verdict, row.n, row.model) == ("undecided", 0, "some/model")
    assert row.reason.startswith("one architecture; one model per architecture")
    made = architectures(seeds=(0, 1))
    row = one(made, "B3", architectures={**ARCHITECTURES, "some/bert": "electra"})
    assert "no BERT among the architectures: electra, roberta, xlnet" in row.reason
    assert row.verdict == "undecided" and row.model == "all"
    assert "architectures are not given" in one(made, "B3").reason
    with pytest.raises(HealingError, match="no architecture is given for the model 'some/xlnet'"):
        claims(made, architectures={"some/bert": "bert", "some/roberta": "roberta"})


def test_b3_leaves_a_task_out_that_one_model_has_not_learnt():
    made = architectures()
    hit = (made.scores.model == "some/xlnet") & (made.scores.task == "flat")
    made.scores.loc[hit, "score"] = 0.5
    row = one(made, "B3", architectures=ARCHITECTURES)
    assert "some/xlnet: left out, not above chance: flat" in row.reason
    assert (row.n, row.n_expected, row.verdict) == (8, 8, "holds")


def test_b3_does_not_divide_by_what_may_be_zero():
    made = architectures()
    hit = (made.probing.model == "some/xlnet") & (made.probing.state == "pretrained")
    made.probing.loc[hit, "selectivity"] = 0.02 * made.probing.seed[hit] - 0.03
    row = one(made, "B3", architectures=ARCHITECTURES)
    assert row.verdict == "undecided" and row.n == 0
    assert "some/xlnet kept share: pre-trained selectivity is 0.000 [" in row.reason


# --- H ---


def test_h_finds_that_the_task_heals_further():
    row = one(healed_study(), "H")
    assert row.verdict == "holds" and row.effect == pytest.approx(0.6, abs=0.03)
    assert row.kind == "reinit" and row.margin == 0
    assert (row.n, row.n_expected, row.units) == (8, 8, "2 tasks x 4 seeds")
    assert "interval above zero" in row.reason
    assert "the selectivity gap that remains is 0.14" in row.reason  # 0.2 * (1 - 0.3)
    assert "bottom 1/2, top 1/2" in row.definition


@pytest.mark.parametrize(
    ("settings", "verdict", "reason"),
    [
        (dict(task_healing=0.3, knowledge_healing=0.6), "fails", "other side of zero"),
        # Hardly any knowledge is missing, however far the task heals.
        (dict(task_healing=1.0, knowledge_healing=0.95), "fails", "not above 0.02"),
        (dict(knowledge_healing=0.9, noise=0.004), "undecided", "not clear of 0.02"),  # a gap of it
        (dict(damage=0.0, noise=0.01), "undecided", "knowledge healing: "),  # no quotient
        (dict(seeds=(0,)), "undecided", "one seed gives no interval for intact - broken"),
        (dict(healed_tasks=()), "undecided", "no broken or healed cell of kind reinit"),
        (dict(sides=(("bottom", 0.5), ("all", 1.0))), "holds", "gap that remains"),
    ],
)
def test_h_reversed_absent_and_not_to_be_measured(settings, verdict, reason):
    row = one(healed_study(**settings), "H")
    assert row.verdict == verdict and reason in row.reason


def test_h_looks_at_the_corrupted_layers_only():
    made = healed_study(noise=0.001)
    corrupted = made.probing.state.isin(["healed", "broken"])
    pairs = zip(made.probing.layer, made.probing.layers, strict=True)
    hit = np.array([layer - 1 in layers for layer, layers in pairs])
    before = one(made, "H").effect
    made.probing.loc[corrupted & ~hit, "selectivity"] = 0.123
    assert one(made, "H").effect == pytest.approx(before)


def test_h_has_no_quotient_where_the_corruption_did_no_damage():
    made = healed_study(noise=0.01)
    top = (made.scores.side == "top") & (made.scores.task == "even")
    scored = made.scores[made.scores.state == "intact"].set_index(["task", "seed"]).score
    keys = [("even", seed) for seed in made.scores[top].seed]
    made.scores.loc[top, "score"] = scored.loc[keys].to_numpy()
    row = one(made, "H")
    assert row.verdict == "undecided" and (row.n, row.n_expected) == (4, 8)
    assert "even top 1/2 task healing: intact - broken is within its interval" in row.reason
    by_cell = kn.healing_by_cell(made.probing, made.scores).set_index(["task", "side"])
    assert by_cell.task_healing["even", "top"].isna().all()
    assert by_cell.task_healing["even", "bottom"].notna().all()
    assert (by_cell.reason["deep"] == "").all()


# --- missing cells ---


@pytest.fixture(scope="module")
def complete():
    """Two architectures without a gap, and what is found in them."""
    made = architectures(healed_tasks=TASKS[:2])
    for name in ("probing", "minimal", "scores"):
        setattr(made, name, without(getattr(made, name), model="some/xlnet"))
    return made, claims(made, architectures=ARCHITECTURES).set_index(["model", "claim"])


@pytest.mark.parametrize(("table", "where", "hurt", "named"), [
    ("probing", dict(state="pretrained", seed=1, column="pos"), ("B1", "B3"),
     "pretrained seed 1 organism pos"),
    ("probing", dict(state="pretrained", seed=1, column="pos", layer=5), ("B1", "B3"),
     "pretrained seed 1 organism pos layer 5"),
    ("probing", dict(state="intact", task="even", seed=2, column="chunk"), ("B1", "B3", "H"),
     "even intact seed 2 organism chunk"),
    ("minimal", dict(state="intact", task="flat", seed=0, column="pos"), ("B2",),
     "flat intact seed 0 organism pos"),
    ("minimal", dict(state="pretrained", seed=3, column="pos"), ("B2",),
     "pretrained seed 3 organism pos"),
    ("scores", dict(state="intact", task="flat", seed=0), ("B1", "B2", "B3"),
     "flat intact score seed 0"),
    ("probing", dict(state="healed", task="deep", seed=0, side="top", column="pos"), ("H",),
     "deep healed top 1/2 seed 0 organism pos"),
    ("scores", dict(state="broken", task="deep", seed=1, side="top"), ("H",),
     "deep top 1/2 seed 1 scores missing: broken"),
    ("scores", dict(task="deep", seed=1, side="top"), ("H",),
     "deep top 1/2 seed 1 scores missing: broken, healed"),
])  # fmt: skip
def test_a_missing_cell_makes_its_claims_undecided_and_is_named(
    table, where, hurt, named, complete
):
    made, before = SimpleNamespace(**vars(complete[0])), complete[1]
    expected = {"B1": "fails", "B2": "holds", "H": "holds", "B3": "holds"}
    assert before.verdict["some/bert"].to_dict() == expected
    setattr(made, table, without(getattr(made, table), model="some/bert", **where))
    after = claims(made, architectures=ARCHITECTURES).set_index(["model", "claim"])
    changed = after.verdict != before.verdict
    undecided = after.reason.str.contains(named, regex=False)
    assert set(after.index[undecided]) == {("some/bert", claim) for claim in hurt}
    assert (after.verdict[undecided] == "undecided").all() and not changed[~undecided].any()
    # The unit goes as a whole, never just one of its columns; a score alone leaves it as it is.
    fewer = set(after.index[after.n < before.n])
    assert fewer == (set() if "score seed" in named else set(after[undecided].index))
    assert (after.n_expected == before.n_expected).all()


def test_a_stage_that_was_not_run_makes_its_claims_undecided():
    made = healed_study()
    baseline = made.scores[made.scores.state == "intact"]
    table = knowledge_claims(made.probing, None, baseline).set_index("claim")
    assert table.verdict["B1"] == "holds" and table.verdict[["B2", "H"]].eq("undecided").all()
    assert "no minimal neuron sets" in table.reason["B2"]
    assert "16 values missing: deep bottom 1/2 seed 0 scores missing: broken" in table.reason["H"]
    before = made.probing[made.probing.state == "pretrained"]
    table = knowledge_claims(before, made.minimal, baseline).set_index("claim")
    assert table.verdict.drop("B2").eq("undecided").all() and table.verdict["B2"] == "holds"
    assert table.reason["B1"] == "no task to compare"
    after = knowledge_claims(without(made.probing, state="pretrained"), None, made.scores)
    assert after.set_index("claim").verdict.to_dict() == {
        "B1": "undecided", "B2": "undecided", "H": "holds", "B3": "undecided",
    }  # fmt: skip
    assert after.reason[0].startswith("8 values missing: pretrained seed 0 organism chunk")


def test_a_value_that_is_nan_is_a_missing_value():
    made = study()
    hit = (made.probing.state == "intact") & (made.probing.seed == 2) & (made.probing.layer == 6)
    made.probing.loc[hit & (made.probing.task == "deep"), "selectivity"] = math.nan
    row = one(made, "B1")
    # The tasks are compared within seeds: the seed goes, and its three units with it.
    assert (row.verdict, row.n, row.n_expected) == ("undecided", 9, 12)
    assert "2 values missing: deep intact seed 2 organism chunk layer 6" in row.reason


def test_the_grid_says_what_is_expected():
    made = healed_study()
    row = one(made, "B1", grid={"tasks": [*TASKS, "rte"]})
    assert row.verdict == "undecided" and "rte intact" in row.reason and row.n_expected == 16
    assert one(made, "B1", grid={"seeds": [0, 1]}).n == 6
    some = one(made, "B1", grid={"corpora": [["organism", "pos"]]})
    assert some.verdict == "holds" and "chunk" not in some.definition
    bottom = one(made, "H", grid={"sides": ["bottom"], "healed_tasks": ["deep"]})
    assert bottom.n == 4 and "top" not in bottom.definition
    sixth = one(made, "H", grid={"levels": [1 / 6]})
    assert sixth.verdict == "undecided" and "healed bottom 1/6" in sixth.reason and sixth.n == 0
    with pytest.raises(HealingError, match="Did you mean 'seeds'"):
        claims(made, grid={"seed": [0]})


def test_bad_tables_are_refused():
    made = healed_study()
    mixed = made.probing.copy()
    healed = (mixed.side == "top") & (mixed.seed == 0)
    mixed["layers"] = [(5,) if h else x for h, x in zip(healed, mixed.layers, strict=True)]
    for message, probing, minimal in (
        ("Did you mean 'selectivty'", made.probing.rename(columns={"selectivity": "selectivty"}),
         None),
        (r"duplicate cells \(probing\)", pd.concat([made.probing, made.probing]), None),
        (r"duplicate cells \(neurons\)", made.probing, pd.concat([made.minimal, made.minimal])),
        ("has layer 9 of some/model", made.probing.replace({"layer": {6: 9}}), None),
        ("different depths",
         made.probing.assign(n_layers=np.where(made.probing.seed == 0, 12, 6)), None),
        ("top 1/2: cells of different layers", mixed, None),
    ):  # fmt: skip
        with pytest.raises(HealingError, match=message):
            knowledge_claims(probing, minimal, made.scores)


# --- tables ---


def test_the_depth_table_names_what_is_missing():
    made = study(forget({"deep": 0.25}), noise=0.02)
    kept = kn.kept_depth(without(made.probing, state="intact", task="deep", seed=1))
    kept = kept.set_index("task")
    assert kept.half_depth["deep"] == pytest.approx(0.5) and kept.half_depth["flat"] == 1
    assert kept.kept_share["deep"] == pytest.approx(0.15 / 0.4, abs=0.1)
    assert kept.kept_share_low["deep"] < kept.kept_share["deep"] < kept.kept_share_high["deep"]
    assert kept.n["deep"] == 3 and "deep intact seed 1" in kept.reason["deep"]
    table = kn.kept_depth(made.probing.assign(selectivity=-0.01))
    assert table.half_depth.isna().all() and table.kept_share.isna().all()
    assert table.reason.str.contains("half_depth: no selectivity before fine-tuning").all()


def test_the_healing_table_holds_what_was_planted():
    made = healed_study(noise=0.0)
    by_cell = kn.healing_by_cell(made.probing, made.scores)
    assert len(by_cell) == 2 * 2 * 4 and (by_cell.reason == "").all()
    table = kn.healing_table(by_cell)
    assert len(table) == 4 and set(table.n) == {4}
    expected = {
        "task_loss": 0.04, "task_healing": 0.9, "knowledge_healing": 0.3, "knowledge_loss": 0.14,
        "knowledge_loss_all": 0.14 * 3 / 7, "cka": 0.25,
    }  # fmt: skip
    for name, value in expected.items():
        assert np.allclose(table[[name, f"{name}_low", f"{name}_high"]], value)
    assert set(table.layers) == {(0, 1, 2), (3, 4, 5)}


def test_tables_read_back_from_text_give_the_same_verdicts(tmp_path):
    made = healed_study()
    before = claims(made)
    for name in ("probing", "minimal", "scores"):
        getattr(made, name).to_csv(tmp_path / "table.csv", index=False)
        setattr(made, name, pd.read_csv(tmp_path / "table.csv"))
    pd.testing.assert_frame_equal(claims(made), before)


# --- the family, the organism, the words ---


def test_b3_is_in_every_models_family_and_keeps_its_largest_corrected_p():
    made = architectures(bert=0.09, roberta=0.1, xlnet=0.1, noise=0.03, shift=0.01)
    table = claims(made, architectures=ARCHITECTURES)
    assert list(table.columns) == COLUMNS
    assert list(table.claim) == ["B1", "B2", "H"] * 3 + ["B3"]
    corrected = []
    for _, family in table[table.claim != "B3"].groupby("model", sort=False):
        found = holm([*family.p, table.p.iloc[-1]])
        assert np.allclose(family.p_corrected, found[:-1], equal_nan=True)
        corrected.append(found[-1])
    assert min(corrected) < table.p_corrected.iloc[-1] == max(corrected)


def test_one_architecture_cannot_be_asked_b3_and_so_does_not_count_in_the_family():
    table = claims(healed_study(), architectures={"some/model": "bert"})
    family = table[table.claim != "B3"]
    assert np.allclose(family.p_corrected, holm(family.p), equal_nan=True)
    assert math.isnan(table.p_corrected.iloc[-1]) and table.verdict.iloc[-1] == "undecided"
    assert set(table.evidence) == {"evidence"}
    made = healed_study(model="data/organism", seeds=(0, 1))
    assert set(claims(made, architectures={"data/organism": "bert"}).evidence) == {DEMONSTRATION}


def test_claims_are_told_in_sentences_and_drawn():
    table = claims(healed_study(), architectures={"some/model": "bert"})
    lines = in_words(table)
    assert len(lines) == 4 and lines[-1].startswith("B3, none, some/model: undecided, one arch")
    assert "Holds - 60" in lines[2] or "Holds - 59" in lines[2]
    figure = figures.claims_figure(table)
    assert all(f"{claim} on model" in figure.alt for claim in ("B1", "B2", "B3", "H"))
    few = claims(healed_study(seeds=(0,)))
    assert set(few.verdict) == {"undecided"} and few.effect.isna().all()


def test_untrained_models_and_other_kinds_play_no_part():
    made = healed_study()
    before, probing = claims(made), made.probing
    untrained = probing[probing.state == "pretrained"].assign(state="untrained", selectivity=0.0)
    init = probing[probing.side != "none"].assign(kind="init", selectivity=0.0)
    chosen = probing[probing.side == "top"].assign(side="custom", selectivity=0.0)
    made.probing = pd.concat([probing, untrained, init, chosen])
    pd.testing.assert_frame_equal(claims(made), before)
