"""Tables of a small study in which effects are planted, as the analysis reads them."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd

from healing_utils.analysis import harm
from healing_utils.analysis.knowledge import checked
from healing_utils.analysis.ledger import Tables

LAYERS, SEEDS, NOISE = 6, (0, 1, 2, 3, 4, 5), 1e-4
CORPORA = (("organism", "pos"), ("organism", "chunk"))
TASKS = ("sst2", "mrpc", "flat")
FORGETS = {"sst2": 0.20, "mrpc": 0.05, "flat": 0.0}  # accuracy lost in the deeper half
INTACT = {"state": "intact", "score": 0.9}


def cells(*rows, seeds=SEEDS) -> pd.DataFrame:
    """`harm.gather`'s table for planted scores, each with a little noise of its own by seed."""
    plain = {
        "model": "m", "task": "t", "state": "healed", "side": "bottom", "level": 0.5,
        "layers": (0, 1, 2), "n_layers": 6, "kind": "reinit", "strength": math.nan, "part": "all",
        "start": "pre-trained", "recipe": "full", "train_size": 100, "epochs": 2.0, "steps": 7.0,
        "learning_rate": 1e-3, "evaluations": 3, "head": "first", "scan": "main", "metric": "f1",
        "chance": 0.5, "test_size": 100, "diverged": "",
    }  # fmt: skip
    out = []
    for number, (row, seed) in enumerate(itertools.product(rows, seeds)):
        row = plain | {"key": f"k{number}", "seed": seed} | row
        if row["state"] in ("intact", "scratch"):
            row |= {"side": "none", "level": 0.0, "kind": "none", "layers": ()}
        row["score"] += NOISE * math.sin(7 * seed + 3 * number)
        out.append(row)
    return harm.beside_intact(pd.DataFrame(out))


MADE = ["harm", "place", "intact", "score_intact", "key_intact", "usual", "budget", "variant",
        "loss", "retained"]  # fmt: skip


def again(*tables: pd.DataFrame) -> pd.DataFrame:
    """`cells` put together, each beside the intact model that it then has."""
    return harm.beside_intact(pd.concat(tables, ignore_index=True).drop(columns=MADE))


def curves(table: pd.DataFrame, shape=(0.4, 0.7, 1.0), steps=(10, 20, 30)) -> pd.DataFrame:
    """Learning curves that reach each cell's score by shares `shape`."""
    rows = []
    table = table[table["state"] != "broken"].drop(columns=MADE)
    for row in table.to_dict("records"):
        for step, share in zip(steps, shape, strict=True):
            more = row["epochs"] / 2
            rows.append({**row, "step": int(step * more), "score": share * row["score"]})
    return pd.DataFrame(rows)


def study(
    forgets=FORGETS, shift=0.15, task_healing=0.9, knowledge_healing=0.3, damage=0.20, tasks=TASKS,
    seeds=SEEDS, healed_tasks=(), sides=(("bottom", 0.5), ("top", 0.5)), model="some/model",
    architecture="bert", n_layers=LAYERS, noise=0.002, random=0,
):  # fmt: skip
    """The three tables of a small study with planted effects, as attributes.

    Pre-trained accuracy is 0.8 in every layer, of which fine-tuning takes `forgets[task]` from the
    deeper half; the minimal set sinks by `shift` of the depth; corruption takes `damage` of
    accuracy from the corrupted layers and 0.4 of the score, of which healing brings the given
    shares back. Selectivity is half of accuracy. `noise` is the spread of each cell's own level.
    """
    rng = np.random.default_rng(random)
    probing, minimal, scores = [], [], []
    networks = [("pretrained", "none", "none", 0.0)]
    networks += [("intact", task, "none", 0.0) for task in tasks]
    networks += [
        (state, task, *where)
        for task, where, state in itertools.product(healed_tasks, sides, ("broken", "healed"))
    ]
    for seed, (state, task, side, level) in itertools.product(seeds, networks):
        hit = range(round(level * n_layers))
        layers = tuple(n_layers - 1 - i if side == "top" else i for i in hit)
        cell = dict(
            model=model, architecture=architecture, task=task, state=state, side=side, level=level,
            kind="reinit" if layers else "none", layers=tuple(sorted(layers)), n_layers=n_layers,
            seed=seed, key="k",
        )  # fmt: skip
        lost = damage * (1 - knowledge_healing * (state == "healed"))
        for corpus, column in CORPORA:
            own, centre = rng.normal(0, noise, 2)
            words = cell | dict(corpus=corpus, column=column)
            for layer in range(n_layers + 1):
                knows = 0.8 - forgets.get(task, 0.0) * (layer > n_layers / 2) + own
                knows -= lost * (layer - 1 in layers)
                cka = (0.25 if layer - 1 in layers else 1.0) if layers else math.nan
                found = dict(layer=layer, accuracy=knows, selectivity=knows / 2, cka=cka)
                probing.append(words | found)
            if not layers:
                sunk = shift * (state == "intact")
                minimal.append(words | dict(center_of_mass=0.6 - sunk + centre))
        if state != "pretrained":
            broken = 1 - {"intact": 1, "broken": 0, "healed": task_healing}[state]
            measured = dict(part="all", strength=math.nan, metric="accuracy", chance=0.5)
            score = 0.9 - 0.4 * broken + rng.normal(0, noise)
            scores.append(cell | measured | dict(test_size=400, score=score))
    return SimpleNamespace(
        probing=pd.DataFrame(probing), neurons=pd.DataFrame(minimal), scores=pd.DataFrame(scores)
    )


def healed_study(**settings):
    """The same with broken and healed models of two tasks."""
    return study(**{"healed_tasks": ("sst2", "mrpc"), **settings})


def together(*parts):
    names = ("probing", "neurons", "scores")
    return SimpleNamespace(**{n: pd.concat([getattr(p, n) for p in parts]) for n in names})


class Planted(Tables):
    """A run's tables, given; the stages of `lost` lack a planned cell. `right` are the answers by
    key, and `unfinished` the keys of cells that were still healing."""

    def __init__(self, made=None, scored=None, lost=(), right=(), unfinished=()):
        super().__init__("planted")
        none = made is None
        made = made or study(tasks=TASKS[:1], seeds=(0,))
        vars(self).update(
            cells=cells(INTACT).head(0) if scored is None else scored,
            probing=checked(made.probing.head(0) if none else made.probing),
            neurons=checked(made.neurons.head(0) if none else made.neurons, "neurons"),
            scores=made.scores,
            answers=dict(right).get,
            censored_keys=set(unfinished),
        )
        vars(self)["equally_trained"] = vars(self)["probing"]
        self.missing = lambda stage: [f"a cell of {stage}"] if stage in lost else []
