"""First aid: ways to bring a corrupted encoder back on a task.

A recipe may change the model first, and may choose which parameters learn and how fast; then the
model is fine-tuned. All see the same number of training tokens: what a warm-up uses is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from healing_utils.base.errors import HealingError, choose
from healing_utils.healing import encoders
from healing_utils.healing.corruption import corrupt
from healing_utils.healing.encoders import encoder_layers, layer_stack, pieces
from healing_utils.healing.examples import Encoded
from healing_utils.healing.models import seeded
from healing_utils.healing.training import Training, fine_tune

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
    seed: int
    pristine: Callable[[], nn.Module] | None = None  # gives a copy from before the damage
    teacher: nn.Module | None = None  # an intact fine-tuned model
    tokenizer: Any = None
    rates: dict[str, float] | None = None  # factors of the learning rate by parameter name
    after: Callable[[], object] | None = None  # done when training has ended

    @property
    def sick(self) -> list[nn.Module]:
        stack = encoder_layers(self.model)
        return [stack[i] for i in self.layers]

    @property
    def head(self) -> set[nn.Parameter]:
        """What is outside of the encoder, and its pooler, which works for the head."""
        pooler = {piece.parameter for piece in pieces(self.model, "pooler")}
        return set(self.model.parameters()) - set(self.model.base_model.parameters()) | pooler

    def train_only(self, kept: Iterable[nn.Parameter]) -> None:
        """Freeze all but the head and the parameters `kept`."""
        learning = self.head.union(kept)
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter in learning)


Objective = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """`prepare` gets the patient before fine-tuning, and may return what a warm-up trains, and by
    which objective; `needs` names what it uses."""

    name: str
    prepare: Callable[[Patient], tuple[nn.Module, Objective] | None]
    summary: str  # the first line of its docstring
    needs: tuple[str, ...]


RECIPES: dict[str, Recipe] = {}


def _recipe(*needs: str) -> Callable[[Callable], Callable]:
    """Enter a function with a docstring into the table."""

    def enter(prepare: Callable) -> Callable:
        name, summary = prepare.__name__, prepare.__doc__.split("\n")[0]
        RECIPES[name] = Recipe(name, prepare, summary, needs)
        return prepare

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
    biases = [p for name, p in base.named_parameters() if name.endswith("bias")]
    patient.train_only(biases + [p for norm in norms for p in norm.parameters()])


@_recipe()
def layerwise_decay(patient: Patient) -> None:
    """Every parameter learns, each layer at 0.8 times the rate of the one above it.

    Howard and Ruder (2018, section 3.2), the embeddings as below the first layer."""
    model = patient.model
    inside, above = pieces(model, "embeddings") + pieces(model), len(encoder_layers(model))
    factors = {piece.parameter: DECAY ** (above - piece.layer) for piece in inside}
    patient.rates = {name: factors[p] for name, p in model.named_parameters() if p in factors}


@_recipe()
def low_rank(patient: Patient) -> None:
    """Low-rank adapters of every matrix in the layers learn, and the head (Hu et al. 2022)."""
    from peft import LoraConfig, get_peft_model

    model, head = patient.model, patient.head
    inside = {m for layer in encoder_layers(model) for m in layer.modules()}
    targets = [n for n, m in model.named_modules() if type(m) is nn.Linear and m in inside]
    if not targets:
        raise HealingError(f"{type(model).__name__} has no linear layers: nothing to adapt")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    with seeded(patient.seed):  # the adapters' first values
        adapted = get_peft_model(model, config)
    for parameter in head:
        parameter.requires_grad_(True)
    patient.after = adapted.merge_and_unload


@_recipe("pristine")
def matched_redraw(patient: Patient) -> None:
    """The corrupted layers are drawn again at each tensor's original scale, then all learns."""
    donor = patient.pristine()
    corrupt(donor, layers=patient.layers, kind="matched", seed=patient.seed)
    for i, layer in zip(patient.layers, patient.sick, strict=True):
        layer.load_state_dict(encoder_layers(donor)[i].state_dict())


@_recipe()
def transplant(patient: Patient) -> None:
    """Each corrupted layer becomes a copy of the nearest healthy one, then all learns."""
    stack = encoder_layers(patient.model)
    shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in stack]
    for i in patient.layers:
        # ModernBERT's first layer lacks a norm: it can take from the others and not give to them.
        others = set(range(len(stack))) - set(patient.layers)
        healthy = [j for j in others if shapes[i].items() <= shapes[j].items()]
        if not healthy:
            raise HealingError(f"there is no healthy layer to transplant in place of layer {i}")
        donor = stack[min(healthy, key=lambda j: (abs(i - j), j))]  # of two as near, the lower
        stack[i].load_state_dict(donor.state_dict(), strict=False)


