"""What fine-tuning and healing do to linguistic knowledge: measures, tables and verdicts.

Claims B1 to B3 are those of paper B, each as one statistic that is stated before any number; claim
H is this study's own. Knowledge is the *selectivity* of a layer's probe: its accuracy minus that of
the same probe on control labels, random per word type (Hewitt and Liang 2019, arXiv 1909.03368,
section 2). The unit of inference is a (task, seed) pair, averaged over corpora and columns. The
same seed means the same sentences, inner split and control labels, so differences are paired; the
units of one seed share one pre-trained model's probe.

Intervals, sign flips, Holm's correction, quotients of healing and the verdict are those of
`healing_utils.analysis.statistics`.

Paper B: Durrani, Sajjad and Dalvi (2021), How transfer learning impacts linguistic knowledge in
deep NLP models?, Findings of ACL, arXiv 2105.15179.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from healing_utils.analysis.statistics import (
    _LEVEL_DIGITS,
    ALPHA,
    CHANCE,
    CORRELATIONS,
    DEMONSTRATION,
    Interval,
    _clean,
    _count,
    _is_organism,
    _no_duplicates,
    as_fraction,
    holm,
    layer_tuple,
    measures,
    sign_flip,
    summary,
    t_interval,
    verdict,
)
from healing_utils.base.errors import HealingError, choose

# Selectivity. A probe of random labels has a selectivity of up to 0.02 either way: a smaller
# difference is what a probe that learnt nothing can show.
KNOWLEDGE_MARGIN = 0.02
# Share of depth. A quarter of one layer of twelve; and by chance alone the centre of mass of 240
# neurons spread evenly over twelve layers and the embeddings has a standard error of 0.02.
DEPTH_MARGIN = 0.02
# Share of the pre-trained selectivity. At a selectivity of 0.4, the most that is usual, it is 0.02.
SHARE_MARGIN = 0.05

STATEMENTS = {
    "B1": "Some tasks preserve linguistic knowledge deep into the network, others forget it",
    "B2": "Linguistic knowledge gathers in the lower layers after fine-tuning",
    "B3": "BERT keeps linguistic knowledge deeper than the other architectures",
    "H": "Healing restores the task more than the linguistic knowledge of the corrupted layers",
}

MAX_PERMUTATIONS = 1_000_000  # listed within a second or two; beyond that they are drawn
DRAWN_PERMUTATIONS = 99_999

_GRID = ("tasks", "seeds", "corpora", "healed_tasks", "sides", "levels")
_CELL = ["model", "task", "state", "side", "level", "kind", "seed", "corpus", "column"]
_SIDES = ("bottom", "top", "all")  # corruptions of chosen layers belong to other questions
_UNIT = ["model", "task", "side", "level", "seed"]


# --- measures --------------------------------------------------------------------------------


def half_depth(pretrained: Sequence[float], intact: Sequence[float]) -> float:
    """The deepest layer that keeps at least half of its pre-trained selectivity, as a share of
    depth: 0 the embeddings, 1 the last layer.

    Both are selectivities by layer, (layers + 1,), embeddings first. A layer without selectivity
    before fine-tuning has nothing to keep and is passed over. 0 where no layer keeps half, NaN
    where no layer had any. Raises HealingError on missing values and unequal lengths.
    """
    before, after = _curves(pretrained, intact)
    had = before > 0
    if not had.any():
        return math.nan
    kept = np.flatnonzero(had & (after >= before / 2))
    return float(kept.max() / (len(before) - 1)) if len(kept) else 0.0


def kept_share(pretrained: Sequence[float], intact: Sequence[float]) -> float:
    """Fine-tuned selectivity of the deeper half of the layers as a share of the pre-trained one.

    The quotient of the two means over the layers > n_layers / 2; both are (layers + 1,). NaN where
    the pre-trained mean is not above zero. It is what B3 compares rather than `half_depth`, which
    moves in steps of a layer, so that models of different depth have different steps, is 1 for
    every model whose last layer keeps half, and hangs on a single layer's noise.
    """
    before, after = (deeper_half(x) for x in _curves(pretrained, intact))
    return after / before if before > 0 else math.nan


def deeper_half(curve: Sequence[float]) -> float:
    """Mean over the deeper half of the layers, those > n_layers / 2, of values by layer
    (layers + 1,), embeddings first: layers 4 to 6 of 6, 7 to 12 of 12, 3 to 5 of 5."""
    return float(np.mean(np.asarray(curve, dtype=float)[_first_deep(len(curve) - 1) :]))


class Permutation(NamedTuple):
    """The p of a permutation test, the smallest it could be, and whether all were listed."""

    p: float
    smallest_p: float
    exact: bool


def task_permutation(drops: Sequence[Sequence[float]], seed: int = 0) -> Permutation:
    """Do tasks differ? Permutation of the task names within each seed of `drops` (tasks, seeds).

    The statistic is the variance between the tasks' means over seeds; p is the share of
    permutations with at least the observed one. Exact: all (T!)^S are accounted for by listing the
    (T!)^(S - 1) that keep the first seed's names, since renaming the tasks in every seed alike
    changes nothing; so p is at least 1 / (T!)^(S - 1). Where these are more than
    `MAX_PERMUTATIONS`, `DRAWN_PERMUTATIONS` are drawn with `seed` and the observed order counts as
    one more (Phipson and Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9, 39). Raises HealingError on
    missing values.
    """
    x = np.asarray(drops, dtype=float)
    if x.ndim != 2 or not x.size:
        raise HealingError(f"need drops of tasks by seeds, got an array of shape {x.shape}")
    if not np.isfinite(x).all():
        raise HealingError(f"{int((~np.isfinite(x)).sum())} of {x.size} drops are missing")
    tasks, seeds = x.shape
    # The sum over tasks is the same in every order, so the squared sums stand for the variance;
    # without the seeds' own level they lose no digits to it.
    x = x - x.mean(axis=0)
    observed = (x.sum(axis=1) ** 2).sum()
    # Ties are ties although their sums are added in another order.
    least = observed - 1e-9 * np.abs(x).sum() ** 2
    count = math.factorial(tasks) ** (seeds - 1)
    if count <= MAX_PERMUTATIONS:
        sums = x[:, 0][None]  # (permutations, tasks)
        for column in x[:, 1:].T:
            orders = np.array(list(itertools.permutations(column)))
            sums = (sums[:, None] + orders[None]).reshape(-1, tasks)
        return Permutation(float(((sums**2).sum(axis=1) >= least).mean()), 1 / count, True)
    rng, extreme = np.random.default_rng(seed), 1
    for start in range(0, DRAWN_PERMUTATIONS, 10_000):
        n = min(10_000, DRAWN_PERMUTATIONS - start)
        sums = rng.permuted(np.broadcast_to(x, (n, tasks, seeds)), axis=1).sum(axis=2)
        extreme += int(((sums**2).sum(axis=1) >= least).sum())
    return Permutation(extreme / (DRAWN_PERMUTATIONS + 1), 1 / (DRAWN_PERMUTATIONS + 1), False)


def above_chance(
    task_results: pd.DataFrame, value: str = "score", confidence: float = 0.95
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tasks whose fine-tuned (intact) score is above chance, and those left out of B1 to B3.

    A task of a model is kept where the t-interval over seeds of score - chance lies above zero;
    one seed gives no interval and so keeps nothing. Of classes it is the accuracy that is compared,
    with the majority label's: guesses have a higher macro-F1 than the majority label, and no higher
    accuracy. Both tables have one row per model and task:
    ``model task metric score chance above low high n reason`` (`above` with its interval;
    `reason` empty where kept). `value` is `score`, `score_f1` or `score_accuracy`.
    """
    choose(value, CHANCE, "score that has a chance level")
    table = _clean(task_results, value)
    intact = table[table.state == "intact"].copy()
    if {"score_accuracy", "chance_accuracy"} <= set(intact):
        classes = ~intact.metric.isin(CORRELATIONS) & intact.score_accuracy.notna()
        intact.loc[classes, "value"] = intact.score_accuracy[classes]
        intact.loc[classes, "chance_value"] = intact.chance_accuracy[classes]
        intact.loc[classes, "metric"] = "accuracy"
    _no_duplicates(intact, ["model", "task", "seed"], "intact")
    rows = []
    for (model, task), part in intact.groupby(["model", "task"], sort=False):
        part = part[part.value.notna() & part.chance_value.notna()]
        interval = t_interval(part.value - part.chance_value, confidence)
        reason = ""
        if interval.n < 2:
            reason = f"{_count(interval.n, 'seed')}, no interval for score - chance"
        elif not interval.low > 0:
            reason = f"score - chance is {_shown(interval)}, not above zero"
        rows.append(
            {
                "model": model, "task": task, "metric": ", ".join(sorted(set(part.metric))),
                "score": part.value.mean(), "chance": part.chance_value.mean(),
                "above": interval.mean, "low": interval.low, "high": interval.high,
                "n": interval.n, "reason": reason,
            }
        )  # fmt: skip
    names = ["model", "task", "metric", "score", "chance", "above", "low", "high", "n", "reason"]
    found = pd.DataFrame(rows, columns=names).sort_values(["model", "task"], ignore_index=True)
    kept = found.reason == ""
    return found[kept].reset_index(drop=True), found[~kept].reset_index(drop=True)


