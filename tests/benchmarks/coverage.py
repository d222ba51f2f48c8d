"""Do intervals and verdicts keep what they say? Asked of studies in which everything is known.

    make coverage                # some minutes; prints a table
    make coverage ARGS=--write   # keeps it in data/results/coverage.json too, for a notebook

A study has three tasks of unequal spread, whose effects correlate within a seed. The ledger's
builder decides a claim on it. With the effect exactly at the margin, a 95 % interval covers it in
95 of 100 studies, and a claim is said to hold in at most 5; what comes on top is the simulation's
own error (of 1,000 studies, 0.7 points at one standard error). Effects are normal: of skewed ones
no three seeds know the mean.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from healing_utils.analysis.claims import MARGIN, Claim, decide, units
from healing_utils.analysis.effects import t_interval

SEEDS, STUDIES, POWERED = (3, 6, 10), 1000, 200
TASKS = {"quiet": 0.3, "usual": 1.0, "noisy": 2.0}  # spreads, as shares of one another
SHARED = 0.6  # correlation of two tasks of a seed
SPREAD = MARGIN / 4  # of a seed's mean over its tasks
AT = {"more": MARGIN, "not worse": -MARGIN, "same": MARGIN}  # effects that are not the claim yet
INTO = {"more": 1, "not worse": 1, "same": -1}  # which way those lie that are


def draw(rng: np.random.Generator, studies: int, seeds: int, effect: float) -> np.ndarray:
    """Effects (studies, tasks, seeds) whose expectation is `effect` in every task: tasks that
    differ would widen the pooled interval, and hide what is wrong with it."""
    spread = np.array(list(TASKS.values()))[:, None]
    common = rng.standard_normal((studies, 1, seeds))
    own = rng.standard_normal((studies, len(TASKS), seeds))
    drawn = spread * (np.sqrt(SHARED) * common + np.sqrt(1 - SHARED) * own)
    correlated = SHARED + (1 - SHARED) * np.eye(len(TASKS))
    of_mean = np.sqrt(spread.T @ correlated @ spread).item() / len(TASKS)
    return effect + SPREAD / of_mean * drawn


def verdicts(effects: np.ndarray, direction: str) -> pd.DataFrame:
    """The ledger's row of each study, in their order."""
    studies, _, seeds = effects.shape
    names = [[str(number) for number in range(studies)], list(TASKS), range(seeds)]
    index = pd.MultiIndex.from_product(names)
    model = {"model": "simulated", "variant": index.get_level_values(0), "main": False}

    def found(tables: Any) -> Iterator[pd.DataFrame]:
        yield units(model, pd.Series(effects.ravel(), index.droplevel(0)))

    whole = SimpleNamespace(models=["simulated"], missing=lambda stage: [])
    return decide(whole, {"": Claim("", "", "", "", found, direction=direction)})[0]


def simulate(studies: int = STUDIES, powered: int = POWERED, seed: int = 0) -> dict[str, Any]:
    """Shares of studies: for each number of seeds, intervals that cover the effect, by a seed's
    mean and by pairs of task and seed, and claims at the margin that are said to hold; and of six
    seeds claims that hold of effects 1, 2 and 3 standard deviations into it."""
    rng, rows, power = np.random.default_rng(seed), [], []
    for seeds in SEEDS:
        row: dict[str, Any] = {"seeds": seeds}
        for direction, effect in AT.items():
            effects = draw(rng, studies, seeds, effect)
            found = verdicts(effects, direction)
            row[direction] = float((found["verdict"] == "holds").mean())
            if direction == "more":
                covers = (found["low"] <= effect) & (effect <= found["high"])
                pooled = [t_interval(study.ravel()) for study in effects]
                row["seed_means"] = float(covers.mean())
                row["pairs"] = float(np.mean([i.low <= effect <= i.high for i in pooled]))
        rows.append(row)
        print(row, flush=True)
    for size in (1, 2, 3):
        row = {"size": size}
        for direction, effect in AT.items():
            effects = draw(rng, powered, 6, effect + INTO[direction] * size * SPREAD)
            row[direction] = float((verdicts(effects, direction)["verdict"] == "holds").mean())
        power.append(row)
    return {"studies": studies, "powered": powered, "at_the_margin": rows, "power": power}


def main() -> None:
    found = simulate()
    print(
        f"\nOf {STUDIES:,} studies each: intervals that cover by seed means and, not done, by pairs"
    )
    print("of task and seed; claims that hold at the margin:\n")
    print(pd.DataFrame(found["at_the_margin"]).to_string(index=False, float_format="{:.1%}".format))
    print(f"\nSix seeds, of {POWERED} studies each, by standard deviations beyond the margin:\n")
    print(pd.DataFrame(found["power"]).to_string(index=False, float_format="{:.0%}".format))
    if "--write" in sys.argv:
        path = Path(__file__).parents[2] / "data" / "results" / "coverage.json"
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
