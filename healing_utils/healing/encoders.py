"""Find the layers of a transformer encoder, and the parts of a layer, by the role they play.

Nothing here knows a model class by name. A *layer* is recognised by what it holds, a *stack* is a
`torch.nn.ModuleList` of layers, and the *role* of a parameter follows from its place in the layer,
its module's type and the last word of its name (`query`, `q_lin`, `q_proj` and `q` say the same).
Torch is imported where a model is at hand: levels and layers of a plan are resolved without it.
"""

from __future__ import annotations

import json
import math
import operator
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from healing_utils.base.errors import HealingError, choose

if TYPE_CHECKING:
    import torch

SIDES = ("bottom", "top")
# Controls for side: as many layers at random, or the same share of every layer's values.
CONTROLS = ("random", "scattered")

_ATTENTION = ("query", "key", "value", "qkv", "position", "attention_output")
# A part is a set of roles. `attention`, `feed_forward` and `layernorm` are disjoint and make up
# `all`. `qkv` is a fused projection; `position` is what attention learns about distance and
# segments (XLNet's r, r_*_bias and seg_embed, DeBERTa's pos_*_proj): it belongs to no finer part.
PARTS: dict[str, tuple[str, ...]] = {
    "all": (*_ATTENTION, "feed_forward", "layernorm"),
    "attention": _ATTENTION,
    **{p: (p,) for p in ("query", "key", "value", "attention_output", "feed_forward", "layernorm")},
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
# Others (GPT-NeoX, DeBERTa of 2020) interleave the three head by head and look the same from
# outside.
_THIRDS = re.compile(r"(wqkv|in_proj_weight|in_proj_bias)$")


@dataclass(frozen=True)
class Piece:
    """A parameter of a layer, by its name in it, or some `rows` (first axis) of one, and the role
    it plays, one of ``PARTS["all"]`` or `OUTER_PARTS`."""

    name: str
    role: str
    rows: slice | None = None

    @property
    def is_bias(self) -> bool:
        """By name, whatever its shape: XLNet's are 2-D."""
        return self.name.endswith("bias")


def encoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The encoder's layers, in the order in which they run, with or without a task head on top.

    A layer has a child that holds query, key and value projections (or one fused projection), and
    at least two weight matrices outside of it. Raises HealingError where no `ModuleList` consists
    of layers, where several do (an encoder-decoder), where layers share their weights (ALBERT: one
    cannot be corrupted without the others), and where the role of a parameter cannot be told.
    """
    return list(layer_stack(model))


def layer_stack(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's own list of what `encoder_layers` gives."""
    import torch

    kind = type(model).__name__
    if not isinstance(model, torch.nn.Module):
        raise HealingError(f"expected a torch model, got {kind}")
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) and all(map(_is_layer, module))
    }
    if not stacks:
        raise HealingError(
            f"{kind} has no stack of encoder layers: no ModuleList whose every member holds query, "
            "key and value projections and a feed-forward block"
        )
    found = sum(map(len, stacks.values()))
    configs = (getattr(module, "config", None) for module in model.modules())
    planned = next((c.num_hidden_layers for c in configs if hasattr(c, "num_hidden_layers")), found)
    if found < planned:
        raise HealingError(
            f"{kind} runs {planned} layers on the weights of {found}: layers that share weights, "
            "as in ALBERT, cannot be corrupted one without the other"
        )
    if len(stacks) > 1:
        listed = ", ".join(f"{name} ({len(stack)} layers)" for name, stack in stacks.items())
        raise HealingError(f"{kind} has several stacks of layers, not one encoder: {listed}")
    (stack,) = stacks.values()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for parameter in stack.parameters():
        shared = names[id(parameter)]
        if len(shared) > 1:
            raise HealingError(
                f"{kind} shares one parameter as {' and '.join(shared[:2])}: "
                "layers that share weights cannot be corrupted one without the other"
            )
    for layer in stack:
        encoder_parts(layer)
    return stack