# --- tables ----------------------------------------------------------------------------------


def drop_by_layer(probing: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Selectivity lost to fine-tuning by task and depth: ``model task layer depth pretrained intact
    drop low high n reason``, one row per model, task and layer.

    `drop` is pretrained - intact, averaged over corpora and columns, with its t-interval over the
    `n` complete seeds; `depth` is the layer as a share of the layers; `reason` names what is
    missing.
    """
    rows = []
    for model, task, pairs, missing in _before_and_after(probing):
        if not pairs:
            continue
        before, after = (np.array(x) for x in zip(*pairs.values(), strict=True))  # (seeds, layers)
        for layer in range(before.shape[1]):
            interval = t_interval(before[:, layer] - after[:, layer], confidence)
            rows.append(
                {
                    "model": model, "task": task, "layer": layer,
                    "depth": layer / (before.shape[1] - 1), "pretrained": before[:, layer].mean(),
                    "intact": after[:, layer].mean(), "drop": interval.mean, "low": interval.low,
                    "high": interval.high, "n": interval.n, "reason": missing,
                }
            )  # fmt: skip
    names = ["model", "task", "layer", "depth", "pretrained", "intact", "drop", "low", "high", "n"]
    return pd.DataFrame(rows, columns=[*names, "reason"])


def kept_depth(probing: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """How deep each task keeps the knowledge: ``model task half_depth half_depth_low
    half_depth_high kept_share kept_share_low kept_share_high n reason``, one row per model and
    task, with t-intervals over the `n` complete seeds. See `half_depth` and `kept_share`."""
    rows = []
    for model, task, pairs, missing in _before_and_after(probing):
        row = {"model": model, "task": task}
        for measure in (half_depth, kept_share):
            values = [measure(*pair) for pair in pairs.values()]
            name = measure.__name__
            interval = t_interval([x for x in values if not math.isnan(x)], confidence)
            row[name], row[f"{name}_low"], row[f"{name}_high"] = interval[:3]
            if interval.n < len(values):
                lost = f"{name}: no selectivity before fine-tuning"
                missing = f"{missing}; {lost}" if missing else lost
        rows.append({**row, "n": len(pairs), "reason": missing})
    names = ("half_depth", "kept_share")
    columns = [f"{name}{suffix}" for name in names for suffix in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["model", "task", *columns, "n", "reason"])


def healing_by_cell(
    probing: pd.DataFrame,
    task_results: pd.DataFrame,
    kind: str = "reinit",
    value: str = "score",
    grid: Mapping[str, Sequence] | None = None,
) -> pd.DataFrame:
    """Losses and healing of score and of knowledge, one row per corrupted setting and seed.

    Beside the columns of `statistics.measures` (whose `healing` is here `task_healing`):

    - `task_loss` = intact - healed score; `knowledge_loss` the same of selectivity, averaged over
      the corrupted layers (hidden states `layers` + 1), corpora and columns;
      `knowledge_loss_all` over every layer, the embeddings included;
    - `knowledge_healing` = (healed - broken) / (intact - broken) of that selectivity;
    - `cka`: similarity of healed to intact, averaged over the corrupted layers.

    Every task, side, level and seed of the probing table (or of `grid`, see `claims`) has a row;
    what cannot be computed is NaN and `reason` says why. A quotient is missing for a whole setting
    whose intact - broken is within its t-interval over seeds of zero.
    """
    table = _probing(probing)
    scores = _clean(task_results, value)
    corrupted = scores.state.isin(["broken", "healed"])
    fits = (scores.kind == kind) & (scores.part == "all") & scores.side.isin(_SIDES)
    measured = measures(scores[(scores.state == "intact") | (corrupted & fits)], value)
    _no_duplicates(measured, _UNIT, "scores of broken and healed")  # of several strengths
    measured = measured.rename(columns={"healing": "task_healing", "reason": "task_reason"})
    found = []
    for model, part in table.groupby("model", sort=False):
        found += _healing_of_knowledge(model, part, kind, _grid(grid))
    if not found:
        raise HealingError(f"no broken or healed cell of kind {kind!r} in the probing table")
    rows = pd.concat(found, ignore_index=True)
    rows = rows.merge(measured.drop(columns=["kind", "layers"]), on=_UNIT, how="left")
    rows["task_loss"] = rows.intact - rows.healed
    rows["reason"] = ["; ".join(_reasons(row)) for row in rows.itertuples(index=False)]
    order = [
        "model", "task", "side", "level", "kind", "part", "strength", "layers", "seed", "metric",
        "test_size", "intact", "broken", "healed", "task_loss", "knowledge_loss",
        "knowledge_loss_all", "task_healing", "knowledge_healing", "cka", "reason",
    ]  # fmt: skip
    return rows[order]


def healing_table(by_cell: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """`healing_by_cell` as means and t-intervals over seeds, one row per model, task, side and
    level: ``task_loss knowledge_loss knowledge_loss_all task_healing knowledge_healing cka``, each
    with ``_low`` and ``_high``; see `statistics.summary`."""
    columns = (
        "task_loss", "knowledge_loss", "knowledge_loss_all", "task_healing", "knowledge_healing",
        "cka",
    )  # fmt: skip
    return summary(by_cell, columns, confidence)


# --- claims ----------------------------------------------------------------------------------


def claims(
    probing: pd.DataFrame,
    minimal: pd.DataFrame | None,
    task_results: pd.DataFrame,
    architectures: Mapping[str, str] | None = None,
    kind: str = "reinit",
    value: str = "score",
    grid: Mapping[str, Sequence] | None = None,
    alpha: float = ALPHA,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """The verdict on claims B1, B2 and H of every model, and on B3 of all models together.

    `probing` and `minimal` are the tables of the stages `probing` and `neurons` (without `minimal`,
    B2 is undecided), `task_results` the baseline, corruption and recovery tables put together,
    `architectures` says each model's ``model_type``. Per unit, a (task, seed) pair averaged over
    corpora and columns, with the deeper half of the layers being those > n_layers / 2:

    - B1: the drop is selectivity(pre-trained) - selectivity(fine-tuned), averaged over the deeper
      half. Effect: mean drop of the task that forgets most minus that of the task that forgets
      least, with its t-interval paired by seed, at a confidence Bonferroni-corrected over all pairs
      of tasks, because the pair is chosen after the fact; p: `task_permutation`. Margin: 0.02
      selectivity. It fails only if no pair's interval leaves the margin.
    - B2: centre of mass of the minimal neuron set, pre-trained minus fine-tuned, as a share of
      depth; p: sign flips, above zero. Margin: 0.02 of depth.
    - B3: `kept_share` of BERT minus the mean of the other architectures (models of one architecture
      are averaged first); p: sign flips, above zero. Margin: 0.05. With one model an architecture
      it says nothing of architectures in general, and says so.
    - H: task healing minus knowledge healing, see `healing_by_cell`, averaged over sides and
      levels; p: sign flips, above zero. It holds only if, besides, the gap that remains (intact -
      healed selectivity over the corrupted layers) has an interval above 0.02, and fails where that
      interval lies below.

    The units of one seed share the pre-trained model's probe, which cancels in B1 but not in B2 and
    B3. Simulated, four tasks by three seeds: where it varies a quarter, half or quite as much over
    seeds as the fine-tuned ones do, B2's 95 % interval covers 0.93, 0.87 or 0.77.

    Tasks that are not `above_chance` are left out of B1 to B3 and named by `reason`; of B3 a task
    is left out where one of the models does not pass. Columns are those of `statistics.claims`; p
    is corrected by Holm over each model's B1, B2, H and B3 (B3 keeps the largest of its corrected
    p; where the models cannot be asked it at all, being of one architecture, it is no member). On
    the organism every claim is a demonstration. B3's row carries BERT's name where there is one
    BERT, else ``all``; B1 to B3 concern no corruption, so their `kind` is ``none``.

    Expected are all combinations of what occurs, or of what `grid` says: ``tasks``, ``seeds``,
    ``corpora`` ((corpus, column) pairs), and for H ``healed_tasks``, ``sides``, ``levels``; cells
    outside of it play no part. A missing cell makes the verdict undecided and `reason` names it;
    effect and p then describe the `n` complete units out of `n_expected`.

    Raises HealingError on missing columns, duplicate cells, a model without an architecture, and
    an unknown entry of `grid`.
    """
    grid = _grid(grid)
    table = _probing(probing)
    centres = None if minimal is None else _minimal(minimal)
    chance = _Chance(task_results, value, confidence)
    healed = None
    if ((table.kind == kind) & table.side.isin(_SIDES)).any():
        healed = healing_by_cell(probing, task_results, kind, value, grid)
    last = {"p_corrected": math.nan, **_b3(table, chance, architectures, grid, confidence)}
    families = []
    for model in dict.fromkeys(table.model):
        curves = _Pairs(model, table, "selectivity", grid)
        sets = None if centres is None else _Pairs(model, centres, "center_of_mass", grid)
        found = [
            _b1(model, curves, chance, confidence),
            _b2(model, sets, chance, confidence),
            _h(model, kind, healed, confidence),
        ]
        family = [*found, last] if last["n_expected"] else found
        corrected = holm([row["p"] for row in family])
        for row, p in zip(found, corrected[: len(found)], strict=True):
            evidence = DEMONSTRATION if _is_organism(model) else "evidence"
            row |= {"model": model, "p_corrected": float(p), "evidence": evidence}
        # B3, where it is asked, is in every model's family and keeps its largest corrected p.
        if len(family) > len(found):
            last["p_corrected"] = float(np.fmax(corrected[-1], last["p_corrected"]))
        families += found
    out = [_decided(row, alpha) for row in [*families, last]]
    columns = [
        "model", "kind", "claim", "statement", "definition", "effect", "low", "high", "n",
        "n_expected", "units", "p", "smallest_p", "p_corrected", "margin", "verdict", "reason",
        "evidence",
    ]  # fmt: skip
    return pd.DataFrame(out, columns=columns)


def _b1(model: str, cells: _Pairs, chance: _Chance, confidence: float) -> dict:
    tasks, missing, notes = chance.passing(model, cells.tasks, cells.seeds)
    pairs = math.comb(len(tasks), 2)
    level = 1 - (1 - confidence) / max(pairs, 1)
    first, last = _first_deep(cells.n_layers), cells.n_layers
    definition = (
        f"drop = selectivity(pre-trained) - selectivity(fine-tuned), averaged over layers {first} "
        f"to {last} of {last} and {cells.over}; effect: mean drop of the task that forgets most "
        f"minus that of the task that forgets least, t-interval paired by seed at "
        f"{100 * level:.4g} % (Bonferroni over {_count(pairs, 'pair')} of tasks); p: permutation "
        "of the task names within each seed, statistic the variance between the tasks' mean drops"
    )
    row = _row("B1", definition, len(tasks), len(cells.seeds), KNOWLEDGE_MARGIN, notes)
    if len(tasks) < 2:
        one = "one task cannot differ from itself"
        return {**row, "problems": _problems(missing) + [one if tasks else "no task to compare"]}
    drops = {
        unit: deeper_half(before) - deeper_half(after)
        for unit, (before, after) in cells.complete(tasks, missing).items()
    }
    row["problems"] = _problems(missing)
    # A seed counts where every task has it: the tasks are compared within seeds.
    seeds = [s for s in cells.seeds if all((task, s) in drops for task in tasks)]
    if not seeds:
        return row
    table = np.array([[drops[task, s] for s in seeds] for task in tasks])  # (tasks, seeds)
    order = np.argsort(table.mean(axis=1), kind="stable")
    least, most = order[0], order[-1]
    interval = t_interval(table[most] - table[least], level)
    test = task_permutation(table)
    row |= {"effect": interval.mean, "low": interval.low, "high": interval.high}
    row |= {"n": table.size, "p": test.p, "smallest_p": test.smallest_p}
    notes.insert(0, f"{tasks[most]} forgets most, {tasks[least]} least")
    if not test.exact:
        notes.insert(1, f"p from {DRAWN_PERMUTATIONS} drawn permutations")

    def all_pairs(found: str, reason: str) -> tuple[str, str]:
        """No two tasks differ only where this is so of every pair, not just of the widest."""
        every = [t_interval(a - b, level) for a, b in itertools.combinations(table, 2)]
        if found == "fails" and any(max(-i.low, i.high) > KNOWLEDGE_MARGIN for i in every):
            return "undecided", "another pair's interval leaves the margin"
        return found, reason

    return {**row, "check": all_pairs}


def _b2(model: str, cells: _Pairs | None, chance: _Chance, confidence: float) -> dict:
    definition = (
        "centre of mass of the minimal neuron set over the layers, pre-trained minus fine-tuned, "
        "share of depth (one point is 0.01 of the depth)"
    )
    if cells is None or not cells.tasks:
        row = _row("B2", definition, 0, 0, DEPTH_MARGIN, [])
        return {**row, "problems": ["no minimal neuron sets of a fine-tuned model"]}
    tasks, missing, notes = chance.passing(model, cells.tasks, cells.seeds)
    row = _row(
        "B2", f"{definition}, averaged over {cells.over}", len(tasks), len(cells.seeds),
        DEPTH_MARGIN, notes,
    )  # fmt: skip
    pairs = cells.complete(tasks, missing)
    row |= _tested([float(before[0] - after[0]) for before, after in pairs.values()], confidence)
    return {**row, "problems": _problems(missing) + ([] if tasks else ["no task to compare"])}


def _b3(
    table: pd.DataFrame,
    chance: _Chance,
    architectures: Mapping[str, str] | None,
    grid: dict,
    confidence: float,
) -> dict:
    models = list(dict.fromkeys(table.model))
    definition = (
        "kept share = selectivity(fine-tuned) / selectivity(pre-trained), each averaged over the "
        "layers > n_layers / 2, corpora and columns; effect: BERT's minus the mean of the other "
        "architectures', paired by task and seed (one point is 0.01 of the pre-trained selectivity)"
    )
    row = _row("B3", definition, 0, 0, SHARE_MARGIN, [])
    row["model"] = models[0] if len(models) == 1 else "all"
    row["evidence"] = DEMONSTRATION if any(map(_is_organism, models)) else "evidence"
    if architectures is None:
        return {**row, "problems": ["the models' architectures are not given"]}
    by_kind: dict[str, list[str]] = {}
    for model in models:
        if model not in architectures:
            raise HealingError(f"no architecture is given for the model {model!r}")
        by_kind.setdefault(architectures[model], []).append(model)
    few = "one model" if max(map(len, by_kind.values())) == 1 else "so few models"
    notes = [f"{few} per architecture: nothing is said about architectures in general"]
    if len(by_kind) == 1:
        return {**row, "problems": ["one architecture"], "notes": notes}
    if "bert" not in by_kind:
        found = ", ".join(sorted(by_kind))
        return {**row, "problems": [f"no BERT among the architectures: {found}"], "notes": notes}
    if len(by_kind["bert"]) == 1:
        row["model"] = by_kind["bert"][0]

    cells = {model: _Pairs(model, table, "selectivity", grid) for model in models}
    tasks = sorted(set().union(*(c.tasks for c in cells.values())))
    seeds = sorted(set().union(*(c.seeds for c in cells.values())))
    missing: list[str] = []
    for model in models:
        tasks, lost, left = chance.passing(model, tasks, seeds)
        missing += [f"{model} {what}" for what in lost]
        notes += [f"{model}: {what}" for what in left]
    shares = {model: c.kept_shares(tasks, seeds, missing) for model, c in cells.items()}
    values = []
    for unit in itertools.product(tasks, seeds):
        if all(unit in shares[model] for model in models):
            mean = {k: np.mean([shares[m][unit] for m in group]) for k, group in by_kind.items()}
            values.append(float(mean.pop("bert") - np.mean(list(mean.values()))))
    row |= _row("B3", definition, len(tasks), len(seeds), SHARE_MARGIN, notes)
    row |= _tested(values, confidence)
    return {**row, "problems": _problems(missing) + ([] if tasks else ["no task to compare"])}


def _h(model: str, kind: str, healed: pd.DataFrame | None, confidence: float) -> dict:
    definition = (
        "task healing minus knowledge healing, each (healed - broken) / (intact - broken): of the "
        "score, and of the selectivity averaged over the corrupted layers, corpora and columns "
        "(one point is 0.01 of the damage)"
    )
    part = None if healed is None else healed[healed.model == model]
    if part is None or part.empty:
        row = _row("H", definition, 0, 0, 0.0, [], kind)
        return {**row, "problems": [f"no broken or healed cell of kind {kind} was probed"]}
    settings = part[["side", "level"]].drop_duplicates().itertuples(index=False)
    over = ", ".join(f"{side} {as_fraction(level)}" for side, level in settings)
    row = _row(
        "H", f"{definition}, averaged over {over}", part.task.nunique(), part.seed.nunique(), 0.0,
        [], kind,
    )  # fmt: skip
    # A row's reasons name what it lacks; a unit counts where no setting lacks anything.
    missing = [r for reason in part.reason if reason for r in reason.split("; ")]
    effects, gaps = [], []
    for _, unit in part.groupby(["task", "seed"], sort=False):
        needed = unit[["task_healing", "knowledge_healing", "knowledge_loss"]]
        if needed.notna().all(axis=None):
            effects.append(float((unit.task_healing - unit.knowledge_healing).mean()))
            gaps.append(float(unit.knowledge_loss.mean()))
    gap = t_interval(gaps, confidence)

    def gap_remains(found: str, reason: str) -> tuple[str, str]:
        """Both must be so: the task came back further, and knowledge is still missing."""
        if math.isnan(gap.low):
            return found, reason
        shown = f"the selectivity gap that remains is {_shown(gap)}"
        if gap.high <= KNOWLEDGE_MARGIN:
            return "fails", f"{shown}, not above {KNOWLEDGE_MARGIN:g}"
        if gap.low <= KNOWLEDGE_MARGIN and found != "fails":
            unclear = f"{shown}, not clear of {KNOWLEDGE_MARGIN:g}"
            return "undecided", unclear if found == "holds" else f"{reason}; {unclear}"
        return found, f"{reason}; {shown}"

    row |= _tested(effects, confidence)
    return {**row, "problems": _problems(missing), "check": gap_remains}


def _row(
    claim: str, definition: str, tasks: int, seeds: int, margin: float, notes: list[str],
    kind: str = "none",
) -> dict:  # fmt: skip
    """A claim without numbers yet. `notes` end its reason, `problems` make it undecided, `check`
    has the last word on the verdict where there are none."""
    return {
        "kind": kind, "claim": claim, "statement": STATEMENTS[claim], "definition": definition,
        "effect": math.nan, "low": math.nan, "high": math.nan, "n": 0, "n_expected": tasks * seeds,
        "units": f"{_count(tasks, 'task')} x {_count(seeds, 'seed')}", "p": math.nan,
        "smallest_p": math.nan, "margin": margin, "notes": notes, "problems": [], "check": None,
    }  # fmt: skip


def _tested(values: list[float], confidence: float) -> dict:
    """Mean, interval and one-sided sign-flip p of one value a unit, as columns of a claim."""
    interval, test = t_interval(values, confidence), sign_flip(values)
    return {
        "effect": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n,
        "p": test.p, "smallest_p": test.smallest_p,
    }  # fmt: skip


def _decided(row: dict, alpha: float) -> dict:
    found, reason = verdict(
        row["low"], row["high"], row["p_corrected"], row["smallest_p"], margin=row["margin"],
        alpha=alpha, missing=row["problems"],
    )  # fmt: skip
    if row["margin"] == 0:
        reason = reason.replace("0 points", "zero")
    if row["check"] and not row["problems"]:
        found, reason = row["check"](found, reason)
    return {**row, "verdict": found, "reason": "; ".join([reason, *row["notes"]])}


# --- cells -----------------------------------------------------------------------------------


class _Cells:
    """Values of one model's cells, averaged over the corpora and columns expected."""

    def __init__(self, rows: pd.DataFrame, value: str, corpora: Iterable[tuple[str, str]]):
        self.corpora = list(corpora)
        self.values: dict[tuple, np.ndarray] = {}
        # By layer, embeddings first, with a gap where a layer is missing; or one value a cell.
        by_layer = "layer" in rows
        size = int(rows.n_layers.iloc[0]) + 1 if by_layer and len(rows) else 1
        layers = rows.layer if by_layer else itertools.repeat(0)
        names = ["state", "task", "side", "level", "seed", "corpus", "column"]
        keys = rows[names].itertuples(index=False, name=None)
        for key, layer, found in zip(keys, layers, rows[value].astype(float), strict=False):
            self.values.setdefault(key, np.full(size, math.nan))[layer] = found

    def mean(
        self, missing: list[str], state: str, task: str, seed: int, side="none", level=0.0
    ) -> np.ndarray | None:
        """By layer, (layers + 1,); None if anything is missing, which `missing` then names."""
        complete = True
        found = []
        for corpus in self.corpora:
            values = self.values.get((state, task, side, level, seed, *corpus))
            gaps = [] if values is None else np.flatnonzero(np.isnan(values)).tolist()
            if values is None or gaps:
                complete = False
                name = [state] if state == "pretrained" else [task, state]
                name += [side, str(as_fraction(level))] if side != "none" else []
                name += [f"seed {seed}", *corpus]
                if gaps and len(gaps) < len(values):
                    name.append(f"layer {' '.join(map(str, gaps))}")
                missing.append(" ".join(name))
            else:
                found.append(values)
        return np.mean(found, axis=0) if complete and found else None


