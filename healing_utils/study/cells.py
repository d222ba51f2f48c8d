"""Cells: the units of work. A cell's key is a hash of what determines its result, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from healing_utils.base.records import digest

# Raised whenever the same parameters give other numbers: old records are no finished cells then.
NUMERICS = 4
MIXED_NUMERICS = 1  # beside it, where bfloat16 or float16 is asked for
PROBING_NUMERICS = 7  # of the stages that look into models

STAGES = ("baseline", "corruption", "recovery")
SCAN_STAGES = ("harms", "scans")  # what the scans leave broken, and what they train
PROBING_STAGES = ("probing", "neurons")
# In the order in which a run computes them; `networks` are the models that are looked into.
ALL_STAGES = (*STAGES, *SCAN_STAGES, "networks", *PROBING_STAGES)

CORRUPTED = ("broken", "healed")
RECIPE = (
    "epochs", "batch_size", "learning_rate", "weight_decay", "warmup", "max_grad_norm",
    "max_length", "max_tokens", "evaluations", "precision",
)  # fmt: skip
COLUMNS = (
    "model", "task", "state", "side", "level", "kind", "part", "strength", "layers", "n_layers",
    "seed", "metric", "start", "recipe",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One unit of work. `determinants` is all that its result depends on, and gives the key."""

    stage: str
    determinants: str  # canonical JSON
    model: str
    task: str = "none"
    state: str  # intact, broken, untrained, healed, scratch; of what is probed also pretrained
    side: str = "none"
    level: float = 0.0
    kind: str = "none"
    part: str = "all"
    strength: float | None = None
    layers: tuple[int, ...] = ()
    n_layers: int
    seed: int
    metric: str
    start: str = "pre-trained"
    recipe: str = "full"
    settings: tuple[tuple[str, Any], ...] = ()  # of the training, other than the study's
    scan: str | None = None  # that names it
    # Of the probing stages, one column of one corpus:
    corpus: str | None = None  # for people; what it holds is hashed into the key
    column: str | None = None
    source: tuple[str, str | None] | None = None  # what `load_corpus` is given
    network: Cell | None = None  # that scores the model, None before any fine-tuning
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
        words = [self.model, self.task, self.state]
        if self.state in CORRUPTED:
            if self.side == "custom":
                words += ["layers", ",".join(map(str, self.layers))]
            elif self.side != "none":
                level = str(Fraction(self.level).limit_denominator(99))
                words += ["all layers"] if self.side == "all" else [self.side, level]
            words.append(self.kind + ("" if self.strength is None else f"={self.strength:g}"))
            words += [w for w in (self.part, self.start) if w not in ("all", "pre-trained")]
            words += [f"by {self.recipe}"] if self.recipe != "full" else []
        for name, value in self.settings:
            words.append(f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}")
        return " ".join([*words, f"seed {self.seed}"])

    @property
    def plain(self) -> bool:
        """Whether whole layers of the pre-trained model are corrupted, and all of it is then
        trained as the study's parameters say."""
        found = (self.part, self.strength, self.start, self.recipe, self.settings)
        return found == ("all", None, "pre-trained", "full", ())

    def columns(self) -> dict[str, Any]:
        """What a table says of the cell."""
        found = {name: getattr(self, name) for name in COLUMNS} | {"layers": list(self.layers)}
        if not self.layers and self.state not in CORRUPTED:
            found["part"] = "none"
        if self.corpus is None:
            return found if self.scan is None else {"scan": self.scan, **found}
        return found | {
            "corpus": self.corpus, "column": self.column, "architecture": self.architecture,
            "scan": self.scan or "main",
            "network": [self.network.stage, self.network.key] if self.network else None,
        }  # fmt: skip