def layer_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every parameter of the encoder's layers by a name that does not depend on the head, such as
    ``layer.0.attention.self.query.weight``."""
    return {
        f"layer.{index}.{name}": parameter
        for index, layer in enumerate(layer_stack(model))
        for name, parameter in layer.named_parameters()
    }


def encoder_parts(layer: torch.nn.Module) -> list[Piece]:
    """One `Piece` per parameter of a layer: `layernorm` where its module's type says norm, else
    `feed_forward` outside the attention block, and inside it what the last word of its name says
    (`_WORDS`). Raises HealingError for two attention blocks (cross-attention, so a decoder), and
    for a parameter of the attention block whose name says nothing known."""
    kind, attention = type(layer).__name__, _attention_blocks(layer)
    if not attention:
        raise HealingError(f"{kind} holds no query, key and value: not an encoder layer")
    if len(attention) > 1:
        raise HealingError(
            f"{kind} holds {len(attention)} attention blocks (cross-attention?): "
            "only the layers of an encoder can be corrupted"
        )
    inside = {id(parameter) for parameter in attention[0].parameters()}
    pieces = []
    for name, parameter in layer.named_parameters():
        role: str | None = "feed_forward"
        if _is_norm(layer, name):
            role = "layernorm"
        elif id(parameter) in inside:
            role = _attention_role(name)
        if role is None:
            raise HealingError(
                f"cannot tell the role of {name!r} in the attention block of {kind}: "
                "not query, key, value, output or position by name"
            )
        pieces.append(Piece(name, role))
    return pieces


def part_pieces(layer: torch.nn.Module, part: str = "all") -> list[Piece]:
    """The pieces of a layer that `part` (a key of `PARTS`) stands for; none where it lacks them.

    Of a fused query, key and value, asking for one gives the rows; where their layout is not known
    (`_THIRDS`) it raises HealingError."""
    roles = PARTS[choose(part, PARTS, "part of a layer")]
    pieces = []
    for piece in encoder_parts(layer):
        if piece.role in roles:
            pieces.append(piece)
        elif piece.role == "qkv" and part in ("query", "key", "value"):
            if not _THIRDS.search(_last_word(piece.name)):
                raise HealingError(
                    f"{piece.name!r} holds query, key and value in a layout that is not known, "
                    f"so part {part!r} cannot be separated; use part 'attention'"
                )
            third = layer.get_parameter(piece.name).shape[0] // 3
            start = ("query", "key", "value").index(part) * third
            pieces.append(Piece(piece.name, part, slice(start, start + third)))
    return pieces


def outer_parts(
    model: torch.nn.Module, part: str
) -> list[tuple[str, torch.nn.Module, list[Piece]]]:
    """(name, module, its pieces) of what `part`, one of `OUTER_PARTS`, stands for.

    `embeddings` are the modules beside the stack that turn ids into the first layer's input: word,
    position and type tables, their normalisation, ELECTRA's projection. Names do not depend on the
    head. Raises HealingError where a model has no such part."""
    paths = {id(module): name for name, module in model.named_modules()}
    stack = paths[id(layer_stack(model))].split(".")
    if choose(part, OUTER_PARTS, "part") == "pooler":
        poolers = (m for name, m in model.named_modules() if name.split(".")[-1] == "pooler")
        found = [("pooler", module) for module in poolers]
    else:  # beside the branch, of the module in which the stack and the table of words part
        words = paths[id(model.get_input_embeddings())].split(".")
        depth = next(i for i, (a, b) in enumerate(zip(words, stack, strict=False)) if a != b)
        encoder = model.get_submodule(".".join(words[:depth]))
        found = [(name, child) for name, child in encoder.named_children() if "embed" in name]
    parts = [
        (name, module, [Piece(n, "layernorm" if _is_norm(module, n) else part) for n in names])
        for name, module in found
        if (names := [n for n, _ in module.named_parameters()])
    ]
    if part == "pooler" and not parts:
        raise HealingError(
            f"{type(model).__name__} has no pooler: "
            "its head reads the last layer through weights of its own"
        )
    return parts


def _is_layer(module: torch.nn.Module) -> bool:
    attention = _attention_blocks(module)
    inside = {id(parameter) for block in attention for parameter in block.parameters()}
    outside = [
        name
        for name, parameter in module.named_parameters()
        if id(parameter) not in inside and parameter.dim() > 1 and not _is_norm(module, name)
    ]
    return bool(attention) and len(outside) >= 2


def _attention_blocks(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """The children of a layer that hold query, key and value; plain containers are looked into."""
    import torch

    blocks = []
    for child in layer.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)):
            blocks += _attention_blocks(child)
        else:
            roles = {_attention_role(name) for name, _ in child.named_parameters()}
            if "qkv" in roles or {"query", "key", "value"} <= roles:
                blocks.append(child)
    return blocks


def _is_norm(module: torch.nn.Module, name: str) -> bool:
    """Whether the parameter of that name in `module` is a normalisation's."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return "norm" in type(owner).__name__.lower()