class _Pairs:
    """One model's cells before and after fine-tuning, against those expected."""

    def __init__(self, model: str, table: pd.DataFrame, value: str, grid: dict):
        part = table[(table.model == model) & table.state.isin(["pretrained", "intact"])]
        self.model = model
        self.tasks = sorted(grid.get("tasks", part.task[part.state == "intact"].unique()))
        self.seeds = sorted(int(s) for s in grid.get("seeds", part.seed.unique()))
        self.cells = _Cells(part, value, _corpora(part, grid))
        self.n_layers = int(part.n_layers.iloc[0]) if len(part) else 0
        self.over = ", ".join(" ".join(c) for c in self.cells.corpora) or "nothing"

    def get(self, task: str, seed: int, missing: list[str]) -> tuple | None:
        """(pre-trained, fine-tuned) of a unit; None where one is missing, which `missing` names."""
        before = self.cells.mean(missing, "pretrained", "none", seed)
        after = self.cells.mean(missing, "intact", task, seed)
        return None if before is None or after is None else (before, after)

    def complete(self, tasks: Iterable[str], missing: list[str]) -> dict[tuple, tuple]:
        """The complete units, {(task, seed): (pre-trained, fine-tuned)}."""
        units = itertools.product(tasks, self.seeds)
        found = {(task, seed): self.get(task, seed, missing) for task, seed in units}
        return {unit: pair for unit, pair in found.items() if pair is not None}

    def kept_shares(
        self, tasks: Sequence[str], seeds: Sequence[int], missing: list[str]
    ) -> dict[tuple, float]:
        """{(task, seed): kept share}, none at all where its denominator may be zero."""
        lost: list[str] = []
        before = [self.cells.mean(lost, "pretrained", "none", seed) for seed in seeds]
        pairs = {unit: self.get(*unit, lost) for unit in itertools.product(tasks, seeds)}
        missing += [f"{self.model} {what}" for what in lost]
        had = t_interval([deeper_half(x) for x in before if x is not None])
        if had.n and not had.low > 0:
            interval = "without an interval" if had.n < 2 else "within its interval of zero"
            missing.append(
                f"{self.model} kept share: pre-trained selectivity is {_shown(had)}, {interval}"
            )
            return {}
        return {unit: kept_share(*pair) for unit, pair in pairs.items() if pair is not None}


