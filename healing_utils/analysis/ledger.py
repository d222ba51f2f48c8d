"""The ledger: published claims, each one entry, re-tested on the cells of a run.

An entry says a claim's statement and source and yields, for each (task, seed), the effect that the
claim is about; `claims.decide` does the rest. The next claim is one more function here.

Paper A: Han, Zhang and Simion (2024), arXiv 2406.14459. Paper B: Durrani, Sajjad and Dalvi (2021),
arXiv 2105.15179.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
from scipy import stats

from healing_utils.analysis import harm, knowledge
from healing_utils.analysis.claims import claim, contrast, units
from healing_utils.analysis.effects import groups, t_interval
from healing_utils.analysis.evidence import FORGET, PRESERVE, Tables
from healing_utils.analysis.knowledge import before_after, deeper_half
from healing_utils.analysis.price import by_examples

TRAINED = ("baseline", "recovery", "scans")
PROBED = ("probing",)
BROKEN = ("baseline", "corruption", "harms")
# Shares of accuracy, of depth, or of what was known before: 0.02 is a quarter of one layer of
# twelve, and what a probe of random labels shows by chance.
KNOWLEDGE_MARGIN = 0.02


def _by_side(names: dict, part: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame]]:
    """Cells with their names: of bottom and top together, where both are there, of each, and of all
    layers."""
    sides = [side for side in ("bottom", "top") if side in set(part["side"])]
    both = [(sides, "")] if len(sides) == 2 else []
    for chosen, where in [*both, *(([s], f", {s}") for s in sides), (["all"], ", all layers")]:
        own = part[part["side"].isin(chosen)]
        if len(own):
            told = {"variant": names["variant"] + where, "main": names["main"] and not where}
            yield names | told, own


def _share(part: pd.DataFrame) -> float:
    """What each place (side and level) of a mean over them weighs."""
    return 1 / len(part[["side", "level"]].drop_duplicates())


def _slope(x: pd.Series) -> pd.Series:
    """What each y weighs in its least-squares slope on the values of x."""
    values = x.unique()
    return (x - values.mean()) / ((values - values.mean()) ** 2).sum()


@claim("A1", "Corrupted models do not fully recover", "paper A, abstract",
       "healed cells with their intact model", stages=TRAINED)  # fmt: skip
def loss(tables: Tables) -> Iterator[pd.DataFrame]:
    """intact - healed at the same budget, averaged over the levels and the sides. The verdict
    counts a censored cell as recovered: it says how fast it heals, not how far."""
    for names, part in tables.healed():
        unsure = part["key"].isin(tables.censored_keys)
        best = part[["score", "score_intact"]].max(axis=1)
        part = part.assign(sure=part["score"].mask(unsure, best))
        for told, own in _by_side(names, part):
            yield contrast(told, own, -_share(own), "intact")


@claim("A2", "The more is corrupted, the more is lost", "paper A, abstract",
       "healed cells at two levels below 1", stages=TRAINED)  # fmt: skip
def rise(tables: Tables) -> Iterator[pd.DataFrame]:
    """Least-squares slope of the loss on the level, times the range of levels below 1; the mean of
    the sides. (Level 1 contains the bottom: it would tell which layers were hit.)"""
    for names, part in tables.healed(by_level=False):
        part = part[part["level"] < 1]
        levels = part.groupby("side")["level"]
        part = part.assign(slope=levels.transform(_slope) * levels.transform(np.ptp))
        for told, own in _by_side(names, part.dropna(subset="slope")):
            yield contrast(told, own, -own["slope"] / own["side"].nunique(), "intact")


@claim("A3", "Corrupting the bottom layers costs more than corrupting as many top layers",
       "paper A, abstract", "healed cells of both sides at one level", stages=TRAINED)  # fmt: skip
def side_difference(tables: Tables) -> Iterator[pd.DataFrame]:
    """healed(top) - healed(bottom) at the same level, averaged over the levels."""
    for names, part in tables.healed():
        own = part[part["side"].isin(["bottom", "top"])]
        own = own[own.groupby("level")["side"].transform("nunique") == 2]
        if len(own):
            yield contrast(names, own, own["side"].map({"top": 2.0, "bottom": -2.0}) * _share(own))


def _against(first: pd.DataFrame, second: pd.DataFrame, same: list[str]) -> Iterator[pd.DataFrame]:
    """Score of cells - score of those of `second` that are alike in `same`, by variant; the mean
    over places where a variant has several."""
    theirs = harm.once(second, same)[[*same, "key", "score"]]
    both = first.merge(theirs, on=same, suffixes=("", "_other"))
    for names, part in groups(both, ["model", "variant"]):
        yield contrast(names, part, _share(part), "other")


def _controls(side: str, tables: Tables) -> Iterator[pd.DataFrame]:
    healed = tables.cells[(tables.cells["state"] == "healed") & (tables.cells["part"] == "all")]
    control, bottom = (healed[healed["side"] == name] for name in (side, "bottom"))
    return _against(harm.once(control), bottom, ["model", "variant", "level", "task", "seed"])


for _side, _drawn in (("random", "layers drawn at random"),
                      ("scattered", "values scattered over all layers")):  # fmt: skip
    claim(f"A3-{_side}", f"The bottom costs more than as many {_drawn}", "a control of this study",
          f"a scan with sides: {_side}", stages=TRAINED)(partial(_controls, _side))  # fmt: skip


@claim("W", "A corrupted model is worth more than random initial values",
       "this study", "healed and scratch cells", stages=TRAINED)  # fmt: skip
def worth(tables: Tables) -> Iterator[pd.DataFrame]:
    """healed - scratch at the same budget: the mean over sides and levels below 1, then each."""
    cells = tables.cells.query("start == 'pre-trained' and recipe == 'full'")
    healed = harm.by_side(cells[cells["state"] == "healed"])
    healed = healed.sort_values("harm", key=lambda harm: harm != "reinit", kind="stable")
    each = healed.assign(variant=healed["variant"] + ", " + healed["place"])
    healed = pd.concat([healed[healed["side"] != "all"], each])
    scratch = cells[cells["state"] == "scratch"]
    return _against(healed, scratch, ["model", "task", "seed", *harm.BUDGET])


@claim("B1", "RTE, MRPC and STS-B preserve linguistic knowledge in the higher layers, SST-2, QNLI "
       "and MNLI forget it", "paper B, highlights",
       "probing of tasks of both groups, above chance and trained for equally many steps",
       stages=PROBED, unit="hundredths of accuracy",
       margin=KNOWLEDGE_MARGIN)  # fmt: skip
def forgetting(tables: Tables) -> Iterator[pd.DataFrame]:
    """Drop of the accuracy over the deeper half of the layers, pre-trained minus fine-tuned for as
    many steps on all tasks: mean of those said to forget minus mean of those said to preserve."""
    for model in tables.equally_trained["model"].unique():
        before, after = before_after(tables.equally_trained, "accuracy", model)
        drops = tables.learnt(model, deeper_half(before) - deeper_half(after)).unstack("task")
        forget, preserve = (sorted(group & set(drops)) for group in (FORGET, PRESERVE))
        if forget and preserve:
            lost, kept = (drops[tasks].mean(axis=1, skipna=False) for tasks in (forget, preserve))
            against = f"{' '.join(forget)} against {' '.join(preserve)}"
            yield units({"model": model, "main": True}, pd.concat({against: lost - kept}))


@claim("B2", "Linguistic knowledge gathers in the lower layers after fine-tuning",
       "paper B, abstract; JMLR, arXiv 2206.13288", "minimal neuron sets before and after",
       stages=("neurons",), margin=KNOWLEDGE_MARGIN, unit="hundredths of the depth")  # fmt: skip
def gathering(tables: Tables) -> Iterator[pd.DataFrame]:
    """Centre of mass of the minimal neuron set over the layers (0 embeddings, 1 last), before minus
    after; tasks at chance stand apart, as the negative control."""
    for model in tables.neurons["model"].unique():
        before, after = before_after(tables.neurons, "center_of_mass", model)
        yield from _beside_chance(tables, model, (before - after).mean(axis=1))


def _beside_chance(tables: Tables, model: str, effects: pd.Series) -> Iterator[pd.DataFrame]:
    """Units of the tasks that were learnt, and apart from them those of tasks at chance."""
    learnt = tables.learnt(model, effects)
    yield units({"model": model, "main": True}, learnt)
    control = {"model": model, "variant": "tasks at chance, the negative control"}
    yield units(control, effects.drop(learnt.index))


@claim("B3", "BERT keeps linguistic knowledge deeper than RoBERTa and XLNet", "paper B, abstract",
       "probing of three architectures", stages=PROBED, margin=0.05,
       unit="hundredths of the accuracy before",
       caveat="one model each: nothing is said about architectures in general")  # fmt: skip
def bert_deepest(tables: Tables) -> Iterator[pd.DataFrame]:
    """Kept share of the deeper half, BERT's minus the mean of the others'; of several models of an
    architecture their mean."""
    shares: dict[str, list[pd.Series]] = {}
    for (model, architecture), _ in tables.probing.groupby(["model", "architecture"]):
        before, after = before_after(tables.probing, "accuracy", model)
        kept = tables.learnt(model, deeper_half(after) / deeper_half(before))
        if len(kept):
            shares.setdefault(architecture, []).append(kept)
    if {"bert", "roberta", "xlnet"} <= set(shares):
        mean = {
            name: pd.concat(found, axis=1).mean(axis=1, skipna=False)
            for name, found in shares.items()
        }
        effect = mean["bert"] - (mean["roberta"] + mean["xlnet"]) / 2
        yield units({"model": "all", "main": True}, effect)


@claim("H", "Healing restores the task more than what the corrupted layers knew about words",
       "this study", "probing of intact, broken and healed models",
       stages=("baseline", "recovery", *PROBED), unit="hundredths of the damage",
       caveat="the score can pass by the corrupted layers through the residual stream, the measure "
       "cannot")  # fmt: skip
def healing_gap(tables: Tables) -> Iterator[pd.DataFrame]:
    """Task healing minus knowledge healing, (healed - broken) / (intact - broken): of the score,
    and of the corrupted layers' probes. Both parts of a quotient are summed over the sides. Tasks
    at chance, and those on which intact - broken is within its interval of zero, have no quotient:
    the variant names them."""
    healed = harm.by_side(tables.cells[tables.cells["state"] == "healed"])
    healed = healed[healed["usual"] & (healed["variant"] == healed["harm"].map(harm.harm_name))]
    for names, part in tables.healed_knowledge:
        places = len(part[["side", "level"]].drop_duplicates())
        columns = ["intact", "broken", "healed", "knew", "broke", "knows"]
        total = part.groupby(["task", "seed"])[columns].sum(min_count=places)
        lost = total.assign(score=total.intact - total.broken, words=total.knew - total.broke)
        without = [
            task
            for task, own in lost.groupby(level="task")
            if (names["model"], task) in tables.at_chance
            or any(t_interval(own[name].dropna()).low <= 0 for name in ("score", "words"))
        ]
        kept = lost.drop(index=without, level="task")
        effect = (kept.healed - kept.broken) / kept.score - (kept.knows - kept.broke) / kept.words
        told = f", without {', '.join(without)}" if without else ""
        same = ["model", "task", "side", "level", "kind", "seed"]
        cells = part[same].merge(healed, on=same)
        yield units(names | {"variant": names["variant"] + told}, effect, cells)


@claim("H-gap", "After healing the corrupted layers know less about words than intact ones",
       "this study", "probing of intact and healed models", stages=PROBED, unit="hundredths",
       margin=KNOWLEDGE_MARGIN)  # fmt: skip
def remaining_gap(tables: Tables) -> Iterator[pd.DataFrame]:
    """Accuracy (or selectivity) of the corrupted layers' probes, intact minus healed, by side."""
    for names, part in tables.healed_knowledge:
        if names["variant"].endswith("codelength"):  # in bits, which no margin is about
            continue
        for place, rows in groups(part, ["side"]):
            own = names | {"variant": f"{names['variant']}, {place['side']}", "main": False}
            yield units(own, rows.groupby(["task", "seed"])["knowledge_loss"].mean())


