"""Find the layers of a transformer encoder, and the parts of a layer, by the role they play.

Nothing here knows a model class by name. A *layer* is recognised by what it holds, a *stack* is a
`torch.nn.ModuleList` of layers, and the *role* of a parameter follows from its place in the layer,
its module's type and the last word of its name (`query`, `q_lin`, `q_proj` and `q` say the same).
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from healing_utils.base.errors import HealingError, choose

SIDES = ("bottom", "top")
# Controls for side: as many layers at random, or the same share of every layer's values.
CONTROLS = ("random", "scattered")

_QKV = ("query", "key", "value")
_ATTENTION = (*_QKV, "qkv", "position", "attention_output")
# A part is a set of roles. `qkv` is a fused projection; `position` is what attention learns about
# distance and segments (XLNet's r, r_*_bias and seg_embed, DeBERTa's pos_*_proj).
PARTS: dict[str, tuple[str, ...]] = {
    "all": (*_ATTENTION, "feed_forward", "layernorm"),
    "attention": _ATTENTION,
    **{part: (part,) for part in (*_QKV, "attention_output", "feed_forward", "layernorm")},
}
# Parts beside the layers; side, level and layers say nothing about them.
OUTER_PARTS = ("embeddings", "pooler")

# The last word of a parameter's name, inside an attention block, says its role.
_WORDS = {
    "qkv": re.compile(r"w?(qkv|query_key_value|in_proj)(_|$)"),
    "query": re.compile(r"w?(q|query)(_|$)"),
    "key": re.compile(r"w?(k|key)(_|$)"),
    "value": re.compile(r"w?(v|value)(_|$)"),
    "attention_output": re.compile(r"w?(o|out|output|dense)(_|$)"),
    "position": re.compile(r"(r|pos|rel|relative|seg)(_|$)"),
}
# Fused projections whose rows are known to be all of query, then all of key, then all of value.
# Others (GPT-NeoX, DeBERTa of 2020) interleave the three head by head and look the same outside.
_THIRDS = re.compile(r"(Wqkv\.weight|Wqkv\.bias|in_proj_weight|in_proj_bias)$")


@dataclass(frozen=True)
class Piece:
    """A parameter, or some `rows` (first axis) of it, by its `path` in `module`: a layer of `model`
    or, with `layer` -1, what stands beside them. The `name` does not depend on the head."""

    name: str
    role: str
    layer: int
    path: str
    module: nn.Module
    model: nn.Module
    rows: Any = ...  # a slice, or all of them

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.path)

    @property
    def values(self) -> torch.Tensor:
        """The rows meant, a float32 copy on the CPU."""
        return self.parameter.detach()[self.rows].to("cpu", torch.float32, copy=True)

    @property
    def is_bias(self) -> bool:
        """By name, whatever its shape: XLNet's are 2-D."""
        return self.name.endswith("bias")


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The encoder's layers, in the order in which they run, with or without a task head on top.

    A layer has a child that holds query, key and value projections (or one fused projection), and
    at least two weight matrices outside of it. Raises HealingError where not exactly one
    `ModuleList` consists of layers, where they share weights (ALBERT), where a parameter's role
    cannot be told, and for a decoder, whose tokens see only those before them."""
    return list(layer_stack(model))


def layer_stack(model: nn.Module) -> nn.ModuleList:
    """The model's own list of what `encoder_layers` gives."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise HealingError(f"expected a torch model, got {kind}")
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_is_layer, module))
    }
    found = sum(map(len, stacks.values()))
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((c for c in configs if hasattr(c, "num_hidden_layers")), None)
    planned = getattr(config, "num_hidden_layers", found)
    alone = "layers that share weights, as in ALBERT, cannot be corrupted one without the other"
    if not stacks:
        raise HealingError(
            f"{kind} has no stack of encoder layers: no ModuleList whose every member holds query, "
            "key and value projections and a feed-forward block"
        )
    if found < planned:
        raise HealingError(f"{kind} runs {planned} layers on the weights of {found}: {alone}")
    if len(stacks) > 1:
        raise HealingError(f"{kind} has several stacks, not one encoder: {', '.join(stacks)}")
    (stack,) = stacks.values()
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for shared in (names[parameter] for parameter in stack.parameters()):
        if len(shared) > 1:
            raise HealingError(f"{kind} has one parameter as {' and '.join(shared[:2])}: {alone}")
    for layer in stack:
        _roles(layer)
    said = [m.is_causal for m in stack.modules() if hasattr(m, "is_causal")]
    if not said and getattr(config, "is_decoder", True):  # BLOOM's take what earlier tokens left
        said = ["past" in name for name in inspect.signature(stack[0].forward).parameters]
    if any(said):
        raise HealingError(f"{kind} is a decoder, whose tokens see only earlier ones: no encoder")
    return stack