class _Chance:
    """Which tasks' fine-tuned scores are above chance."""

    def __init__(self, task_results: pd.DataFrame, value: str, confidence: float):
        kept, left_out = above_chance(task_results, value, confidence)
        both = pd.concat([kept, left_out])
        self.reasons = dict(zip(zip(both.model, both.task, strict=True), both.reason, strict=True))
        table = _clean(task_results, value)
        scored = table[(table.state == "intact") & table.value.notna()]
        self.scored = set(zip(scored.model, scored.task, scored.seed, strict=True))

    def passing(
        self, model: str, tasks: Iterable[str], seeds: Iterable[int]
    ) -> tuple[list[str], list[str], list[str]]:
        """The tasks kept, the scores missing that would decide it, and a note on those left out."""
        kept, missing, left = [], [], []
        for task in tasks:
            missing += [
                f"{task} intact score seed {seed}"
                for seed in seeds
                if (model, task, seed) not in self.scored
            ]
            reason = self.reasons.get((model, task), "")
            if reason:
                left.append(f"left out, not above chance: {task} ({reason})")
            else:
                kept.append(task)
        return kept, missing, left


def _healing_of_knowledge(
    model: str, table: pd.DataFrame, kind: str, grid: dict
) -> list[pd.DataFrame]:
    """The knowledge columns of `healing_by_cell` for one model, a table per side and level."""
    corrupted = table[
        table.state.isin(["broken", "healed"]) & (table.kind == kind) & table.side.isin(_SIDES)
    ]
    if corrupted.empty:
        return []
    tasks = sorted(grid.get("healed_tasks", corrupted.task.unique()))
    seeds = sorted(int(s) for s in grid.get("seeds", corrupted.seed.unique()))
    sides = grid.get("sides", corrupted.side.unique())
    sides = [side for side in ("bottom", "top") if side in set(sides)]
    levels = sorted({round(float(x), _LEVEL_DIGITS) for x in grid.get("levels", corrupted.level)})
    rows = pd.concat([table[table.state == "intact"], corrupted])
    corpora = _corpora(corrupted, grid)
    cells = _Cells(rows, "selectivity", corpora)
    similar = _Cells(corrupted[corrupted.state == "healed"], "cka", corpora)
    out = []
    for level in levels:
        for side in ["all"] if level == 1 else sides:
            here = corrupted[(corrupted.side == side) & (corrupted.level == level)]
            layers = sorted(set(here.layers))
            if len(layers) > 1:
                raise HealingError(
                    f"{model}, {side} {as_fraction(level)}: cells of different layers, "
                    f"{' and '.join(map(str, layers))}"
                )
            layers = layers[0] if layers else ()
            out.append(
                _setting(cells, similar, layers, itertools.product(tasks, seeds), model, side,
                         level, kind)
            )  # fmt: skip
    return out