@claim(
    "M1",
    "Fine-tuning does not lead to catastrophic forgetting of linguistic knowledge",
    "Merchant et al. 2020 (2004.14448), abstract; Zhou and Srikumar 2022 (2106.14282)",
    "probing before and after fine-tuning",
    stages=PROBED,
    direction="same",
    margin=KNOWLEDGE_MARGIN,
    unit="hundredths of accuracy",
    caveat="over all layers with the embeddings, which may hide a loss in the top ones",
)
def forgotten(tables: Tables) -> Iterator[pd.DataFrame]:
    """Accuracy before minus after, mean over the layers."""
    for model in tables.probing["model"].unique():
        before, after = before_after(tables.probing, "accuracy", model)
        yield from _beside_chance(tables, model, (before - after).mean(axis=1, skipna=False))


def _recipes(first: str, second: str, tables: Tables) -> Iterator[pd.DataFrame]:
    cells = harm.healed_layers(tables.cells)
    start = cells["start"].replace("pre-trained", "")
    words = zip(
        cells["harm"].map(harm.harm_name), cells["place"], start, cells["budget"], strict=True
    )
    cells["variant"] = [", ".join(filter(None, told)) for told in words]
    own, theirs = (cells[cells["recipe"] == recipe] for recipe in (first, second))
    return _against(own, theirs, harm.SAME_DAMAGE)


