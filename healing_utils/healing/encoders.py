"""Find the layers of a transformer encoder, and the parts of a layer, by the role they play.

Nothing here knows a model class by name. A *layer* is recognised by what it holds, a *stack* is a
`torch.nn.ModuleList` of layers, and the *role* of a parameter follows from its place in the layer,
its module's type and the last word of its name (`query`, `q_lin`, `q_proj` and `q` all say the same
thing). The rules stand in `encoder_parts`.

Torch is imported only inside the functions that are handed a model, so that levels and layers of a
plan can be resolved without it.
"""

from __future__ import annotations

import json
import math
import operator
import random
import re
from collections.abc import Iterable, Iterator, Sequence
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
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "attention_output": ("attention_output",),
    "feed_forward": ("feed_forward",),
    "layernorm": ("layernorm",),
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
    """A parameter of a layer, or some rows of one, and the role it plays.

    `name` is relative to the layer; `role` is one of ``PARTS["all"]`` or `OUTER_PARTS`; `is_bias`
    tells a bias from a weight; `rows` is None for the whole parameter, else the rows (first axis)
    meant.
    """

    name: str
    role: str
    is_bias: bool
    rows: slice | None = None


# --- Finding the stack and the parts --------------------------------------------------------------


def encoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The encoder's layers, in the order in which they run, with or without a task head on top.

    The model is searched for a `ModuleList` in which every member is a layer, that is, has

    * an attention block: a child that holds query, key and value projections (or one fused
      projection),
    * a feed-forward block: at least two weight matrices outside the attention block.

    Raises HealingError where there is no such stack, where there are several (an encoder-decoder),
    where layers share their weights (ALBERT: one cannot be corrupted without the others), and where
    a layer holds something whose role cannot be told.
    """
    return list(_stack(model))


def layer_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every parameter of the encoder's layers by a name that does not depend on the head.

    Names are ``layer.<index>.<name inside the layer>``, such as
    ``layer.0.attention.self.query.weight``, the same for `AutoModel` and
    `AutoModelForSequenceClassification` of one checkpoint. Embeddings, pooler, heads and what a
    family keeps beside its stack (DeBERTa's convolution and relative embedding, MPNet's relative
    attention bias) are not in it.
    """
    return {
        f"layer.{index}.{name}": parameter
        for index, layer in enumerate(encoder_layers(model))
        for name, parameter in layer.named_parameters()
    }


def encoder_parts(layer: torch.nn.Module) -> list[Piece]:
    """One `Piece` per parameter of a layer, saying its role. How a role is found:

    1. `layernorm`: the parameter's module is a normalisation, by type or by the word norm in its
       type.
    2. The attention block is the one child of the layer (looking through containers) that holds
       query, key and value. Inside it the last word of the name decides: q, query, q_lin,
       query_proj, ...; a fused projection is `qkv`; o, out, dense, Wo, ... is `attention_output`;
       r, pos, rel, seg is `position`.
    3. `feed_forward`: everything outside the attention block.

    A parameter is a bias if its name ends in "bias", whatever its shape (XLNet's are 2-D).
    Raises HealingError for two attention blocks (cross-attention, so a decoder), and for a
    parameter of the attention block whose name says nothing known.
    """
    attention = [child for _, child in _blocks(layer) if _holds_attention(child)]
    if not attention:
        raise HealingError(
            f"{type(layer).__name__} holds no query, key and value: not an encoder layer"
        )
    if len(attention) > 1:
        raise HealingError(
            f"{type(layer).__name__} holds {len(attention)} attention blocks (cross-attention?): "
            "only the layers of an encoder can be corrupted"
        )
    inside = {id(parameter) for parameter in attention[0].parameters()}
    pieces = []
    for name, owner, parameter in _owned_parameters(layer):
        if _is_norm(owner):
            role = "layernorm"
        elif id(parameter) in inside:
            role = _attention_role(name)
            if role is None:
                raise HealingError(
                    f"cannot tell the role of {name!r} in the attention block of "
                    f"{type(layer).__name__}: not query, key, value, output or position by name"
                )
        else:
            role = "feed_forward"
        pieces.append(Piece(name, role, is_bias=name.endswith("bias")))
    return pieces


