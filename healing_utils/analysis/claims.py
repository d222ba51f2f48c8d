"""The ledger: every claim is one entry, and one builder makes its row, whatever it is about.

An entry says a claim's name, its statement, its margin, and what one unit's effect is, claimed to
be above zero. Interval, exact test, correction, verdict and sentence are made by `decide` alone.

Here are those of paper A (arXiv 2406.14459); `claims_knowledge` has those of paper B.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from typing import Any

import numpy as np
import pandas as pd

from healing_utils.analysis.effects import (
    ALPHA,
    Cells,
    Exact,
    Interval,
    as_fraction,
    count,
    groups,
    holm,
    named_gaps,
    no_duplicates,
    sign_flip,
    t_interval,
)
from healing_utils.analysis.recovery import SIDES, clean, places
from healing_utils.base.errors import choose

MARGIN = 0.01  # one point of score: a smaller effect is of no interest, whatever its p
DEMONSTRATION = "demonstration, never evidence: the organism was built so that pre-training matters"
COLUMNS = [
    "model", "kind", "claim", "statement", "definition", "effect", "low", "high", "n", "n_expected",
    "units", "p", "smallest_p", "p_corrected", "margin", "verdict", "reason", "evidence",
]  # fmt: skip


@dataclass(eq=False)
class Effect:
    """What a claim says of a model, before it is decided.

    `values` has one effect a unit; `interval` and `test` are theirs where no others are given.
    `problems` make the verdict undecided, `notes` end its reason, `check` has the last word where
    there are no problems. p is corrected within each of the `families` and keeps the largest.
    """

    values: Sequence[float] = ()
    definition: str = ""
    tasks: int = 0
    seeds: int = 0
    expected: int | None = None  # units, where they are no product of tasks and seeds
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()
    interval: Interval | None = None
    test: Exact | None = None
    check: Callable[[str, str], tuple[str, str]] | None = None
    claim: str = ""
    statement: str = ""
    model: str = ""
    kind: str = "none"
    margin: float = MARGIN
    evidence: str = "evidence"
    families: Sequence[str] = ()
    more: dict[str, Any] = field(default_factory=dict)


def decide(effects: Sequence[Effect], columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """The table of claims: interval, exact test, Holm's correction, verdict; a row an effect."""
    intervals = {e: e.interval or t_interval(e.values) for e in effects}
    tests = {e: e.test or sign_flip(e.values) for e in effects}
    corrected = dict.fromkeys(effects, math.nan)
    for family in dict.fromkeys(name for e in effects for name in e.families):
        members = [e for e in effects if family in e.families]
        for member, p in zip(members, holm(tests[e].p for e in members), strict=True):
            corrected[member] = float(np.fmax(corrected[member], p))
    rows = []
    for e in effects:
        interval, test = intervals[e], tests[e]
        found, reason = verdict(
            interval.low, interval.high, corrected[e], test.smallest_p, e.margin, e.problems
        )
        if e.check and not e.problems:
            found, reason = e.check(found, reason)
        rows.append(
            {
                **{name: getattr(e, name) for name in ("model", "kind", "claim", "statement",
                                                       "definition", "margin", "evidence")},
                "effect": interval.mean, "low": interval.low, "high": interval.high,
                "n": len(e.values),
                "n_expected": e.tasks * e.seeds if e.expected is None else e.expected,
                "units": f"{count(e.tasks, 'task')} x {count(e.seeds, 'seed')}",
                "p": test.p, "smallest_p": test.smallest_p, "p_corrected": corrected[e],
                "verdict": found, "reason": "; ".join([reason, *e.notes]), **e.more,
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=list(columns))


def verdict(
    low: float, high: float, p_corrected: float, smallest_p: float = 0.0, margin: float = MARGIN,
    problems: Sequence[str] = (),
) -> tuple[str, str]:  # fmt: skip
    """``holds``, ``fails`` or ``undecided`` for an effect claimed to be positive, and the reason.

    *Holds*: the corrected p is below `ALPHA` and the whole interval lies above `margin`. *Fails*:
    the whole interval lies within ± `margin`, or on the other side of zero. Everything else,
    and anything with a problem, is *undecided*.
    """
    if problems:
        return "undecided", "; ".join(problems)
    if math.isnan(low) or math.isnan(high):
        return "undecided", "fewer than two units give no interval"
    points = f"{100 * margin:g} point" + ("" if margin == 0.01 else "s") if margin else "zero"
    if low >= -margin and high <= margin:
        return "fails", f"the interval lies within {points} of zero"
    if high < 0:
        return "fails", "the interval lies on the other side of zero"
    if low > margin and p_corrected < ALPHA:
        return "holds", f"corrected p below {ALPHA:g} and the interval above {points}"
    reasons = []
    if low <= margin:
        reasons.append(f"the interval is not clear of {points}")
    if not p_corrected < ALPHA:
        reasons.append(
            f"corrected p is not below {ALPHA:g}"
            if smallest_p < ALPHA
            else f"so few units cannot reach p below {ALPHA:g} (the smallest is {smallest_p:.3g})"
        )
    return "undecided", "; ".join(reasons)


def in_words(claims: pd.DataFrame) -> list[str]:
    """The verdicts of a table of claims as sentences."""
    lines = []
    for row in claims.itertuples():
        opening = f"{row.claim}, {row.kind}, {row.model}: "
        if not row.n:
            lines.append(f"{opening}{row.verdict}, {row.reason}.")
            continue
        effect, low, high = (100 * value for value in (row.effect, row.low, row.high))
        lines.append(
            f"{opening}{row.statement}. {row.verdict.capitalize()} - {effect:.1f} points, 95 % "
            f"interval {low:.1f} to {high:.1f} over {row.n} units ({row.units}); corrected p "
            f"{row.p_corrected:.3f}, the smallest p that so many units can reach "
            f"{row.smallest_p:.2g}: {row.reason}."
            + ("" if row.evidence == "evidence" else f" ({row.evidence}.)")
        )
    return lines


def evidence(*models: str) -> str:
    """What a claim is worth that rests on the models' pre-training."""
    names = [str(m).rstrip("/\\").replace("\\", "/").split("/")[-1] for m in models]
    return DEMONSTRATION if "organism" in names else "evidence"


def claim(
    name: str, statement: str, margin: float = MARGIN, demonstrates: bool = True
) -> Callable[[Callable[..., Effect]], Callable[..., Effect]]:
    """Makes an entry of a function that says what one unit's effect is. `demonstrates`: on the
    organism it is no evidence."""

    def entry(effect: Callable[..., Effect]) -> Callable[..., Effect]:
        @functools.wraps(effect)
        def of(model: str, *data: Any) -> Effect:
            return replace(
                effect(*data), claim=name, statement=statement, margin=margin, model=model,
                families=[model], evidence=evidence(model) if demonstrates else "evidence",
            )  # fmt: skip

        return of

    return entry


class Healed:
    """The healed and intact scores of one model and kind, against the cells expected: what occurs
    for the kind, or what `grid` says."""

    def __init__(self, table: pd.DataFrame, kind: str, grid: Mapping[str, Sequence]):
        whole = (table.part == "all") & (table.kind == kind) & table.side.isin(SIDES)
        intact = table[table.state == "intact"].assign(side="none", level=0.0)
        corrupted = table[table.state.isin(["healed", "broken"]) & whole]
        healed = corrupted[corrupted.state == "healed"]
        no_duplicates(intact, ["task", "seed"], "intact")
        no_duplicates(healed, ["task", "seed", "side", "level"], f"healed, kind {kind}")
        present = pd.concat([intact, corrupted])
        self.kind, self.empty = kind, healed.value.isna().all()
        self.tasks = sorted(grid.get("tasks", present.task.unique()))
        self.seeds = sorted(int(s) for s in grid.get("seeds", present.seed.unique()))
        self.places = places(corrupted, grid)
        self.sides = [s for s in ("bottom", "top") if any(s == side for side, _ in self.places)]
        self.levels = list(dict.fromkeys(level for _, level in self.places))
        self.cells = Cells(pd.concat([intact, healed]), "value")

    def scores(self, wanted: Sequence[tuple[str, float]]) -> tuple[np.ndarray, list[str]]:
        """Scores of the complete units at some (side, level), (units, places); what is missing."""
        if self.empty or not wanted:
            what = f"no healed cell of kind {self.kind}" if self.empty else "no level below 1"
            return np.empty((0, len(wanted))), [what]
        units = list(product(self.tasks, self.seeds))
        states = ("intact" if side == "none" else "healed" for side, _ in wanted)
        found = [self.cells.of(state, units, *w) for state, w in zip(states, wanted, strict=True)]
        lost = [sum(names, []) for names in zip(*(names for _, names in found), strict=True)]
        scores = np.column_stack([curves[:, 0] for curves, _ in found])
        return scores[[not names for names in lost]], named_gaps(chain(*lost))

    def losses(self, levels: Sequence[float]) -> tuple[np.ndarray, list[str]]:
        """intact - healed of the complete units, averaged over the sides, (units, levels)."""
        wanted = [place for place in self.places if place[1] in levels]
        scores, problems = self.scores([*wanted, ("none", 0.0)] if wanted else [])
        lost = pd.DataFrame(scores[:, -1:] - scores[:, :-1], columns=[x for _, x in wanted])
        return lost.T.groupby(level=0).mean().T.to_numpy(), problems

    def effect(self, values: Sequence[float], definition: str, problems: list[str]) -> Effect:
        units = len(self.tasks), len(self.seeds)
        return Effect(values, definition, *units, problems=problems, kind=self.kind)


def _over(levels: Sequence[float]) -> str:
    return ", ".join(str(as_fraction(level)) for level in levels) or "none"


@claim("A1", "Corrupted models do not fully recover", demonstrates=False)
def loss(cells: Healed) -> Effect:
    """The loss, averaged over the sides and then over the levels."""
    losses, problems = cells.losses(cells.levels)
    sides = " and ".join(cells.sides) or "all layers"
    definition = f"intact - healed, averaged over {sides} and levels {_over(cells.levels)}"
    return cells.effect(losses.mean(axis=1) if len(losses) else (), definition, problems)


@claim("A2", "The more is corrupted, the more is lost", demonstrates=False)
def rise(cells: Healed) -> Effect:
    """The loss that the level adds between the smallest and the largest below 1. Level 1 always
    contains the bottom: beside levels that are averaged over both sides it would tell which layers
    were hit, not how many."""
    levels = [level for level in cells.levels if level < 1]
    losses, problems = cells.losses(levels)
    sides = " and ".join(cells.sides) or "all layers"
    definition = (
        f"least-squares slope of intact - healed (mean of {sides}) on the level, times the range "
        f"of levels {_over(levels)}"
    )
    if len(levels) < 2:
        return cells.effect((), definition, problems or ["one level only"])
    centred = np.array(levels) - np.mean(levels)
    weights = centred / (centred**2).sum() * np.ptp(levels)
    return cells.effect(losses @ weights if len(losses) else (), definition, problems)


@claim("A3", "Corrupting the bottom layers costs more than corrupting as many top layers")
def side_difference(cells: Healed) -> Effect:
    """top - bottom, healed. The intact score cancels: a missing one does not touch this claim."""
    levels = [level for level in cells.levels if level < 1]
    scores, problems = cells.scores([(s, x) for x in levels for s in cells.sides])
    definition = (
        f"healed(top) - healed(bottom) at the same level, averaged over levels {_over(levels)}"
    )
    if levels and not cells.empty and len(cells.sides) < 2:
        absent = " or ".join(s for s in ("bottom", "top") if s not in cells.sides)
        scores, problems = scores[:0], [f"no cell of side {absent}"]
    values = (scores[:, 1::2] - scores[:, ::2]).mean(axis=1) if len(scores) else ()
    return cells.effect(values, definition, problems)


def recovery_claims(
    results: pd.DataFrame, kind: str = "reinit", grid: Mapping[str, Sequence] | None = None
) -> pd.DataFrame:
    """The verdict on claims A1 to A3, one row per model and claim.

    `results` is the baseline and recovery tables put together; only whole-layer corruptions by side
    enter. Level 1 is one cell, stands for both sides in A1, and has no part in A2 and A3. p is
    corrected over a model's claims. Expected are all combinations of what occurs, or of what `grid`
    says (``tasks``, ``seeds``, ``sides``, ``levels``; other cells then play no part). A missing
    cell makes the verdict undecided and `reason` names it; effect and p then describe the `n`
    complete units out of `n_expected`. Raises HealingError on duplicate cells.
    """
    table, effects = clean(results), []
    for name in grid or {}:
        choose(name, ("tasks", "seeds", "sides", "levels"), "entry of the grid")
    for names, part in groups(table, ["model"]):
        cells = Healed(part, kind, grid or {})
        effects += [entry(names["model"], cells) for entry in (loss, rise, side_difference)]
    return decide(effects)