# Score by the first recipe - score by the second, of the same corrupted model and budget.
for _name, _first, _second, _direction, _statement, _source in (
    ("D", "drop", "full", "more",
     "Taking corrupted layers out heals more than training them", "this study"),
    ("S1", "corrupted_only", "full", "not worse",
     "Training the damaged part alone does as well as training everything",
     "Lee et al. 2023, surgical fine-tuning (2210.11466); 2310.17041"),
    ("R1", "full", "low_rank", "more",
     "Low-rank adapters heal less than training all weights",
     "Kim et al. 2024 (2402.02834), abstract (decoders)"),
    ("X1", "corrupted_frozen", "head_only", "more",
     "Freezing the damaged part and training the healthy one heals",
     "2508.04749, abstract (mixture of experts)"),
):  # fmt: skip
    claim(_name, _statement, _source, f"recipes {_first} and {_second}", stages=TRAINED,
          direction=_direction)(partial(_recipes, _first, _second))  # fmt: skip


@claim("C1", "Some layers are critical and others robust to being redrawn, without training",
       "Zhang, Bengio and Singer 2019 (1902.01996), abstract", "every layer broken alone",
       stages=BROKEN, unit="hundredths of the intact score")  # fmt: skip
def critical_layers(tables: Tables) -> Iterator[pd.DataFrame]:
    """Retained score of the median layer minus that of the layer that is worst on the other
    seeds."""
    broken = tables.cells[(tables.cells["state"] == "broken") & (tables.cells["part"] == "all")]
    broken = harm.once(harm.single_layers(broken[broken["recipe"] == "full"]))
    for names, part in groups(broken, ["model"]):
        effects = {}
        for (task,), rows in part.groupby(["task"]):
            wide = rows.pivot(index="seed", columns="layers", values="retained").dropna()
            if wide.shape[1] > 2 and len(wide) > 1:
                for seed, own in wide.iterrows():
                    effects[task, seed] = own.median() - own[wide.drop(seed).mean().idxmin()]
        if effects:
            yield units(names, pd.Series(effects))