def pieces(model: nn.Module, part: str = "all", layers: Iterable[int] | None = None) -> list[Piece]:
    """What `part`, of `PARTS` or `OUTER_PARTS`, stands for in `layers`, or in all of them; nothing
    where the model lacks it.

    Of a fused query, key and value, one gives its rows; HealingError where the layout is not known.
    ``embeddings`` are all that turns ids into the first layer's input."""
    stack, found = layer_stack(model), []
    if choose(part, (*PARTS, *OUTER_PARTS), "part") in OUTER_PARTS:
        for name, module in _outer_modules(model, stack, part):
            for path, _ in module.named_parameters():
                role = "layernorm" if _is_norm(module, path) else part
                found.append(Piece(f"{name}.{path}", role, -1, path, module, model))
        return found
    for i in range(len(stack)) if layers is None else layers:
        for path, role in _roles(stack[i]).items():
            piece = Piece(f"layer.{i}.{path}", role, i, path, stack[i], model)
            if role in PARTS[part]:
                found.append(piece)
            elif role == "qkv" and part in _QKV:
                if not _THIRDS.search(path):
                    raise HealingError(f"{path!r} cannot be divided: use part 'attention'")
                size = piece.parameter.shape[0] // 3
                start = _QKV.index(part) * size
                found.append(replace(piece, role=part, rows=slice(start, start + size)))
    return found


def _roles(layer: nn.Module) -> dict[str, str]:
    """The role of every parameter of a layer: `layernorm` where its module's type says norm, else
    `feed_forward` outside the attention block, and inside it what its name says (`_WORDS`)."""
    kind, attention = type(layer).__name__, _attention_blocks(layer)
    if len(attention) > 1:
        raise HealingError(f"{kind} has cross-attention: it is no layer of an encoder")
    inside, roles = set(attention[0].parameters()), {}
    within = {_attention_role(name) for name, _ in attention[0].named_parameters()}
    for name, parameter in layer.named_parameters():
        role = _attention_role(name) if parameter in inside else "feed_forward"
        if role == "feed_forward" and "attention" in name.split(".")[0]:  # SqueezeBERT's output
            role = role if "attention_output" in within else "attention_output"
        roles[name] = "layernorm" if _is_norm(layer, name) else role
        if roles[name] is None:
            raise HealingError(f"cannot tell the role of {name!r} in the attention block of {kind}")
    return roles


def _outer_modules(model: nn.Module, stack: nn.Module, part: str) -> list[tuple[str, nn.Module]]:
    paths = {module: name.split(".") for name, module in model.named_modules()}
    if part == "pooler":
        return [("pooler", module) for module, path in paths.items() if path[-1] == "pooler"]
    # Beside the branch, of the module in which the stack and the table of words part.
    words = paths[model.get_input_embeddings()]
    depth = next(i for i, (a, b) in enumerate(zip(words, paths[stack], strict=False)) if a != b)
    encoder = model.get_submodule(".".join(words[:depth]))
    found = [(name, child) for name, child in encoder.named_children() if "embed" in name]
    # RemBERT projects its embeddings beside the stack.
    holder = model.get_submodule(".".join(paths[stack][:-1]))
    inner = [m for name, m in holder.named_children() if "embed" in name and holder is not encoder]
    return found + [(".".join(paths[m][depth:]), m) for m in inner if type(m) is nn.Linear]


def _is_layer(module: nn.Module) -> bool:
    attention = _attention_blocks(module)
    inside = {parameter for block in attention for parameter in block.parameters()}
    outside = (
        parameter.dim() > 1 and not _is_norm(module, name)
        for name, parameter in module.named_parameters()
        if parameter not in inside
    )
    return bool(attention) and sum(outside) >= 2


def _attention_blocks(layer: nn.Module) -> list[nn.Module]:
    """The children of a layer that hold query, key and value; plain containers are looked into."""
    blocks = []
    for child in layer.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            blocks += _attention_blocks(child)
        else:
            roles = {_attention_role(name) for name, _ in child.named_parameters()}
            if "qkv" in roles or roles.issuperset(_QKV):
                blocks.append(child)
    return blocks


