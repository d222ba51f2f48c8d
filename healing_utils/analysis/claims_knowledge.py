"""The ledger's claims on linguistic knowledge: B1 to B3 of paper B, and H, this study's own.

Paper B: Durrani, Sajjad and Dalvi (2021), How transfer learning impacts linguistic knowledge in
deep NLP models?, Findings of ACL, arXiv 2105.15179.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, combinations, product

import numpy as np
import pandas as pd

from healing_utils.analysis.claims import Effect, claim, decide, evidence
from healing_utils.analysis.effects import (
    DRAWN_PERMUTATIONS,
    as_fraction,
    count,
    groups,
    named_gaps,
    t_interval,
    task_permutation,
)
from healing_utils.analysis.knowledge import (
    Probed,
    above_chance,
    checked,
    checked_grid,
    deeper_half,
    healing_by_cell,
    kept_share,
)
from healing_utils.analysis.recovery import SIDES, clean
from healing_utils.base.errors import HealingError

# Selectivity. A probe of random labels has a selectivity of up to 0.02 either way: a smaller
# difference is what a probe that learnt nothing can show.
KNOWLEDGE_MARGIN = 0.02
# Share of depth. A quarter of one layer of twelve; and by chance alone the centre of mass of 240
# neurons spread evenly over twelve layers and the embeddings has a standard error of 0.02.
DEPTH_MARGIN = 0.02
# Share of the pre-trained selectivity. At a selectivity of 0.4, the most that is usual, it is 0.02.
SHARE_MARGIN = 0.05


class Chance:
    """Which tasks' fine-tuned scores are above chance."""

    def __init__(self, task_results: pd.DataFrame):
        both = pd.concat(above_chance(task_results))
        self.reasons = dict(zip(zip(both.model, both.task, strict=True), both.reason, strict=True))
        scored = clean(task_results).query("state == 'intact' and value.notna()")
        self.scored = set(zip(scored.model, scored.task, scored.seed, strict=True))

    def passing(
        self, model: str, tasks: Iterable[str], seeds: Iterable[int]
    ) -> tuple[list[str], list[str], list[str]]:
        """The tasks kept, the scores missing that would decide it, and a note on those left out."""
        missing = [
            f"{task} intact score seed {seed}"
            for task, seed in product(tasks, seeds)
            if (model, task, seed) not in self.scored
        ]
        reasons = {task: self.reasons.get((model, task), "") for task in tasks}
        left = [
            f"left out, not above chance: {task} ({why})" for task, why in reasons.items() if why
        ]
        return [task for task, why in reasons.items() if not why], missing, left


@claim("B1", "Some tasks preserve linguistic knowledge deep into the network, others forget it",
       KNOWLEDGE_MARGIN)  # fmt: skip
def forgetting(cells: Probed, chance: Chance) -> Effect:
    """Drop of the task that forgets most minus that of the task that forgets least. The pair is
    chosen after the fact: its interval is Bonferroni-corrected over all pairs, and it fails only
    if no pair's interval leaves the margin."""
    tasks, missing, notes = chance.passing(cells.model, cells.tasks, cells.seeds)
    pairs = math.comb(len(tasks), 2)
    level = 1 - 0.05 / max(pairs, 1)
    definition = (
        f"drop = selectivity(pre-trained) - selectivity(fine-tuned), averaged over layers "
        f"{cells.n_layers // 2 + 1} to {cells.n_layers} of {cells.n_layers} and {cells.over}; "
        f"effect: mean drop of the task that forgets most minus that of the task that forgets "
        f"least, t-interval paired by seed at {100 * level:.4g} % (Bonferroni over "
        f"{count(pairs, 'pair')} of tasks); p: permutation of the task names within each seed, "
        "statistic the variance between the tasks' mean drops"
    )
    effect = Effect((), definition, len(tasks), len(cells.seeds), notes=notes)
    if len(tasks) < 2:
        one = "one task cannot differ from itself"
        effect.problems = named_gaps(missing) + [one if tasks else "no task to compare"]
        return effect
    found, lost = cells.pairs(tasks)
    effect.problems = named_gaps(missing + lost)
    drops = {u: deeper_half(before) - deeper_half(after) for u, (before, after) in found.items()}
    # A seed counts where every task has it: the tasks are compared within seeds.
    seeds = [s for s in cells.seeds if all((task, s) in drops for task in tasks)]
    if not seeds:
        return effect
    table = np.array([[drops[task, s] for s in seeds] for task in tasks])  # (tasks, seeds)
    order = np.argsort(table.mean(axis=1), kind="stable")
    least, most = order[0], order[-1]
    effect.values, effect.test = table.ravel(), task_permutation(table)
    effect.interval = t_interval(table[most] - table[least], level)
    drawn = [] if effect.test.listed else [f"p from {DRAWN_PERMUTATIONS} drawn permutations"]
    effect.notes = [f"{tasks[most]} forgets most, {tasks[least]} least", *drawn, *notes]

    def all_pairs(found: str, reason: str) -> tuple[str, str]:
        every = [t_interval(a - b, level) for a, b in combinations(table, 2)]
        if found == "fails" and any(max(-i.low, i.high) > KNOWLEDGE_MARGIN for i in every):
            return "undecided", "another pair's interval leaves the margin"
        return found, reason

    effect.check = all_pairs
    return effect