@claim("T1", "Probing accuracy does not say which layers the task needs",
       "Tamkin et al. 2020 (2004.14975), abstract and scripts", "every layer redrawn alone and "
       "healed, probing", stages=(*TRAINED, *PROBED), direction="not worse", margin=0.5,
       unit="hundredths of a rank correlation",
       caveat="whether such a layer suffices is not tested; with so few layers a rank correlation "
       "is exploratory by construction")  # fmt: skip
def probing_does_not_predict(tables: Tables) -> Iterator[pd.DataFrame]:
    """Minus the rank correlation over layers of the pre-trained probe's accuracy with the loss from
    redrawing that layer alone: it holds where the correlation is below one half."""
    healed = tables.cells[(tables.cells["state"] == "healed") & (tables.cells["part"] == "all")]
    healed = harm.single_layers(healed)
    healed = harm.once(harm.plain(healed, ["layers"]), ["model", "task", "seed", "layers"])
    probed = tables.probing[tables.probing["state"] == "pretrained"]
    for names, part in groups(healed, ["model"]):
        own = probed[probed["model"] == names["model"]]
        if own.empty:
            continue
        curves = knowledge.by_layer(own, "accuracy").droplevel(list(range(6)))  # by seed
        effects = {}
        for place, rows in groups(part, ["task", "seed"]):
            seed, at = place["seed"], [layer + 1 for (layer,) in rows["layers"]]
            if len(at) > 2 and seed in curves.index:
                accuracy = curves.loc[seed, at].to_numpy()
                effects[place["task"], seed] = -stats.spearmanr(accuracy, rows["loss"]).statistic
        if effects:
            yield units(names, pd.Series(effects), part)


@claim("T2", "What a pre-trained layer is worth grows with the number of labelled examples",
       "Tamkin et al. 2020 (2004.14975), abstract", "one layer redrawn and healed on three numbers "
       "of examples", stages=TRAINED, unit="points for ten times the examples",
       caveat="where passes are alike, more examples are more steps too")  # fmt: skip
