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
    out = []
    for number, (row, seed) in enumerate(itertools.product(rows, seeds)):
        plain = {
            "model": "m", "task": "t", "state": "healed", "side": "bottom", "level": 0.5,
            "layers": (0, 1, 2), "n_layers": 6, "kind": "reinit", "strength": math.nan,
            "part": "all", "start": "pre-trained", "recipe": "full", "train_size": 100,
            "epochs": 2.0, "steps": 7.0, "learning_rate": 1e-3, "evaluations": 3, "head": "first",
            "scan": "main", "metric": "f1", "chance": 0.5, "test_size": 100, "diverged": "",
            "key": f"k{number}",
        }  # fmt: skip
        row = plain | {"seed": seed} | row
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

    def cell(state, task="none", side="none", level=0.0, seed=0, layers=()):
        kind = "none" if side == "none" else "reinit"
        return dict(
            model=model, architecture=architecture, task=task, state=state, side=side, level=level,
            kind=kind, layers=layers, n_layers=n_layers, seed=seed,
        )  # fmt: skip

    def probe(knows, cka, **where):
        for corpus, column in CORPORA:
            level = rng.normal(0, noise)
            for layer in range(n_layers + 1):
                words = dict(corpus=corpus, column=column, key="k", layer=layer)
                found = knows(layer) + level
                measured = dict(accuracy=found, selectivity=found / 2, cka=cka(layer))
                probing.append(cell(**where) | words | measured)

    def centre(depth, **where):
        for corpus, column in CORPORA:
            words = dict(corpus=corpus, column=column, key="k")
            found = depth + rng.normal(0, noise)
            minimal.append(cell(**where) | words | dict(center_of_mass=found))

    def score(value, **where):
        measured = dict(part="all", strength=math.nan, metric="accuracy", chance=0.5, test_size=400)
        scores.append(cell(**where) | measured | dict(score=value + rng.normal(0, noise)))

    def after(task, layer):
        return 0.8 - forgets.get(task, 0.0) * (layer > n_layers / 2)

    for seed in seeds:
        probe(lambda layer: 0.8, lambda layer: math.nan, state="pretrained", seed=seed)
        centre(0.6, state="pretrained", seed=seed)
        for task in tasks:
            own = dict(task=task, seed=seed, state="intact")
            probe(lambda x, t=task: after(t, x), lambda x: math.nan, **own)
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
                    return after(task, layer) - damage * (1 - knows) * (layer - 1 in hit)

                probe(curve, lambda x, hit=layers: 0.25 if x - 1 in hit else 1.0, **where)
                score(0.9 - 0.4 * (1 - does), **where)
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