def part_pieces(layer: torch.nn.Module, part: str = "all") -> list[Piece]:
    """The pieces of a layer that `part` (a key of `PARTS`) stands for.

    Where query, key and value are fused and their layout is known (ModernBERT's Wqkv: three equal
    blocks of rows), asking for one gives a Piece with `rows`; with an unknown layout it raises
    HealingError. The list is empty where a layer lacks the part.
    """
    roles = PARTS[choose(part, PARTS, "part of a layer")]
    pieces = []
    for piece in encoder_parts(layer):
        if piece.role in roles:
            pieces.append(piece)
        elif piece.role == "qkv" and part in ("query", "key", "value"):
            if not _THIRDS.search(_last_word(piece.name).lower()):
                raise HealingError(
                    f"{piece.name!r} holds query, key and value in a layout that is not known, "
                    f"so part {part!r} cannot be separated; use part 'attention'"
                )
            third = layer.get_parameter(piece.name).shape[0] // 3
            start = ("query", "key", "value").index(part) * third
            pieces.append(Piece(piece.name, part, piece.is_bias, slice(start, start + third)))
    return pieces


def outer_parts(
    model: torch.nn.Module, part: str
) -> list[tuple[str, torch.nn.Module, list[Piece]]]:
    """(name, module, its pieces) of what `part`, one of `OUTER_PARTS`, stands for.

    `embeddings` are the modules beside the stack that turn ids into the first layer's input: word,
    position and type tables, their normalisation, ELECTRA's projection. `pooler` is a module of
    that name. Names do not depend on the head. Raises HealingError where a model has no such part.
    """
    stack = _stack(model)
    kind = type(model).__name__
    paths = {id(module): name for name, module in model.named_modules()}
    if choose(part, OUTER_PARTS, "part") == "pooler":
        found = [
            ("pooler", module)
            for name, module in model.named_modules()
            if name.split(".")[-1] == "pooler" and any(True for _ in module.parameters())
        ]
        if not found:
            raise HealingError(
                f"{kind} has no pooler: its head reads the last layer through weights of its own"
            )
        return [(name, module, _outer_pieces(module, part)) for name, module in found]
    words = paths[id(model.get_input_embeddings())].split(".")
    path = paths[id(stack)].split(".")
    depth = next(i for i, (a, b) in enumerate(zip(words, path, strict=False)) if a != b)
    encoder = model.get_submodule(".".join(words[:depth]))
    return [
        (name, child, _outer_pieces(child, part))
        for name, child in encoder.named_children()
        if "embed" in name and any(True for _ in child.parameters())
    ]


def _outer_pieces(module: torch.nn.Module, part: str) -> list[Piece]:
    return [
        Piece(name, "layernorm" if _is_norm(owner) else part, is_bias=name.endswith("bias"))
        for name, owner, _ in _owned_parameters(module)
    ]


def _stack(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's only stack of layers; see `encoder_layers` for what is refused."""
    import torch

    kind = type(model).__name__
    if not isinstance(model, torch.nn.Module):
        raise HealingError(f"expected a torch model, got {kind}")
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) and all(map(_is_layer, module))
    ]
    if not stacks:
        raise HealingError(
            f"{kind} has no stack of encoder layers: no ModuleList whose every member holds query, "
            "key and value projections and a feed-forward block"
        )
    found = sum(len(stack) for _, stack in stacks)
    configs = (getattr(module, "config", None) for module in model.modules())
    planned = next((c.num_hidden_layers for c in configs if hasattr(c, "num_hidden_layers")), None)
    if planned is not None and found < planned:
        raise HealingError(
            f"{kind} runs {planned} layers on the weights of {found}: layers that share weights, "
            "as in ALBERT, cannot be corrupted one without the other"
        )
    if len(stacks) > 1:
        listed = ", ".join(f"{name} ({len(stack)} layers)" for name, stack in stacks)
        raise HealingError(f"{kind} has several stacks of layers, not one encoder: {listed}")
    if planned is not None and found != planned:
        raise HealingError(f"{kind} holds {found} layers, but its configuration says {planned}")
    stack = stacks[0][1]
    _refuse_shared(model, stack)
    for layer in stack:
        encoder_parts(layer)
    return stack