def _setting(
    cells: _Cells, similar: _Cells, layers: tuple[int, ...], units: Iterable[tuple[str, int]],
    model: str, side: str, level: float, kind: str,
) -> pd.DataFrame:  # fmt: skip
    """Knowledge lost and healed in one side and level, one row a unit."""
    hidden = [layer + 1 for layer in layers]  # hidden state 0 is the embeddings
    where = {"model": model, "side": side, "level": level, "kind": kind, "layers": layers}
    rows, scores = [], []
    for task, seed in units:
        lost: list[str] = []
        curves = {
            "intact": cells.mean(lost, "intact", task, seed),
            "broken": cells.mean(lost, "broken", task, seed, side, level),
            "healed": cells.mean(lost, "healed", task, seed, side, level),
        }
        unit = {"task": task, "seed": seed}
        for state, curve in curves.items():
            if curve is not None and hidden:
                # `measures` reads a score per cell; here the score is the layers' selectivity.
                scores.append({**where, **unit, "state": state, "knowledge": curve[hidden].mean()})
        intact, healed = curves["intact"], curves["healed"]
        both = intact is not None and healed is not None
        # The similarity of a missing cell is missing with it; it plays no part in a claim.
        cka = similar.mean([], "healed", task, seed, side, level)
        rows.append(
            {
                **where, **unit, "lost": lost,
                "knowledge_loss_all": (intact - healed).mean() if both else math.nan,
                "cka": math.nan if cka is None or not hidden else cka[hidden].mean(),
            }
        )  # fmt: skip
    out = pd.DataFrame(rows)
    if not scores:
        return out.assign(knowledge_loss=math.nan, knowledge_healing=math.nan, knowledge_reason="")
    found = measures(pd.DataFrame(scores), "knowledge")
    found["knowledge_loss"] = found.intact - found.healed
    found = found.rename(columns={"healing": "knowledge_healing", "reason": "knowledge_reason"})
    names = ["knowledge_loss", "knowledge_healing", "knowledge_reason"]
    return out.merge(found[["task", "seed", *names]], on=["task", "seed"], how="left")


