"""First aid: ways to bring a corrupted encoder back on a task.

`heal` takes a corrupted classifier and a recipe of `RECIPES`, and leaves the healed model in place.
A recipe may change the model first, may choose which parameters learn and how fast, and then the
model is fine-tuned. All recipes see the same number of training tokens: what a warm-up uses is
taken off the fine-tuning. The next recipe is a function with a docstring under `@_recipe`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from healing_utils.base.errors import HealingError, choose
from healing_utils.healing.corruption import corrupt
from healing_utils.healing.encoders import encoder_layers, layer_stack, outer_parts, parse_layers
from healing_utils.healing.examples import Encoded
from healing_utils.healing.training import Training, fine_tune, seeded

# Raised whenever a change makes the same recipe, `full` left out, give other numbers.
NUMERICS = 1
WARM_UP = 1 / 3  # share of the tokens that a warm-up gets
DECAY = 0.8  # of the learning rate from a layer to the one below it
RANK = 8  # of the low-rank adapters
MASKED = 0.15  # share of tokens that the warm-up masks (Devlin et al. 2019, section 3.1)


@dataclass
class Patient:
    """A corrupted classifier and what a recipe may use to heal it, or set."""

    model: nn.Module
    layers: tuple[int, ...]  # the corrupted ones
    train: Encoded
    seed: int
    settings: dict[str, Any]  # of `fine_tune`
    pristine: Callable[[], nn.Module] | None = None  # gives a copy from before the damage
    teacher: nn.Module | None = None  # an intact fine-tuned model
    tokenizer: Any = None
    rates: dict[str, float] = field(default_factory=dict)  # factors by parameter name
    after: Callable[[], object] | None = None  # done when training has ended
    warm_up: Training | None = None  # what a warm-up did

    @property
    def sick(self) -> list[nn.Module]:
        stack = encoder_layers(self.model)
        return [stack[i] for i in self.layers]

    @property
    def head(self) -> set[str]:
        """Names of the parameters outside of the encoder, and of its pooler, which works for it."""
        encoder = {id(p) for p in self.model.base_model.parameters()}
        with contextlib.suppress(HealingError):
            poolers = outer_parts(self.model, "pooler")
            encoder -= {id(p) for _, module, _ in poolers for p in module.parameters()}
        return {name for name, p in self.model.named_parameters() if id(p) not in encoder}

    def train_only(self, kept: Iterable[nn.Parameter]) -> None:
        """Freeze all but the head and the parameters `kept`."""
        head, ids = self.head, {id(p) for p in kept}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in head or id(parameter) in ids)


@dataclass(frozen=True)
class Recipe:
    """A recipe: `prepare` gets the patient before fine-tuning; `needs` names what it uses."""

    name: str
    prepare: Callable[[Patient], None]
    summary: str  # the first line of its docstring
    needs: tuple[str, ...]


RECIPES: dict[str, Recipe] = {}


def _recipe(*needs: str) -> Callable[[Callable], Callable]:
    def enter(function: Callable) -> Callable:
        name, summary = function.__name__, function.__doc__.split("\n")[0]
        RECIPES[name] = Recipe(name, function, summary, needs)
        return function

    return enter


@_recipe()
def full(patient: Patient) -> None:
    """Every parameter learns, at one rate (Han, Zhang and Simion 2024)."""


@_recipe()
def corrupted_only(patient: Patient) -> None:
    """Only the corrupted layers and the head learn (surgical fine-tuning, Lee et al. 2023)."""
    patient.train_only(p for layer in patient.sick for p in layer.parameters())


@_recipe()
def corrupted_frozen(patient: Patient) -> None:
    """All but the corrupted layers learn: can the others work around them?"""
    for layer in patient.sick:
        layer.requires_grad_(False)


@_recipe()
def head_only(patient: Patient) -> None:
    """Only the head learns: what the damaged features still tell (a linear probe)."""
    patient.train_only([])


@_recipe()
def norms_and_biases(patient: Patient) -> None:
    """Only normalisations, biases and the head learn (BitFit, Ben Zaken et al. 2022)."""
    base = patient.model.base_model
    norms = [m for m in base.modules() if "norm" in type(m).__name__.lower()]
    kept = [p for norm in norms for p in norm.parameters()]
    patient.train_only(kept + [p for name, p in base.named_parameters() if name.endswith("bias")])


@_recipe()
def layerwise_decay(patient: Patient) -> None:
    """Every parameter learns, each layer at 0.8 times the rate of the one above it.

    Howard and Ruder (2018, section 3.2); the embeddings are below the first layer, the head learns
    at the whole rate."""
    embeddings = [module for _, module, _ in outer_parts(patient.model, "embeddings")]
    levels = [embeddings, *([layer] for layer in encoder_layers(patient.model))]
    factors = {
        id(p): DECAY ** (len(levels) - i)
        for i, level in enumerate(levels)
        for module in level
        for p in module.parameters()
    }
    named = patient.model.named_parameters()
    patient.rates = {name: factors[id(p)] for name, p in named if id(p) in factors}


@_recipe()
def low_rank(patient: Patient) -> None:
    """Low-rank adapters of every matrix in the layers learn, and the head (Hu et al. 2022).

    Rank 8, scaled by 2, as peft sets them up; merged into the weights when training has ended."""
    from peft import LoraConfig, get_peft_model

    model, head = patient.model, patient.head
    inside = {id(m) for layer in encoder_layers(model) for m in layer.modules()}
    targets = [n for n, m in model.named_modules() if type(m) is nn.Linear and id(m) in inside]
    if not targets:
        raise HealingError(
            f"{type(model).__name__} keeps its weights outside of linear layers: "
            "low-rank adapters have nothing to adapt"
        )
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    with seeded(patient.seed, torch.device("cpu")):  # the adapters' first values
        adapted = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if name in head:
            parameter.requires_grad_(True)
    patient.after = adapted.merge_and_unload


@_recipe("pristine")
def matched_redraw(patient: Patient) -> None:
    """The corrupted layers are drawn again at each tensor's original scale, then all learns.

    Needs only a mean and a standard deviation a tensor of the healthy model (kind `matched`)."""
    donor = patient.pristine()
    corrupt(donor, layers=patient.layers, kind="matched", seed=patient.seed)
    theirs = encoder_layers(donor)
    for i, layer in zip(patient.layers, patient.sick, strict=True):
        layer.load_state_dict(theirs[i].state_dict())


@_recipe()
def transplant(patient: Patient) -> None:
    """Each corrupted layer becomes a copy of the nearest healthy one, then all learns.

    Of two that are as near, the lower one."""
    stack = encoder_layers(patient.model)
    shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in stack]
    for i in patient.layers:
        # ModernBERT's first layer lacks a norm: it can take from the others and not give to them.
        healthy = [
            j
            for j in range(len(stack))
            if j not in patient.layers and shapes[i].items() <= shapes[j].items()
        ]
        if not healthy:
            raise HealingError(f"there is no healthy layer to transplant in place of layer {i}")
        donor = stack[min(healthy, key=lambda j: (abs(i - j), j))]
        stack[i].load_state_dict(donor.state_dict(), strict=False)


@_recipe()
def drop(patient: Patient) -> None:
    """The corrupted layers are taken out, then all that is left learns (Sajjad et al. 2023)."""
    stack, config = layer_stack(patient.model), patient.model.config
    if len(patient.layers) == len(stack):
        raise HealingError("every layer is corrupted: nothing would be left")
    for i in reversed(patient.layers):
        del stack[i]
    config.num_hidden_layers = len(stack)
    if isinstance(getattr(config, "layer_types", None), list):
        kinds = enumerate(config.layer_types)
        config.layer_types = [kind for i, kind in kinds if i not in patient.layers]


@_recipe("tokenizer")
def mlm_warm_up(patient: Patient) -> None:
    """A third of the tokens for masked language modelling on the task's texts, then all learns.

    Gururangan et al. (2020), task-adaptive pre-training; 15 % of the tokens, of which 80 % become
    the mask, 10 % another piece and 10 % stay (Devlin et al. 2019). The language model's head is
    new and its output is tied to the embeddings."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    tokenizer, model = patient.tokenizer, patient.model
    if tokenizer.mask_token_id is None:
        raise HealingError("the tokenizer has no mask token: no masked language modelling")
    config = AutoConfig.for_model(**{**model.config.to_dict(), "num_labels": 2})
    try:
        with seeded(patient.seed, torch.device("cpu")):
            speaker = AutoModelForMaskedLM.from_config(config)
    except ValueError as error:
        raise HealingError(
            f"{type(model).__name__} has no masked language model beside it"
        ) from error
    setattr(speaker, speaker.base_model_prefix, model.base_model)
    speaker.tie_weights()
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))

    def objective(batch: dict[str, torch.Tensor], rows: np.ndarray) -> torch.Tensor:
        ids = batch["input_ids"]
        drawn = torch.rand(ids.shape, device=ids.device)
        hidden = (drawn < MASKED) & ~torch.isin(ids, special.to(ids.device))
        wanted = torch.where(hidden, ids, -100)
        other = torch.randint(model.config.vocab_size, ids.shape, device=ids.device)
        given = torch.where(drawn < 0.8 * MASKED, tokenizer.mask_token_id, other)
        given = torch.where(hidden & (drawn < 0.9 * MASKED), given, ids)
        logits = speaker(**{**batch, "input_ids": given}).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="sum")
        return len(rows) * loss / hidden.sum().clamp_(min=1)

    _warm_up(patient, speaker, objective)