def more_examples(tables: Tables) -> Iterator[pd.DataFrame]:
    """The slope of intact - healed, each at its number of examples, on the tenfold."""
    cells = harm.single_layers(by_examples(tables.cells))
    cells = cells[(cells["state"] == "healed") & (cells["recipe"] == "full")]
    cells = cells[(cells["part"] == "all") & cells["side"].isin(["bottom", "top"])]
    for names, part in groups(cells, ["model", "side"]):
        if part["train_size"].nunique() > 2:
            slope = _slope(np.log10(part["train_size"].astype(float)))
            told = {"model": names["model"], "variant": f"{names['side']} layer"}
            yield contrast(told, part, -slope, "intact")


@claim("Z1", "With few examples, redrawing the top layers with the model's own initialiser does "
       "not hurt", "Zhang et al. 2021 (2006.05987)", "the top sixth of the layers redrawn by init, "
       "healed on fewer examples than others", stages=TRAINED, direction="not worse",
       caveat="that it helps is not tested")  # fmt: skip
def fresh_top(tables: Tables) -> Iterator[pd.DataFrame]:
    """healed(top sixth, init) - intact, at the fewest examples."""
    cells = harm.by_side(tables.cells[tables.cells["state"] == "healed"])
    top = cells[(cells["harm"] == "init") & (cells["side"] == "top") & (cells["recipe"] == "full")]
    top = top[(top["level"] < 0.2) & (top["train_size"] < cells["train_size"].max())]
    for names, part in groups(top, ["model"]):
        few = part[part["train_size"] == part["train_size"].min()]
        size, place = few[["train_size", "place"]].iloc[0]
        told = names | {"variant": f"{place}, {size:,.0f} examples"}
        yield contrast(told, few, other="intact")


def _kinds(kind: str, control: str, tables: Tables) -> Iterator[pd.DataFrame]:
    broken = harm.once(tables.cells[tables.cells["state"] == "broken"])
    same = ["model", "task", "seed", "part", "side", "level", "layers", "strength"]
    controls = broken[broken["kind"] == control]
    harms = controls["harm"].str.replace(control, kind).map(harm.harm_name)
    words = controls["part"] + ", " + harms + ", " + controls["place"]
    controls = controls.assign(variant=words.str.removeprefix("all, "))
    return _against(controls, broken[broken["kind"] == kind], same)


# broken by the control - broken by the kind, of the same strength, at the same place.
for _name, _kind, _control, _statement, _source in (
    ("K1", "outliers", "outliers_control",
     "Disabling the few outlier weights of LayerNorm costs more than as many others",
     "Kovaleva et al. 2021 (2105.06990), abstract"),
    ("G1", "bits_exponent", "bits_other",
     "Flips of the highest exponent bit cost more than flips elsewhere",
     "Gao et al. 2025 (10.1109/TNANO.2025.3531721), abstract"),
):  # fmt: skip
    claim(_name, _statement, _source, f"broken cells of the kinds {_kind} and {_control}, of one "
          "strength", stages=BROKEN)(partial(_kinds, _kind, _control))  # fmt: skip


def _deleted(tables: Tables) -> pd.DataFrame:
    """Fine-tuned models without some of their layers, not trained again."""
    cells = tables.cells[(tables.cells["state"] == "broken") & (tables.cells["part"] == "all")]
    return cells[cells["recipe"] == "drop"]


@claim("P1", "The top layers of a fine-tuned model can be taken out without training",
       "Phang et al. 2021 (2109.08406), abstract", "broken cells of top layers by the recipe drop",
       stages=BROKEN, direction="not worse")  # fmt: skip
def top_taken_out(tables: Tables) -> Iterator[pd.DataFrame]:
    """intact without its top layers - intact, at the smallest level."""
    top = harm.by_side(_deleted(tables))
    top = top[top["side"] == "top"]
    for names, part in groups(top[top["level"] == top["level"].min()], ["model"]):
        yield contrast(names | {"variant": part["place"].iloc[0]}, part, other="intact")


@claim("L1", "Taking out a middle layer without training costs least, the first or last most",
       "Lad et al. 2024 (2406.19384), abstract (decoders)", "broken cells of every single layer by "
       "the recipe drop", stages=BROKEN)  # fmt: skip
def middle_costs_least(tables: Tables) -> Iterator[pd.DataFrame]:
    """Loss of taking out the first or last layer (mean) - that of one between them (mean)."""
    alone = harm.once(harm.single_layers(_deleted(tables)))
    for names, part in groups(alone, ["model"]):
        depth, at = part["n_layers"].iloc[0], part["layers"].map(lambda layers: layers[0])
        if at.nunique() == depth > 2:
            ends = at.isin([0, depth - 1])
            yield contrast(names, part, ends.map({True: -0.5, False: 1 / (depth - 2)}))