def _reasons(row) -> list[str]:
    """What a row of `healing_by_cell` lacks, and why."""
    out = list(row.lost)
    setting = f"{row.task} {row.side} {as_fraction(row.level)}"
    if not isinstance(row.task_reason, str):  # no such row among the scores
        return [*out, f"{setting} seed {row.seed} scores missing: broken, healed"]
    for name, value, reason in (
        ("task", row.task_healing, row.task_reason),
        ("knowledge", row.knowledge_healing, row.knowledge_reason),
    ):
        for part in reason.split("; ") if isinstance(reason, str) and math.isnan(value) else ():
            if part.startswith("healing: "):
                out.append(f"{setting} {name} {part}")
            elif part.startswith("missing: ") and name == "task":
                out.append(f"{setting} seed {row.seed} scores {part}")
    return out


def _before_and_after(probing: pd.DataFrame):
    """Yield model, task, its complete seeds {seed: (pre-trained, fine-tuned)}, what is missing."""
    table = _probing(probing)
    for model in dict.fromkeys(table.model):
        cells = _Pairs(model, table, "selectivity", {})
        for task in cells.tasks:
            missing: list[str] = []
            pairs = cells.complete([task], missing)
            yield model, task, {s: p for (_, s), p in pairs.items()}, "; ".join(_problems(missing))