@claim("B2", "Linguistic knowledge gathers in the lower layers after fine-tuning", DEPTH_MARGIN)
def gathering(cells: Probed | None, chance: Chance) -> Effect:
    """Centre of mass of the minimal neuron set, pre-trained minus fine-tuned."""
    definition = (
        "centre of mass of the minimal neuron set over the layers, pre-trained minus fine-tuned, "
        "share of depth (one point is 0.01 of the depth)"
    )
    if cells is None or not cells.tasks:
        return Effect((), definition, problems=["no minimal neuron sets of a fine-tuned model"])
    tasks, missing, notes = chance.passing(cells.model, cells.tasks, cells.seeds)
    pairs, lost = cells.pairs(tasks)
    return Effect(
        [float(before[0] - after[0]) for before, after in pairs.values()],
        f"{definition}, averaged over {cells.over}", len(tasks), len(cells.seeds), notes=notes,
        problems=named_gaps(missing + lost) + ([] if tasks else ["no task to compare"]),
    )  # fmt: skip


@claim("B3", "BERT keeps linguistic knowledge deeper than the other architectures", SHARE_MARGIN)
def bert_deepest(
    models: Sequence[Probed], architectures: Mapping[str, Sequence[str]] | None, chance: Chance
) -> Effect:
    """Kept share of BERT minus the mean of the other architectures; the models of one are averaged
    first."""
    definition = (
        "kept share = selectivity(fine-tuned) / selectivity(pre-trained), each averaged over the "
        "layers > n_layers / 2, corpora and columns; effect: BERT's minus the mean of the other "
        "architectures', paired by task and seed (one point is 0.01 of the pre-trained selectivity)"
    )
    if architectures is None:
        return Effect((), definition, problems=["the models' architectures are not given"])
    few = "one model" if max(map(len, architectures.values())) == 1 else "so few models"
    notes = [f"{few} per architecture: nothing is said about architectures in general"]
    if len(architectures) == 1 or "bert" not in architectures:
        others = f"no BERT among the architectures: {', '.join(sorted(architectures))}"
        problem = "one architecture" if len(architectures) == 1 else others
        return Effect((), definition, problems=[problem], notes=notes)
    tasks = sorted({task for cells in models for task in cells.tasks})
    seeds = sorted({seed for cells in models for seed in cells.seeds})
    missing: list[str] = []
    for cells in models:
        tasks, lost, left = chance.passing(cells.model, tasks, seeds)
        missing += [f"{cells.model} {what}" for what in lost]
        notes += [f"{cells.model}: {what}" for what in left]
    shares = {cells.model: _kept_shares(cells, tasks, seeds, missing) for cells in models}
    values = []
    for unit in product(tasks, seeds):
        if all(unit in found for found in shares.values()):
            mean = {k: np.mean([shares[m][unit] for m in of]) for k, of in architectures.items()}
            values.append(float(mean.pop("bert") - np.mean(list(mean.values()))))
    problems = named_gaps(missing) + ([] if tasks else ["no task to compare"])
    units = len(tasks), len(seeds)
    return Effect(values, definition, *units, problems=problems, notes=notes)


def _kept_shares(
    cells: Probed, tasks: Sequence[str], seeds: Sequence[int], missing: list[str]
) -> dict[tuple, float]:
    """{(task, seed): kept share}, none at all where its denominator may be zero."""
    before, lost = cells.cells.of("pretrained", [("none", seed) for seed in seeds])
    pairs, gone = cells.pairs(tasks, seeds)
    missing += [f"{cells.model} {what}" for what in [*chain(*lost), *gone]]
    had = deeper_half(before)
    had = t_interval(had[~np.isnan(had)])
    if had.n and not had.low > 0:
        interval = "without an interval" if had.n < 2 else "within its interval of zero"
        missing.append(f"{cells.model} kept share: pre-trained selectivity is {had}, {interval}")
        return {}
    return {unit: kept_share(*pair) for unit, pair in pairs.items()}


@claim("H", "Healing restores the task more than the linguistic knowledge of the corrupted layers",
       0.0)  # fmt: skip