@_recipe()
def drop(patient: Patient) -> None:
    """The corrupted layers are taken out, then all that is left learns (Sajjad et al. 2023)."""
    stack, config = layer_stack(patient.model), patient.model.config
    if len(patient.layers) == len(stack):
        raise HealingError("every layer is corrupted: nothing would be left")
    for i in reversed(patient.layers):
        del stack[i]
        if isinstance(getattr(config, "layer_types", None), list):
            config.layer_types = config.layer_types[:i] + config.layer_types[i + 1 :]
    config.num_hidden_layers = len(stack)


@_recipe("tokenizer")
def mlm_warm_up(patient: Patient) -> tuple[nn.Module, Objective]:
    """A third of the tokens for masked language modelling on the task's texts, then all learns.

    Gururangan et al. (2020), task-adaptive pre-training; of the chosen tokens 80 % become the mask,
    10 % another piece and 10 % stay (Devlin et al. 2019). The language model's head is new."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    tokenizer, model = patient.tokenizer, patient.model
    if tokenizer.mask_token_id is None:
        raise HealingError("the tokenizer has no mask token: no masked language modelling")
    config = AutoConfig.for_model(**{**model.config.to_dict(), "num_labels": 2})
    try:
        with seeded(patient.seed):
            speaker = AutoModelForMaskedLM.from_config(config)
    except ValueError as error:
        kind = type(model).__name__
        raise HealingError(f"{kind} has no masked language model beside it") from error
    setattr(speaker, speaker.base_model_prefix, model.base_model)
    speaker.tie_weights()
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))

    def objective(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = batch["input_ids"]
        drawn = torch.rand(ids.shape, device=ids.device)
        hidden = (drawn < MASKED) & ~torch.isin(ids, special.to(ids.device))
        wanted = torch.where(hidden, ids, -100)
        other = torch.randint(model.config.vocab_size, ids.shape, device=ids.device)
        given = torch.where(drawn < 0.8 * MASKED, tokenizer.mask_token_id, other)
        given = torch.where(hidden & (drawn < 0.9 * MASKED), given, ids)
        logits = speaker(**{**batch, "input_ids": given}).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="sum")
        return len(ids) * loss / hidden.sum().clamp_(min=1)

    return speaker, objective


@_recipe("teacher")
def distillation(patient: Patient) -> tuple[nn.Module, Objective]:
    """A third of the tokens for the intact model's hidden states, then all learns.

    Mean squared error over all layers and real tokens, in units of each layer's own variance (after
    Sun et al. 2019 and Jiao et al. 2020)."""
    model, teacher = patient.model, patient.teacher
    teacher.to(next(model.parameters()).device).eval()

    def objective(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with torch.no_grad():
            wanted = teacher(**batch, output_hidden_states=True).hidden_states
        got = model(**batch, output_hidden_states=True).hidden_states
        loss = sum(
            F.mse_loss(ours[real].float(), theirs[real].float()) / theirs[real].float().var()
            for ours, theirs in zip(got[1:], wanted[1:], strict=True)
        )
        return len(real) * loss / (len(got) - 1)

    return model, objective


@dataclass(frozen=True)
class Healing:
    """What `heal` did: `trained` of the `parameters` learnt."""

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

    `train`, `validation` and `settings` are those of `fine_tune`;
    `pristine`, `teacher` and `tokenizer` are for recipes that need them, see `Patient`. Raises
    HealingError for an unknown recipe, one that lacks what it needs or cannot be applied to this
    damage or model, and as `fine_tune` does."""
    chosen = RECIPES[choose(recipe, RECIPES, "recipe")]
    corrupted = encoders.parse_layers(layers)
    if corrupted is None:
        raise HealingError("layers names the corrupted layers: at least one is needed")
    encoders.resolve_layers(len(encoder_layers(model)), layers=corrupted)  # they are there
    patient = Patient(model, corrupted, seed, pristine, teacher, tokenizer)
    for name in chosen.needs:
        if getattr(patient, name) is None:
            raise HealingError(f"recipe {recipe!r} needs {name}, which was not given")
    before = {p for p in model.parameters() if p.requires_grad}
    network, objective = chosen.prepare(patient) or (None, None)
    learning = [p for p in model.parameters() if p.requires_grad]
    counts = [sum(p.numel() for p in some) for some in (learning, model.parameters())]
    share, warm_up = 1.0, None
    settings |= {"seed": seed, "tokenizer": tokenizer}
    if objective:
        given, share = {**settings, "epochs": WARM_UP * epochs}, 1 - WARM_UP
        warm_up = fine_tune(network, train, objective=objective, **given)
    settings |= {"epochs": share * epochs, "rates": patient.rates}
    training = fine_tune(model, train, validation, **settings)
    if patient.after:
        patient.after()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in before or bool(patient.after))
    return Healing(training, warm_up, *counts)