# --- shared ----------------------------------------------------------------------------------


def _table(frame: pd.DataFrame, value: Sequence[str], what: str) -> pd.DataFrame:
    """Cells with plain values; where nothing is corrupted, side, level and kind say so."""
    for name in (*_CELL, "layers", "n_layers", *value):
        if name not in frame:
            choose(name, [str(c) for c in frame.columns], f"column of the {what} table")
    table = frame.reset_index(drop=True).copy()
    table["level"] = table.level.astype(float).round(_LEVEL_DIGITS)
    table["seed"] = table.seed.astype(int)
    table["layers"] = [layer_tuple(x) for x in table.layers]
    whole = table.state.isin(["pretrained", "untrained", "intact"])
    table.loc[whole, ["side", "kind"]] = "none"
    table.loc[whole, "level"] = 0.0
    table.loc[whole & (table.state != "intact"), "task"] = "none"
    for model, part in table.groupby("model"):
        if part.n_layers.nunique() != 1:
            raise HealingError(f"{model} has cells of different depths in the {what} table")
    return table


def _probing(frame: pd.DataFrame) -> pd.DataFrame:
    table = _table(frame, ("layer", "selectivity", "cka"), "probing")
    _no_duplicates(table, [*_CELL, "layer"], "probing")
    table["layer"] = table.layer.astype(int)
    outside = table[(table.layer < 0) | (table.layer > table.n_layers)]
    if len(outside):
        first = outside.iloc[0]
        raise HealingError(
            f"the probing table has layer {first.layer} of {first.model}, whose layers are 0 (the "
            f"embeddings) to {first.n_layers}"
        )
    return table


