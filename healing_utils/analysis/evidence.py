"""What a run holds of evidence: its tables, read when a claim of the ledger asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd

from healing_utils.analysis import harm, knowledge, price, results
from healing_utils.analysis.effects import as_fraction, groups
from healing_utils.base.paths import run_folder

FORGET = {"sst2", "qnli", "mnli"}  # paper B: which tasks forget linguistic knowledge
PRESERVE = {"rte", "mrpc", "stsb"}


class Tables:
    """The tables of a run that claims are about, read when asked for; empty without records."""

    def __init__(self, run: str | Path):
        self.run = run_folder(run)
        # Names of the planned cells of a stage without a record.
        self.missing = cache(partial(results.missing_cells, self.run))

    def _stage(self, stage: str) -> pd.DataFrame:
        return results.table(results.planned_records(self.run, stage), stage)

    @cached_property
    def cells(self) -> pd.DataFrame:
        return harm.gather(self.run)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Learning curves, of scans too."""
        return results.load_curves(self.run, scans=True)

    @cached_property
    def censored(self) -> pd.DataFrame:
        """`price.censored` of the run."""
        return price.censored(self.cells, self.curves)

    @cached_property
    def censored_keys(self) -> set[str]:
        """The cells that `censored` says ended before healing was over."""
        return price.censored_keys(self.cells, self.censored)

    @cached_property
    def answers(self) -> Callable[[str], np.ndarray | None]:
        """What a cell answers right, by its key: (items,), None where that is not recorded."""
        return results.load_answers(self.run).get

    @cached_property
    def models(self) -> list[str]:
        return list(dict.fromkeys([*self.cells["model"], *self.probing["model"]]))

    @cached_property
    def probing(self) -> pd.DataFrame:
        table = self._stage("probing")
        return knowledge.checked(table[table["scan"] == "main"])

    @cached_property
    def equally_trained(self) -> pd.DataFrame:
        """Probes of pre-trained models and of intact ones, these after one number of steps: that
        at which most tasks of `FORGET` and `PRESERVE` were probed, some of both; else none."""
        table = self._stage("probing")
        table = table[table["state"].isin(["pretrained", "intact"])]
        steps = table["key"].map(results.probed_steps(self.run))
        tasks = {at: set(own["task"]) for at, own in table.groupby(steps)}
        both = {
            at: t & (FORGET | PRESERVE) for at, t in tasks.items() if t & FORGET and t & PRESERVE
        }
        best = max(both, key=lambda at: len(both[at]), default=math.nan)
        kept = harm.once(
            table[(steps == best) | (table["state"] == "pretrained")],
            ["model", "state", "task", "seed", "corpus", "column", "layer"],
        )
        return knowledge.checked(kept)

    @cached_property
    def neurons(self) -> pd.DataFrame:
        return knowledge.checked(self._stage("neurons"), "neurons")

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Task scores of the models that were probed."""
        return results.load_probed_scores(self.run)

    @cached_property
    def at_chance(self) -> set[tuple[str, str]]:
        """(model, task) of the probed tasks whose intact score is not above chance, by an interval
        over seeds: of one seed it cannot be said."""
        left = knowledge.above_chance(self.scores)[1].query("n > 1")
        return set(zip(left["model"], left["task"], strict=True))

    def learnt(self, model: str, effects: pd.Series) -> pd.Series:
        """Effects (task, seed) without those of tasks at chance."""
        at_chance = [task for name, task in self.at_chance if name == model]
        return effects[~effects.index.get_level_values("task").isin(at_chance)]

    @cached_property
    def healed_knowledge(self) -> list[tuple[dict, pd.DataFrame]]:
        """`knowledge.healing_by_cell` of every model, by every measure that the run has."""
        found = []
        healed = self.probing[self.probing["state"].eq("healed")]
        healed = healed[healed["side"].isin(["bottom", "top"])]
        for measure in knowledge.MEASURES:
            if measure in healed and healed[measure].notna().any():
                rows = knowledge.healing_by_cell(self.probing, self.scores, measure)
                told = {"variant": measure, "main": measure == "accuracy"}
                found += [(names | told, part) for names, part in groups(rows, ["model"])]
        return found

    def healed(self, by_level: bool = True) -> Iterator[tuple[dict, pd.DataFrame]]:
        """The healed cells of whole layers by side, of every model and variant, with names. The
        main grid is one variant; what lies beside it is told for each level, since scans differ in
        tasks and seeds, or with `by_level` false for the units that have all of its levels."""
        cells = harm.by_side(self.cells[self.cells["state"] == "healed"])
        cells = cells.sort_values("variant", key=lambda words: words != "reinit", kind="stable")
        for names, part in groups(cells, ["model", "variant"]):
            main = part["scan"] == "main"
            if main.any():
                yield names | {"main": names["variant"] == "reinit"}, part[main]
            rest = part[~main]
            for level, own in rest.groupby("level") if by_level else [(1, rest)]:
                told = f", {as_fraction(level)}" if level < 1 else ""
                if len(own):
                    yield names | {"variant": names["variant"] + told, "main": False}, own