def _refuse_shared(model: torch.nn.Module, stack: torch.nn.ModuleList) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for parameter in stack.parameters():
        shared = names[id(parameter)]
        if len(shared) > 1:
            raise HealingError(
                f"{type(model).__name__} shares one parameter as {' and '.join(shared[:2])}: "
                "layers that share weights cannot be corrupted one without the other"
            )


def _is_layer(module: torch.nn.Module) -> bool:
    attention = [child for _, child in _blocks(module) if _holds_attention(child)]
    inside = {id(parameter) for child in attention for parameter in child.parameters()}
    outside = [
        parameter
        for _, owner, parameter in _owned_parameters(module)
        if id(parameter) not in inside and parameter.dim() > 1 and not _is_norm(owner)
    ]
    return bool(attention) and len(outside) >= 2


def _blocks(layer: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The children of a layer, with those of plain containers in the container's place."""
    import torch

    for name, child in layer.named_children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)):
            yield from _blocks(child)
        else:
            yield name, child


def _holds_attention(block: torch.nn.Module) -> bool:
    roles = {_attention_role(name) for name, _, _ in _owned_parameters(block)}
    return "qkv" in roles or {"query", "key", "value"} <= roles


def _owned_parameters(
    module: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    """(name inside `module`, the submodule that owns it, parameter)."""
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            yield f"{path}.{name}" if path else name, owner, parameter


def _is_norm(module: torch.nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _last_word(name: str) -> str:
    """`attention.self.query.weight` -> `query`; the raw parameter `rel_attn.q` -> `q`."""
    words = name.split(".")
    return words[-2] if words[-1] in ("weight", "bias") and len(words) > 1 else words[-1]


def _attention_role(name: str) -> str | None:
    word = _last_word(name).lower()
    return next((role for role, pattern in _WORDS.items() if pattern.match(word)), None)


# --- Resolving side, level and layers -------------------------------------------------------------


def parse_level(value: Any) -> float:
    """A level, the corrupted fraction of the layers, as a float in (0, 1].

    Text such as "1/6" or "0.5" is understood; anything else raises HealingError.
    """
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
    Raises HealingError for anything else; whether they are in range is up to `resolve_layers`.
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
    values = value if isinstance(value, Iterable) else [value]
    try:
        indices = [_index(one) for one in values]
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
    n_layers: int,
    side: str = "bottom",
    level: float | str = 0.5,
    layers: Sequence[int] | str | None = None,
    seed: int = 0,
) -> tuple[int, ...]:
    """The 0-based indices, ascending, of the layers that a plan stands for.

    `level` of `n_layers` is rounded half up to whole layers (a quarter of 6 is 2), counted from the
    input (`bottom`) or from the output (`top`); level 1 gives all layers. `layers` overrides both.
    Of the controls, `random` draws as many layers from `seed`, the same in every process, about
    half of them from each side and never the bottom or the top ones; `scattered` means all layers,
    of whose values the level is a share.
    Raises HealingError for an unknown side, a level that rounds to no layer, and layers out of
    range.
    """
    named = parse_layers(layers)
    if named is not None:
        outside = [index for index in named if not 0 <= index < n_layers]
        if outside:
            raise HealingError(
                f"layer {outside[0]} does not exist: the encoder has layers 0 to {n_layers - 1}"
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


def _index(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)