def _minimal(frame: pd.DataFrame) -> pd.DataFrame:
    table = _table(frame, ("center_of_mass",), "neurons")
    _no_duplicates(table, _CELL, "neurons")
    return table.drop(columns="layer", errors="ignore")


def _grid(grid: Mapping[str, Sequence] | None) -> dict:
    for name in grid or {}:
        choose(name, _GRID, "entry of the grid")
    for pair in (grid or {}).get("corpora", ()):
        if isinstance(pair, str) or len(pair) != 2:
            raise HealingError(f"corpora of the grid are (corpus, column) pairs, got {pair!r}")
    return dict(grid or {})


def _corpora(rows: pd.DataFrame, grid: dict) -> list[tuple[str, str]]:
    found = zip(rows.corpus, rows.column, strict=True)
    return sorted({tuple(c) for c in grid.get("corpora", found)})


def _problems(missing: Sequence[str]) -> list[str]:
    missing = list(dict.fromkeys(missing))
    if not missing:
        return []
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return [f"{_count(len(missing), 'value')} missing: {shown}"]


def _first_deep(n_layers: int) -> int:
    return n_layers // 2 + 1


def _curves(*curves: Sequence[float]) -> list[np.ndarray]:
    out = [np.asarray(curve, dtype=float) for curve in curves]
    if len({x.shape for x in out}) != 1 or out[0].ndim != 1 or len(out[0]) < 2:
        shapes = " and ".join(str(x.shape) for x in out)
        raise HealingError(f"need one value a layer of the same layers, got shapes {shapes}")
    if not all(np.isfinite(x).all() for x in out):
        raise HealingError("a layer's value is missing or infinite; leave none out here")
    return out


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