def _is_norm(module: nn.Module, name: str) -> bool:
    """Whether the parameter of that name in `module` is a normalisation's."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return "norm" in type(owner).__name__.lower()


def _attention_role(name: str) -> str | None:
    """By the last word: `query` of ``attention.self.query.weight``, `q` of ``rel_attn.q``."""
    word = re.sub(r"\.(weight|bias)$", "", name.lower()).rpartition(".")[2]
    return next((role for role, pattern in _WORDS.items() if pattern.match(word)), None)


def parse_seed(value: Any) -> int:
    """A seed, of its text too: a whole number that torch takes."""
    try:
        digits = isinstance(value, str) and value.isdecimal()
        seed = int(value) if digits else operator.index(value)
    except (TypeError, ValueError):
        seed = -1
    if isinstance(value, bool) or not 0 <= seed < 2**64:
        raise HealingError("seed is not a whole number from 0 to 2^64 - 1")
    return seed


def parse_level(value: Any) -> float:
    """A level, the corrupted fraction of the layers, as a float in (0, 1]; of text ("1/6") too."""
    try:
        level = float(Fraction(value.strip()) if isinstance(value, str) else value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        level = math.nan
    if not 0 < level <= 1 or isinstance(value, bool):
        raise HealingError(
            f"level {value!r:.60} is not a fraction above 0 and at most 1, such as 0.5 or 1/6"
        )
    return level


def parse_layers(value: Any) -> tuple[int, ...] | None:
    """Layer indices, sorted and distinct, or None where none are named, of an int, several, or the
    text of one of these ("[0,2]", "0,2", "3", "none")."""
    try:
        found = value.strip() if isinstance(value, str) else value
        if found is None or (isinstance(found, str) and found.lower() in ("", "none", "null")):
            return None
        found = ast.literal_eval(found) if isinstance(found, str) else found
        found = list(found) if isinstance(found, Iterable) else [found]
        if any(isinstance(index, bool) for index in found):
            raise TypeError
        indices = sorted(map(operator.index, found))
    except (TypeError, ValueError, SyntaxError):
        message = f"layers {value!r:.60} is not a list of whole numbers such as [0, 2]"
        raise HealingError(message) from None
    if not indices or len(set(indices)) < len(indices):
        raise HealingError(f"layers {value!r} names no layer, or one twice")
    return tuple(indices)


def resolve_layers(
    n_layers: int, side: str = "bottom", level: float | str = 0.5,
    layers: Sequence[int] | str | None = None, seed: int = 0,
) -> tuple[int, ...]:  # fmt: skip
    """The 0-based indices, ascending, of the layers that a plan stands for.

    `level` of `n_layers` is rounded half up (a quarter of 6 is 2), counted from the input
    (`bottom`) or the output (`top`); `layers` overrides both. `random` draws as many from `seed`,
    half of them on each side and never the bottom or the top ones; `scattered` means all. Raises
    HealingError for a level of no layer and layers out of range."""
    named = parse_layers(layers)
    if named is not None:
        if wrong := [index for index in named if not 0 <= index < n_layers]:
            raise HealingError(f"layer {wrong[0]} does not exist: they are 0 to {n_layers - 1}")
        return named
    choose(side, (*SIDES, *CONTROLS), "side")
    # A float such as 1/6 or 0.15 stands for the fraction that a person wrote: a half stays a half.
    fraction = Fraction(parse_level(level)).limit_denominator(10_000)
    count = math.floor(fraction * n_layers + Fraction(1, 2))
    if count == 0:
        least = f"the smallest level here is {1 / (2 * n_layers):.3g}"
        raise HealingError(f"level {level!r} of {n_layers} layers rounds to no layer; {least}")
    everything = tuple(range(n_layers))
    if side == "scattered" or count == n_layers:
        return everything
    if side == "random":
        return _random_layers(everything, count, random.Random(f"layers:{seed}"))
    return everything[:count] if side == "bottom" else everything[-count:]


def _random_layers(everything: tuple[int, ...], count: int, rng: random.Random) -> tuple[int, ...]:
    if len(everything) < 3:
        raise HealingError(f"of {len(everything)} layers any {count} is the bottom or the top one")
    middle = len(everything) // 2
    lower, upper = everything[:middle], everything[middle:]
    while True:
        low = count // 2 + (rng.randrange(2) if count % 2 else 0)
        low = min(max(low, count - len(upper)), len(lower))
        chosen = tuple(sorted(rng.sample(lower, low) + rng.sample(upper, count - low)))
        if chosen not in (everything[:count], everything[-count:]):
            return chosen
