"""Cells: the units of work. A cell's key is a hash of what determines its result, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from healing_utils.base.records import digest

# Raised whenever a change makes the same parameters give other numbers: old records stay readable
# and are no longer taken for finished cells.
NUMERICS = 4
MIXED_NUMERICS = 1  # beside it, where bfloat16 or float16 is asked for
PROBING_NUMERICS = 7  # of the stages that look into models

STAGES = ("baseline", "corruption", "recovery")
SCAN_STAGES = ("harms", "scans")  # what the scans leave broken, and what they train
PROBING_STAGES = ("probing", "neurons")
# In the order in which a run computes them; `networks` are the models that the probing stages look
# into, those of further tasks included.
ALL_STAGES = (*STAGES, *SCAN_STAGES, "networks", *PROBING_STAGES)
# Of the stage of a state; what is not named is trained from corrupted or random weights.
STAGE_OF = {"intact": "baseline", "broken": "corruption", "untrained": "corruption"}

RECIPE = (
    "epochs", "batch_size", "learning_rate", "weight_decay", "warmup", "max_grad_norm",
    "max_length", "max_tokens", "evaluations", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One unit of work. `determinants` is all that its result depends on, and gives the key."""

    stage: str
    state: str  # intact, broken, untrained, healed, scratch; of what is probed also pretrained
    model: str
    task: str
    seed: int
    side: str
    level: float
    kind: str
    layers: tuple[int, ...]
    n_layers: int
    metric: str
    determinants: str  # canonical JSON
    part: str = "all"
    strength: float | None = None
    start: str = "pre-trained"
    recipe: str = "full"
    # Parameters of the training that are other than the study's.
    settings: tuple[tuple[str, Any], ...] = ()
    scan: str | None = None  # the scan that names it
    # Of the probing stages: one column of one corpus, of a model that is scored by another cell
    # (`network`, None before any fine-tuning).
    corpus: str | None = None  # for people; what it holds is hashed into the key
    column: str | None = None
    source: tuple[str, str | None] | None = None  # what `load_corpus` is given
    network: Cell | None = None
    architecture: str | None = None  # as the model's configuration names it

    @cached_property
    def key(self) -> str:
        return digest(self.determinants)

    @property
    def name(self) -> str:
        """For people: ``organism sentiment healed bottom 1/2 reinit seed 0``."""
        if self.corpus is not None:
            of = f"{self.model} {self.state} seed {self.seed}"
            return f"{self.network.name if self.network else of} on {self.corpus} {self.column}"
        where = "" if self.side in ("none", "all") else f" {self.side}"
        if self.side == "custom":
            where = f" layers {','.join(map(str, self.layers))}"
        elif self.side != "none":
            where += f" {Fraction(self.level).limit_denominator(99)}"
        what = f"{where} {self.kind}" + ("" if self.strength is None else f"={self.strength:g}")
        for value, usual, words in (
            (self.part, "all", "{}"), (self.start, "pre-trained", "{}"),
            (self.recipe, "full", "by {}"),
        ):  # fmt: skip
            what += "" if value == usual else " " + words.format(value)
        what = what if self.state in ("broken", "healed") else ""
        for name, value in self.settings:
            what += f" {name} {value}" if isinstance(value, str) else f" {name} {value:g}"
        return f"{self.model} {self.task} {self.state}{what} seed {self.seed}"

    @property
    def plain(self) -> bool:
        """Whether whole layers of the pre-trained model are corrupted, and all of it is then
        trained as the study's parameters say."""
        found = (self.part, self.strength, self.start, self.recipe, self.settings)
        return found == ("all", None, "pre-trained", "full", ())

    def columns(self) -> dict[str, Any]:
        """What a table says of the cell."""
        corrupted = self.state in ("broken", "healed")
        found = {
            "model": self.model, "task": self.task, "state": self.state, "side": self.side,
            "level": self.level, "kind": self.kind,
            "part": self.part if corrupted or self.layers else "none",
            "strength": self.strength, "layers": list(self.layers), "n_layers": self.n_layers,
            "seed": self.seed, "metric": self.metric, "start": self.start, "recipe": self.recipe,
        }  # fmt: skip
        if self.corpus is None:
            return found if self.scan is None else {"scan": self.scan, **found}
        return found | {
            "corpus": self.corpus, "column": self.column, "architecture": self.architecture,
            "scan": self.scan or "main",
            "network": [self.network.stage, self.network.key] if self.network else None,
        }  # fmt: skip


def by_unit(cells: list[Cell]) -> list[Cell]:
    """Each cell once, by seed and task, and of these what is trained before what is broken, and
    that before what is probed: so that models are looked into where and when they were made."""
    each: dict[str, Cell] = {}
    for cell in cells:
        each.setdefault(cell.key, cell)
    tasks = {task: i for i, task in enumerate(dict.fromkeys(c.task for c in cells))}

    def turn(cell: Cell) -> tuple[int, int, int]:
        probed = PROBING_STAGES.index(cell.stage) + 2 if cell.stage in PROBING_STAGES else 0
        return cell.seed, tasks[cell.task], probed or int(cell.stage == "corruption")

    return sorted(each.values(), key=turn)
