"""First aid: ways to bring a corrupted encoder back on a task.

`heal` takes a corrupted classifier and a recipe of `RECIPES`, and leaves the healed model in place.
A recipe may change the model first (redraw, transplant or drop layers, warm it up), may choose
which parameters learn and how fast, and then fine-tunes. All recipes see the same number of
training tokens: what a warm-up uses is taken off the fine-tuning. The next recipe is a function
with a docstring under `@_recipe`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from healing_utils.base.errors import HealingError, choose
from healing_utils.healing.corruption import corrupt
from healing_utils.healing.encoders import _stack, encoder_layers, outer_parts, parse_layers
from healing_utils.healing.training import Encoded, Training, fine_tune, seeded

# Raised whenever a change makes the same recipe, `full` left out, give other numbers.
NUMERICS = 1
WARM_UP = 1 / 3  # share of the tokens that a warm-up gets
DECAY = 0.8  # of the learning rate from a layer to the one below it
RANK = 8  # of the low-rank adapters
MASKED = 0.15  # share of tokens that the warm-up masks (Devlin et al. 2019, section 3.1)


@dataclass
class Patient:
    """A corrupted classifier and what a recipe may use to heal it.

    `layers` are the corrupted ones; `pristine` gives a new copy of the model as it was before the
    damage; `teacher` is an intact fine-tuned model; `tokenizer` belongs to the model. A recipe may
    set `rates`, factors of the learning rate by parameter name, and `after`, done when training has
    ended; `warm_up` is what a warm-up did.
    """

    model: nn.Module
    layers: tuple[int, ...]
    train: Encoded
    seed: int
    settings: dict[str, Any]
    pristine: Callable[[], nn.Module] | None = None
    teacher: nn.Module | None = None
    tokenizer: Any = None
    rates: dict[str, float] = field(default_factory=dict)
    after: list[Callable[[], None]] = field(default_factory=list)
    warm_up: Training | None = None

    @property
    def sick(self) -> list[nn.Module]:
        stack = encoder_layers(self.model)
        return [stack[i] for i in self.layers]


@dataclass(frozen=True)
class Recipe:
    """A recipe: `prepare` gets the patient before fine-tuning; `needs` names what it uses."""

    name: str
    prepare: Callable[[Patient], None]
    needs: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The first line of the recipe's docstring."""
        return (self.prepare.__doc__ or "").strip().split("\n")[0]


RECIPES: dict[str, Recipe] = {}


def _recipe(*needs: str) -> Callable[[Callable], Callable]:
    def enter(function: Callable) -> Callable:
        RECIPES[function.__name__] = Recipe(function.__name__, function, needs)
        return function

    return enter


# --- What learns ----------------------------------------------------------------------------------


@_recipe()
def full(patient: Patient) -> None:
    """Every parameter learns, at one rate (Han, Zhang and Simion 2024)."""


@_recipe()
def corrupted_only(patient: Patient) -> None:
    """Only the corrupted layers and the head learn (surgical fine-tuning, Lee et al. 2023)."""
    _only(patient, {id(p) for layer in patient.sick for p in layer.parameters()})


@_recipe()
def corrupted_frozen(patient: Patient) -> None:
    """All but the corrupted layers learn: can the others work around them?"""
    for layer in patient.sick:
        layer.requires_grad_(False)


@_recipe()
def head_only(patient: Patient) -> None:
    """Only the head learns: what the damaged features still tell (a linear probe)."""
    _only(patient, set())


@_recipe()
def norms_and_biases(patient: Patient) -> None:
    """Only normalisations, biases and the head learn (BitFit, Ben Zaken et al. 2022)."""
    base = patient.model.base_model
    norms = [m for m in base.modules() if "norm" in type(m).__name__.lower()]
    kept = {id(p) for m in norms for p in m.parameters()}
    kept |= {id(p) for name, p in base.named_parameters() if name.endswith("bias")}
    _only(patient, kept)


@_recipe()
def layerwise_decay(patient: Patient) -> None:
    """Every parameter learns, each layer at 0.8 times the rate of the one above it.

    Howard and Ruder (2018, section 3.2); the embeddings are below the first layer, the head learns
    at the whole rate.
    """
    stack = encoder_layers(patient.model)
    factors = {
        id(p): DECAY ** (len(stack) - i)
        for i, layer in enumerate(stack)
        for p in layer.parameters()
    }
    for _, module, _ in outer_parts(patient.model, "embeddings"):
        factors |= {id(p): DECAY ** (len(stack) + 1) for p in module.parameters()}
    patient.rates = {
        name: factors[id(p)] for name, p in patient.model.named_parameters() if id(p) in factors
    }