def healing_gap(kind: str, healed: pd.DataFrame | None) -> Effect:
    """Task healing minus knowledge healing. It holds only if, besides, the gap that remains (intact
    - healed selectivity of the corrupted layers) is above `KNOWLEDGE_MARGIN`, and fails if not."""
    definition = (
        "task healing minus knowledge healing, each (healed - broken) / (intact - broken): of the "
        "score, and of the selectivity averaged over the corrupted layers, corpora and columns "
        "(one point is 0.01 of the damage)"
    )
    if healed is None or healed.empty:
        none = f"no broken or healed cell of kind {kind} was probed"
        return Effect((), definition, problems=[none], kind=kind)
    settings = dict.fromkeys(zip(healed.side, healed.level, strict=True))
    over = ", ".join(f"{side} {as_fraction(level)}" for side, level in settings)
    # A row's reasons name what it lacks; a unit counts where no setting lacks anything.
    missing = [r for reason in healed.reason if reason for r in reason.split("; ")]
    effects, gaps = [], []
    for _, unit in groups(healed, ["task", "seed"]):
        needed = unit[["task_healing", "knowledge_healing", "knowledge_loss"]]
        if needed.notna().all(axis=None):
            effects.append(float((unit.task_healing - unit.knowledge_healing).mean()))
            gaps.append(float(unit.knowledge_loss.mean()))
    gap = t_interval(gaps)

    def gap_remains(found: str, reason: str) -> tuple[str, str]:
        """Both must be so: the task came back further, and knowledge is still missing."""
        if math.isnan(gap.low):
            return found, reason
        shown = f"the selectivity gap that remains is {gap}"
        if gap.high <= KNOWLEDGE_MARGIN:
            return "fails", f"{shown}, not above {KNOWLEDGE_MARGIN:g}"
        if gap.low <= KNOWLEDGE_MARGIN and found != "fails":
            unclear = f"{shown}, not clear of {KNOWLEDGE_MARGIN:g}"
            return "undecided", unclear if found == "holds" else f"{reason}; {unclear}"
        return found, f"{reason}; {shown}"

    return Effect(
        effects, f"{definition}, averaged over {over}", healed.task.nunique(),
        healed.seed.nunique(), problems=named_gaps(missing), kind=kind, check=gap_remains,
    )  # fmt: skip


def knowledge_claims(
    probing: pd.DataFrame,
    minimal: pd.DataFrame | None,
    task_results: pd.DataFrame,
    architectures: Mapping[str, str] | None = None,
    kind: str = "reinit",
    grid: Mapping[str, Sequence] | None = None,
) -> pd.DataFrame:
    """The verdict on claims B1, B2 and H of every model, and on B3 of all models together.

    `probing` and `minimal` are the tables of the stages `probing` and `neurons` (without `minimal`,
    B2 is undecided), `task_results` those of the task stages put together, `architectures` says
    each model's ``model_type``. The units of one seed share the pre-trained model's probe, which
    cancels in B1 but not in B2 and B3. (Simulated, four tasks by three seeds: where it varies a
    quarter, half or quite as much over seeds as the fine-tuned ones do, B2's 95 % interval covers
    0.93, 0.87 or 0.77.) Tasks that are not `above_chance`, for B3 in any of the models, are left
    out of B1 to B3 and named by `reason`.

    p is corrected over each model's B1, B2, H and, if there are architectures to compare, B3.
    Expected is what occurs, or what `grid` says: ``tasks``, ``seeds``, ``corpora`` ((corpus,
    column) pairs), and for H ``healed_tasks``, ``sides``, ``levels``.
    """
    table, grid = checked(probing, "probing"), checked_grid(grid)
    sets = None if minimal is None else checked(minimal, "neurons")
    chance, healed = Chance(task_results), None
    if ((table.kind == kind) & table.side.isin(SIDES)).any():
        healed = healing_by_cell(probing, task_results, kind, grid)
    models = list(dict.fromkeys(table.model))
    curves = [Probed(model, table, "selectivity", grid) for model in models]
    effects = []
    for model, cells in zip(models, curves, strict=True):
        sunk = None if sets is None else Probed(model, sets, "center_of_mass", grid)
        effects.append(forgetting(model, cells, chance))
        effects.append(gathering(model, sunk, chance))
        own = None if healed is None else healed[healed.model == model]
        effects.append(healing_gap(model, kind, own))
    by_kind: dict[str, list[str]] = {}
    for model in models if architectures is not None else ():
        if model not in architectures:
            raise HealingError(f"no architecture is given for the model {model!r}")
        by_kind.setdefault(architectures[model], []).append(model)
    one = models if len(models) == 1 else by_kind.get("bert", []) if len(by_kind) > 1 else []
    last = bert_deepest(one[0] if len(one) == 1 else "all", curves, by_kind or None, chance)
    last.families = models if last.tasks * last.seeds else ()
    last.evidence = evidence(*models)
    return decide([*effects, last])