def _last_word(name: str) -> str:
    """`attention.self.query.weight` -> `query`; the raw parameter `rel_attn.q` -> `q`."""
    words = name.lower().split(".")
    return words[-2] if words[-1] in ("weight", "bias") and len(words) > 1 else words[-1]


def _attention_role(name: str) -> str | None:
    word = _last_word(name)
    return next((role for role, pattern in _WORDS.items() if pattern.match(word)), None)


def parse_level(value: Any) -> float:
    """A level, the corrupted fraction of the layers, as a float in (0, 1]; of text such as "1/6" or
    "0.5" too."""
    allowed = "a level is a fraction above 0 and at most 1, such as 0.5 or 1/6"
    try:
        if isinstance(value, bool):
            raise TypeError
        level = float(Fraction(value.strip()) if isinstance(value, str) else value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise HealingError(f"level {value!r} is not a number; {allowed}") from None
    if not 0 < level <= 1:
        raise HealingError(f"level {value!r} is out of range; {allowed}")
    return level


def parse_layers(value: Any) -> tuple[int, ...] | None:
    """Layer indices as a sorted tuple of distinct ints, or None where none are named.

    Takes None, an int, a list of ints, or the text of one of these ("[0,2]", "0,2", "3", "none").
    """
    given = value
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("", "none", "null"):
            return None
        inner = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
        try:
            value = json.loads(f"[{inner.strip().rstrip(',')}]")
        except json.JSONDecodeError:
            value = [text]
    if value is None:
        return None
    values = list(value) if isinstance(value, Iterable) else [value]
    try:
        if any(isinstance(one, bool) for one in values):
            raise TypeError
        indices = [operator.index(one) for one in values]
    except TypeError:
        raise HealingError(
            f"layers {given!r} is not a list of whole numbers such as [0, 2]"
        ) from None
    if not indices:
        raise HealingError("layers is an empty list: name at least one layer, or leave it out")
    if len(set(indices)) < len(indices):
        raise HealingError(f"layers {given!r} names a layer twice")
    return tuple(sorted(indices))


def resolve_layers(
    n_layers: int, side: str = "bottom", level: float | str = 0.5,
    layers: Sequence[int] | str | None = None, seed: int = 0,
) -> tuple[int, ...]:  # fmt: skip
    """The 0-based indices, ascending, of the layers that a plan stands for.

    `level` of `n_layers` is rounded half up to whole layers (a quarter of 6 is 2), counted from the
    input (`bottom`) or from the output (`top`). `layers` overrides both. Of the controls, `random`
    draws as many layers from `seed`, about half of them from each side and never the bottom or the
    top ones; `scattered` means all layers, of whose values the level is a share. Raises
    HealingError for an unknown side, a level that rounds to no layer, and layers out of range.
    """
    named = parse_layers(layers)
    if named is not None:
        for index in named:
            if not 0 <= index < n_layers:
                raise HealingError(
                    f"layer {index} does not exist: the encoder has layers 0 to {n_layers - 1}"
                )
        return named
    choose(side, (*SIDES, *CONTROLS), "side")
    # A float such as 1/6 or 0.15 stands for the fraction that a person wrote: a half stays a half.
    fraction = Fraction(parse_level(level)).limit_denominator(10_000)
    count = math.floor(fraction * n_layers + Fraction(1, 2))
    if count == 0:
        raise HealingError(
            f"level {level!r} of {n_layers} layers rounds to no layer at all; "
            f"the smallest level here is {1 / (2 * n_layers):.3g}"
        )
    if side == "random":
        return _random_layers(n_layers, count, seed)
    if side == "scattered":
        return tuple(range(n_layers))
    return tuple(range(count)) if side == "bottom" else tuple(range(n_layers - count, n_layers))


def _random_layers(n_layers: int, count: int, seed: int) -> tuple[int, ...]:
    """`count` layers, about half of them from each half of the stack, neither its lowest ones nor
    its highest ones, but for all of them."""
    everything = tuple(range(n_layers))
    if count == n_layers:
        return everything
    if n_layers < 3:
        raise HealingError(f"of {n_layers} layers any {count} is the bottom or the top one")
    lower, upper = everything[: n_layers // 2], everything[n_layers // 2 :]
    rng = random.Random(f"layers:{seed}")
    while True:
        low = count // 2 + (rng.randrange(2) if count % 2 else 0)
        low = min(max(low, count - len(upper)), len(lower))
        chosen = tuple(sorted(rng.sample(lower, low) + rng.sample(upper, count - low)))
        if chosen not in (everything[:count], everything[-count:]):
            return chosen