@_recipe("teacher")
def distillation(patient: Patient) -> None:
    """A third of the tokens for the intact model's hidden states, then all learns.

    Mean squared error over all layers and real tokens, in units of each layer's own variance (after
    Sun et al. 2019 and Jiao et al. 2020). The teacher is the fine-tuned intact model."""
    model, teacher = patient.model, patient.teacher
    teacher.to(next(model.parameters()).device).eval()

    def objective(batch: dict[str, torch.Tensor], rows: np.ndarray) -> torch.Tensor:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with torch.no_grad():
            wanted = teacher(**batch, output_hidden_states=True).hidden_states
        got = model(**batch, output_hidden_states=True).hidden_states
        loss = sum(
            F.mse_loss(ours[real].float(), theirs[real].float()) / theirs[real].float().var()
            for ours, theirs in zip(got[1:], wanted[1:], strict=True)
        )
        return len(rows) * loss / (len(got) - 1)

    _warm_up(patient, model, objective)


def _warm_up(patient: Patient, model: nn.Module, objective: Callable[..., torch.Tensor]) -> None:
    epochs = patient.settings["epochs"]
    given = {**patient.settings, "epochs": WARM_UP * epochs, "seed": patient.seed}
    patient.warm_up = fine_tune(model, patient.train, objective=objective, **given)
    patient.settings["epochs"] = (1 - WARM_UP) * epochs