@_recipe()
def low_rank(patient: Patient) -> None:
    """Low-rank adapters of every matrix in the layers learn, and the head (Hu et al. 2022).

    Rank 8, scaled by 2, as peft sets them up; merged into the weights when training has ended.
    """
    from peft import LoraConfig, get_peft_model

    stack = encoder_layers(patient.model)
    inside = {id(m) for layer in stack for m in layer.modules() if type(m) is nn.Linear}
    targets = [name for name, m in patient.model.named_modules() if id(m) in inside]
    if not targets:
        raise HealingError(
            f"{type(patient.model).__name__} keeps its weights outside of linear layers: "
            "low-rank adapters have nothing to adapt"
        )
    head = _head_names(patient.model)
    with seeded(patient.seed, torch.device("cpu")):  # the adapters' first values
        adapted = get_peft_model(
            patient.model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
        )
    for name, parameter in patient.model.named_parameters():
        if name in head:
            parameter.requires_grad_(True)
    patient.after.append(lambda: adapted.merge_and_unload())


def _only(patient: Patient, kept: set[int]) -> None:
    """Freeze all but the head and the parameters whose ids are `kept`."""
    head = _head_names(patient.model)
    for name, parameter in patient.model.named_parameters():
        parameter.requires_grad_(name in head or id(parameter) in kept)


def _head_names(model: nn.Module) -> set[str]:
    """Names of the parameters outside of the encoder; its pooler counts to the head, for which it
    works."""
    encoder = {id(p) for p in model.base_model.parameters()}
    with contextlib.suppress(HealingError):
        encoder -= {id(p) for _, m, _ in outer_parts(model, "pooler") for p in m.parameters()}
    return {name for name, p in model.named_parameters() if id(p) not in encoder}


# --- What is done before --------------------------------------------------------------------------


@_recipe("pristine")
def matched_redraw(patient: Patient) -> None:
    """The corrupted layers are drawn again at each tensor's original scale, then all learns.

    Needs only a mean and a standard deviation a tensor of the healthy model (kind `matched`).
    """
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
        with torch.no_grad():
            for name, parameter in stack[i].named_parameters():
                parameter.copy_(donor.get_parameter(name))


@_recipe()
def drop(patient: Patient) -> None:
    """The corrupted layers are taken out, then all that is left learns (Sajjad et al. 2023)."""
    model, config = patient.model, patient.model.config
    stack = _stack(model)  # the model's own list, and not a copy of it
    if len(patient.layers) == len(stack):
        raise HealingError("every layer is corrupted: nothing would be left")
    for i in reversed(patient.layers):
        del stack[i]
    config.num_hidden_layers = len(stack)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = [
            kind for i, kind in enumerate(config.layer_types) if i not in patient.layers
        ]


@_recipe("tokenizer")
def mlm_warm_up(patient: Patient) -> None:
    """A third of the tokens for masked language modelling on the task's texts, then all learns.

    Gururangan et al. (2020), task-adaptive pre-training; 15 % of the tokens, of which 80 % become
    the mask, 10 % another piece and 10 % stay (Devlin et al. 2019). The head of the language model
    is new and its output is tied to the embeddings.
    """
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
    Sun et al. 2019 and Jiao et al. 2020). The teacher is the fine-tuned intact model.
    """
    model, teacher = patient.model, patient.teacher
    teacher.eval()

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

    teacher.to(next(model.parameters()).device)
    _warm_up(patient, model, objective)


def _warm_up(patient: Patient, model: nn.Module, objective: Callable[..., torch.Tensor]) -> None:
    settings = dict(patient.settings)
    epochs = settings["epochs"]
    settings["epochs"], patient.settings["epochs"] = WARM_UP * epochs, (1 - WARM_UP) * epochs
    patient.warm_up = fine_tune(
        model, patient.train, objective=objective, seed=patient.seed, **settings
    )


# --- Healing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Healing:
    """What `heal` did: the fine-tuning, a warm-up where there was one, and how many parameters
    learnt of how many."""

    recipe: str
    training: Training
    warm_up: Training | None
    trained: int
    parameters: int


def heal(
    model: nn.Module,
    recipe: str = "full",
    *,
    layers: Sequence[int] | str,
    train: Encoded,
    validation: Encoded | None = None,
    pristine: Callable[[], nn.Module] | None = None,
    teacher: nn.Module | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    epochs: float = 2,
    **settings: Any,
) -> Healing:
    """Heal a classifier whose `layers` are corrupted, in place.

    `train` and `validation` are what `training.encode` returns; `settings` are those of
    `fine_tune`. `pristine` (a function that loads the undamaged model), `teacher` (an intact
    fine-tuned model) and `tokenizer` are used by the recipes that need them, see `RECIPES`. Every
    recipe trains on ``epochs`` passes' worth of tokens in all. When it has ended, every parameter
    requires a gradient again.

    Raises HealingError for an unknown recipe, one that lacks what it needs or cannot be applied to
    this damage or model, and as `fine_tune` does.
    """
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
    training = fine_tune(
        model, train, validation, seed=seed, rates=patient.rates, **patient.settings
    )
    for step in patient.after:
        step()
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in before or bool(patient.after))
    return Healing(recipe, training, patient.warm_up, *counts)