@dataclass(frozen=True)
class Healing:
    """What `heal` did: the fine-tuning, a warm-up where there was one, and how many of the
    parameters learnt."""

    recipe: str
    training: Training
    warm_up: Training | None
    trained: int
    parameters: int


def heal(
    model: nn.Module, recipe: str = "full", *, layers: Sequence[int] | str, train: Encoded,
    validation: Encoded | None = None, pristine: Callable[[], nn.Module] | None = None,
    teacher: nn.Module | None = None, tokenizer: Any = None, seed: int = 0, epochs: float = 2,
    **settings: Any,
) -> Healing:  # fmt: skip
    """Heal a classifier whose `layers` are corrupted, in place.

    `train` and `validation` are what `training.encode` returns; `settings` are those of
    `fine_tune`; `pristine`, `teacher` and `tokenizer` are for the recipes that need them, see
    `Patient`. Every recipe trains on ``epochs`` passes' worth of tokens in all. Raises HealingError
    for an unknown recipe, one that lacks what it needs or cannot be applied to this damage or
    model, and as `fine_tune` does."""
    chosen = RECIPES[choose(recipe, RECIPES, "recipe")]
    corrupted = parse_layers(layers)
    if corrupted is None:
        raise HealingError("layers names the corrupted layers: at least one is needed")
    patient = Patient(
        model, corrupted, train, seed, {**settings, "epochs": epochs}, pristine, teacher, tokenizer
    )
    for name in chosen.needs:
        if getattr(patient, name) is None:
            raise HealingError(f"recipe {recipe!r} needs {name}, which was not given")
    before = {id(p) for p in model.parameters() if p.requires_grad}
    chosen.prepare(patient)
    learning = [p for p in model.parameters() if p.requires_grad]
    if not learning:
        raise HealingError(f"recipe {recipe!r} leaves nothing to learn in {type(model).__name__}")
    counts = sum(p.numel() for p in learning), sum(p.numel() for p in model.parameters())
    given = {"seed": seed, "rates": patient.rates, **patient.settings}
    training = fine_tune(model, train, validation, **given)
    if patient.after:
        patient.after()
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in before or bool(patient.after))
    return Healing(recipe, training, patient.warm_up, *counts)
